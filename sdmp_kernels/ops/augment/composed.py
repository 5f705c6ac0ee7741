"""`augment` by PyTorch's own operators: colours and blur for the whole batch at once, the resize image by image.

One signature with `reference`, whose pictures and reflections it shares.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmp_kernels.ops.augment.arguments import Draws
from sdmp_kernels.ops.augment.reference import LUMA, pictures, reflected


def augment(images: list[Tensor], draws: Draws, cubic: bool, radius: int, out: Tensor) -> None:
    """Write one view of every image into `out`."""
    size, box, sigma = out.shape[2:], draws.box, draws.sigma
    cut = not box.is_floating_point()
    if cut and not box.is_cuda:
        mode = "bicubic" if cubic else "bilinear"
        views = torch.cat(
            [_resized(p, b, size, mode) for p, b in zip(pictures(images, out.shape[1]), box.tolist(), strict=True)]
        )
    elif images[0].ndim == 4:
        views = _resampled(images[0], box, size, cubic, cut)
    else:
        views = torch.cat(
            [
                _resampled(p[None], b[None], size, cubic, cut)
                for p, b in zip(pictures(images, out.shape[1]), box, strict=True)
            ]
        )
    views = views.clamp(0, 255)
    views = torch.where(_per_row(draws.flip), views.flip(3), views)
    views = _recoloured(views, draws)
    if radius != 0:
        widest = radius if radius > 0 else math.ceil(3 * float(sigma.max()))
        for dim in (2, 3):
            views = _blurred(views, sigma, widest, dim)
    views = views.round().clamp(0, 255)
    out.copy_(torch.where(_per_row(draws.solarize) & (views >= 128), 255 - views, views))


def _per_row(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1, 1)


def _resized(picture: Tensor, box: list[int], size: torch.Size, mode: str) -> Tensor:
    """(C, H, W) uint8 -> (1, C, h, w)."""
    top, left, height, width = box
    crop = picture[None, :, top : top + height, left : left + width].float()
    return F.interpolate(crop, size=tuple(size), mode=mode, antialias=True, align_corners=False)


def _resampled(images: Tensor, box: Tensor, size: torch.Size, cubic: bool, cut: bool) -> Tensor:
    """(N, C, H, W) uint8 -> (N, C, h, w), by one matrix per image and axis."""
    rows, columns = (
        _weights(box[:, axis], box[:, 2 + axis], size[axis], images.shape[2 + axis], cubic, cut) for axis in (0, 1)
    )
    across = images.float() @ columns[:, None].transpose(2, 3)
    return rows[:, None] @ across


def _weights(start: Tensor, length: Tensor, count: int, size: int, cubic: bool, cut: bool) -> Tensor:
    """(N, count, size), see `reference.resampling`; with `cut` nothing outside [start, start + length) is taken."""
    start, length = start.double().clamp(0, size - 1), length.double()
    length = torch.minimum(length.clamp_min(1e-6), size - start)
    scale = (length / count)[:, None]
    centres = start[:, None] + scale * (torch.arange(count, device=start.device, dtype=torch.float64) + 0.5)
    places = torch.arange(size, device=start.device, dtype=torch.float64)
    x = ((places + 0.5) - centres[:, :, None]).abs() / scale.clamp_min(1.0)[:, :, None]
    if cubic:
        a = -0.5
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    else:
        weights = (1 - x).clamp_min(0)
    if cut:
        inside = (places >= start[:, None]) & (places < (start + length)[:, None])
        weights = torch.where(inside[:, None], weights, 0.0)
    return (weights / weights.sum(2, keepdim=True)).float()


def _luma(views: Tensor) -> Tensor:
    """(N, 1, h, w)."""
    if views.shape[1] != 3:
        return views.mean(1, keepdim=True)
    r, g, b = views.unbind(1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b).unsqueeze(1)


def _recoloured(views: Tensor, draws: Draws) -> Tensor:
    numbers = (draws.brightness, draws.contrast, draws.saturation, draws.hue)
    b, c, s, h = (_per_row(rows) for rows in numbers)
    views = (views * b).clamp(0, 255)
    mean = _luma(views).mean((2, 3), keepdim=True)
    views = torch.where(c == 1, views, (mean * (1 - c) + views * c).clamp(0, 255))
    if views.shape[1] != 3:
        return views
    grey = _luma(views)
    views = torch.where(s == 1, views, (grey * (1 - s) + views * s).clamp(0, 255))
    views = torch.where(h == 0, views, _turned(views, h))
    return torch.where(_per_row(draws.gray), _luma(views), views)


def _turned(views: Tensor, turns: Tensor) -> Tensor:
    r, g, b = views.split(1, dim=1)
    value, least = views.amax(1, keepdim=True), views.amin(1, keepdim=True)
    chroma = value - least
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == r, (g - b) / divisor, torch.where(value == g, (b - r) / divisor + 2, (r - g) / divisor + 4)
    )
    phases = torch.tensor([5.0, 3.0, 1.0], device=views.device).view(1, 3, 1, 1)
    k = (sixths + 6 * turns + phases) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blurred(views: Tensor, sigma: Tensor, radius: int, dim: int) -> Tensor:
    """Along one axis, by sigmas of the rows; those without keep their pixels."""
    offsets = torch.arange(radius + 1, device=views.device)
    spread = torch.where(sigma > 0, sigma, 1.0).double()[:, None]
    weights = torch.exp(-offsets.double().square() / (2 * spread * spread))
    weights = torch.where(offsets <= torch.ceil(3 * spread), weights, 0.0)
    weights = (weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdim=True))).float()
    size = views.shape[dim]
    places = torch.arange(size, device=views.device)
    blurred = views * _per_row(weights[:, 0])
    for k in range(1, radius + 1):
        before, after = (views.index_select(dim, reflected(places + way, size)) for way in (-k, k))
        blurred = blurred + (before + after) * _per_row(weights[:, k])
    return torch.where(_per_row(sigma) > 0, blurred, views)
