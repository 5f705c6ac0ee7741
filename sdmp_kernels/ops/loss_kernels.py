"""The Triton kernels that the losses share; `loss_launches.py` launches them."""

import triton
from triton import language as tl


@triton.jit(do_not_specialize=["N", "groups", "period", "stride_up", "tiles"])
def loss_multiply_kernel(
    gradient_ptr, up_ptr, correction_ptr, out_ptr, N, groups, period, stride_up, tiles, ALIGN: tl.constexpr,
    CORRECTED: tl.constexpr, PER_ROW: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient (N, K) times its upstream factor, and the correction; where that is 1, in place, nothing at all.

    PER_ROW: a factor for every row, again after `period` rows. K comes in groups of ALIGN.
    """
    correction = 1.0
    if CORRECTED:
        correction = tl.load(correction_ptr)
    K = groups * ALIGN
    first = tl.program_id(0)
    factor = 1.0
    if not PER_ROW:
        factor = tl.load(up_ptr).to(tl.float32) * correction
        if IN_PLACE:
            first = tl.where(factor == 1.0, tiles, first)
    for tile in range(first, tiles, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < N
        if PER_ROW:
            place = row % period * stride_up
            by = tl.load(up_ptr + place, mask=inside, other=1).to(tl.float32) * correction  # narrow: one per row
        else:
            by = tl.zeros([BLOCK_N], tl.float32) + factor
        # A row whose factor is 1 stays as it is.
        wanted = inside & (by != 1.0) if IN_PLACE else inside
        place = row * (groups.to(tl.int64) * ALIGN)
        for start in range(0, K, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            mask = wanted[:, None] & (column < K)[None, :]
            at = place[:, None] + column[None, :]
            values = tl.load(gradient_ptr + at, mask=mask, other=0).to(tl.float32) * by[:, None]
            tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=mask)
