"""The Triton kernels of `mix`: one launch for a batch, whatever the rules of its rows. `triton.py` launches them.

An image is a few planes, each of them rows one after another: for contiguous images a plane is a channel, for
channels-last ones it is the whole image, its pixels holding their channels side by side. A program owns one chunk of
the planes of one image (all of them up to four: they share row, column and box), or, for the flip, of both images of a
pair: both are read once and both results written once, 16 bytes at a time where the planes are dense.

A RESIZEMIX row is copied first; then the programs write the part of the box that lies in their chunk over it, the rows
of the box one after the other, so that only box pixels pay for the four taps. Tiles have one dimension: with two, their
rows and columns meet through shared memory, at six barriers a tile on Triton 3.6. What is erased is written over that.

Bytes and floors (n = 1024 images of 3 x 224 x 224, an H200 copying 4.3 TB/s): bf16 to bf16 617 MB, 143 us, whatever
the rules; uint8 to normalised bf16 462 MB, 108 us; the same with `clean` 771 MB, 179 us. The taps of RESIZEMIX come out
of L1 and L2, since the grid is reading that very image; about 35 instructions per box pixel and channel are its cost.
"""

from typing import Any, NamedTuple

import triton
from triton import language as tl

from sdmp_kernels.plan import Rule

# CUTMIX and RESIZEMIX, the rules that have a box, are the last two: `rule >= RULE_CUTMIX` means either.
RULE_KEEP = tl.constexpr(int(Rule.KEEP))
RULE_MIXUP = tl.constexpr(int(Rule.MIXUP))
RULE_CUTMIX = tl.constexpr(int(Rule.CUTMIX))
RULE_RESIZEMIX = tl.constexpr(int(Rule.RESIZEMIX))
# Numbers that change from call to call and must not make new kernels.
_FREE = ["rows", "sources", "boxes", "fills", "units", "H", "W"]


class Size(NamedTuple):
    """Of an image, in pixels."""

    height: Any
    width: Any


class Strides(NamedTuple):
    """Of one tensor, in elements; that of channels is used only where they lie side by side."""

    row: Any
    column: Any
    channel: Any


class Where(NamedTuple):
    """The place of each element of a chunk.

    Attributes:
        index: counted from the start of the plane.
        mask: whether it is in the plane at all.
        row: of the image.
        position: in that row, counted in elements.
        edge: the position of the first element of its group.
    """

    index: Any
    mask: Any
    row: Any
    position: Any
    edge: Any


class Span(NamedTuple):
    """The first and the last row of the image that a chunk reaches."""

    first: Any
    last: Any


class Box(NamedTuple):
    """In pixels, within the image."""

    top: Any
    left: Any
    height: Any
    width: Any


class PlanRow(NamedTuple):
    """What one row of the plan asks of a chunk; KEEP where that is nothing."""

    rule: Any
    lam: Any
    box: Any


class Scaling(NamedTuple):
    """(x - centre) * scale per channel: four scalars each, or for more channels a table of 2 C values."""

    centres: Any
    scales: Any
    table_ptr: Any


class Erased(NamedTuple):
    """Of every image `boxes` boxes of five numbers, the last the row of `fill` that it begins with, of `fills`."""

    box_ptr: Any
    fill_ptr: Any
    boxes: Any
    fills: Any


class Taps(NamedTuple):
    """Along one axis: two source positions and their weights."""

    first: Any
    second: Any
    w_first: Any
    w_second: Any


# ---- where an element lies ----


@triton.jit
def _split(program, count, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """(row, its first plane, chunk) of a program: the programs of a row run side by side, and so find each other's
    taps in the L2 cache. PARTS: programs that share the planes of a row.
    """
    # A program number has 31 bits, and so has the number of chunks of a plane; dividing in 64 would be dear.
    chunks = ((count + (BLOCK - 1)) // BLOCK).to(tl.uint32)
    outer = program.to(tl.uint32) // chunks
    chunk = program.to(tl.uint32) - outer * chunks
    return (outer // PARTS).to(tl.int64), (outer % PARTS).to(tl.int64), chunk.to(tl.int64)


@triton.jit
def _chunk(
    chunk, count, size, PER: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """`Where` of a chunk, (BLOCK / GROUP, GROUP) elements, and its `Span`. GROUP neighbours share their row, which is
    divided out once for all of them. PER: elements of a pixel.
    """
    # Unsigned division takes half the instructions of signed.
    unsigned: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    signed: tl.constexpr = tl.int64 if WIDE else tl.int32
    length = (size.width * PER).to(unsigned)
    start = chunk.to(signed) * BLOCK
    stop = tl.minimum(start + BLOCK, count)
    first = (start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP).to(unsigned)
    inner = tl.arange(0, GROUP)[None, :]
    row = first // length
    edge = (first - row * length).to(tl.int32)
    span = Span((start.to(unsigned) // length).to(tl.int32), ((stop - 1).to(unsigned) // length).to(tl.int32))
    return Where(first.to(signed) + inner, first.to(signed) < count, row.to(tl.int32), edge + inner, edge), span


@triton.jit
def _divided(position, PER: tl.constexpr):
    """(pixel, channel) of a position in a row whose pixels hold PER elements."""
    pixel = (position.to(tl.uint32) // PER).to(tl.int32)
    return pixel, position - pixel * PER


@triton.jit
def _offset(where, strides, PER: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Elements from the start of the plane: the index itself where all tensors are dense and lie alike."""
    if FLAT:
        return where.index
    else:
        kind: tl.constexpr = tl.int64 if WIDE else tl.int32
        pixel, channel = _divided(where.position, PER)
        return where.row.to(kind) * strides.row + pixel.to(kind) * strides.column + channel.to(kind) * strides.channel


@triton.jit
def _inside(where, box, PER: tl.constexpr):
    """Which elements of the chunk are in the box."""
    in_rows = (where.row >= box.top) & (where.row < box.top + box.height)
    return in_rows & (where.position >= box.left * PER) & (where.position < (box.left + box.width) * PER)


@triton.jit
def _near(where, box, PER: tl.constexpr, GROUP: tl.constexpr):
    """Which groups of the chunk reach into the box: one answer for all their members, so that loads stay wide."""
    in_rows = (where.row >= box.top) & (where.row < box.top + box.height)
    return in_rows & (where.edge + GROUP > box.left * PER) & (where.edge < (box.left + box.width) * PER)


# ---- what a row of the plan says ----


@triton.jit
def _box(box_ptr, size):
    """The four numbers there as a `Box`, within the image whatever they are."""
    top = tl.minimum(tl.maximum(tl.load(box_ptr), 0), size.height)
    left = tl.minimum(tl.maximum(tl.load(box_ptr + 1), 0), size.width)
    height = tl.minimum(tl.maximum(tl.load(box_ptr + 2), 0), size.height - top)
    width = tl.minimum(tl.maximum(tl.load(box_ptr + 3), 0), size.width - left)
    return Box(top, left, height, width)


@triton.jit
def _plan_row(rule_ptr, lam_ptr, box_ptr, i, itself, size):
    """`PlanRow` i: KEEP where nothing is to be done, and the box within the image whatever the plan holds."""
    lam = tl.load(lam_ptr + i)
    box = _box(box_ptr + 4 * i, size)
    rule = tl.load(rule_ptr + i).to(tl.int32)
    copied = (rule == RULE_MIXUP) & ((lam == 1.0) | itself)
    empty = (rule >= RULE_CUTMIX) & ((box.height == 0) | (box.width == 0))
    return PlanRow(tl.where(copied | empty, RULE_KEEP, rule), lam, box)


@triton.jit
def _unless_apart(plan, span):
    """The row's plan for a chunk of the image rows `span`: KEEP where none of them is in the box."""
    apart = (span.last < plan.box.top) | (span.first >= plan.box.top + plan.box.height)
    return PlanRow(tl.where((plan.rule >= RULE_CUTMIX) & apart, RULE_KEEP, plan.rule), plan.lam, plan.box)


# ---- pixels ----


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """float32 to `dtype` with one rounding; uint8 to nearest, ties to even, NaN to 0."""
    if dtype == tl.uint8:
        # Adding 2^23 leaves the rounded integer in the low bits; comparing in this order sends NaN to 0.
        low = tl.where(values > 0.0, values, 0.0)
        bounded = tl.where(low < 255.0, low, 255.0)
        return (bounded + 8388608.0).to(tl.int32, bitcast=True).to(tl.uint8)
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
        if plan.rule == RULE_MIXUP:
            pixels = _rounded(plan.lam * own.to(tl.float32) + (1.0 - plan.lam) * other.to(tl.float32), own.dtype)
    if CUTMIX:
        if plan.rule == RULE_CUTMIX:
            pixels = tl.where(_inside(where, plan.box, PER), other, own)
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
    where, first_plane, plane: tl.constexpr, values, table_ptr, C: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """The value of each element's channel: from scalars for up to four channels, else from a table.

    Where a plane is a channel, that is one value. Else the channels of a group are those of its first element, counted
    on: which member takes which of the C values the compiler knows, and only the C values are picked for every group.
    """
    if PER == 1 and C > 4:
        return tl.load(table_ptr + first_plane)
    elif PER == 1:
        return values[plane]
    elif C > 4:
        return tl.load(table_ptr + _divided(where.position, PER)[1])  # narrow: one of C values
    else:
        first = _divided(where.edge, PER)[1]
        inner = tl.arange(0, GROUP)[None, :] % C
        value = _picked(first, values, C)
        for later in tl.static_range(1, C):
            value = tl.where(inner == later, _picked((first + later) % C, values, C), value)
        return value


@triton.jit
def _finished(
    pixels, where, first_plane, plane: tl.constexpr, scaling, dtype: tl.constexpr, C: tl.constexpr, PER: tl.constexpr,
    GROUP: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """One plane's pixels normalised, then rounded to the dtype of the result."""
    if NORMALISE:
        centre = _per_channel(where, first_plane, plane, scaling.centres, scaling.table_ptr, C, PER, GROUP)
        scale = _per_channel(where, first_plane, plane, scaling.scales, scaling.table_ptr + C, C, PER, GROUP)
        return _rounded((pixels - centre) * scale, dtype)
    elif pixels.dtype == dtype:
        return pixels
    else:
        return _rounded(pixels, dtype)


@triton.jit
def _taps(position, target, extent):
    """Where resizing `extent` pixels to `target` looks, as torch.nn.functional.interpolate in float32: bilinear,
    align_corners=False.
    """
    scale = tl.div_rn(extent.to(tl.float32), target.to(tl.float32))
    source = tl.maximum(scale * (position.to(tl.float32) + 0.5) - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), extent - 1)
    # Where the sizes agree nothing is resized, and the neighbour, which may hold NaN, is not looked at.
    last = tl.where(target == extent, 0, extent - 1)
    second = tl.where(first < last, first + 1, first)
    weight = tl.minimum(source - first.to(tl.float32), 1.0)
    return Taps(first, second, 1.0 - weight, weight)


@triton.jit
def _box_part(
    row, start, box, chunk, size, PER: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """(`Where`, pixel, channel) of COLUMNS elements of rows of a box, from element `start` of each on; those that are
    not in the box and the chunk are masked. The pixel is counted from the left of the box.
    """
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    begin = chunk.to(kind) * BLOCK
    across = start + tl.arange(0, COLUMNS)[None, :]
    pixel, channel = _divided(across, PER)
    position = box.left * PER + across
    index = row.to(kind) * (size.width * PER) + position
    mask = (row < box.top + box.height) & (across < box.width * PER) & (index >= begin) & (index < begin + BLOCK)
    return Where(index, mask, row, position, position), pixel, channel


@triton.jit
def _fill_box(
    source, target, chunk, count, box, span, size, source_strides, target_strides, source_plane, target_plane,
    first_plane, scaling, work: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, PLANES: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Write the source image, resized to the box, over the part of the box that lies in the chunk.

    The rows of the box that reach into the chunk, one after the other, in tiles of LINES * COLUMNS: each thread works
    out where its pixel looks once for all its channels (planes, or up to four side by side), and asks for all of
    their taps before it uses the first.
    """
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    result: tl.constexpr = target.dtype.element_ty
    # More channels side by side are taken one by one, as pixels of their own.
    ALONE: tl.constexpr = PER if PER > 4 else 1
    SIDE: tl.constexpr = PER // ALONE
    CHANNELS: tl.constexpr = SIDE if PER > 1 else PLANES
    top, left, height, width = box
    begin = chunk.to(kind) * BLOCK
    first_row = tl.maximum(span.first, top)
    length = width * ALONE
    total = (tl.minimum(span.last + 1, top + height) - first_row) * length
    for start in range(0, total, LINES * COLUMNS):
        place = start + tl.arange(0, LINES * COLUMNS)
        line, across = _line_of(place, length)
        row = first_row + line
        pixel, channel = _divided(across, ALONE)
        y, x = _taps(row - top, height, size.height), _taps(pixel, width, size.width)
        upper, lower = y.first.to(kind) * source_strides.row, y.second.to(kind) * source_strides.row
        before = x.first.to(kind) * source_strides.column + channel.to(kind) * source_strides.channel
        behind = x.second.to(kind) * source_strides.column + channel.to(kind) * source_strides.channel
        position = left * PER + across * SIDE
        index = row.to(kind) * (size.width * PER) + position
        mask = (place < total) & (index + SIDE > begin) & (index < begin + BLOCK)
        where = Where(index, mask, row, position, position)
        offset = _offset(where, target_strides, PER, FLAT, WIDE)
        taps = ()
        for c in tl.static_range(CHANNELS):
            base = source + (c * source_plane if PER == 1 else c * source_strides.channel)
            taps = taps + (tl.load(base + (upper + before), mask=mask, other=0),)  # narrow: a tap
            taps = taps + (tl.load(base + (upper + behind), mask=mask, other=0),)  # narrow: a tap
            taps = taps + (tl.load(base + (lower + before), mask=mask, other=0),)  # narrow: a tap
            taps = taps + (tl.load(base + (lower + behind), mask=mask, other=0),)  # narrow: a tap
        for c in tl.static_range(CHANNELS):
            above = x.w_first * taps[4 * c].to(tl.float32) + x.w_second * taps[4 * c + 1].to(tl.float32)
            below = x.w_first * taps[4 * c + 2].to(tl.float32) + x.w_second * taps[4 * c + 3].to(tl.float32)
            patch = y.w_first * above + y.w_second * below
            pixels = _rounded(patch, work)
            # A channel known to the compiler: as where each has a plane of its own.
            pixels = _finished(pixels, where, first_plane, c, scaling, result, C, ALONE, 1, NORMALISE)
            own = mask & (index + c >= begin) & (index + c < begin + BLOCK) if SIDE > 1 else mask
            step = c * target_plane if PER == 1 else c * target_strides.channel
            tl.store(target + step + offset, pixels, mask=own)  # narrow: boxes begin anywhere


@triton.jit
def _line_of(place, length):
    """(line, position in it) of places that are counted over lines of this length."""
    line = (place.to(tl.uint32) // length.to(tl.uint32)).to(tl.int32)
    return line, place - line * length


@triton.jit
def _erase(
    target, i, chunk, span, size, erased, strides, target_plane, first_plane, C: tl.constexpr, PER: tl.constexpr,
    PLANES: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    COLUMNS: tl.constexpr, PER_PIXEL: tl.constexpr,
):  # fmt: skip
    """Write what is erased of image i, and lies in the chunk, over it: box by box, the later ones over the earlier.

    Tiles of LINES box rows by COLUMNS elements, as what is resized.
    """
    result: tl.constexpr = target.dtype.element_ty
    for k in range(erased.boxes):
        # What it is written over, the box before it too, was stored by other threads of this program.
        tl.debug_barrier()
        box_ptr = erased.box_ptr + 5 * (i * erased.boxes + k)
        box = _box(box_ptr, size)
        colour = tl.load(box_ptr + 4).to(tl.int64)
        for line in range(tl.maximum(span.first, box.top), tl.minimum(span.last + 1, box.top + box.height), LINES):
            row = line + tl.arange(0, LINES)[:, None]
            for start in range(0, box.width * PER, COLUMNS):
                where, pixel, channel = _box_part(row, start, box, chunk, size, PER, WIDE, BLOCK, COLUMNS)
                offset = _offset(where, strides, PER, FLAT, WIDE)
                of = colour
                if PER_PIXEL:
                    of += (row - box.top).to(tl.int64) * box.width + pixel
                # A row number on the device was not checked on the host; out of range, it must still not be followed.
                of = tl.minimum(tl.maximum(of, 0), erased.fills - 1) * C + channel + first_plane
                for plane in tl.static_range(PLANES):
                    pixels = tl.load(erased.fill_ptr + (of + plane), mask=where.mask, other=0)  # narrow: boxes
                    place = target + plane * target_plane + offset
                    tl.store(place, _rounded(pixels, result), mask=where.mask)  # narrow: boxes begin anywhere


@triton.jit(do_not_specialize=_FREE)
def mix_pair_kernel(
    images_ptr, mixed_ptr, clean_ptr, rule_ptr, lam_ptr, box_ptr, table_ptr, boxes_ptr, fill_ptr, rows, boxes, fills,
    units, H, W,
    images_n, images_p, images_h, images_w, images_c, mixed_n, mixed_p, mixed_h, mixed_w, mixed_c,
    clean_n, clean_p, clean_h, clean_w, clean_c, centre0, centre1, centre2, centre3, scale0, scale1, scale2, scale3,
    C: tl.constexpr, PER: tl.constexpr, PLANES: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    MIXUP: tl.constexpr, CUTMIX: tl.constexpr, RESIZEMIX: tl.constexpr, NORMALISE: tl.constexpr, CLEAN: tl.constexpr,
    ERASE: tl.constexpr, PER_PIXEL: tl.constexpr,
):  # fmt: skip
    """Rows i and N-1-i, each mixed with the other: a program owns one chunk of PLANES planes of both.

    `units` (elements of a plane) and the strides of images and planes count UNIT elements, so that the compiler sees by
    how much they are divisible.
    """
    size = Size(H, W)
    count = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    i, first_plane, chunk = _split(program, count, BLOCK, C // (PER * PLANES))
    j = rows - 1 - i
    where, span = _chunk(chunk, count, size, PER, GROUP, BLOCK, WIDE)
    mask = where.mask
    strides = Strides(images_h, images_w, images_c)
    source_i = images_ptr + (i * images_n + first_plane * images_p) * UNIT
    source_j = images_ptr + (j * images_n + first_plane * images_p) * UNIT
    offset = _offset(where, strides, PER, FLAT, WIDE)
    image_plane, mixed_plane = tl.cast(images_p, tl.int64) * UNIT, tl.cast(mixed_p, tl.int64) * UNIT
    raw_i = _loaded(source_i, offset, image_plane, mask, PLANES)
    raw_j = _loaded(source_j, offset, image_plane, mask, PLANES)
    plan_i = _unless_apart(_plan_row(rule_ptr, lam_ptr, box_ptr, i, i == j, size), span)
    plan_j = _unless_apart(_plan_row(rule_ptr, lam_ptr, box_ptr, j, i == j, size), span)
    scaling = Scaling((centre0, centre1, centre2, centre3), (scale0, scale1, scale2, scale3), table_ptr)
    result: tl.constexpr = mixed_ptr.dtype.element_ty
    direct: tl.constexpr = images_ptr.dtype.element_ty == result and not NORMALISE
    work: tl.constexpr = images_ptr.dtype.element_ty if direct else tl.float32
    targets = Strides(mixed_h, mixed_w, mixed_c)
    target_i = mixed_ptr + (i * mixed_n + first_plane * mixed_p) * UNIT
    target_j = mixed_ptr + (j * mixed_n + first_plane * mixed_p) * UNIT
    offset = _offset(where, targets, PER, FLAT, WIDE)
    for plane in tl.static_range(PLANES):
        own_i, own_j = raw_i[plane].to(work), raw_j[plane].to(work)
        if CLEAN:
            clean = (
                clean_ptr
                + (first_plane + plane) * clean_p * UNIT
                + _offset(where, Strides(clean_h, clean_w, clean_c), PER, FLAT, WIDE)
            )
            pixels = _finished(own_i, where, first_plane, plane, scaling, result, C, PER, GROUP, NORMALISE)
            tl.store(clean + i * clean_n * UNIT, pixels, mask=mask)
            pixels = _finished(own_j, where, first_plane, plane, scaling, result, C, PER, GROUP, NORMALISE)
            tl.store(clean + j * clean_n * UNIT, pixels, mask=mask)
        pixels = _mixed(own_i, own_j, where, plan_i, PER, MIXUP, CUTMIX)
        pixels = _finished(pixels, where, first_plane, plane, scaling, result, C, PER, GROUP, NORMALISE)
        tl.store(target_i + plane * mixed_plane + offset, pixels, mask=mask)
        pixels = _mixed(own_j, own_i, where, plan_j, PER, MIXUP, CUTMIX)
        pixels = _finished(pixels, where, first_plane, plane, scaling, result, C, PER, GROUP, NORMALISE)
        tl.store(target_j + plane * mixed_plane + offset, pixels, mask=mask)
    if RESIZEMIX:
        # What the box is written over was stored by other threads of this program.
        tl.debug_barrier()
        if plan_i.rule == RULE_RESIZEMIX:
            _fill_box(
                source_j, target_i, chunk, count, plan_i.box, span, size, strides, targets, image_plane, mixed_plane,
                first_plane, scaling, work, C, PER, PLANES, FLAT, WIDE, BLOCK, LINES, COLUMNS, NORMALISE,
            )  # fmt: skip
        if plan_j.rule == RULE_RESIZEMIX:
            _fill_box(
                source_i, target_j, chunk, count, plan_j.box, span, size, strides, targets, image_plane, mixed_plane,
                first_plane, scaling, work, C, PER, PLANES, FLAT, WIDE, BLOCK, LINES, COLUMNS, NORMALISE,
            )  # fmt: skip
    if ERASE:
        erased = Erased(boxes_ptr, fill_ptr, boxes, fills)
        _erase(
            target_i, i, chunk, span, size, erased, targets, mixed_plane, first_plane, C, PER, PLANES, FLAT, WIDE,
            BLOCK, LINES, COLUMNS, PER_PIXEL,
        )  # fmt: skip
        _erase(
            target_j, j, chunk, span, size, erased, targets, mixed_plane, first_plane, C, PER, PLANES, FLAT, WIDE,
            BLOCK, LINES, COLUMNS, PER_PIXEL,
        )  # fmt: skip


@triton.jit(do_not_specialize=_FREE)
def mix_gather_kernel(
    images_ptr, partners_ptr, mixed_ptr, clean_ptr, rule_ptr, partner_ptr, lam_ptr, box_ptr, table_ptr, boxes_ptr,
    fill_ptr, sources, boxes, fills, units, H, W, images_n, images_p, images_h, images_w, images_c, partners_n, partners_p, partners_h, partners_w, partners_c,
    mixed_n, mixed_p, mixed_h, mixed_w, mixed_c, clean_n, clean_p, clean_h, clean_w, clean_c,
    centre0, centre1, centre2, centre3, scale0, scale1, scale2, scale3,
    C: tl.constexpr, PER: tl.constexpr, PLANES: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    MIXUP: tl.constexpr, CUTMIX: tl.constexpr, RESIZEMIX: tl.constexpr, NORMALISE: tl.constexpr, CLEAN: tl.constexpr,
    SELF: tl.constexpr, ERASE: tl.constexpr, PER_PIXEL: tl.constexpr,
):  # fmt: skip
    """Row i mixed with row partner[i] of `partners`, whatever that is: a program owns one chunk of PLANES planes.

    SELF: the partners are the images themselves. Of the partner only what the rule needs is read.
    """
    size = Size(H, W)
    count = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    i, first_plane, chunk = _split(program, count, BLOCK, C // (PER * PLANES))
    # A row number on the device was not checked on the host; out of range, it must still not be followed.
    j = tl.minimum(tl.maximum(tl.load(partner_ptr + i), 0), sources - 1)
    where, span = _chunk(chunk, count, size, PER, GROUP, BLOCK, WIDE)
    mask = where.mask
    image = images_ptr + (i * images_n + first_plane * images_p) * UNIT
    source = partners_ptr + (j * partners_n + first_plane * partners_p) * UNIT
    strides = Strides(partners_h, partners_w, partners_c)
    offset = _offset(where, Strides(images_h, images_w, images_c), PER, FLAT, WIDE)
    partner_plane, mixed_plane = tl.cast(partners_p, tl.int64) * UNIT, tl.cast(mixed_p, tl.int64) * UNIT
    raw_own = _loaded(image, offset, tl.cast(images_p, tl.int64) * UNIT, mask, PLANES)
    plan = _unless_apart(_plan_row(rule_ptr, lam_ptr, box_ptr, i, (i == j) & SELF, size), span)
    needed = mask & ((plan.rule == RULE_MIXUP) | ((plan.rule == RULE_CUTMIX) & _near(where, plan.box, PER, GROUP)))
    raw_other = _loaded(source, _offset(where, strides, PER, FLAT, WIDE), partner_plane, needed, PLANES)
    scaling = Scaling((centre0, centre1, centre2, centre3), (scale0, scale1, scale2, scale3), table_ptr)
    result: tl.constexpr = mixed_ptr.dtype.element_ty
    direct: tl.constexpr = images_ptr.dtype.element_ty == result and not NORMALISE
    work: tl.constexpr = images_ptr.dtype.element_ty if direct else tl.float32
    targets = Strides(mixed_h, mixed_w, mixed_c)
    target = mixed_ptr + (i * mixed_n + first_plane * mixed_p) * UNIT
    offset = _offset(where, targets, PER, FLAT, WIDE)
    for plane in tl.static_range(PLANES):
        own, other = raw_own[plane].to(work), raw_other[plane].to(work)
        if CLEAN:
            pixels = _finished(own, where, first_plane, plane, scaling, result, C, PER, GROUP, NORMALISE)
            clean = clean_ptr + (i * clean_n + (first_plane + plane) * clean_p) * UNIT
            tl.store(clean + _offset(where, Strides(clean_h, clean_w, clean_c), PER, FLAT, WIDE), pixels, mask=mask)
        pixels = _mixed(own, other, where, plan, PER, MIXUP, CUTMIX)
        pixels = _finished(pixels, where, first_plane, plane, scaling, result, C, PER, GROUP, NORMALISE)
        tl.store(target + plane * mixed_plane + offset, pixels, mask=mask)
    if RESIZEMIX:
        # What the box is written over was stored by other threads of this program.
        tl.debug_barrier()
        if plan.rule == RULE_RESIZEMIX:
            _fill_box(
                source, target, chunk, count, plan.box, span, size, strides, targets, partner_plane, mixed_plane,
                first_plane, scaling, work, C, PER, PLANES, FLAT, WIDE, BLOCK, LINES, COLUMNS, NORMALISE,
            )  # fmt: skip
    if ERASE:
        erased = Erased(boxes_ptr, fill_ptr, boxes, fills)
        _erase(
            target, i, chunk, span, size, erased, targets, mixed_plane, first_plane, C, PER, PLANES, FLAT, WIDE, BLOCK, LINES,
            COLUMNS, PER_PIXEL,
        )  # fmt: skip


# ---- gradients ----


@triton.jit
def _resized_backward(source, where, box, size, strides, PER: tl.constexpr, WIDE: tl.constexpr):
    """The transpose of resizing: what the box's gradients give back to the elements of the chunk.

    A box is never larger than the image, so a pixel is looked at from at most three rows and three columns of it,
    those around its own place in the box. Gathering them makes the order of the sum fixed.
    """
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    column, channel = _divided(where.position, PER)
    middle_y = ((where.row.to(tl.float32) + 0.5) * (box.height.to(tl.float32) / size.height.to(tl.float32))).to(
        tl.int32
    )
    middle_x = ((column.to(tl.float32) + 0.5) * (box.width.to(tl.float32) / size.width.to(tl.float32))).to(tl.int32)
    total = tl.zeros(where.position.shape, tl.float32)
    for down in tl.static_range(3):
        y = middle_y + (down - 1)
        taps = _taps(y, box.height, size.height)
        weight_y = tl.where(taps.first == where.row, taps.w_first, 0.0)
        weight_y += tl.where(taps.second == where.row, taps.w_second, 0.0)
        weight_y = tl.where((y >= 0) & (y < box.height), weight_y, 0.0)
        line = (y + box.top).to(kind) * strides.row + channel.to(kind) * strides.channel
        for right in tl.static_range(3):
            x = middle_x + (right - 1)
            taps = _taps(x, box.width, size.width)
            weight_x = tl.where(taps.first == column, taps.w_first, 0.0)
            weight_x += tl.where(taps.second == column, taps.w_second, 0.0)
            weight = weight_y * tl.where((x >= 0) & (x < box.width), weight_x, 0.0)
            place = source + (line + (x + box.left).to(kind) * strides.column)
            grad = tl.load(place, mask=where.mask & (weight != 0.0), other=0)  # narrow: a tap
            total += weight * grad.to(tl.float32)
    return total


@triton.jit
def _own_gradient(grad, where, plan, PER: tl.constexpr, MIXUP: tl.constexpr, BOXED: tl.constexpr):
    """What the gradient of a mixed row gives back to the row's own pixels."""
    result = grad
    if MIXUP:
        if plan.rule == RULE_MIXUP:
            result = plan.lam * grad
    if BOXED:
        if plan.rule >= RULE_CUTMIX:
            result = tl.where(_inside(where, plan.box, PER), 0.0, grad)
    return result


@triton.jit
def _partner_gradient(
    grad, source, where, plan, size, strides, PER: tl.constexpr, WIDE: tl.constexpr, MIXUP: tl.constexpr,
    CUTMIX: tl.constexpr, RESIZEMIX: tl.constexpr,
):  # fmt: skip
    """What it gives back to the partner's pixels; `source` points to the row's gradient, `grad` is its chunk."""
    result = tl.zeros(grad.shape, tl.float32)
    if MIXUP:
        if plan.rule == RULE_MIXUP:
            result = (1.0 - plan.lam) * grad
    if CUTMIX:
        if plan.rule == RULE_CUTMIX:
            result = tl.where(_inside(where, plan.box, PER), grad, 0.0)
    if RESIZEMIX:
        if plan.rule == RULE_RESIZEMIX:
            result = _resized_backward(source, where, plan.box, size, strides, PER, WIDE)
    return result


@triton.jit
def _spread(where, first_plane, scales, table_ptr, C: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr):
    """1 / std of each element's channel, for a program of one plane."""
    if PER == 1 and C <= 4:
        return _picked(first_plane, scales, C)
    else:
        return _per_channel(where, first_plane, 0, scales, table_ptr + C, C, PER, GROUP)


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
    size = Size(H, W)
    count = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    i, first_plane, chunk = _split(program, count, BLOCK, C // PER)
    j = rows - 1 - i
    where, _ = _chunk(chunk, count, size, PER, GROUP, BLOCK, WIDE)
    mask = where.mask
    grad_i = tl.zeros(where.index.shape, tl.float32)
    grad_j = tl.zeros(where.index.shape, tl.float32)
    if MIXED:
        strides = Strides(mixed_h, mixed_w, mixed_c)
        offset = _offset(where, strides, PER, FLAT, WIDE)
        source_i = mixed_ptr + (i * mixed_n + first_plane * mixed_p) * UNIT
        source_j = mixed_ptr + (j * mixed_n + first_plane * mixed_p) * UNIT
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
        clean = (
            clean_ptr
            + first_plane * clean_p * UNIT
            + _offset(where, Strides(clean_h, clean_w, clean_c), PER, FLAT, WIDE)
        )
        grad_i += tl.load(clean + i * clean_n * UNIT, mask=mask, other=0).to(tl.float32)
        grad_j += tl.load(clean + j * clean_n * UNIT, mask=mask, other=0).to(tl.float32)
    if NORMALISE:
        spread = _spread(where, first_plane, (scale0, scale1, scale2, scale3), table_ptr, C, PER, GROUP)
        grad_i *= spread
        grad_j *= spread
    dtype: tl.constexpr = result_ptr.dtype.element_ty
    target = (
        result_ptr
        + first_plane * result_p * UNIT
        + _offset(where, Strides(result_h, result_w, result_c), PER, FLAT, WIDE)
    )
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
    size = Size(H, W)
    count = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    i, first_plane, chunk = _split(program, count, BLOCK, C // PER)
    where, _ = _chunk(chunk, count, size, PER, GROUP, BLOCK, WIDE)
    mask = where.mask
    strides = Strides(mixed_h, mixed_w, mixed_c)
    offset = _offset(where, strides, PER, FLAT, WIDE)
    grads = mixed_ptr + first_plane * mixed_p * UNIT
    total = tl.zeros(where.index.shape, tl.float32)
    if OWN and MIXED:
        itself = (tl.load(partner_ptr + i) == i) & OTHER
        own_plan = _plan_row(rule_ptr, lam_ptr, box_ptr, i, itself, size)
        own = tl.load(grads + i * mixed_n * UNIT + offset, mask=mask, other=0).to(tl.float32)
        total += _own_gradient(own, where, own_plan, PER, MIXUP, CUTMIX or RESIZEMIX)
    if OWN and CLEAN:
        clean = clean_ptr + (i * clean_n + first_plane * clean_p) * UNIT
        offset_clean = _offset(where, Strides(clean_h, clean_w, clean_c), PER, FLAT, WIDE)
        total += tl.load(clean + offset_clean, mask=mask, other=0).to(tl.float32)
    if OTHER and MIXED:
        for user in range(tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)):
            k = tl.load(users_ptr + user)
            plan = _plan_row(rule_ptr, lam_ptr, box_ptr, k, (k == i) & OWN, size)
            source = grads + k * mixed_n * UNIT
            needed = mask & (
                (plan.rule == RULE_MIXUP) | ((plan.rule == RULE_CUTMIX) & _near(where, plan.box, PER, GROUP))
            )
            grad = tl.load(source + offset, mask=needed, other=0).to(tl.float32)
            total += _partner_gradient(
                grad, source, where, plan, size, strides, PER, WIDE, MIXUP, CUTMIX, RESIZEMIX
            )  # fmt: skip
    if NORMALISE:
        total *= _spread(where, first_plane, (scale0, scale1, scale2, scale3), table_ptr, C, PER, GROUP)
    target = result_ptr + (i * result_n + first_plane * result_p) * UNIT
    offset = _offset(where, Strides(result_h, result_w, result_c), PER, FLAT, WIDE)
    tl.store(target + offset, total.to(result_ptr.dtype.element_ty), mask=mask)
