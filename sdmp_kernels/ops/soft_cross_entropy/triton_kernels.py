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
    row_ptr, first_ptr, second_ptr, weight_ptr, class_ptr, row, inside, peak, K, stride_k, ignored,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """(columns, weights and half gaps (see `losses.half_gaps`) of the two target logits, what the row counts).

    Weights are of what is left of the target and add up to 1, see `arguments.Rows`; of a row that does not count
    they are 0.
    """
    first, first_valid = column_of(first_ptr, row, inside, K)
    second, second_valid = column_of(second_ptr, row, inside, K)
    first_valid &= first != ignored
    second_valid &= second != ignored
    weight = tl.load(weight_ptr + row, mask=inside, other=0).to(tl.float32)  # narrow: one number per row
    z_first = tl.load(row_ptr + first * stride_k, mask=first_valid, other=0).to(tl.float32)  # narrow: gather
    z_second = tl.load(row_ptr + second * stride_k, mask=second_valid, other=0).to(tl.float32)  # narrow: gather
    at_first = tl.where(first_valid, weight, 0.0)
    at_second = tl.where(second_valid, 1.0 - weight, 0.0)
    if CLASSES:
        at_first *= tl.load(class_ptr + first, mask=first_valid, other=0).to(tl.float32)  # narrow: gather
        at_second *= tl.load(class_ptr + second, mask=second_valid, other=0).to(tl.float32)  # narrow: gather
        factor = at_first + at_second
        w_first = tl.where(factor > 0.0, at_first / factor, 0.0)
    else:
        # Not their sum where both are left: that may be 1 but for its last bit.
        factor = tl.where(first_valid & second_valid, 1.0, at_first + at_second)
        w_first = tl.where(second_valid, tl.where(first_valid, weight, 0.0), 1.0)
    counts = factor > 0.0
    w_second = tl.where(counts, 1.0 - w_first, 0.0)
    w_first = tl.where(counts, w_first, 0.0)
    return first, second, w_first, w_second, 0.5 * peak - 0.5 * z_first, 0.5 * peak - 0.5 * z_second, factor


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


# What kernels are not compiled anew for.
_FREE = ["N", "groups", "stride_n", "stride_k", "stride_up", "ignored", "tiles"]


@triton.jit(do_not_specialize=_FREE)
def soft_cross_entropy_sweep_kernel(
    logits_ptr, first_ptr, second_ptr, weight_ptr, class_ptr, up_ptr, correction_ptr, loss_ptr, factor_ptr, out_ptr, N,
    groups, stride_n, stride_k, stride_up, ignored, tiles, smoothing, per_k, scale, ALIGN: tl.constexpr,
    UNIT: tl.constexpr, MIXTURE: tl.constexpr, SMOOTH: tl.constexpr, CLASSES: tl.constexpr, LOSS: tl.constexpr,
    GRAD: tl.constexpr, UPSTREAM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Losses and what they count, and the gradient, of every so many-th tile of BLOCK_N rows.

    LOSS, GRAD: which of them are wanted. A gradient is `scale` times that of the sum of the losses; with UPSTREAM also
    times each row's upstream factor and the correction. A row is read twice by the same program, which finds it in the
    L2 cache: no more programs run than rows fit there. The gradient may go where the logits are.
    Columns and row stride come in groups of ALIGN, which is how the compiler learns what they are multiples of.
    UNIT: neighbours in a row are neighbours in memory. per_k: 1 / K.
    """
    K = groups * ALIGN
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < N
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
            if SMOOTH and LOSS:
                # The mean is taken of differences, so that a common offset costs no digits, and of halves, which
                # cannot overflow.
                shift = tl.where(start == 0, base, shift)
                depth += tl.where(mask, (0.5 * shift[:, None] - 0.5 * z) * per_k, 0.0)
        sums = tl.sum(total, 1)
        first, second, w_first, w_second, half_first, half_second, factor = _targets(
            row_ptr, first_ptr, second_ptr, weight_ptr, class_ptr, row, inside, peak, K, step, ignored, CLASSES
        )
        half, at_first, at_second = half_first, w_first, w_second
        if MIXTURE:
            half, at_first, at_second = _mixture(w_first, w_second, half_first, half_second)
        if LOSS:
            log_sum = tl.log(sums)
            # The share of the target goes in before the halves are doubled: what overflows is not representable.
            share = factor * (1.0 - smoothing) if SMOOTH else factor
            if MIXTURE:
                loss = tl.where(factor > 0.0, (0.5 * log_sum + half) * (2.0 * share), 0.0)
            else:
                # A column of weight 0 has no say, not even where its logit is minus infinity.
                loss = tl.where(factor > 0.0, log_sum * (share * (w_first + w_second)), 0.0)
                loss += tl.where(w_first > 0.0, half_first * (2.0 * share * w_first), 0.0)
                loss += tl.where(w_second > 0.0, half_second * (2.0 * share * w_second), 0.0)
            # No loss is negative; a comparison that keeps NaN.
            loss = tl.where(loss < 0.0, 0.0, loss)
            if SMOOTH:
                below = (0.5 * peak - 0.5 * shift) + tl.sum(depth, 1)
                loss += tl.where(factor > 0.0, factor * (smoothing * log_sum + (2.0 * smoothing) * below), 0.0)
            tl.store(loss_ptr + row, loss, mask=inside)  # narrow: one number per row
            tl.store(factor_ptr + row, factor, mask=inside)  # narrow: one number per row
        if GRAD:
            given = factor * scale
            if UPSTREAM:
                up = tl.load(up_ptr + row * stride_up, mask=inside, other=0).to(tl.float32)  # narrow: one per row
                given *= up * tl.load(correction_ptr)
            unsmoothed = given * (1.0 - smoothing) if SMOOTH else given
            height = unsmoothed * (at_first + at_second)
            if SMOOTH:
                height += given * smoothing
            # Divided by the sum itself: its logarithm in an exponent would cost digits.
            height = height / sums
            # What one warp has yet to gather of its targets, another must not overwrite.
            tl.debug_barrier()
            out_ptrs = out_ptr + row * (groups.to(tl.int64) * ALIGN)
            for start in range(0, K, BLOCK_K):
                here = start + column
                mask = inside[:, None] & (here < K)[None, :]
                offset = here if UNIT else here * step
                z = tl.load(row_ptr[:, None] + offset[None, :], mask=mask, other=0).to(tl.float32)
                out = height[:, None] * tl.exp2((z - peak[:, None]) * _LOG2E)
                if SMOOTH:
                    out -= (given * smoothing * per_k)[:, None]
                out -= tl.where(here[None, :] == first[:, None], (unsmoothed * at_first)[:, None], 0.0)
                out -= tl.where(here[None, :] == second[:, None], (unsmoothed * at_second)[:, None], 0.0)
                place = out_ptrs[:, None] + here[None, :]
                # Nobody reads it soon: rows that are to be read again stay in the cache.
                tl.store(place, out.to(out_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["N"])
def soft_cross_entropy_reduce_kernel(
    loss_ptr, factor_ptr, out_ptr, correction_ptr, N, scale, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """The losses added up in one order; MEAN: over what they count, and N over that, which corrects a gradient that
    has 1 / N in it. `scale` is 1 / N there: the mean of large losses is finite where their sum is not.
    """
    each = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        inside = start + each < N
        total += tl.load(loss_ptr + start + each, mask=inside, other=0) * scale
        if MEAN:
            counted += tl.load(factor_ptr + start + each, mask=inside, other=0)
    loss = tl.sum(total, 0)
    if MEAN:
        correction = N / tl.sum(counted, 0)
        loss *= correction
        tl.store(correction_ptr, correction)
    tl.store(out_ptr, loss)
