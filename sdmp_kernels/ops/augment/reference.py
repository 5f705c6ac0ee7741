"""What `augment` means: plain PyTorch, one image at a time. In float64 it is the truth that backends are held to.

Letters: C channels, H W pixels of the image, h w pixels of the view.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdmp_kernels.ops.augment.arguments import Draws, FlatImages

LUMA = (0.299, 0.587, 0.114)


def augment(images: list[Tensor], draws: Draws, cubic: bool, radius: int, out: Tensor) -> None:
    """Write one view of every image into `out`."""
    for image, drawn, view in zip(pictures(images, out.shape[1]), zip(*draws, strict=True), out, strict=True):
        view.copy_(make_view(image.double(), Draws(*drawn), cubic, view.shape[1:]))


def make_view(image: Tensor, drawn: Draws, cubic: bool, size: torch.Size) -> Tensor:
    """(C, H, W) on the 0 to 255 scale -> (C, h, w) whole numbers on it, in the dtype of `image`.

    `drawn`: one row of each tensor.
    """
    view = crop_and_resize(image, drawn.box, size, cubic)
    if drawn.flip:
        view = view.flip(2)
    view = recolour(view, drawn)
    view = blur(view, float(drawn.sigma)).round().clamp(0, 255)
    return torch.where(drawn.solarize & (view >= 128), 255 - view, view)


def pictures(images: list[Tensor], channels: int) -> list[Tensor]:
    """(C, H, W) each, of one (N, C, H, W) batch, of N images (H, W, C), or of the tensors of `FlatImages`."""
    if len(images) == 1 and images[0].ndim == 4:
        return list(images[0].unbind())
    return [image.permute(2, 0, 1) for image in one_by_one(images, channels)]


def one_by_one(images: list[Tensor], channels: int) -> list[Tensor]:
    """N images (H, W, C), whether they came so or in one buffer."""
    if images and images[0].ndim == 1:
        pixels, offsets, heights, widths = images
        return FlatImages(pixels, offsets, heights, widths, channels).unbind()
    return images


def crop_and_resize(image: Tensor, box: Tensor, size: torch.Size, cubic: bool) -> Tensor:
    """(C, H, W) -> (C, h, w). A whole box is cut out first; a fractional one is a part of the resized whole image."""
    if not box.is_floating_point():
        top, left, height, width = box.tolist()
        image = image[:, top : top + height, left : left + width]
        box = box.new_tensor([0, 0, height, width])
    top, left, height, width = box.double().tolist()
    rows = resampling(top, height, size[0], image.shape[1], cubic).to(image)
    columns = resampling(left, width, size[1], image.shape[2], cubic).to(image)
    return (rows @ image @ columns.T).clamp(0, 255)


def resampling(start: float, length: float, count: int, size: int, cubic: bool) -> Tensor:
    """(count, size): how much each of `count` samples over [start, start + length) takes of each of `size` pixels.

    Pillow's antialiased filter: a triangle or a cubic about each sample's centre, as wide as the scale where it
    shrinks, divided by its sum within the image.
    """
    scale = length / count
    centres = start + scale * (torch.arange(count, dtype=torch.float64) + 0.5)
    x = ((torch.arange(size, dtype=torch.float64) + 0.5) - centres[:, None]).abs() / max(scale, 1.0)
    if cubic:
        a = -0.5
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    else:
        weights = (1 - x).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def luma(view: Tensor) -> Tensor:
    """(h, w): ITU-R 601; of other than three channels, their mean."""
    if view.shape[0] != 3:
        return view.mean(0)
    return sum(weight * channel for weight, channel in zip(LUMA, view, strict=True))


def recolour(view: Tensor, drawn: Draws) -> Tensor:
    """Brightness, contrast, saturation, hue, grey, clamped after each; neutral numbers change nothing."""
    coloured = view.shape[0] == 3
    if drawn.brightness != 1:
        view = (view * drawn.brightness.to(view)).clamp(0, 255)
    if drawn.contrast != 1:
        mean = luma(view).mean()
        view = (mean + drawn.contrast.to(view) * (view - mean)).clamp(0, 255)
    if drawn.saturation != 1 and coloured:
        grey = luma(view)
        view = (grey + drawn.saturation.to(view) * (view - grey)).clamp(0, 255)
    if drawn.hue != 0 and coloured:
        view = turn_hue(view, float(drawn.hue))
    if drawn.gray and coloured:
        view = luma(view).expand_as(view)
    return view


def turn_hue(view: Tensor, turns: float) -> Tensor:
    """Through HSV: the hue moves by a share of the colour circle, saturation and value stay."""
    r, g, b = view
    value, chroma = view.amax(0), view.amax(0) - view.amin(0)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == r, (g - b) / divisor, torch.where(value == g, (b - r) / divisor + 2, (r - g) / divisor + 4)
    )
    phases = torch.tensor([5.0, 3.0, 1.0], dtype=view.dtype, device=view.device).view(3, 1, 1)
    k = (sixths + 6 * turns + phases) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(view: Tensor, sigma: float) -> Tensor:
    """Gaussian blur along both axes; edges are reflected without being repeated, as often as it takes."""
    if sigma == 0:
        return view
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=view.device)
    weights = torch.exp(-offsets.double().square() / (2 * sigma * sigma))
    weights = (weights / weights.sum()).to(view)
    for dim in (1, 2):
        places = reflected(torch.arange(view.shape[dim], device=view.device)[:, None] + offsets, view.shape[dim])
        taken = view.index_select(dim, places.reshape(-1)).unflatten(dim, places.shape)
        view = (taken * weights.view(-1, *[1] * (2 - dim))).sum(dim + 1)
    return view


def reflected(places: Tensor, size: int) -> Tensor:
    """Places within [0, size) for any whole numbers: 0 1 2 3 2 1 0 1 ... for a size of 4."""
    if size == 1:
        return torch.zeros_like(places)
    folded = places % (2 * (size - 1))
    return torch.minimum(folded, 2 * (size - 1) - folded)
