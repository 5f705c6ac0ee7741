"""The Triton kernels of `soft_cross_entropy`; `triton.py` launches them.

Letters: N rows, K columns; a tile has BLOCK_N rows and BLOCK_K columns.
"""

import math

import triton
from triton import language as tl

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def column_of(pointer, row, inside, K):
    """(column, whether it may be read) of each row; one out of range is never read."""
    column = tl.load(pointer + row, mask=inside, other=-1)  # narrow: one number per row
    return column, (column >= 0) & (column < K)


@triton.jit
def _targets(
    row_ptr, first_ptr, second_ptr, weight_ptr, row, inside, peak, K, stride_k,
):  # fmt: skip
    """Columns, weights and half gaps of the two target logits (see `losses.half_gaps`)."""
    first, first_valid = column_of(first_ptr, row, inside, K)
    second, second_valid = column_of(second_ptr, row, inside, K)
    weight = tl.load(weight_ptr + row, mask=inside, other=0).to(tl.float32)  # narrow: one number per row
    z_first = tl.load(row_ptr + first * stride_k, mask=first_valid, other=0).to(tl.float32)  # narrow: gather
    z_second = tl.load(row_ptr + second * stride_k, mask=second_valid, other=0).to(tl.float32)  # narrow: gather
    w_first = tl.where(first_valid, weight, 0.0)
    w_second = tl.where(second_valid, 1.0 - weight, 0.0)
    return first, second, w_first, w_second, 0.5 * peak - 0.5 * z_first, 0.5 * peak - 0.5 * z_second


@triton.jit
def _mixture(w_first, w_second, half_first, half_second):
    """(half of -log(w_first e^-gap_first + w_second e^-gap_second), what the posterior draws to first, and to second)."""
    # The gaps are subtracted first: each may be so large that a logarithm added to it leaves no trace.
    both = (w_first > 0.0) & (w_second > 0.0)
    odds = tl.where(both, tl.log(w_first) - tl.log(w_second), 0.0) + 2.0 * (half_second - half_first)
    small = tl.where(both, tl.exp2(-tl.abs(odds) * _LOG2E), 0.0)
    larger, smaller = 1.0 / (1.0 + small), small / (1.0 + small)
    at_first = tl.where(both, tl.where(odds >= 0.0, larger, smaller), (w_first > 0.0).to(tl.float32))
    at_second = tl.where(both, tl.where(odds >= 0.0, smaller, larger), (w_second > 0.0).to(tl.float32))
    near = tl.minimum(half_first - 0.5 * tl.log(w_first), half_second - 0.5 * tl.log(w_second))
    return near - 0.5 * tl.log(1.0 + small), at_first, at_second


@triton.jit(do_not_specialize=["N", "groups", "stride_n", "stride_k"])
def soft_cross_entropy_forward_kernel(
    logits_ptr, first_ptr, second_ptr, weight_ptr, loss_ptr, stats_ptr, N, groups, stride_n, stride_k, smoothing, per_k,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, MIXTURE: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Losses, largest logits and sums of exponentials (relative to them) of BLOCK_N rows.

    Columns and row stride come in groups of ALIGN, which is how the compiler learns what they are multiples of.
    UNIT: neighbours in a row are neighbours in memory. per_k: 1 / K.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    K = groups * ALIGN
    if UNIT:
        row_ptr = logits_ptr + row * (stride_n.to(tl.int64) * ALIGN)
        step = tl.full([], 1, tl.int32)
    else:
        row_ptr = logits_ptr + row * stride_n.to(tl.int64)
        step = stride_k.to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    shift = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    depth = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = inside[:, None] & (start + column < K)[None, :]
        offset = start + column if UNIT else (start + column) * step
        z = tl.load(row_ptr[:, None] + offset[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, 1))
        # A block may hold nothing but minus infinity.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrunk = tl.exp2((peak - base) * _LOG2E)
        total = tl.fma(total, shrunk[:, None], tl.exp2((z - base[:, None]) * _LOG2E))
        peak = higher
        if SMOOTH:
            # The mean is taken of differences, so that a common offset costs no digits, and of halves, which cannot
            # overflow.
            shift = tl.where(start == 0, base, shift)
            depth += tl.where(mask, (0.5 * shift[:, None] - 0.5 * z) * per_k, 0.0)
    sums = tl.sum(total, 1)
    log_sum = tl.log(sums)
    _, _, w_first, w_second, half_first, half_second = _targets(
        row_ptr, first_ptr, second_ptr, weight_ptr, row, inside, peak, K, step
    )
    # The share of the target goes in before the halves are doubled: what overflows is not representable.
    unsmoothed = 1.0 - smoothing if SMOOTH else 1.0
    if MIXTURE:
        half, _, _ = _mixture(w_first, w_second, half_first, half_second)
        loss = (0.5 * log_sum + half) * (2.0 * unsmoothed)
    else:
        # A column of weight 0 has no say, not even where its logit is minus infinity.
        loss = log_sum * (unsmoothed * (w_first + w_second))
        loss += tl.where(w_first > 0.0, half_first * (2.0 * unsmoothed * w_first), 0.0)
        loss += tl.where(w_second > 0.0, half_second * (2.0 * unsmoothed * w_second), 0.0)
    # No loss is negative; a comparison that keeps NaN.
    loss = tl.where(loss < 0.0, 0.0, loss)
    if SMOOTH:
        below = (0.5 * peak - 0.5 * shift) + tl.sum(depth, 1)
        loss += smoothing * log_sum + (2.0 * smoothing) * below
    tl.store(loss_ptr + row, loss, mask=inside)  # narrow: one number per row
    tl.store(stats_ptr + row, peak, mask=inside)  # narrow: one number per row
    tl.store(stats_ptr + N + row, sums, mask=inside)  # narrow: one number per row


@triton.jit(do_not_specialize=["N", "groups", "stride_n", "stride_k", "stride_grad"])
def soft_cross_entropy_backward_kernel(
    grad_ptr, logits_ptr, stats_ptr, first_ptr, second_ptr, weight_ptr, out_ptr, N, groups, stride_n, stride_k,
    stride_grad, smoothing, per_k, ALIGN: tl.constexpr, UNIT: tl.constexpr, MIXTURE: tl.constexpr,
    SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of BLOCK_N rows and BLOCK_K columns; arguments as in the forward kernel."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row < N
    K = groups * ALIGN
    if UNIT:
        row_ptr = logits_ptr + row * (stride_n.to(tl.int64) * ALIGN)
        step = tl.full([], 1, tl.int32)
    else:
        row_ptr = logits_ptr + row * stride_n.to(tl.int64)
        step = stride_k.to(tl.int64)
    mask = inside[:, None] & (column < K)[None, :]
    offset = column if UNIT else column * step
    z = tl.load(row_ptr[:, None] + offset[None, :], mask=mask, other=0).to(tl.float32)
    peak = tl.load(stats_ptr + row, mask=inside, other=0)  # narrow: one number per row
    sums = tl.load(stats_ptr + N + row, mask=inside, other=1)  # narrow: one number per row
    grad = tl.load(grad_ptr + row * stride_grad, mask=inside, other=0).to(tl.float32)  # narrow: one number per row
    first, second, w_first, w_second, half_first, half_second = _targets(
        row_ptr, first_ptr, second_ptr, weight_ptr, row, inside, peak, K, step
    )
    if MIXTURE:
        _, w_first, w_second = _mixture(w_first, w_second, half_first, half_second)
    unsmoothed = grad * (1.0 - smoothing) if SMOOTH else grad
    total = unsmoothed * (w_first + w_second)
    if SMOOTH:
        total += grad * smoothing
    # Divided by the sum itself: its logarithm in an exponent would cost digits.
    out = (total / sums)[:, None] * tl.exp2((z - peak[:, None]) * _LOG2E)
    if SMOOTH:
        out -= (grad * smoothing * per_k)[:, None]
    out -= tl.where(column[None, :] == first[:, None], (unsmoothed * w_first)[:, None], 0.0)
    out -= tl.where(column[None, :] == second[:, None], (unsmoothed * w_second)[:, None], 0.0)
    place = out_ptr + (row * K)[:, None] + column[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=mask)
