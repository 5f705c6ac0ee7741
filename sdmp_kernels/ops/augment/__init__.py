"""From decoded images to the views of a training step: crop, resize, flip, colours, blur, solarise, in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdmp_kernels._checks import check_choice, check_tensor, readable
from sdmp_kernels.ops.augment import op as _op  # noqa: F401  registers the operators
from sdmp_kernels.ops.augment.arguments import FlatImages
from sdmp_kernels.views import Interpolation, Size, ViewDraws, view_size


def augment(
    images: Tensor | Sequence[Tensor] | FlatImages,
    draws: ViewDraws,
    size_px: Size,
    *,
    interpolation: Interpolation = "bilinear",
    out: Tensor | None = None,
) -> Tensor:
    """Make one view of every image, as `draws` says.

    Per image, in this order: crop `box` and resize it to the view with antialiasing; flip; brightness (times a
    factor b); contrast, m + c (x - m) about the view's mean luma m after brightness; saturation, l + s (x - l) about
    the pixel's luma l; hue, turned in HSV; grey, the luma in all channels; Gaussian blur; rounding to nearest, ties to
    even; solarise, 255 - x where x is 128 or more. Values are clamped to 0..255 after each step that can leave it.
    Luma is ITU-R 601: 0.299 R + 0.587 G + 0.114 B. Arithmetic is float32 and rounds once.

    The resize is that of `torch.nn.functional.interpolate(antialias=True)` on floats: a triangle ("bilinear") or a
    cubic with a = -0.5 ("bicubic"), widened by the scale where it shrinks. An int32 box is cut out first, so that the
    filter ends at its edges; a float32 box is a part of the resized whole image, whose filter ends at the image's
    edges: what torchvision's Resize and CenterCrop give. The blur reaches ceil(3 sigma) pixels, with weights
    exp(-x^2 / (2 sigma^2)) divided by their sum; edges are reflected without being repeated, again and again where the
    window is wider than the view, and a side of one pixel is constant. Neutral numbers (factor 1, hue 0, sigma 0, a
    box of the view's own size) leave pixels bit for bit.

    With one channel luma is the value itself, and saturation, hue and grey do nothing.

    Args:
        images: (N, C, H, W) uint8 of any strides; or N tensors (H_i, W_i, C) uint8 as decoders give them, read where
            they lie on the CPU (on a GPU one after another: give it one batch); or `FlatImages`, images of many
            sizes in one buffer, which a GPU takes in one go. On a GPU their sizes are not checked against the buffer.
        draws: N rows, on the device of the images. Boxes must lie inside their image; on a GPU they are clamped.
        size_px: side of the views in pixels, or (height, width).
        interpolation: "bilinear" or "bicubic".
        out: (N, C, height, width) uint8, channels_last, written and returned; default a new tensor.

    Returns:
        (N, C, height, width) uint8, channels_last.

    Raises:
        TypeError, ValueError: naming the argument. With channels other than 1 or 3, saturation, hue and grey must be
            neutral (on a GPU they are ignored, since looking would stop the host).

    Source: the recipes of BYOL (Grill et al. 2020, appendix B) and DINO (Caron et al. 2021), the resize of Pillow.
    """
    height, width = view_size(size_px)
    check_choice("interpolation", interpolation, ("bilinear", "bicubic"))
    if not isinstance(draws, ViewDraws):
        raise TypeError(f"draws must be a ViewDraws (see draw_views), got {type(draws).__name__}")
    given, sizes, channels = _check_images(images)
    count = len(images.offsets) if isinstance(images, FlatImages) else len(sizes)
    if count != len(draws):
        raise ValueError(f"draws has {len(draws)} rows but there are {count} images; draw one view per image")
    for image in given:
        if image.device != draws.device:
            raise ValueError(f"images are on {image.device} but draws on {draws.device}; use ViewDraws.to(device)")
    if len(draws) and readable(draws.box):
        _check_values(draws, sizes, channels)
    shape = (len(draws), channels, height, width)
    if out is None:
        device = given[0].device if given else draws.device
        out = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    else:
        _check_out(out, shape, draws.device)
    radius = -1 if draws.max_sigma is None else _radius(draws.max_sigma)
    torch.ops.sdmp.augment(given, *draws.tensors(), interpolation == "bicubic", radius, out)
    return out


def _radius(sigma: float) -> int:
    return -int(-3 * sigma // 1)


def _check_images(
    images: Tensor | Sequence[Tensor] | FlatImages,
) -> tuple[list[Tensor], list[tuple[int, int]], int]:
    """The images as the operator takes them, their (height, width), and how many channels they have.

    Sizes on a GPU are not looked at, since that would stop the host: none are returned then.
    """
    if isinstance(images, FlatImages):
        return _check_flat(images)
    if isinstance(images, Tensor):
        check_tensor("images", images, dtypes=(torch.uint8,), ndim=4, shape="(N, C, H, W)")
        n, channels, height, width = images.shape
        if n and channels * height * width == 0:
            raise ValueError(f"images must have channels and pixels, got shape {tuple(images.shape)}")
        return [images], [(height, width)] * n, channels
    if not isinstance(images, Sequence):
        raise TypeError(f"images must be a tensor (N, C, H, W) or N tensors (H, W, C), got {type(images).__name__}")
    for i, image in enumerate(images):
        check_tensor(f"images[{i}]", image, dtypes=(torch.uint8,), ndim=3, shape="(H, W, C)")
        if image.numel() == 0:
            raise ValueError(f"images[{i}] must have pixels, got shape {tuple(image.shape)}")
        if image.shape[2] != images[0].shape[2]:
            raise ValueError(
                f"images[{i}] has {image.shape[2]} channels but images[0] has {images[0].shape[2]}; "
                "give images of one kind"
            )
    return list(images), [(i.shape[0], i.shape[1]) for i in images], images[0].shape[2] if len(images) else 3


def _check_flat(images: FlatImages) -> tuple[list[Tensor], list[tuple[int, int]], int]:
    pixels, offsets, heights, widths = images.pixels, images.offsets, images.heights, images.widths
    channels = images.channels
    check_tensor("pixels", pixels, dtypes=(torch.uint8,), ndim=1, shape="(bytes,)")
    if not pixels.is_contiguous():
        raise ValueError("pixels must be contiguous, got strides " + str(pixels.stride()))
    if channels < 1:
        raise ValueError(f"channels must be positive, got {channels}")
    kinds = {"offsets": torch.int64, "heights": torch.int32, "widths": torch.int32}
    for (name, dtype), rows in zip(kinds.items(), (offsets, heights, widths), strict=True):
        check_tensor(name, rows, dtypes=(dtype,), ndim=1, shape="(N,)")
        if len(rows) != len(offsets):
            raise ValueError(f"{name} has {len(rows)} rows but offsets has {len(offsets)}")
    given = [pixels, offsets.contiguous(), heights.contiguous(), widths.contiguous()]
    if not readable(offsets):
        return given, [], channels
    end = offsets + heights.long() * widths.long() * channels
    wrong = (offsets < 0) | (heights < 1) | (widths < 1) | (end > len(pixels))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {row} begins at byte {int(offsets[row])} and has {int(heights[row])} x {int(widths[row])} pixels of "
            f"{channels} channels, which {len(pixels)} bytes of pixels do not hold"
        )
    return given, list(zip(heights.tolist(), widths.tolist(), strict=True)), channels


def _check_values(draws: ViewDraws, sizes: list[tuple[int, int]], channels: int) -> None:
    limit = torch.tensor(sizes, dtype=torch.float64)
    end = draws.box[:, :2].double() + draws.box[:, 2:].double()
    # A fraction is rounded to float32: up to a thousandth of the image may be missing to the exact edge.
    slack = 1e-3 * limit if draws.box.is_floating_point() else 0.0
    outside = (end > limit + slack).any(dim=1)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"box of row {row} is {draws.box[row].tolist()} (top, left, height, width), outside its image of "
            f"{sizes[row][0]} x {sizes[row][1]} pixels; draw with the heights and widths of these images"
        )
    if channels in (1, 3):
        return
    neutral = {"saturation": draws.saturation == 1, "hue": draws.hue == 0, "gray": ~draws.gray}
    for name, rows in neutral.items():
        if not bool(rows.all()):
            raise ValueError(
                f"{name} must be neutral for images of {channels} channels, which have no colour in that sense; "
                "draw with byol_views(..., channels=C)"
            )


def _check_out(out: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> None:
    check_tensor("out", out, dtypes=(torch.uint8,), ndim=4, shape="(N, C, height, width)")
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if out.device != device:
        raise ValueError(f"out is on {out.device} but the images are on {device}")
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("out must be channels_last; make it with memory_format=torch.channels_last")
