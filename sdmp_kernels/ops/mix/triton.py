"""`mix` on a GPU: one launch for a batch, whatever the rules of its rows.

An image is a few planes, each of them rows one after another: for contiguous images a plane is a channel, for
channels-last ones it is the whole image, its pixels holding their channels side by side. A program owns one chunk of
the planes of one image (all of them up to four: they share row, column and box), or, for the flip, of both images of a
pair: both are read once and both results written once, 16 bytes at a time where the planes are dense.

A RESIZEMIX row is copied first; then the programs write the part of the box that lies in their chunk over it, row by
row of the box, so that only box pixels pay for the four taps.

Bytes and floors (n = 1024 images of 3 x 224 x 224, an H200 copying 4.3 TB/s): bf16 to bf16 617 MB, 143 us, whatever
the rules; uint8 to normalised bf16 462 MB, 108 us; the same with `clean` 771 MB, 179 us. The taps of RESIZEMIX come out
of L1 and L2, since the grid is reading that very image; about 35 instructions per box pixel and channel are its cost.

Tuples that the functions below hand on: `where` (index in the plane, mask, row, position in the row, that of the first
of the group) of a chunk's elements, `plan` (rule, lam, top, left, height, width) of one row, `size` (H, W), `strides`
(row, column, channel) of one tensor; the last is used only where channels lie side by side.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from sdmp_kernels import _launch
from sdmp_kernels._launch import Compile
from sdmp_kernels.plan import Rule

KERNELS = ("mix_pair_kernel", "mix_gather_kernel", "mix_backward_pair_kernel", "mix_backward_gather_kernel")
# Numbers that change from call to call and must not make new kernels.
_FREE = ["rows", "sources", "units", "H", "W"]


# ---- where an element lies ----


@triton.jit
def _split(program, count, BLOCK: tl.constexpr, SHARES: tl.constexpr):
    """(row, share of its planes, chunk) of a program: the programs of a row run side by side, and so find each other's
    taps in the L2 cache.
    """
    # A program number has 31 bits, and so has the number of chunks of a plane; dividing in 64 would be dear.
    chunks = ((count + (BLOCK - 1)) // BLOCK).to(tl.uint32)
    outer = program.to(tl.uint32) // chunks
    chunk = program.to(tl.uint32) - outer * chunks
    return (outer // SHARES).to(tl.int64), (outer % SHARES).to(tl.int64), chunk.to(tl.int64)


@triton.jit
def _chunk(
    chunk, count, size, PER: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """`where` of a chunk, (BLOCK / GROUP, GROUP) elements, and its first and last row. GROUP neighbours share their
    row, which is divided out once for all of them. PER: elements of a pixel.
    """
    # Unsigned division takes half the instructions of signed.
    unsigned: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    signed: tl.constexpr = tl.int64 if WIDE else tl.int32
    length = (size[1] * PER).to(unsigned)
    start = chunk.to(signed) * BLOCK
    stop = tl.minimum(start + BLOCK, count)
    first = (start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP).to(unsigned)
    inner = tl.arange(0, GROUP)[None, :]
    row = first // length
    edge = (first - row * length).to(tl.int32)
    span = ((start.to(unsigned) // length).to(tl.int32), ((stop - 1).to(unsigned) // length).to(tl.int32))
    return (first.to(signed) + inner, first.to(signed) < count, row.to(tl.int32), edge + inner, edge), span


@triton.jit
def _divided(position, PER: tl.constexpr):
    """(pixel, channel) of a position in a row whose pixels hold PER elements."""
    pixel = (position.to(tl.uint32) // PER).to(tl.int32)
    return pixel, position - pixel * PER


@triton.jit
def _offset(where, strides, PER: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Elements from the start of the plane: the index itself where all tensors are dense and lie alike."""
    if FLAT:
        return where[0]
    else:
        kind: tl.constexpr = tl.int64 if WIDE else tl.int32
        pixel, channel = _divided(where[3], PER)
        return where[2].to(kind) * strides[0] + pixel.to(kind) * strides[1] + channel.to(kind) * strides[2]


@triton.jit
def _inside(where, plan, PER: tl.constexpr):
    """Which elements of the chunk are in the row's box."""
    _, _, row, position, _ = where
    _, _, top, left, height, width = plan
    in_rows = (row >= top) & (row < top + height)
    return in_rows & (position >= left * PER) & (position < (left + width) * PER)


@triton.jit
def _near(where, plan, PER: tl.constexpr, GROUP: tl.constexpr):
    """Which groups of the chunk reach into the row's box: one answer for all their members, so that loads stay wide."""
    _, _, row, _, edge = where
    _, _, top, left, height, width = plan
    in_rows = (row >= top) & (row < top + height)
    return in_rows & (edge + GROUP > left * PER) & (edge < (left + width) * PER)


# ---- what a row of the plan says ----


@triton.jit
def _plan_row(rule_ptr, lam_ptr, box_ptr, i, itself, size):
    """Rule (KEEP where nothing is to be done), lam and the box, kept within the image whatever the plan holds."""
    H, W = size
    lam = tl.load(lam_ptr + i)
    top = tl.minimum(tl.maximum(tl.load(box_ptr + 4 * i), 0), H)
    left = tl.minimum(tl.maximum(tl.load(box_ptr + 4 * i + 1), 0), W)
    height = tl.minimum(tl.maximum(tl.load(box_ptr + 4 * i + 2), 0), H - top)
    width = tl.minimum(tl.maximum(tl.load(box_ptr + 4 * i + 3), 0), W - left)
    rule = tl.load(rule_ptr + i).to(tl.int32)
    copied = (rule == 1) & ((lam == 1.0) | itself)
    empty = (rule >= 2) & ((height == 0) | (width == 0))
    return tl.where(copied | empty, 0, rule), lam, top, left, height, width


@triton.jit
def _unless_apart(plan, span):
    """The row's plan for a chunk of the rows `span`: KEEP where none of them is in the box."""
    rule, lam, top, left, height, width = plan
    apart = (span[1] < top) | (span[0] >= top + height)
    return tl.where((rule >= 2) & apart, 0, rule), lam, top, left, height, width


# ---- pixels ----


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """float32 to `dtype` with one rounding; uint8 to nearest, ties to even, NaN to 0."""
    if dtype == tl.uint8:
        # Adding 2^23 leaves the rounded integer in the low bits; comparing in this order sends NaN to 0.
        low = tl.where(values > 0.0, values, 0.0)
        kept = tl.where(low < 255.0, low, 255.0)
        return (kept + 8388608.0).to(tl.int32, bitcast=True).to(tl.uint8)
    else:
        return values.to(dtype)


@triton.jit
def _loaded(image, offset, plane_stride, mask, PLANES: tl.constexpr):
    """The chunk's elements of every plane, all asked for before the first is used."""
    planes = ()
    for plane in tl.static_range(PLANES):
        planes = planes + (tl.load(image + plane * plane_stride + offset, mask=mask, other=0),)
    return planes


@triton.jit
def _mixed(own, other, where, plan, PER: tl.constexpr, MIXUP: tl.constexpr, CUTMIX: tl.constexpr):
    """One plane's pixels, in the dtype of `own`: float32, or the stored dtype where copied pixels need no conversion.

    `other` holds the partner's pixels at the same place. The box of a RESIZEMIX row is filled later.
    """
    pixels = own
    if MIXUP:
        if plan[0] == 1:
            pixels = _rounded(plan[1] * own.to(tl.float32) + (1.0 - plan[1]) * other.to(tl.float32), own.dtype)
    if CUTMIX:
        if plan[0] == 2:
            pixels = tl.where(_inside(where, plan, PER), other, own)
    return pixels


@triton.jit
def _picked(channel, values, C: tl.constexpr):
    """values[channel], of up to four values."""
    value = tl.where(channel == 1, values[1], values[0])
    if C > 2:
        value = tl.where(channel == 2, values[2], value)
    if C > 3:
        value = tl.where(channel == 3, values[3], value)
    return value


@triton.jit
def _per_channel(
    where, share, plane: tl.constexpr, values, table_ptr, C: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """The value of each element's channel: from scalars for up to four channels, else from a table.

    Where a plane is a channel, that is one value. Else the channels of a group are those of its first element, counted
    on: which member takes which of the C values the compiler knows, and only the C values are picked for every group.
    """
    if PER == 1 and C > 4:
        return tl.load(table_ptr + share)
    elif PER == 1:
        return values[plane]
    elif C > 4:
        return tl.load(table_ptr + _divided(where[3], PER)[1])  # narrow: one of C values
    else:
        first = _divided(where[4], PER)[1]
        inner = tl.arange(0, GROUP)[None, :] % C
        value = _picked(first, values, C)
        for later in tl.static_range(1, C):
            value = tl.where(inner == later, _picked((first + later) % C, values, C), value)
        return value


@triton.jit
def _finished(
    pixels, where, share, plane: tl.constexpr, norm, dtype: tl.constexpr, C: tl.constexpr, PER: tl.constexpr,
    GROUP: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """One plane's pixels normalised, then rounded to the dtype of the result."""
    if NORMALISE:
        centres, scales, table_ptr = norm
        centre = _per_channel(where, share, plane, centres, table_ptr, C, PER, GROUP)
        scale = _per_channel(where, share, plane, scales, table_ptr + C, C, PER, GROUP)
        return _rounded((pixels - centre) * scale, dtype)
    elif pixels.dtype == dtype:
        return pixels
    else:
        return _rounded(pixels, dtype)


@triton.jit
def _taps(position, target, extent):
    """(first, second, weight of the first, of the second): where resizing `extent` pixels to `target` looks, as
    torch.nn.functional.interpolate in float32: bilinear, align_corners=False.
    """
    scale = tl.div_rn(extent.to(tl.float32), target.to(tl.float32))
    source = tl.maximum(scale * (position.to(tl.float32) + 0.5) - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), extent - 1)
    # Where the sizes agree nothing is resized, and the neighbour, which may hold NaN, is not looked at.
    last = tl.where(target == extent, 0, extent - 1)
    second = tl.where(first < last, first + 1, first)
    weight = tl.minimum(source - first.to(tl.float32), 1.0)
    return first, second, 1.0 - weight, weight


@triton.jit
def _fill_box(
    source, target, chunk, count, plan, span, size, source_strides, target_strides, source_plane, target_plane, share,
    norm, work: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, PLANES: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Write the source image, resized to the row's box, over the part of the box that lies in the chunk.

    Tiles of LINES box rows by COLUMNS elements. Rows are worked out once for a line of tiles, and the places and
    weights of the taps once for all planes.
    """
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    result: tl.constexpr = target.dtype.element_ty
    _, _, top, left, height, width = plan
    H, W = size
    begin = chunk.to(kind) * BLOCK
    for line in range(tl.maximum(span[0], top), tl.minimum(span[1] + 1, top + height), LINES):
        row = line + tl.arange(0, LINES)[:, None]
        y0, y1, above, below = _taps(row - top, height, H)
        upper, lower = y0.to(kind) * source_strides[0], y1.to(kind) * source_strides[0]
        for start in range(0, width * PER, COLUMNS):
            across = start + tl.arange(0, COLUMNS)[None, :]
            pixel, channel = _divided(across, PER)
            x0, x1, before, behind = _taps(pixel, width, W)
            x0 = x0.to(kind) * source_strides[1] + channel.to(kind) * source_strides[2]
            x1 = x1.to(kind) * source_strides[1] + channel.to(kind) * source_strides[2]
            position = left * PER + across
            index = row.to(kind) * (W * PER) + position
            mask = (row < top + height) & (across < width * PER) & (index >= begin) & (index < begin + BLOCK)
            where = (index, mask, row, position, position)
            offset = _offset(where, target_strides, PER, FLAT, WIDE)
            for plane in tl.static_range(PLANES):
                base = source + plane * source_plane
                p00 = tl.load(base + (upper + x0), mask=mask, other=0).to(tl.float32)  # narrow: a tap
                p01 = tl.load(base + (upper + x1), mask=mask, other=0).to(tl.float32)  # narrow: a tap
                p10 = tl.load(base + (lower + x0), mask=mask, other=0).to(tl.float32)  # narrow: a tap
                p11 = tl.load(base + (lower + x1), mask=mask, other=0).to(tl.float32)  # narrow: a tap
                patch = above * (before * p00 + behind * p01) + below * (before * p10 + behind * p11)
                pixels = _rounded(patch, work)
                pixels = _finished(pixels, where, share, plane, norm, result, C, PER, 1, NORMALISE)
                tl.store(target + plane * target_plane + offset, pixels, mask=mask)  # narrow: boxes begin anywhere


@triton.jit(do_not_specialize=_FREE)
def mix_pair_kernel(
    images_ptr, mixed_ptr, clean_ptr, rule_ptr, lam_ptr, box_ptr, table_ptr, rows, units, H, W,
    images_n, images_p, images_h, images_w, images_c, mixed_n, mixed_p, mixed_h, mixed_w, mixed_c,
    clean_n, clean_p, clean_h, clean_w, clean_c, centre0, centre1, centre2, centre3, scale0, scale1, scale2, scale3,
    C: tl.constexpr, PER: tl.constexpr, PLANES: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    MIXUP: tl.constexpr, CUTMIX: tl.constexpr, RESIZEMIX: tl.constexpr, NORMALISE: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Rows i and N-1-i, each mixed with the other: a program owns one chunk of PLANES planes of both.

    `units` (elements of a plane) and the strides of images and planes count UNIT elements, so that the compiler sees by
    how much they are divisible.
    """
    size = (H, W)
    count = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    i, share, chunk = _split(program, count, BLOCK, C // (PER * PLANES))
    j = rows - 1 - i
    where, span = _chunk(chunk, count, size, PER, GROUP, BLOCK, WIDE)
    mask = where[1]
    strides = (images_h, images_w, images_c)
    source_i = images_ptr + (i * images_n + share * images_p) * UNIT
    source_j = images_ptr + (j * images_n + share * images_p) * UNIT
    offset = _offset(where, strides, PER, FLAT, WIDE)
    image_plane, mixed_plane = tl.cast(images_p, tl.int64) * UNIT, tl.cast(mixed_p, tl.int64) * UNIT
    raw_i = _loaded(source_i, offset, image_plane, mask, PLANES)
    raw_j = _loaded(source_j, offset, image_plane, mask, PLANES)
    plan_i = _unless_apart(_plan_row(rule_ptr, lam_ptr, box_ptr, i, i == j, size), span)
    plan_j = _unless_apart(_plan_row(rule_ptr, lam_ptr, box_ptr, j, i == j, size), span)
    norm = ((centre0, centre1, centre2, centre3), (scale0, scale1, scale2, scale3), table_ptr)
    result: tl.constexpr = mixed_ptr.dtype.element_ty
    direct: tl.constexpr = images_ptr.dtype.element_ty == result and not NORMALISE
    work: tl.constexpr = images_ptr.dtype.element_ty if direct else tl.float32
    targets = (mixed_h, mixed_w, mixed_c)
    target_i = mixed_ptr + (i * mixed_n + share * mixed_p) * UNIT
    target_j = mixed_ptr + (j * mixed_n + share * mixed_p) * UNIT
    offset = _offset(where, targets, PER, FLAT, WIDE)
    for plane in tl.static_range(PLANES):
        own_i, own_j = raw_i[plane].to(work), raw_j[plane].to(work)
        if CLEAN:
            kept = (
                clean_ptr
                + (share + plane) * clean_p * UNIT
                + _offset(where, (clean_h, clean_w, clean_c), PER, FLAT, WIDE)
            )
            pixels = _finished(own_i, where, share, plane, norm, result, C, PER, GROUP, NORMALISE)
            tl.store(kept + i * clean_n * UNIT, pixels, mask=mask)
            pixels = _finished(own_j, where, share, plane, norm, result, C, PER, GROUP, NORMALISE)
            tl.store(kept + j * clean_n * UNIT, pixels, mask=mask)
        pixels = _mixed(own_i, own_j, where, plan_i, PER, MIXUP, CUTMIX)
        pixels = _finished(pixels, where, share, plane, norm, result, C, PER, GROUP, NORMALISE)
        tl.store(target_i + plane * mixed_plane + offset, pixels, mask=mask)
        pixels = _mixed(own_j, own_i, where, plan_j, PER, MIXUP, CUTMIX)
        pixels = _finished(pixels, where, share, plane, norm, result, C, PER, GROUP, NORMALISE)
        tl.store(target_j + plane * mixed_plane + offset, pixels, mask=mask)
    if RESIZEMIX:
        # What the box is written over was stored by other threads of this program.
        tl.debug_barrier()
        if plan_i[0] == 3:
            _fill_box(
                source_j, target_i, chunk, count, plan_i, span, size, strides, targets, image_plane, mixed_plane,
                share, norm, work, C, PER, PLANES, FLAT, WIDE, BLOCK, LINES, COLUMNS, NORMALISE,
            )  # fmt: skip
        if plan_j[0] == 3:
            _fill_box(
                source_i, target_j, chunk, count, plan_j, span, size, strides, targets, image_plane, mixed_plane,
                share, norm, work, C, PER, PLANES, FLAT, WIDE, BLOCK, LINES, COLUMNS, NORMALISE,
            )  # fmt: skip


@triton.jit(do_not_specialize=_FREE)
def mix_gather_kernel(
    images_ptr, partners_ptr, mixed_ptr, clean_ptr, rule_ptr, partner_ptr, lam_ptr, box_ptr, table_ptr, sources, units,
    H, W, images_n, images_p, images_h, images_w, images_c, partners_n, partners_p, partners_h, partners_w, partners_c,
    mixed_n, mixed_p, mixed_h, mixed_w, mixed_c, clean_n, clean_p, clean_h, clean_w, clean_c,
    centre0, centre1, centre2, centre3, scale0, scale1, scale2, scale3,
    C: tl.constexpr, PER: tl.constexpr, PLANES: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    MIXUP: tl.constexpr, CUTMIX: tl.constexpr, RESIZEMIX: tl.constexpr, NORMALISE: tl.constexpr, CLEAN: tl.constexpr,
    SELF: tl.constexpr,
):  # fmt: skip
    """Row i mixed with row partner[i] of `partners`, whatever that is: a program owns one chunk of PLANES planes.

    SELF: the partners are the images themselves. Of the partner only what the rule needs is read.
    """
    size = (H, W)
    count = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    i, share, chunk = _split(program, count, BLOCK, C // (PER * PLANES))
    # A row number on the device was not checked on the host; out of range, it must still not be followed.
    j = tl.minimum(tl.maximum(tl.load(partner_ptr + i), 0), sources - 1)
    where, span = _chunk(chunk, count, size, PER, GROUP, BLOCK, WIDE)
    mask = where[1]
    image = images_ptr + (i * images_n + share * images_p) * UNIT
    source = partners_ptr + (j * partners_n + share * partners_p) * UNIT
    strides = (partners_h, partners_w, partners_c)
    offset = _offset(where, (images_h, images_w, images_c), PER, FLAT, WIDE)
    partner_plane, mixed_plane = tl.cast(partners_p, tl.int64) * UNIT, tl.cast(mixed_p, tl.int64) * UNIT
    raw_own = _loaded(image, offset, tl.cast(images_p, tl.int64) * UNIT, mask, PLANES)
    plan = _unless_apart(_plan_row(rule_ptr, lam_ptr, box_ptr, i, (i == j) & SELF, size), span)
    needed = mask & ((plan[0] == 1) | ((plan[0] == 2) & _near(where, plan, PER, GROUP)))
    raw_other = _loaded(source, _offset(where, strides, PER, FLAT, WIDE), partner_plane, needed, PLANES)
    norm = ((centre0, centre1, centre2, centre3), (scale0, scale1, scale2, scale3), table_ptr)
    result: tl.constexpr = mixed_ptr.dtype.element_ty
    direct: tl.constexpr = images_ptr.dtype.element_ty == result and not NORMALISE
    work: tl.constexpr = images_ptr.dtype.element_ty if direct else tl.float32
    targets = (mixed_h, mixed_w, mixed_c)
    target = mixed_ptr + (i * mixed_n + share * mixed_p) * UNIT
    offset = _offset(where, targets, PER, FLAT, WIDE)
    for plane in tl.static_range(PLANES):
        own, other = raw_own[plane].to(work), raw_other[plane].to(work)
        if CLEAN:
            pixels = _finished(own, where, share, plane, norm, result, C, PER, GROUP, NORMALISE)
            kept = clean_ptr + (i * clean_n + (share + plane) * clean_p) * UNIT
            tl.store(kept + _offset(where, (clean_h, clean_w, clean_c), PER, FLAT, WIDE), pixels, mask=mask)
        pixels = _mixed(own, other, where, plan, PER, MIXUP, CUTMIX)
        pixels = _finished(pixels, where, share, plane, norm, result, C, PER, GROUP, NORMALISE)
        tl.store(target + plane * mixed_plane + offset, pixels, mask=mask)
    if RESIZEMIX:
        # What the box is written over was stored by other threads of this program.
        tl.debug_barrier()
        if plan[0] == 3:
            _fill_box(
                source, target, chunk, count, plan, span, size, strides, targets, partner_plane, mixed_plane,
                share, norm, work, C, PER, PLANES, FLAT, WIDE, BLOCK, LINES, COLUMNS, NORMALISE,
            )  # fmt: skip


# ---- gradients ----


@triton.jit
def _resized_backward(source, where, plan, size, strides, PER: tl.constexpr, WIDE: tl.constexpr):
    """The transpose of resizing: what the box's gradients give back to the elements of the chunk.

    A box is never larger than the image, so a pixel is looked at from at most three rows and three columns of it,
    those around its own place in the box. Gathering them makes the order of the sum fixed.
    """
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    _, mask, row, position, _ = where
    _, _, top, left, height, width = plan
    H, W = size
    column, channel = _divided(position, PER)
    middle_y = ((row.to(tl.float32) + 0.5) * (height.to(tl.float32) / H.to(tl.float32))).to(tl.int32)
    middle_x = ((column.to(tl.float32) + 0.5) * (width.to(tl.float32) / W.to(tl.float32))).to(tl.int32)
    total = tl.zeros(position.shape, tl.float32)
    for down in tl.static_range(3):
        y = middle_y + (down - 1)
        first, second, above, below = _taps(y, height, H)
        weight_y = tl.where(first == row, above, 0.0) + tl.where(second == row, below, 0.0)
        weight_y = tl.where((y >= 0) & (y < height), weight_y, 0.0)
        line = (y + top).to(kind) * strides[0] + channel.to(kind) * strides[2]
        for right in tl.static_range(3):
            x = middle_x + (right - 1)
            first, second, before, behind = _taps(x, width, W)
            weight_x = tl.where(first == column, before, 0.0) + tl.where(second == column, behind, 0.0)
            weight = weight_y * tl.where((x >= 0) & (x < width), weight_x, 0.0)
            place = source + (line + (x + left).to(kind) * strides[1])
            grad = tl.load(place, mask=mask & (weight != 0.0), other=0)  # narrow: a tap
            total += weight * grad.to(tl.float32)
    return total


@triton.jit
def _own_gradient(grad, where, plan, PER: tl.constexpr, MIXUP: tl.constexpr, BOXED: tl.constexpr):
    """What the gradient of a mixed row gives back to the row's own pixels."""
    result = grad
    if MIXUP:
        if plan[0] == 1:
            result = plan[1] * grad
    if BOXED:
        if plan[0] >= 2:
            result = tl.where(_inside(where, plan, PER), 0.0, grad)
    return result


@triton.jit
def _partner_gradient(
    grad, source, where, plan, size, strides, PER: tl.constexpr, WIDE: tl.constexpr, MIXUP: tl.constexpr,
    CUTMIX: tl.constexpr, RESIZEMIX: tl.constexpr,
):  # fmt: skip
    """What it gives back to the partner's pixels; `source` points to the row's gradient, `grad` is its chunk."""
    result = tl.zeros(grad.shape, tl.float32)
    if MIXUP:
        if plan[0] == 1:
            result = (1.0 - plan[1]) * grad
    if CUTMIX:
        if plan[0] == 2:
            result = tl.where(_inside(where, plan, PER), grad, 0.0)
    if RESIZEMIX:
        if plan[0] == 3:
            result = _resized_backward(source, where, plan, size, strides, PER, WIDE)
    return result


@triton.jit
def _spread(where, share, scales, table_ptr, C: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr):
    """1 / std of each element's channel, for a program of one plane."""
    if PER == 1 and C <= 4:
        return _picked(share, scales, C)
    else:
        return _per_channel(where, share, 0, scales, table_ptr + C, C, PER, GROUP)


@triton.jit(do_not_specialize=_FREE)
def mix_backward_pair_kernel(
    mixed_ptr, clean_ptr, result_ptr, rule_ptr, lam_ptr, box_ptr, table_ptr, rows, units, H, W,
    mixed_n, mixed_p, mixed_h, mixed_w, mixed_c, clean_n, clean_p, clean_h, clean_w, clean_c,
    result_n, result_p, result_h, result_w, result_c, scale0, scale1, scale2, scale3,
    C: tl.constexpr, PER: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, MIXUP: tl.constexpr, CUTMIX: tl.constexpr, RESIZEMIX: tl.constexpr,
    NORMALISE: tl.constexpr, MIXED: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Gradients of images i and N-1-i from those of both their rows, mixed, clean or both: one chunk of one plane."""
    size = (H, W)
    count = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    i, share, chunk = _split(program, count, BLOCK, C // PER)
    j = rows - 1 - i
    where, _ = _chunk(chunk, count, size, PER, GROUP, BLOCK, WIDE)
    mask = where[1]
    grad_i = tl.zeros(where[0].shape, tl.float32)
    grad_j = tl.zeros(where[0].shape, tl.float32)
    if MIXED:
        strides = (mixed_h, mixed_w, mixed_c)
        offset = _offset(where, strides, PER, FLAT, WIDE)
        source_i = mixed_ptr + (i * mixed_n + share * mixed_p) * UNIT
        source_j = mixed_ptr + (j * mixed_n + share * mixed_p) * UNIT
        own_i = tl.load(source_i + offset, mask=mask, other=0).to(tl.float32)
        own_j = tl.load(source_j + offset, mask=mask, other=0).to(tl.float32)
        plan_i = _plan_row(rule_ptr, lam_ptr, box_ptr, i, i == j, size)
        plan_j = _plan_row(rule_ptr, lam_ptr, box_ptr, j, i == j, size)
        grad_i = _own_gradient(own_i, where, plan_i, PER, MIXUP, CUTMIX or RESIZEMIX)
        grad_j = _own_gradient(own_j, where, plan_j, PER, MIXUP, CUTMIX or RESIZEMIX)
        grad_i += _partner_gradient(
            own_j, source_j, where, plan_j, size, strides, PER, WIDE, MIXUP, CUTMIX, RESIZEMIX
        )  # fmt: skip
        grad_j += _partner_gradient(
            own_i, source_i, where, plan_i, size, strides, PER, WIDE, MIXUP, CUTMIX, RESIZEMIX
        )  # fmt: skip
    if CLEAN:
        kept = clean_ptr + share * clean_p * UNIT + _offset(where, (clean_h, clean_w, clean_c), PER, FLAT, WIDE)
        grad_i += tl.load(kept + i * clean_n * UNIT, mask=mask, other=0).to(tl.float32)
        grad_j += tl.load(kept + j * clean_n * UNIT, mask=mask, other=0).to(tl.float32)
    if NORMALISE:
        spread = _spread(where, share, (scale0, scale1, scale2, scale3), table_ptr, C, PER, GROUP)
        grad_i *= spread
        grad_j *= spread
    dtype: tl.constexpr = result_ptr.dtype.element_ty
    target = result_ptr + share * result_p * UNIT + _offset(where, (result_h, result_w, result_c), PER, FLAT, WIDE)
    tl.store(target + i * result_n * UNIT, grad_i.to(dtype), mask=mask)
    tl.store(target + j * result_n * UNIT, grad_j.to(dtype), mask=mask)


@triton.jit(do_not_specialize=_FREE)
def mix_backward_gather_kernel(
    mixed_ptr, clean_ptr, result_ptr, rule_ptr, partner_ptr, lam_ptr, box_ptr, users_ptr, starts_ptr, table_ptr, units,
    H, W, mixed_n, mixed_p, mixed_h, mixed_w, mixed_c, clean_n, clean_p, clean_h, clean_w, clean_c,
    result_n, result_p, result_h, result_w, result_c, scale0, scale1, scale2, scale3,
    C: tl.constexpr, PER: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, MIXUP: tl.constexpr, CUTMIX: tl.constexpr, RESIZEMIX: tl.constexpr,
    NORMALISE: tl.constexpr, MIXED: tl.constexpr, CLEAN: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Gradient of one source row, one chunk of one plane of it: OWN, as the image of mixed row i; OTHER, as the partner
    of the mixed rows users[starts[i]] to users[starts[i + 1] - 1], in that order.
    """
    size = (H, W)
    count = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    i, share, chunk = _split(program, count, BLOCK, C // PER)
    where, _ = _chunk(chunk, count, size, PER, GROUP, BLOCK, WIDE)
    mask = where[1]
    strides = (mixed_h, mixed_w, mixed_c)
    offset = _offset(where, strides, PER, FLAT, WIDE)
    grads = mixed_ptr + share * mixed_p * UNIT
    total = tl.zeros(where[0].shape, tl.float32)
    if OWN and MIXED:
        itself = (tl.load(partner_ptr + i) == i) & OTHER
        own_plan = _plan_row(rule_ptr, lam_ptr, box_ptr, i, itself, size)
        own = tl.load(grads + i * mixed_n * UNIT + offset, mask=mask, other=0).to(tl.float32)
        total += _own_gradient(own, where, own_plan, PER, MIXUP, CUTMIX or RESIZEMIX)
    if OWN and CLEAN:
        kept = clean_ptr + (i * clean_n + share * clean_p) * UNIT
        offset_clean = _offset(where, (clean_h, clean_w, clean_c), PER, FLAT, WIDE)
        total += tl.load(kept + offset_clean, mask=mask, other=0).to(tl.float32)
    if OTHER and MIXED:
        for user in range(tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)):
            k = tl.load(users_ptr + user)
            plan = _plan_row(rule_ptr, lam_ptr, box_ptr, k, (k == i) & OWN, size)
            source = grads + k * mixed_n * UNIT
            needed = mask & ((plan[0] == 1) | ((plan[0] == 2) & _near(where, plan, PER, GROUP)))
            grad = tl.load(source + offset, mask=needed, other=0).to(tl.float32)
            total += _partner_gradient(
                grad, source, where, plan, size, strides, PER, WIDE, MIXUP, CUTMIX, RESIZEMIX
            )  # fmt: skip
    if NORMALISE:
        total *= _spread(where, share, (scale0, scale1, scale2, scale3), table_ptr, C, PER, GROUP)
    target = result_ptr + (i * result_n + share * result_p) * UNIT
    offset = _offset(where, (result_h, result_w, result_c), PER, FLAT, WIDE)
    tl.store(target + offset, total.to(result_ptr.dtype.element_ty), mask=mask)


# ---- launching ----


class _Layout(NamedTuple):
    """How the tensors of a call lie in memory, and the constants of the kernels that follow from it.

    Attributes:
        strides: image, plane, row, column and channel stride of one tensor after the other; the first two in units.
        units: elements of a plane, in units.
        constants: C, PER, FLAT, WIDE, UNIT and GROUP.
    """

    strides: list[int]
    units: int
    constants: dict[str, Any]


def _layout(tensors: list[Tensor], result: Tensor) -> _Layout:
    """The layout that serves all `tensors`; where they differ, that of `result`, which is written."""
    _, channels, height, width = result.shape
    dense = [pixels for pixels in (False, True) if all(_dense(t, pixels) for t in tensors)]
    pixels = dense[0] if dense else channels > 1 and result.stride(1) < result.stride(3)
    per = channels if pixels else 1
    count = height * width * per
    steps = [t.stride(0) if len(t) > 1 else 0 for t in tensors]
    planes = [0 if pixels or channels == 1 else t.stride(1) for t in tensors]
    unit = math.gcd(16, count, *steps, *planes)
    group = math.gcd(16, width * per)
    if dense and group < 8:
        group = 1  # a vector may then run on into the next row
    strides = []
    for tensor, step, plane in zip(tensors, steps, planes, strict=True):
        strides += [step // unit, plane // unit, *tensor.stride()[2:], tensor.stride(1) if pixels else 0]
    reach = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    constants = {
        "C": channels,
        "PER": per,
        "FLAT": bool(dense),
        # An index runs past the plane by less than one block before it is masked.
        "WIDE": max(count, reach) > 2**31 - 2**16,
        "UNIT": unit,
        "GROUP": group,
    }
    return _Layout(strides, count // unit, constants)


def _dense(tensor: Tensor, pixels: bool) -> bool:
    """Whether each image is one dense run of memory: planes of rows, or (`pixels`) rows of pixels of channels."""
    _, channels, height, width = tensor.shape
    expected = (1, width * channels, channels) if pixels else (height * width, width, 1)
    return all(n == 1 or s == e for n, s, e in zip(tensor.shape[1:], tensor.stride()[1:], expected, strict=True))


def _allowed(rules: list[int]) -> dict[str, bool]:
    return {rule.name: int(rule) in rules for rule in (Rule.MIXUP, Rule.CUTMIX, Rule.RESIZEMIX)}


class _Normalisation(NamedTuple):
    """(x - centre) * scale per channel: as scalars for up to four channels, else as a table of 2 C values."""

    centres: list[float]
    scales: list[float]
    table: Tensor | None


def _normalisation(mean: list[float] | None, std: list[float] | None, images: Tensor) -> _Normalisation:
    if std is None:
        return _Normalisation([0.0] * 4, [1.0] * 4, None)
    # uint8 is taken to the 0 to 1 scale by the same two constants.
    factor = 255.0 if images.dtype == torch.uint8 else 1.0
    centres = [m * factor for m in mean or [0.0] * len(std)]
    scales = [1.0 / (s * factor) for s in std]
    if len(std) <= 4:
        return _Normalisation((centres + [0.0] * 4)[:4], (scales + [1.0] * 4)[:4], None)
    # Filled on the device, not copied to it: a copy would make the host wait, and fail in the capture of a graph.
    table = torch.stack([torch.full((), v, dtype=torch.float32, device=images.device) for v in centres + scales])
    return _Normalisation([0.0] * 4, [1.0] * 4, table)


class _Call(NamedTuple):
    """A launch not yet made, so that what is compiled ahead of time is what is launched."""

    kernel: Any
    programs: int
    args: list[Any]
    num_warps: int
    constants: dict[str, Any]

    def launch(self, device: torch.device) -> None:
        warps, constants = self.num_warps, self.constants
        _launch.launch(self.kernel, (self.programs,), device, *self.args, num_warps=warps, num_stages=1, **constants)

    def compilation(self, name: str, facts: tuple[str, ...]) -> Compile:
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": 1, "facts": facts, "name": name}
        return _launch.compilation(self.kernel, *self.args, **options, **self.constants)


def _shape(
    arch: str, kernel: str, rows: int, images: Tensor, constants: dict[str, Any]
) -> tuple[dict[str, int], int, int]:
    """(BLOCK and the other constants, num_warps, programs) from the launch table: by what a plane is and the bits of an
    element, and less for small images and for those that are not read 16 bytes at a time.

    `rows`: how many programs own each chunk of a plane, one row or one pair each.
    """
    planes = constants.get("PLANES", 1)
    bits = 8 * images.element_size()
    found = _launch.constants(arch, f"mix.{kernel}.{'planes' if planes > 1 else 'plane'}.{bits}bit")
    count = images.shape[2] * images.shape[3] * constants["PER"]
    if not constants["FLAT"] or constants["UNIT"] * bits < 128:
        found = _launch.constants(arch, f"mix.{kernel}.narrow")
    elif count < found["block"]:
        found = _launch.constants(arch, f"mix.{kernel}.small")
    shares = images.shape[1] // (constants["PER"] * planes)
    chosen = {name.upper(): value for name, value in found.items() if name != "num_warps"}
    return chosen, found["num_warps"], -(-count // found["block"]) * shares * rows


def mix(
    images: Tensor,
    partners: Tensor | None,
    rule: Tensor,
    partner: Tensor,
    lam: Tensor,
    box: Tensor,
    mirrored: bool,
    rules: list[int],
    mean: list[float] | None,
    std: list[float] | None,
    mixed: Tensor,
    clean: Tensor | None,
) -> None:
    """Write the mixed images into `mixed` and, where given, the unmixed ones into `clean`; see `reference.mix`."""
    arch = _launch.architecture(images.device)
    plan = (rule, partner, lam, box)
    _mix_call(arch, images, partners, plan, mirrored, rules, mean, std, mixed, clean).launch(images.device)


def _mix_call(
    arch: str,
    images: Tensor,
    partners: Tensor | None,
    plan: tuple[Tensor, Tensor, Tensor, Tensor],
    mirrored: bool,
    rules: list[int],
    mean: list[float] | None,
    std: list[float] | None,
    mixed: Tensor,
    clean: Tensor | None,
) -> _Call:
    pair = mirrored and partners is None
    others = images if partners is None else partners
    kept = mixed if clean is None else clean
    rule, partner, lam, box = (t.contiguous() for t in plan)
    norm = _normalisation(mean, std, images)
    table = lam if norm.table is None else norm.table
    layout = _layout([images, mixed, kept] if pair else [images, others, mixed, kept], mixed)
    constants = layout.constants | _allowed(rules) | {"NORMALISE": std is not None, "CLEAN": clean is not None}
    constants["PLANES"] = images.shape[1] if constants["PER"] == 1 and images.shape[1] <= 4 else 1
    rows = -(-len(images) // 2) if pair else len(images)
    chosen, num_warps, programs = _shape(arch, "pair" if pair else "gather", rows, images, constants)
    constants |= chosen
    scalars = [layout.units, *images.shape[2:], *layout.strides, *norm.centres, *norm.scales]
    if pair:
        args = [images, mixed, kept, rule, lam, box, table, len(images), *scalars]
        return _Call(mix_pair_kernel, programs, args, num_warps, constants)
    args = [images, others, mixed, kept, rule, partner, lam, box, table, len(others), *scalars]
    return _Call(mix_gather_kernel, programs, args, num_warps, constants | {"SELF": partners is None})


def mix_backward(
    grad_mixed: Tensor | None,
    grad_clean: Tensor | None,
    rule: Tensor,
    partner: Tensor,
    lam: Tensor,
    box: Tensor,
    mirrored: bool,
    rules: list[int],
    std: list[float] | None,
    grad_images: Tensor,
    grad_partners: Tensor | None,
) -> None:
    """Write the gradients of `images`, and of `partners` where they were given; see `reference.mix_backward`."""
    arch = _launch.architecture(grad_images.device)
    plan = (rule, partner, lam, box)
    for call in _backward_calls(arch, grad_mixed, grad_clean, plan, mirrored, rules, std, grad_images, grad_partners):
        call.launch(grad_images.device)


def _backward_calls(
    arch: str,
    grad_mixed: Tensor | None,
    grad_clean: Tensor | None,
    plan: tuple[Tensor, Tensor, Tensor, Tensor],
    mirrored: bool,
    rules: list[int],
    std: list[float] | None,
    grad_images: Tensor,
    grad_partners: Tensor | None,
) -> list[_Call]:
    given = [t for t in (grad_mixed, grad_clean) if t is not None]
    grads = (given[0], given[-1])
    norm = _normalisation(None, std, grad_images)
    rule, partner, lam, box = (t.contiguous() for t in plan)
    table = lam if norm.table is None else norm.table
    constants = _allowed(rules) | {"NORMALISE": std is not None}
    constants |= {"MIXED": grad_mixed is not None, "CLEAN": grad_clean is not None}

    def call(kernel: Any, name: str, result: Tensor, tensors: list[Tensor], **more: Any) -> _Call:
        layout = _layout([*grads, result], result)
        pair = kernel is mix_backward_pair_kernel
        rows = -(-len(result) // 2) if pair else len(result)
        chosen, num_warps, programs = _shape(arch, name, rows, result, layout.constants)
        numbers = [len(result)] if pair else []
        args = [*grads, result, *tensors, *numbers, layout.units, *result.shape[2:], *layout.strides, *norm.scales]
        return _Call(kernel, programs, args, num_warps, layout.constants | constants | more | chosen)

    if mirrored and grad_partners is None:
        return [call(mix_backward_pair_kernel, "backward_pair", grad_images, [rule, lam, box, table])]
    sources = grad_images if grad_partners is None else grad_partners
    tensors = [rule, partner, lam, box, *_users(partner, len(sources)), table]
    kernel, name = mix_backward_gather_kernel, "backward_gather"
    own = call(kernel, name, grad_images, tensors, OWN=True, OTHER=grad_partners is None)
    if grad_partners is None:
        return [own]
    return [own, call(kernel, name, grad_partners, tensors, OWN=False, OTHER=True)]


def _users(partner: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    """The mixed rows in the order of their partners, and where those of each source row start, (sources + 1,)."""
    ordered, users = torch.sort(partner.clamp(0, max(sources - 1, 0)), stable=True)
    return users, torch.searchsorted(ordered, torch.arange(sources + 1, device=partner.device))


# ---- what is compiled ahead of time ----

_ALL = [int(Rule.MIXUP), int(Rule.CUTMIX), int(Rule.RESIZEMIX)]
_WIDE = ("no_spills", "wide_loads", "wide_stores")
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def compiles(arch: str) -> list[Compile]:
    """Every kind of launch: kernel, dtypes, layout, normalisation, and both sizes of block."""
    u8, f16, bf16, f32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
    return [
        _forward(arch, "pair bf16", bf16),
        _forward(arch, "pair bf16 channels_last", bf16, pixels=True),
        _forward(arch, "pair bf16 without resizemix", bf16, rules=_ALL[:2]),
        _forward(arch, "pair fp16", f16),
        _forward(arch, "pair fp32", f32),
        _forward(arch, "pair uint8", u8),
        _forward(arch, "pair bf16 small", bf16, size=(32, 32)),
        _forward(arch, "pair bf16 rows of 100", bf16, size=(100, 100)),
        _forward(arch, "pair uint8 to bf16 clean", u8, bf16, normalise=True, clean=True),
        _forward(arch, "pair uint8 to bf16 channels_last clean", u8, bf16, pixels=True, normalise=True, clean=True),
        _forward(arch, "pair uint8 to fp32 channels_last", u8, f32, pixels=True, normalise=True),
        _forward(arch, "pair bf16 normalised, 13 channels", bf16, channels=13, normalise=True),
        _forward(arch, "pair bf16 odd", bf16, size=(31, 37), facts=("no_spills",)),
        _forward(arch, "pair bf16 strided", bf16, strided=True, facts=("no_spills",)),
        _forward(arch, "gather bf16", bf16, mirrored=False),
        _forward(arch, "gather fp32", f32, mirrored=False),
        _forward(arch, "gather uint8 to bf16 channels_last clean", u8, bf16, pixels=True, mirrored=False,
                 normalise=True, clean=True),
        _forward(arch, "gather bf16 strided", bf16, mirrored=False, strided=True, facts=("no_spills",)),
        _backward(arch, "backward pair bf16", bf16),
        _backward(arch, "backward pair fp32", f32),
        _backward(arch, "backward gather bf16", bf16, mirrored=False),
        _backward(arch, "backward gather fp32", f32, mirrored=False),
    ]  # fmt: skip


def _meta_plan(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (((rows,), torch.uint8), ((rows,), torch.int64), ((rows,), torch.float32), ((rows, 4), torch.int32))
    rule, partner, lam, box = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
    return rule, partner, lam, box


def _meta_images(dtype: torch.dtype, channels: int, size: tuple[int, int], pixels: bool, strided: bool) -> Tensor:
    # A strided one is a crop of a larger image.
    height, width = (s + 2 for s in size) if strided else size
    images = torch.empty((64, channels, height, width), dtype=dtype, device="meta")
    images = images.to(memory_format=torch.channels_last) if pixels else images
    return images[:, :, 1:-1, 1:-1] if strided else images


def _forward(
    arch: str,
    name: str,
    source: torch.dtype,
    target: torch.dtype | None = None,
    *,
    channels: int = 3,
    size: tuple[int, int] = (224, 224),
    pixels: bool = False,
    strided: bool = False,
    mirrored: bool = True,
    rules: list[int] = _ALL,
    normalise: bool = False,
    clean: bool = False,
    facts: tuple[str, ...] = _WIDE,
) -> Compile:
    images = _meta_images(source, channels, size, pixels, strided)
    mixed = torch.empty_like(images, dtype=target or source)
    mean, std = ((_MEAN * channels)[:channels], (_STD * channels)[:channels]) if normalise else (None, None)
    kept = torch.empty_like(mixed) if clean else None
    call = _mix_call(arch, images, None, _meta_plan(len(images)), mirrored, rules, mean, std, mixed, kept)
    return call.compilation(f"mix {name}", facts)


def _backward(arch: str, name: str, dtype: torch.dtype, *, mirrored: bool = True) -> Compile:
    grad = _meta_images(dtype, 3, (224, 224), pixels=False, strided=False)
    plan = _meta_plan(len(grad))
    (call,) = _backward_calls(arch, grad, grad, plan, mirrored, _ALL, _STD, torch.empty_like(grad), None)
    return call.compilation(f"mix {name}", _WIDE)
