"""What is done to an image to make a view of it, and the numbers drawn for it.

All numbers are drawn here, on the host and for a whole batch at once, from (seed, step, view, row) alone. `augment`
only carries them out; that is why every backend and loader cuts the same crops, and why a resumed run, or one with
another worker count or world size, sees the same views.

Letters: N images, H W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from sdmp_kernels._checks import check_choice, check_integer, check_tensor, readable
from sdmp_kernels._memory import is_on, moved

Interpolation = Literal["bilinear", "bicubic"]
Size = int | tuple[int, int]

_CROP_TRIES = 10
_COLUMNS = 40
"""Uniform numbers per image and view: 2 * 10 for the crop, 12 for the rest, the others unused. A multiple of 4, which
is what one Philox block holds, so that a rank can start at its own first row."""

_STREAM = 0x56494557
"""Highest counter word of the streams drawn here. Mixing plans use the same key (seed, step) and count from 0."""


@dataclass(frozen=True)
class ViewRecipe:
    """One random view: crop, resize, flip, colour jitter, grey, blur, solarise, in this order.

    Jitter multiplies brightness, contrast and saturation by factors uniform in [1 - x, 1 + x] and turns the hue by a
    share of the colour circle uniform in [-x, x], in that order (torchvision shuffles the four; a fixed order is what
    lets a whole batch run as one GPU pass).
    """

    size_px: Size
    """Side of the square view in pixels, or (height, width)."""
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
        view_size(self.size_px)
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
    """The whole image, resized so that its shorter side is `resize_px`, then its centre of `size_px`.

    A rectangular `size_px` scales the image until it covers `size_px * resize_px / min(size_px)`.
    """

    size_px: Size
    resize_px: int
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        shorter = min(view_size(self.size_px))
        if self.resize_px < shorter:
            raise ValueError(
                f"resize_px must be at least the shorter side of size_px ({shorter}), but is {self.resize_px}: "
                "the centre crop would not fit into the resized image"
            )
        _check_interpolation(self.interpolation)


_DTYPES = {
    "flip": torch.bool,
    "brightness": torch.float32,
    "contrast": torch.float32,
    "saturation": torch.float32,
    "hue": torch.float32,
    "gray": torch.bool,
    "sigma": torch.float32,
    "solarize": torch.bool,
}


@dataclass(frozen=True, eq=False)
class ViewDraws:
    """What was drawn for one view of N images. Made by `draw_views`, or by hand.

    Attributes:
        box: (N, 4) int32 pixels of the image: top, left, height, width of the crop, at least one pixel each way.
            float32 for a part of the resized whole image, as evaluation views are (see `augment`).
        flip: (N,) bool.
        brightness: (N,) float32 factor >= 0; 1 is neutral. So are contrast and saturation.
        contrast: (N,) float32.
        saturation: (N,) float32.
        hue: (N,) float32 turns of the colour circle in [-0.5, 0.5]; 0 is neutral.
        gray: (N,) bool.
        sigma: (N,) float32 standard deviation of the blur in pixels of the view; 0 is none.
        solarize: (N,) bool.
        max_sigma: no sigma is above this; known on the host, so that no backend has to read one back from a device.
            Default: the largest `sigma`, where that is on the CPU.

    Raises:
        TypeError, ValueError: on construction, for a wrong dtype, shape or device; and, for tensors on the CPU, for
            any value outside what is said above.
    """

    box: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor
    max_sigma: float | None = None

    def __post_init__(self) -> None:
        check_tensor("box", self.box, dtypes=(torch.int32, torch.float32), ndim=2, shape="(N, 4)")
        if self.box.shape[1] != 4:
            raise ValueError(f"box must have shape (N, 4), got {tuple(self.box.shape)}")
        for name, dtype in _DTYPES.items():
            tensor = check_tensor(name, getattr(self, name), dtypes=(dtype,), ndim=1, shape="(N,)")
            if len(tensor) != len(self):
                raise ValueError(f"{name} has {len(tensor)} rows but box has {len(self)}; give every tensor N rows")
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device} but box is on {self.device}; use ViewDraws.to(device)")
        if self.max_sigma is None and readable(self.sigma):
            object.__setattr__(self, "max_sigma", float(self.sigma.max()) if len(self) else 0.0)
        if len(self) and all(readable(getattr(self, name)) for name in ("box", *_DTYPES)):
            self._check_values()

    def __len__(self) -> int:
        return self.box.shape[0]

    def __getitem__(self, rows: slice) -> ViewDraws:
        """The draws of some of the images, without a copy: `draws[8:16]`."""
        if not isinstance(rows, slice):
            raise TypeError(f"draws are taken by slices such as draws[8:16], not by {type(rows).__name__}")
        return _unflatten([tensor[rows] for tensor in self.tensors()], self.max_sigma)

    def __repr__(self) -> str:
        return f"ViewDraws({len(self)} views on {self.device})"

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.box.device

    def tensors(self) -> tuple[Tensor, ...]:
        """The nine tensors, in the order of the attributes."""
        return tuple(getattr(self, name) for name in ("box", *_DTYPES))

    def to(self, device: torch.device | str | int) -> ViewDraws:
        """The same draws on `device`, by one asynchronous copy (from pinned memory where the target is a GPU)."""
        target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return self if is_on(self.device, target) else _unflatten(moved(self.tensors(), target), self.max_sigma)

    def whole(self, size_px: Size) -> ViewDraws:
        """The same numbers for images that are already cropped and resized to `size_px`: the box is all of them."""
        height, width = view_size(size_px)
        whole = torch.tensor([0, 0, height, width], dtype=torch.int32).expand(len(self), 4).contiguous()
        return replace(self, box=whole.to(self.device))

    def _check_values(self) -> None:
        box = self.box
        if not bool((box[:, :2] >= 0).all() & (box[:, 2:] >= (0 if box.is_floating_point() else 1)).all()):
            raise ValueError("box must hold top, left >= 0 and height, width of at least one pixel")
        for name in ("brightness", "contrast", "saturation", "sigma"):
            tensor = getattr(self, name)
            if not bool(((tensor >= 0) & (tensor < float("inf"))).all()):
                raise ValueError(f"{name} must hold finite numbers of 0 or more, got {float(tensor.min()):g} and more")
        if not bool((self.hue.abs() <= 0.5).all()):
            raise ValueError("hue must hold turns of the colour circle in [-0.5, 0.5]")
        if self.max_sigma is not None and float(self.sigma.max()) > self.max_sigma:
            raise ValueError(f"sigma holds {float(self.sigma.max()):g}, above max_sigma={self.max_sigma:g}")


def _flatten(draws: ViewDraws) -> tuple[list[Tensor], float | None]:
    return list(draws.tensors()), draws.max_sigma


def _unflatten(tensors: Iterable[Any], max_sigma: float | None) -> ViewDraws:
    # Not by the constructor: the leaves may be anything for a while.
    draws = object.__new__(ViewDraws)
    for name, value in zip(("box", *_DTYPES, "max_sigma"), (*tensors, max_sigma), strict=True):
        object.__setattr__(draws, name, value)
    return draws


register_pytree_node(ViewDraws, _flatten, _unflatten, serialized_type_name="sdmp_kernels.views.ViewDraws")


def view_size(size_px: Size) -> tuple[int, int]:
    """(height, width) of a view from a side or such a pair.

    Raises:
        ValueError: naming size_px, unless both are whole numbers of 1 or more.
    """
    pair = tuple(size_px) if isinstance(size_px, tuple | list) else (size_px, size_px)
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in pair):
        raise ValueError(f"size_px must be a whole number of pixels, 1 or more, or (height, width), but is {size_px!r}")
    return pair


def byol_views(
    size_px: Size, crop_min: float = 0.08, blur: bool = True, *, channels: int = 3
) -> tuple[ViewRecipe, ViewRecipe]:
    """The two views of BYOL (Grill et al. 2020, appendix B) as MoCo v3 uses them.

    The reference is given for 224 px; the blur is scaled with the view's shorter side, and is off below 64 px whatever
    `blur` says: blurring CIFAR-sized images as if they were large is known to cost accuracy.

    Args:
        size_px: side of the views, or (height, width).
        crop_min: smallest area of a crop, as a share of the image's.
        blur: whether there is any.
        channels: of the images; other than 1 and 3, saturation, hue and grey mean nothing, and are left out with a
            warning.

    Returns:
        The recipes of the first and the second view.

    Raises:
        ValueError: for sizes and shares outside what is said above, naming them.
    """
    blur_on = blur and min(view_size(size_px)) >= 64
    base = ViewRecipe(size_px, (crop_min, 1.0), jitter_prob=0.8, gray_prob=0.2, blur_sigma_px=_blur_range(size_px))
    if channels not in (1, 3):
        warnings.warn(
            f"images of {channels} channels have no saturation, hue or grey: the views change brightness and contrast "
            "alone",
            stacklevel=2,
        )
        base = replace(base, gray_prob=0.0, jitter=(*base.jitter[:2], 0.0, 0.0))
    first = replace(base, blur_prob=1.0 if blur_on else 0.0)
    second = replace(base, blur_prob=0.1 if blur_on else 0.0, solarize_prob=0.2)
    return first, second


def dino_views(
    global_px: Size = 224,
    local_px: Size = 96,
    locals: int = 8,
    global_scale: tuple[float, float] | None = None,
    local_scale: tuple[float, float] = (0.05, 0.4),
    blur: bool = True,
) -> tuple[ViewRecipe, ...]:
    """The multi-crop of DINO (Caron et al. 2021): two global views, then `locals` local ones.

    The blur is the same in pixels for both sizes, scaled with `global_px / 224` and off below 64 px, as in
    :func:`byol_views`.

    Args:
        global_px: side of the global views, or (height, width).
        local_px: likewise of the local ones.
        locals: how many local views there are, 0 or more.
        global_scale: smallest and largest area of a global crop, as shares of the image's; default (0.4, 1), and
            (0.14, 1) without local views.
        local_scale: likewise of a local crop.
        blur: whether there is any.

    Returns:
        2 + `locals` recipes.

    Raises:
        ValueError: for an argument outside what is said above, naming it.
    """
    if locals < 0:
        raise ValueError(f"locals must be the number of local views, 0 or more, but is {locals}")
    scale = global_scale or ((0.4, 1.0) if locals else (0.14, 1.0))
    blur_on = blur and min(view_size(global_px)) >= 64
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


def crop_flip_view(size_px: Size, crop_min: float = 0.08, interpolation: Interpolation = "bilinear") -> ViewRecipe:
    """Random crop and flip alone: the augmentation of linear evaluation."""
    return ViewRecipe(size_px, (crop_min, 1.0), interpolation=interpolation)


def eval_view(size_px: Size, resize_px: int | None = None, interpolation: Interpolation = "bilinear") -> EvalView:
    """Resize and centre crop; `resize_px` defaults to the shorter side * 256 / 224, and up to 64 px to that side."""
    if resize_px is None:
        shorter = min(view_size(size_px))
        resize_px = shorter if shorter <= 64 else round(shorter * 256 / 224)
    return EvalView(size_px, resize_px, interpolation)


def draw_views(
    recipe: ViewRecipe | EvalView,
    heights: NDArray[np.integer] | Tensor,
    widths: NDArray[np.integer] | Tensor,
    *,
    step: int,
    seed: int = 0,
    view: int = 0,
    first_row: int = 0,
    device: torch.device | str | int = "cpu",
) -> ViewDraws:
    """Draw the numbers for rows `first_row`, `first_row + 1`, ... of the global batch of a step.

    A pure function of its arguments that touches no global random state: row i gets the same numbers on every rank,
    device and backend. Nothing is random about an `EvalView`.

    Args:
        recipe: what may be drawn.
        heights, widths: (N,) sizes of the images in pixels, arrays or tensors on the CPU.
        step: number of the training step, 0 or more. There is no default: a loop that forgot it would see one frozen
            augmentation for ever.
        seed: of the run, 0 or more.
        view: number of the view within the step; every view has draws of its own.
        first_row: global row of the first image (rank * N).
        device: where the tensors go, by one asynchronous copy.

    Returns:
        Draws of N views.

    Raises:
        TypeError, ValueError: for an argument outside what is said above, naming it.
    """
    seed = check_integer("seed", seed, low=0, high=2**64 - 1, what="an integer in [0, 2**64)")
    step = check_integer("step", step, low=0, high=2**64 - 1, what="an integer in [0, 2**64)")
    view = check_integer("view", view, low=0, high=2**32 - 1, what="a view number, 0 or more")
    first_row = check_integer("first_row", first_row, low=0, high=2**48, what="a row number, 0 or more")
    heights, widths = _sizes("heights", heights), _sizes("widths", widths)
    if len(heights) != len(widths):
        raise ValueError(f"heights has {len(heights)} rows but widths has {len(widths)}; give one of each per image")
    if isinstance(recipe, EvalView):
        return _eval_draws(recipe, heights, widths).to(device)
    u = _uniforms(len(heights), seed=seed, step=step, view=view, first_row=first_row)
    crop, rest = u[:, : 2 * _CROP_TRIES], u[:, 2 * _CROP_TRIES :].T
    jittered = rest[3] < recipe.jitter_prob
    brightness, contrast, saturation = (
        np.where(jittered, 1 + x * (2 * rest[4 + i] - 1), 1) for i, x in enumerate(recipe.jitter[:3])
    )
    low, high = recipe.blur_sigma_px
    drawn = ViewDraws(
        box=torch.from_numpy(_crop_boxes(recipe, heights, widths, crop, rest[0], rest[1])),
        flip=torch.from_numpy(rest[2] < recipe.flip_prob),
        brightness=_numbers(brightness),
        contrast=_numbers(contrast),
        saturation=_numbers(saturation),
        hue=_numbers(np.where(jittered, recipe.jitter[3] * (2 * rest[7] - 1), 0)),
        gray=torch.from_numpy(rest[8] < recipe.gray_prob),
        sigma=_numbers(np.where(rest[9] < recipe.blur_prob, low + (high - low) * rest[10], 0)),
        solarize=torch.from_numpy(rest[11] < recipe.solarize_prob),
        # What may be drawn, not what was: a compiled caller then sees the same number at every step.
        max_sigma=float(np.float32(high)) if recipe.blur_prob > 0 else 0.0,
    )
    return drawn.to(device)


def _numbers(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _sizes(name: str, sizes: Any) -> NDArray[np.int64]:
    found = np.asarray(sizes)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise TypeError(
            f"{name} must be (N,) whole numbers, got an array of shape {found.shape} and type {found.dtype}"
        )
    if len(found) and found.min() < 1:
        raise ValueError(f"{name} must hold sizes of 1 or more, got {found.min()}")
    return found.astype(np.int64)


def eval_geometry(
    view: EvalView, heights: NDArray[np.integer], widths: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(N, 2) height and width of the resized images, and (N, 2) top and left of the centre crop in them.

    Torchvision's rounding: the longer side is truncated, the crop's corner rounded half to even.
    """
    heights, widths = _sizes("heights", heights), _sizes("widths", widths)
    size = np.array(view_size(view.size_px))
    target = np.array([round(side * view.resize_px / size.min()) for side in size])
    by_height = heights * target[1] <= widths * target[0]
    resized = np.where(
        by_height[:, None],
        np.stack([np.full_like(heights, target[0]), target[0] * widths // heights], axis=1),
        np.stack([target[1] * heights // widths, np.full_like(widths, target[1])], axis=1),
    )
    return resized, np.rint((resized - size) / 2).astype(np.int64)


def _eval_draws(view: EvalView, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> ViewDraws:
    resized, corner = eval_geometry(view, heights, widths)
    scale = np.stack([heights, widths], axis=1) / resized
    box = np.concatenate([corner * scale, np.array(view_size(view.size_px)) * scale], axis=1).astype(np.float32)
    n = len(heights)
    one, zero, no = torch.ones(n), torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    return ViewDraws(torch.from_numpy(box), no, one, one, one, zero, no, zero, no)


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


def _blur_range(size_px: Size) -> tuple[float, float]:
    shorter = min(view_size(size_px))
    return 0.1 * shorter / 224, 2.0 * shorter / 224


def _check_range(name: str, value: tuple[float, float], upper: float = float("inf")) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= upper:
        limit = "" if upper == float("inf") else f" and at most {upper:g}"
        raise ValueError(f"{name} must be (lowest, highest), above 0{limit}, but is {value}")


def _check_interpolation(value: str) -> None:
    check_choice("interpolation", value, ("bilinear", "bicubic"))
