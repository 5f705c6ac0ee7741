"""The Triton kernels of `augment`: resize and flip; colours; blur along rows; blur along columns.

Between launches a view is float32 planes. What holds up a single launch is the contrast, which needs the mean of the
whole view, and the blur, which needs neighbours. A program works on BLOCK pixels of one image, of its three channels
(GROUP = 3) or of one (GROUP = 1, where there are not three).
"""

import triton
from triton import language as tl

_TOP = tl.constexpr(255.0)


@triton.jit
def _clamped(values):
    return tl.minimum(tl.maximum(values, 0.0), _TOP)


@triton.jit
def _luma(r, g, b):
    """ITU-R 601."""
    return 0.299 * r + 0.587 * g + 0.114 * b


@triton.jit
def _whole(values):
    """Rounded to nearest, ties to even: adding 2^23 leaves the whole number in the lowest bits."""
    return (_clamped(values) + 8388608.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _solarized_from(solarize_ptr, n):
    """The level from which values are inverted: out of reach where the row is not solarised."""
    return tl.where(tl.load(solarize_ptr + n) != 0, 128, 256)


@triton.jit
def _level(values, from_level):
    """The byte that is stored."""
    whole = _whole(values)
    return tl.where(whole >= from_level, 255 - whole, whole).to(tl.uint8)


@triton.jit
def _filter(x, CUBIC: tl.constexpr):
    """The triangle, or the cubic with a = -0.5, at a distance from a sample's centre."""
    x = tl.abs(x)
    if CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        return tl.maximum(1.0 - x, 0.0)


@triton.jit
def _axis(box_ptr, n, axis, count, size, sample, CUT: tl.constexpr, CUBIC: tl.constexpr):
    """One axis of the crop, kept within the image: for each output sample the first pixel it takes, the pixel after
    the last, and its centre; how far distances shrink under the filter, and how many pixels a sample may take.

    With CUT positions count from the crop's edge, beyond which nothing is taken.
    """
    start = tl.load(box_ptr + 4 * n + axis)
    length = tl.load(box_ptr + 4 * n + 2 + axis)
    if CUT:
        base = tl.minimum(tl.maximum(start, 0), size - 1)
        end = tl.minimum(tl.maximum(length, 1), size - base)
        scale = end.to(tl.float32) / count
        offset = 0.0
    else:
        base = start.to(tl.int32) * 0
        end = base + size
        offset = tl.minimum(tl.maximum(start, 0.0), size - 1.0)
        scale = tl.minimum(tl.maximum(length, 1e-3), size - offset) / count
    stretch = tl.maximum(scale, 1.0)
    support = stretch * 2.0 if CUBIC else stretch
    centre = offset + scale * (sample.to(tl.float32) + 0.5)
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    last = tl.minimum((centre + support + 0.5).to(tl.int32), end)
    return base, first, last, centre, 1.0 / stretch, (2.0 * support).to(tl.int32) + 2


@triton.jit(do_not_specialize=["stride_n", "out_h", "out_w", "tiles", "units"])
def augment_resize_kernel(
    images_ptr, offset_ptr, height_ptr, width_ptr, box_ptr, flip_ptr, brightness_ptr, view_ptr, sums_ptr, stride_n,
    stride_c, stride_h, stride_w, in_h, in_w, out_h, out_w, area, tiles, units, FLAT: tl.constexpr,
    GROUP: tl.constexpr, CUT: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Crop, resize, flip and brightness of BLOCK pixels; and the sum of their luma.

    area: out_h * out_w. units: groups of channels per image. FLAT: each image has its own offset, height and width,
    and its channels lie side by side. Grid: (images * units * tiles,).
    """
    program = tl.program_id(0).to(tl.int64)
    tile, unit = program % tiles, program // tiles
    n, group = unit // units, unit % units
    at = (tile * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    inside = at < area
    y, x = at // out_w, at % out_w
    x = tl.where(tl.load(flip_ptr + n) != 0, out_w - 1 - x, x)
    if FLAT:
        in_h = tl.maximum(tl.load(height_ptr + n), 1)
        in_w = tl.maximum(tl.load(width_ptr + n), 1)
        stride_h = in_w * stride_w
        image = images_ptr + tl.load(offset_ptr + n) + group * GROUP
    else:
        image = images_ptr + n * stride_n + group * GROUP * stride_c
    top, first_y, last_y, centre_y, shrink_y, taps_y = _axis(box_ptr, n, 0, out_h, in_h, y, CUT, CUBIC)
    left, first_x, last_x, centre_x, shrink_x, taps_x = _axis(box_ptr, n, 1, out_w, in_w, x, CUT, CUBIC)
    total = tl.zeros([BLOCK], tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    g = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    for i in range(0, taps_y):
        row = first_y + i
        weight_y = tl.where(row < last_y, _filter((row.to(tl.float32) - centre_y + 0.5) * shrink_y, CUBIC), 0.0)
        for j in range(0, taps_x):
            column = first_x + j
            weight_x = _filter((column.to(tl.float32) - centre_x + 0.5) * shrink_x, CUBIC)
            weight = tl.where(column < last_x, weight_x, 0.0) * weight_y
            read = inside & (row < last_y) & (column < last_x)
            place = (top + row).to(tl.int64) * stride_h + (left + column).to(tl.int64) * stride_w
            total += weight
            r += weight * tl.load(image + place, mask=read, other=0).to(tl.float32)  # narrow: gather of bytes
            if GROUP == 3:
                g_ptr, b_ptr = image + stride_c, image + 2 * stride_c
                g += weight * tl.load(g_ptr + place, mask=read, other=0).to(tl.float32)  # narrow: gather of bytes
                b += weight * tl.load(b_ptr + place, mask=read, other=0).to(tl.float32)  # narrow: gather of bytes
    total = tl.where(inside, total, 1.0)
    brightness = tl.load(brightness_ptr + n)
    view = view_ptr + unit * GROUP * area + at
    r = _clamped(_clamped(r / total) * brightness)
    tl.store(view, r, mask=inside)
    light = r
    if GROUP == 3:
        g = _clamped(_clamped(g / total) * brightness)
        b = _clamped(_clamped(b / total) * brightness)
        tl.store(view + area, g, mask=inside)
        tl.store(view + 2 * area, b, mask=inside)
        light = _luma(r, g, b)
    tl.store(sums_ptr + program, tl.sum(tl.where(inside, light, 0.0), 0))


@triton.jit
def _channel_of_hue(phase, sixths, value, chroma):
    k = sixths + phase
    k = tl.where(k >= 6.0, k - 6.0, k)
    return value - chroma * tl.maximum(tl.minimum(tl.minimum(k, 4.0 - k), 1.0), 0.0)


@triton.jit
def _turned(r, g, b, turns):
    """Hue moved by a share of the colour circle; saturation and value of HSV stay."""
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    divisor = tl.where(chroma == 0.0, 1.0, chroma)
    of_blue = (r - g) / divisor + 4.0
    of_green = (b - r) / divisor + 2.0
    sixths = tl.where(value == r, (g - b) / divisor, tl.where(value == g, of_green, of_blue)) + 6.0 * turns
    sixths = tl.where(sixths < 0.0, sixths + 6.0, sixths)
    sixths = tl.where(sixths < 0.0, sixths + 6.0, sixths)
    sixths = tl.where(sixths >= 6.0, sixths - 6.0, sixths)
    sixths = tl.where(sixths >= 6.0, sixths - 6.0, sixths)
    return (
        _channel_of_hue(5.0, sixths, value, chroma),
        _channel_of_hue(3.0, sixths, value, chroma),
        _channel_of_hue(1.0, sixths, value, chroma),
    )


@triton.jit(do_not_specialize=["stride_n", "tiles", "units"])
def augment_colour_kernel(
    view_ptr, sums_ptr, contrast_ptr, saturation_ptr, hue_ptr, gray_ptr, sigma_ptr, solarize_ptr, out_ptr, stride_n,
    area, tiles, units, GROUP: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Contrast, saturation, hue and grey of BLOCK pixels; where nothing is to be blurred they are done.

    SUMS: a power of two, not below the sums that an image has. Grid as in the resize.
    """
    program = tl.program_id(0).to(tl.int64)
    tile, unit = program % tiles, program // tiles
    n, group = unit // units, unit % units
    at = (tile * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    inside = at < area
    part = tl.arange(0, SUMS)
    count = tiles * units
    sums = tl.load(sums_ptr + n * count + part, mask=part < count, other=0.0)  # narrow: a few numbers
    mean = tl.sum(sums, 0) / (area * units).to(tl.float32)
    contrast = tl.load(contrast_ptr + n)
    pull = mean * (1.0 - contrast)
    changed = contrast != 1.0
    sigma = tl.load(sigma_ptr + n)
    waiting = tl.where(sigma > 0.0, area, 0)
    waits, done = at < waiting, at < area - waiting
    from_level = _solarized_from(solarize_ptr, n)
    view = view_ptr + unit * GROUP * area + at
    out = out_ptr + n * stride_n + at.to(tl.int64) * (units * GROUP) + group * GROUP
    r = tl.load(view, mask=inside, other=0.0)
    r = tl.where(changed, _clamped(pull + r * contrast), r)
    if GROUP == 3:
        g = tl.load(view + area, mask=inside, other=0.0)
        b = tl.load(view + 2 * area, mask=inside, other=0.0)
        g = tl.where(changed, _clamped(pull + g * contrast), g)
        b = tl.where(changed, _clamped(pull + b * contrast), b)
        saturation = tl.load(saturation_ptr + n)
        grey = _luma(r, g, b) * (1.0 - saturation)
        changed = saturation != 1.0
        r = tl.where(changed, _clamped(grey + r * saturation), r)
        g = tl.where(changed, _clamped(grey + g * saturation), g)
        b = tl.where(changed, _clamped(grey + b * saturation), b)
        turns = tl.load(hue_ptr + n)
        turned_r, turned_g, turned_b = _turned(r, g, b, turns)
        changed = turns != 0.0
        r = tl.where(changed, turned_r, r)
        g = tl.where(changed, turned_g, g)
        b = tl.where(changed, turned_b, b)
        gray = tl.load(gray_ptr + n) != 0
        light = _luma(r, g, b)
        r = tl.where(gray, light, r)
        g = tl.where(gray, light, g)
        b = tl.where(gray, light, b)
        tl.store(view + area, g, mask=waits)
        tl.store(view + 2 * area, b, mask=waits)
        tl.store(out + 1, _level(g, from_level), mask=done)  # narrow: channels lie side by side
        tl.store(out + 2, _level(b, from_level), mask=done)  # narrow: channels lie side by side
    tl.store(view, r, mask=waits)
    tl.store(out, _level(r, from_level), mask=done)  # narrow: channels lie side by side


@triton.jit
def _reflected(place, size):
    """The place within [0, size) where edges are reflected without being repeated, again and again."""
    period = 2 * size - 2
    folded = tl.abs(place) % tl.maximum(period, 1)
    return tl.where(size == 1, 0, tl.minimum(folded, period - folded))


@triton.jit
def _blurred(plane, sigma, line, place, size, step, inside):
    """The weighted sum about `place` along an axis of `size` whose samples are `step` apart, the rest being `line`."""
    spread = -0.5 / (sigma * sigma)
    radius = tl.ceil(3.0 * sigma).to(tl.int32)
    sums = tl.load(plane + line + place * step, mask=inside, other=0.0)  # narrow: a row may begin anywhere
    total = sigma * 0.0 + 1.0
    for k in range(1, radius + 1):
        weight = tl.exp(spread * (k * k))
        total += 2.0 * weight
        before, after = _reflected(place - k, size), _reflected(place + k, size)
        left = tl.load(plane + line + before * step, mask=inside, other=0.0)  # narrow: neighbours at any offset
        right = tl.load(plane + line + after * step, mask=inside, other=0.0)  # narrow: neighbours at any offset
        sums += weight * (left + right)
    return sums / total


@triton.jit(do_not_specialize=["out_h", "out_w", "tiles", "planes"])
def augment_blur_rows_kernel(
    view_ptr, sigma_ptr, blurred_ptr, out_h, out_w, area, tiles, planes, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of one plane blurred along rows; nothing where there is no blur. Grid: (images * planes * tiles,)."""
    program = tl.program_id(0).to(tl.int64)
    tile, plane = program % tiles, program // tiles
    sigma = tl.load(sigma_ptr + plane // planes)
    if sigma > 0.0:
        at = (tile * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        inside = at < area
        x = at % out_w
        sums = _blurred(view_ptr + plane * area, sigma, at - x, x, out_w, 1, inside)
        tl.store(blurred_ptr + plane * area + at, sums, mask=inside)


@triton.jit(do_not_specialize=["stride_n", "out_h", "tiles", "planes"])
def augment_blur_columns_kernel(
    blurred_ptr, sigma_ptr, solarize_ptr, out_ptr, stride_n, out_h, out_w, area, tiles, planes, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same along columns, then rounded, solarised and put in place."""
    program = tl.program_id(0).to(tl.int64)
    tile, plane = program % tiles, program // tiles
    n, channel = plane // planes, plane % planes
    sigma = tl.load(sigma_ptr + n)
    if sigma > 0.0:
        at = (tile * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        inside = at < area
        sums = _blurred(blurred_ptr + plane * area, sigma, at % out_w, at // out_w, out_h, out_w, inside)
        out = out_ptr + n * stride_n + at.to(tl.int64) * planes + channel
        tl.store(out, _level(sums, _solarized_from(solarize_ptr, n)), mask=inside)  # narrow: channels lie side by side
