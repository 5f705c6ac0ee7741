"""Inputs of `augment` for the tests, the benchmarks and anyone who wants to see it called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdmp_kernels.ops.augment import augment, reference
from sdmp_kernels.ops.augment.arguments import Draws, FlatImages
from sdmp_kernels.ops.case import Case
from sdmp_kernels.views import EvalView, Interpolation, Size, ViewDraws, ViewRecipe, draw_views, eval_view, view_size

Images = Tensor | list[Tensor] | FlatImages


def call(images: Images, draws: ViewDraws, size_px: Size, interpolation: Interpolation) -> Tensor:
    """The op."""
    return augment(images, draws, size_px, interpolation=interpolation)


def eager(images: Images, draws: ViewDraws, size_px: Size, interpolation: Interpolation) -> Tensor:
    """Plain PyTorch, one image at a time, in float32."""
    return _views(images, draws, size_px, interpolation, torch.float32)


def truth(images: Images, draws: ViewDraws, size_px: Size, interpolation: Interpolation) -> Tensor:
    """The definition, in float64."""
    return _views(images, draws, size_px, interpolation, torch.float64)


def _views(images: Images, draws: ViewDraws, size_px: Size, interpolation: Interpolation, dtype: torch.dtype) -> Tensor:
    size, cubic = torch.Size(view_size(size_px)), interpolation == "bicubic"
    channels = _channels(images)
    if isinstance(images, FlatImages):
        images = images.unbind()
    pictures = reference.pictures([images] if isinstance(images, Tensor) else images, channels)
    rows = zip(pictures, *draws.tensors(), strict=True)
    views = [reference.make_view(image.to(dtype), Draws(*drawn), cubic, size).to(torch.uint8) for image, *drawn in rows]
    return torch.stack(views) if views else torch.empty(0, channels, *size, dtype=torch.uint8)


def largest_term(**inputs: Any) -> float:
    """In levels of uint8: results may differ by one where they round."""
    return 1.0


def source_bytes(images: Images, draws: ViewDraws, **_: Any) -> int:
    """What the crops hold."""
    return _channels(images) * int((draws.box[:, 2].double().ceil() * draws.box[:, 3].double().ceil()).sum())


def floor_bytes(images: Images, draws: ViewDraws, size_px: Size, **_: Any) -> int:
    """The crops read once and the views written once."""
    height, width = view_size(size_px)
    return source_bytes(images, draws) + len(draws) * _channels(images) * height * width


def kernel_bytes(images: Images, draws: ViewDraws, size_px: Size, **_: Any) -> int:
    """On a GPU: float32 planes written and read between two launches, or four where there may be a blur."""
    height, width = view_size(size_px)
    passes = 6 if draws.max_sigma != 0 else 2
    between = 4 * passes * len(draws) * _channels(images) * height * width
    return floor_bytes(images, draws, size_px) + between


def flops(images: Images, draws: ViewDraws, size_px: Size, **_: Any) -> int:
    """Products and sums of the two passes of the resize, the colours, and the two passes of the blur."""
    height, width = view_size(size_px)
    taps = 2 * (2 * (draws.box[:, 2:].double() / torch.tensor([height, width])).clamp_min(1)).sum(1)
    blur = 2 * 2 * (2 * (3 * draws.sigma.double()).ceil() + 1) * (draws.sigma > 0)
    return int((height * width * _channels(images) * (2 * taps + 30 + blur)).sum())


def _channels(images: Images) -> int:
    if isinstance(images, Tensor):
        return images.shape[1]
    if isinstance(images, FlatImages):
        return images.channels
    return images[0].shape[2] if images else 3


def photograph(generator: torch.Generator, height: int, width: int, channels: int = 3) -> Tensor:
    """(H, W, C) uint8 with edges, slopes, noise, and values at both ends."""
    coarse = torch.rand(1, channels, max(2, height // 7), max(2, width // 7), generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    noise = torch.randn(1, channels, height, width, generator=generator)
    return (300 * smooth - 20 + 12 * noise).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous()


EVERYTHING = ViewRecipe(
    16,
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_prob=0.9,
    gray_prob=0.3,
    blur_prob=0.7,
    blur_sigma_px=(0.1, 1.5),
    solarize_prob=0.3,
)
COLOURLESS = replace(EVERYTHING, jitter=(0.4, 0.4, 0.0, 0.0), gray_prob=0.0)
WIDE_BLUR = replace(EVERYTHING, size_px=5, blur_prob=1.0, blur_sigma_px=(2.0, 3.0))
SIZES = ((37, 50), (16, 16), (31, 90), (5, 7), (1, 1), (1, 40), (64, 3))


def _draw(recipe: ViewRecipe | EvalView, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    draws = draw_views(recipe, heights, widths, seed=1, step=2)
    return {"draws": draws, "size_px": recipe.size_px, "interpolation": recipe.interpolation}


def _ragged(recipe: ViewRecipe | EvalView) -> Callable[[torch.Generator], dict[str, Any]]:
    def make(generator: torch.Generator) -> dict[str, Any]:
        images = [photograph(generator, *size) for size in SIZES]
        return {"images": images, **_draw(recipe, list(SIZES))}

    return make


def _flat(recipe: ViewRecipe | EvalView) -> Callable[[torch.Generator], dict[str, Any]]:
    """The same images in one buffer, out of order and with a gap that no image owns."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        images = [photograph(generator, *size) for size in SIZES]
        order = [3, 0, 6, 5, 1, 4, 2]
        parts = [torch.full((7,), 255, dtype=torch.uint8), *(images[i].reshape(-1) for i in order)]
        ends = np.cumsum([len(part) for part in parts])
        offsets = torch.empty(len(SIZES), dtype=torch.int64)
        offsets[order] = torch.from_numpy(ends[:-1])
        heights, widths = torch.tensor(SIZES, dtype=torch.int32).unbind(1)
        flat = FlatImages(torch.cat(parts), offsets, heights, widths)
        return {"images": flat, **_draw(recipe, list(SIZES))}

    return make


def _batch(
    recipe: ViewRecipe | EvalView, n: int = 3, size: tuple[int, int] = (24, 30), channels: int = 3, planar: bool = False
) -> Callable[[torch.Generator], dict[str, Any]]:
    def make(generator: torch.Generator) -> dict[str, Any]:
        rows = [photograph(generator, *size, channels) for _ in range(n)]
        images = torch.stack(rows) if rows else torch.empty(0, *size, channels, dtype=torch.uint8)
        images = images.permute(0, 3, 1, 2)
        return {"images": images.contiguous() if planar else images, **_draw(recipe, [size] * n)}

    return make


def _case(name: str, inputs: Callable[[torch.Generator], dict[str, Any]], interpreter: bool = True) -> Case:
    return Case(name, inputs, ("images",), dtypes=(torch.uint8,), interpreter=interpreter)


CASES = [
    _case("everything channels_last", _batch(EVERYTHING, n=5)),
    _case("everything planar bicubic", _batch(replace(EVERYTHING, interpolation="bicubic"), planar=True)),
    _case("everything enlarged", _batch(replace(EVERYTHING, size_px=33), n=2, size=(9, 11))),
    _case("everything rectangular", _batch(replace(EVERYTHING, size_px=(9, 21)))),
    _case("crop and flip", _batch(ViewRecipe(16))),
    _case(
        "blur wider than the view", _batch(replace(EVERYTHING, size_px=5, blur_prob=1.0, blur_sigma_px=(2.0, 3.0)), n=1)
    ),
    _case("one pixel", _batch(replace(EVERYTHING, size_px=1, blur_sigma_px=(0.3, 0.6)), n=2, size=(4, 4))),
    _case("a copy", _batch(ViewRecipe(24, (1.0, 1.0), (1.0, 1.0), flip_prob=0.0), size=(24, 24))),
    _case("evaluation", _batch(eval_view(16))),
    _case("evaluation rectangular bicubic", _batch(eval_view((12, 18), 14, "bicubic"))),
    _case("one channel", _batch(EVERYTHING, channels=1)),
    _case("five channels", _batch(COLOURLESS, n=1, channels=5)),
    _case("no images", _batch(EVERYTHING, n=0)),
    _case("many sizes", _ragged(EVERYTHING), interpreter=False),
    _case("many sizes evaluation", _ragged(eval_view(16)), interpreter=False),
    _case("many sizes in one buffer", _flat(EVERYTHING)),
    _case("many sizes in one buffer evaluation", _flat(eval_view(16))),
]
