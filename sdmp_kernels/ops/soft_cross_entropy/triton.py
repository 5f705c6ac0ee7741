"""`soft_cross_entropy` on a GPU: one read of the logits for the loss; one read and one write for the gradient.

A program of the forward pass owns a tile of rows and walks along their columns with a running maximum and sum; rows
of few columns share a program. The gradient needs nothing but each element, its row's peak and sum, and the two target
columns, so that its programs are tiles of the matrix.

Bytes and floors (8,192 x 65,536 bf16, an H200 copying 4.3 TB/s): loss 1.07 GB, 250 us; gradient 2.15 GB, 500 us.
"""

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

from sdmp_kernels import _launch
from sdmp_kernels._launch import Call, Compile

KERNELS = ("soft_cross_entropy_forward_kernel", "soft_cross_entropy_backward_kernel")
_LOG2E = tl.constexpr(math.log2(math.e))
# Columns from which a row has programs of its own and more warps.
_WIDE = 2048


@triton.jit
def column_of(pointer, row, inside, K):
    """(column, whether it may be read) of each row; one out of range is never read."""
    column = tl.load(pointer + row, mask=inside, other=-1)  # narrow: one number per row
    return column, (column >= 0) & (column < K)


@triton.jit
def _targets(
    row_ptr, first_ptr, second_ptr, weight_ptr, row, inside, peak, K, stride_k,
):  # fmt: skip
    """Columns, weights and half gaps of the two target logits (see `target.half_gap`)."""
    first, first_valid = column_of(first_ptr, row, inside, K)
    second, second_valid = column_of(second_ptr, row, inside, K)
    weight = tl.load(weight_ptr + row, mask=inside, other=0).to(tl.float32)  # narrow: one number per row
    z_first = tl.load(row_ptr + first * stride_k, mask=first_valid, other=0).to(tl.float32)  # narrow: gather
    z_second = tl.load(row_ptr + second * stride_k, mask=second_valid, other=0).to(tl.float32)  # narrow: gather
    own = tl.where(first_valid, weight, 0.0)
    other = tl.where(second_valid, 1.0 - weight, 0.0)
    return first, second, own, other, 0.5 * peak - 0.5 * z_first, 0.5 * peak - 0.5 * z_second


@triton.jit
def _mixture(own, other, half_first, half_second):
    """(half of -log(own e^-gap_first + other e^-gap_second), what the posterior draws to first, and to second)."""
    # The gaps are subtracted first: each may be so large that a logarithm added to it leaves no trace.
    both = (own > 0.0) & (other > 0.0)
    odds = tl.where(both, tl.log(own) - tl.log(other), 0.0) + 2.0 * (half_second - half_first)
    small = tl.where(both, tl.exp2(-tl.abs(odds) * _LOG2E), 0.0)
    larger, smaller = 1.0 / (1.0 + small), small / (1.0 + small)
    at_first = tl.where(both, tl.where(odds >= 0.0, larger, smaller), (own > 0.0).to(tl.float32))
    at_second = tl.where(both, tl.where(odds >= 0.0, smaller, larger), (other > 0.0).to(tl.float32))
    near = tl.minimum(half_first - 0.5 * tl.log(own), half_second - 0.5 * tl.log(other))
    return near - 0.5 * tl.log(1.0 + small), at_first, at_second


@triton.jit(do_not_specialize=["N", "groups", "stride_n", "stride_k"])
def soft_cross_entropy_forward_kernel(
    logits_ptr, first_ptr, second_ptr, weight_ptr, loss_ptr, rows_ptr, N, groups, stride_n, stride_k, smoothing, per_k,
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
        kept = tl.exp2((peak - base) * _LOG2E)
        total = tl.fma(total, kept[:, None], tl.exp2((z - base[:, None]) * _LOG2E))
        peak = higher
        if SMOOTH:
            # The mean is taken of differences, so that a common offset costs no digits, and of halves, which cannot
            # overflow.
            shift = tl.where(start == 0, base, shift)
            depth += tl.where(mask, (0.5 * shift[:, None] - 0.5 * z) * per_k, 0.0)
    sums = tl.sum(total, 1)
    log_sum = tl.log(sums)
    _, _, own, other, half_first, half_second = _targets(
        row_ptr, first_ptr, second_ptr, weight_ptr, row, inside, peak, K, step
    )
    # The share of the target goes in before the halves are doubled: what overflows is not representable.
    kept = 1.0 - smoothing if SMOOTH else 1.0
    if MIXTURE:
        half, _, _ = _mixture(own, other, half_first, half_second)
        loss = (0.5 * log_sum + half) * (2.0 * kept)
    else:
        # A column of weight 0 has no say, not even where its logit is minus infinity.
        loss = log_sum * (kept * (own + other))
        loss += tl.where(own > 0.0, half_first * (2.0 * kept * own), 0.0)
        loss += tl.where(other > 0.0, half_second * (2.0 * kept * other), 0.0)
    # No loss is negative; a comparison that keeps NaN.
    loss = tl.where(loss < 0.0, 0.0, loss)
    if SMOOTH:
        below = (0.5 * peak - 0.5 * shift) + tl.sum(depth, 1)
        loss += smoothing * log_sum + (2.0 * smoothing) * below
    tl.store(loss_ptr + row, loss, mask=inside)  # narrow: one number per row
    tl.store(rows_ptr + row, peak, mask=inside)  # narrow: one number per row
    tl.store(rows_ptr + N + row, sums, mask=inside)  # narrow: one number per row


@triton.jit(do_not_specialize=["N", "groups", "stride_n", "stride_k", "stride_grad"])
def soft_cross_entropy_backward_kernel(
    grad_ptr, logits_ptr, rows_ptr, first_ptr, second_ptr, weight_ptr, out_ptr, N, groups, stride_n, stride_k,
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
    peak = tl.load(rows_ptr + row, mask=inside, other=0)  # narrow: one number per row
    sums = tl.load(rows_ptr + N + row, mask=inside, other=1)  # narrow: one number per row
    grad = tl.load(grad_ptr + row * stride_grad, mask=inside, other=0).to(tl.float32)  # narrow: one number per row
    first, second, own, other, half_first, half_second = _targets(
        row_ptr, first_ptr, second_ptr, weight_ptr, row, inside, peak, K, step
    )
    if MIXTURE:
        _, own, other = _mixture(own, other, half_first, half_second)
    kept = grad * (1.0 - smoothing) if SMOOTH else grad
    total = kept * (own + other)
    if SMOOTH:
        total += grad * smoothing
    # Divided by the sum itself: its logarithm in an exponent would cost digits.
    out = (total / sums)[:, None] * tl.exp2((z - peak[:, None]) * _LOG2E)
    if SMOOTH:
        out -= (grad * smoothing * per_k)[:, None]
    out -= tl.where(column[None, :] == first[:, None], (kept * own)[:, None], 0.0)
    out -= tl.where(column[None, :] == second[:, None], (kept * other)[:, None], 0.0)
    place = out_ptr + (row * K)[:, None] + column[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=mask)


def forward(
    logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, label_smoothing: float, form: str
) -> tuple[Tensor, Tensor]:
    """(loss, rows) as `reference.forward`."""
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    rows = logits.new_empty((2, logits.shape[0]), dtype=torch.float32)
    arch = _launch.architecture(logits.device)
    target = (first.contiguous(), second.contiguous(), weight.contiguous())
    forward_call(arch, logits, *target, label_smoothing, form, loss, rows).launch(logits.device)
    return loss, rows


def backward(
    grad: Tensor,
    logits: Tensor,
    rows: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
) -> Tensor:
    """(N, K) gradient as `reference.backward`."""
    out = logits.new_empty(logits.shape)
    arch = _launch.architecture(logits.device)
    target = (first.contiguous(), second.contiguous(), weight.contiguous())
    backward_call(arch, grad, logits, rows, *target, label_smoothing, form, out).launch(logits.device)
    return out


def forward_call(
    arch: str,
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
    loss: Tensor,
    rows: Tensor,
) -> Call:
    """The launch of the forward kernel."""
    sizes, constants = _layout(logits, label_smoothing, form)
    warps = _tile(arch, "forward", logits, constants)
    tiles = triton.cdiv(logits.shape[0], constants["BLOCK_N"])
    args = (logits, first, second, weight, loss, rows, *sizes, label_smoothing, 1 / logits.shape[1])
    return Call(soft_cross_entropy_forward_kernel, (tiles,), args, warps, 1, constants)


def backward_call(
    arch: str,
    grad: Tensor,
    logits: Tensor,
    rows: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
    out: Tensor,
) -> Call:
    """The launch of the backward kernel."""
    sizes, constants = _layout(logits, label_smoothing, form)
    warps = _tile(arch, "backward", logits, constants)
    grid = tuple(triton.cdiv(n, constants[b]) for n, b in zip(logits.shape, ("BLOCK_N", "BLOCK_K"), strict=True))
    args = (grad, logits, rows, first, second, weight, out, *sizes, grad.stride(0), label_smoothing)
    return Call(soft_cross_entropy_backward_kernel, grid, (*args, 1 / logits.shape[1]), warps, 1, constants)


def _layout(logits: Tensor, label_smoothing: float, form: str) -> tuple[tuple[int, ...], dict[str, object]]:
    """(N, groups, stride_n, stride_k) and the constants that say how the logits lie in memory."""
    n, k = logits.shape
    stride_n, stride_k = logits.stride()
    unit = stride_k == 1 or k == 1
    align = math.gcd(k, stride_n, 16) if unit else math.gcd(k, 16)
    sizes = (n, k // align, stride_n // align if unit else stride_n, stride_k)
    smooth = label_smoothing != 0
    return sizes, {"ALIGN": align, "UNIT": unit, "MIXTURE": form == "log_mixture", "SMOOTH": smooth}


def _tile(arch: str, kernel: str, logits: Tensor, constants: dict[str, object]) -> int:
    """Put the size of the tile into `constants`; the number of warps."""
    k = logits.shape[1]
    given = _launch.constants(arch, f"soft_cross_entropy.{kernel}.{'wide' if k >= _WIDE else 'narrow'}")
    width = min(max(16, triton.next_power_of_2(k)), given["elements"])
    constants |= {"BLOCK_N": given["elements"] // width, "BLOCK_K": width}
    return given["num_warps"]


def compiles(arch: str) -> list[Compile]:
    """Both kernels for every dtype, width, form and way the logits may lie."""
    f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    wide = [(f"{str(t)[6:]} 65536", t, 65536, "ce", 0.0, True) for t in (f16, bf16, f32)]
    others = [
        ("bfloat16 65536 log_mixture smoothed", bf16, 65536, "log_mixture", 0.1, True),
        ("bfloat16 1000 smoothed", bf16, 1000, "ce", 0.1, True),
        ("float32 1000 log_mixture", f32, 1000, "log_mixture", 0.0, True),
        ("float32 10", f32, 10, "ce", 0.1, True),
        ("bfloat16 1000 transposed", bf16, 1000, "ce", 0.0, False),
        ("float32 65537", f32, 65537, "ce", 0.0, True),
    ]
    found = []
    for name, dtype, k, form, smoothing, unit in wide + others:
        facts = ("no_spills", "wide_loads", "wide_stores") if k % 8 == 0 and unit else ("no_spills",)
        logits = torch.empty((64, k), dtype=dtype, device="meta")
        strided = logits if unit else logits.t().contiguous().t()
        column = torch.empty(64, dtype=torch.int64, device="meta")
        row = torch.empty(64, dtype=torch.float32, device="meta")
        rows = torch.empty((2, 64), dtype=torch.float32, device="meta")
        call = forward_call(arch, strided, column, column, row, smoothing, form, row, rows)
        # The forward pass stores one number a row.
        found.append(call.compilation(f"soft_cross_entropy forward {name}", [f for f in facts if f != "wide_stores"]))
        call = backward_call(arch, row, strided, rows, column, column, row, smoothing, form, logits)
        found.append(call.compilation(f"soft_cross_entropy backward {name}", facts))
    return found
