"""What is done to an image to make a view of it, and the numbers drawn for it.

All numbers are drawn here, on the host and for a whole batch at once, from (seed, step, view, row) alone. A loader
only carries them out; that is why DALI and torchvision cut the same crops, and why a resumed run, or one with another
worker count or world size, sees the same views.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Interpolation = Literal["bilinear", "bicubic"]

_CROP_TRIES = 10
_COLUMNS = 40
"""Uniform numbers per image and view: 2 * 10 for the crop, 12 for the rest, the others unused. A multiple of 4, which
is what one Philox block holds, so that a rank can start at its own first row."""

_STREAM = 0x56494557
"""Highest counter word of the streams drawn here. Mixing plans use the same key (seed, step) and count from 0."""


@dataclass(frozen=True)
class ViewRecipe:
    """One random view: crop, resize, colour jitter, grey, blur, solarise, flip, in this order.

    Jitter multiplies brightness, contrast and saturation by factors uniform in [1 - x, 1 + x] and turns the hue by a
    share of the colour circle uniform in [-x, x], in that order (torchvision shuffles the four; a fixed order is what
    lets a whole batch run as one GPU pass).
    """

    size_px: int
    """Side of the square view."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop as a share of the image's (torchvision RandomResizedCrop)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the crop."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue."""
    jitter_prob: float = 0.0
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the Gaussian, in pixels of the view."""
    solarize_prob: float = 0.0
    """Chance that values from 128 up are inverted."""
    flip_prob: float = 0.5
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check_size("size_px", self.size_px)
        _check_range("scale", self.scale, upper=1.0)
        _check_range("ratio", self.ratio)
        _check_range("blur_sigma_px", self.blur_sigma_px)
        if len(self.jitter) != 4 or not (all(0 <= x <= 1 for x in self.jitter) and self.jitter[3] <= 0.5):
            raise ValueError(
                f"jitter must be four strengths, three in [0, 1] and hue in [0, 0.5], but is {self.jitter}; "
                "for example (0.4, 0.4, 0.2, 0.1)"
            )
        for name in ("jitter_prob", "gray_prob", "blur_prob", "solarize_prob", "flip_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1], but is {getattr(self, name)}")
        _check_interpolation(self.interpolation)


@dataclass(frozen=True)
class EvalView:
    """The whole image with its shorter side resized to `resize_px`, then the central square of `size_px`."""

    size_px: int
    resize_px: int
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check_size("size_px", self.size_px)
        if self.resize_px < self.size_px:
            raise ValueError(
                f"resize_px must be at least size_px ({self.size_px}), but is {self.resize_px}: "
                "the centre crop would not fit into the resized image"
            )
        _check_interpolation(self.interpolation)


@dataclass(frozen=True)
class ViewParams:
    """What was drawn for one view of N images: every array has N rows."""

    box: NDArray[np.int32]
    """(N, 4) top, left, height, width of the crop, in pixels of the file."""
    brightness: NDArray[np.float32]
    """(N,) factor, 1 where there is no jitter; so are contrast and saturation."""
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    """(N,) turns in [-0.5, 0.5], 0 where there is no jitter."""
    gray: NDArray[np.bool_]
    sigma: NDArray[np.float32]
    """(N,) standard deviation of the blur in pixels of the view, 0 where there is none."""
    solarize: NDArray[np.bool_]
    flip: NDArray[np.bool_]


@dataclass(frozen=True)
class EvalParams:
    """Geometry of N deterministic views."""

    resized: NDArray[np.int32]
    """(N, 2) height, width after the resize."""
    corner: NDArray[np.int32]
    """(N, 2) top, left of the centre crop in the resized image."""


def byol_views(size_px: int, crop_min: float = 0.08, blur: bool = True) -> tuple[ViewRecipe, ViewRecipe]:
    """The two views of BYOL (Grill et al. 2020, appendix B) as MoCo v3 uses them.

    The reference is given for 224 px; the blur is scaled with the view, and is off below 64 px whatever `blur` says:
    blurring CIFAR-sized images as if they were large is known to cost accuracy.
    """
    blur_on = blur and size_px >= 64
    base = ViewRecipe(size_px, (crop_min, 1.0), jitter_prob=0.8, gray_prob=0.2, blur_sigma_px=_blur_range(size_px))
    first = replace(base, blur_prob=1.0 if blur_on else 0.0)
    second = replace(base, blur_prob=0.1 if blur_on else 0.0, solarize_prob=0.2)
    return first, second


def dino_views(
    global_px: int = 224,
    local_px: int = 96,
    locals: int = 8,
    global_scale: tuple[float, float] | None = None,
    local_scale: tuple[float, float] = (0.05, 0.4),
    blur: bool = True,
) -> tuple[ViewRecipe, ...]:
    """The multi-crop of DINO (Caron et al. 2021): two global views, then `locals` local ones.

    `global_scale` defaults to (0.4, 1), and to (0.14, 1) without local views. The blur is the same in pixels for both
    sizes, scaled with `global_px / 224` and off below 64 px, as in :func:`byol_views`.
    """
    if locals < 0:
        raise ValueError(f"locals must be the number of local views, 0 or more, but is {locals}")
    scale = global_scale or ((0.4, 1.0) if locals else (0.14, 1.0))
    blur_on = blur and global_px >= 64
    base = ViewRecipe(
        global_px,
        scale,
        jitter_prob=0.8,
        gray_prob=0.2,
        blur_sigma_px=_blur_range(global_px),
        interpolation="bicubic",
    )
    first = replace(base, blur_prob=1.0 if blur_on else 0.0)
    second = replace(base, blur_prob=0.1 if blur_on else 0.0, solarize_prob=0.2)
    local = replace(base, size_px=local_px, scale=local_scale, blur_prob=0.5 if blur_on else 0.0)
    return (first, second, *[local] * locals)


def crop_flip_view(size_px: int, crop_min: float = 0.08, interpolation: Interpolation = "bilinear") -> ViewRecipe:
    """Random crop and flip alone: the augmentation of linear evaluation."""
    return ViewRecipe(size_px, (crop_min, 1.0), interpolation=interpolation)


def eval_view(size_px: int, resize_px: int | None = None, interpolation: Interpolation = "bilinear") -> EvalView:
    """Resize and centre crop; `resize_px` defaults to `size_px * 256 / 224`, and up to 64 px to `size_px` itself."""
    if resize_px is None:
        resize_px = size_px if size_px <= 64 else round(size_px * 256 / 224)
    return EvalView(size_px, resize_px, interpolation)


def draw_view(
    recipe: ViewRecipe,
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    *,
    seed: int,
    step: int,
    view: int,
    first_row: int = 0,
) -> ViewParams:
    """Draw the numbers for rows `first_row`, `first_row + 1`, ... of the global batch of a step.

    `heights`, `widths`: (N,) sizes of the files in pixels. Row i gets the same numbers whichever rank draws them.
    """
    u = _uniforms(len(heights), seed=seed, step=step, view=view, first_row=first_row)
    crop, rest = u[:, : 2 * _CROP_TRIES], u[:, 2 * _CROP_TRIES :].T
    jittered = rest[3] < recipe.jitter_prob
    brightness, contrast, saturation = (
        np.where(jittered, 1 + x * (2 * rest[4 + i] - 1), 1).astype(np.float32) for i, x in enumerate(recipe.jitter[:3])
    )
    low, high = recipe.blur_sigma_px
    return ViewParams(
        box=_crop_boxes(recipe, heights, widths, crop, rest[0], rest[1]),
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=np.where(jittered, recipe.jitter[3] * (2 * rest[7] - 1), 0).astype(np.float32),
        gray=rest[8] < recipe.gray_prob,
        sigma=np.where(rest[9] < recipe.blur_prob, low + (high - low) * rest[10], 0).astype(np.float32),
        solarize=rest[11] < recipe.solarize_prob,
        flip=rest[2] < recipe.flip_prob,
    )


def eval_params(view: EvalView, heights: NDArray[np.integer], widths: NDArray[np.integer]) -> EvalParams:
    """Torchvision's rounding: the longer side is truncated, the crop's corner rounded half to even."""
    size = np.stack([heights, widths], axis=1).astype(np.int64)
    resized = (view.resize_px * size) // size.min(axis=1, keepdims=True)
    corner = np.rint((resized - view.size_px) / 2)
    return EvalParams(resized.astype(np.int32), corner.astype(np.int32))


def blur_windows(params: ViewParams) -> NDArray[np.int32]:
    """(N,) odd width of the Gaussian window, three standard deviations to each side."""
    return (2 * np.ceil(3 * params.sigma) + 1).astype(np.int32)


def _uniforms(n: int, *, seed: int, step: int, view: int, first_row: int) -> NDArray[np.float64]:
    """(n, 40) numbers in [0, 1). Raw bits, because numpy pins those for good and its distributions only by version."""
    start = [first_row * (_COLUMNS // 4), 0, view, _STREAM]
    bits = np.random.Philox(key=[seed, step], counter=start).random_raw(n * _COLUMNS)
    return (bits >> np.uint64(11)).astype(np.float64).reshape(n, _COLUMNS) * 2.0**-53


def _crop_boxes(
    recipe: ViewRecipe,
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    tries: NDArray[np.float64],
    u_top: NDArray[np.float64],
    u_left: NDArray[np.float64],
) -> NDArray[np.int32]:
    """RandomResizedCrop: the first of ten tries that fits, else the largest central crop within the ratio limits."""
    height, width = heights.astype(np.float64), widths.astype(np.float64)
    low, high = recipe.scale
    area = (height * width)[:, None] * (low + (high - low) * tries[:, :_CROP_TRIES])
    log_low, log_high = np.log(recipe.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * tries[:, _CROP_TRIES:])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    any_fits, first = fits.any(axis=1), fits.argmax(axis=1)
    rows = np.arange(len(height))
    h, w = h[rows, first], w[rows, first]

    central_w = np.minimum(width, np.maximum(1, np.rint(height * recipe.ratio[1])))
    central_h = np.minimum(height, np.maximum(1, np.rint(width / recipe.ratio[0])))
    h, w = np.where(any_fits, h, central_h), np.where(any_fits, w, central_w)
    top = np.where(any_fits, np.floor(u_top * (height - h + 1)), (height - h) // 2)
    left = np.where(any_fits, np.floor(u_left * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def _blur_range(size_px: int) -> tuple[float, float]:
    return 0.1 * size_px / 224, 2.0 * size_px / 224


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of pixels, 1 or more, but is {value!r}")


def _check_range(name: str, value: tuple[float, float], upper: float = float("inf")) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= upper:
        limit = "" if upper == float("inf") else f" and at most {upper:g}"
        raise ValueError(f"{name} must be (lowest, highest), above 0{limit}, but is {value}")


def _check_interpolation(value: str) -> None:
    if value not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', but is {value!r}")
