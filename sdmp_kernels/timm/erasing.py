"""timm's random erasing of a batch: boxes and colours drawn for all rows at once, written by `mix` in its one pass.

Letters: N images, C channels, H W pixels, R boxes per image at most.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sdmp_kernels._checks import check_choice, check_integer, check_number, check_tensor
from sdmp_kernels._drop_in import Draws, keep_plan
from sdmp_kernels._memory import moved
from sdmp_kernels.ops.mix import mix
from sdmp_kernels.ops.mix.arguments import Erasure

_MODES = ("const", "rand", "pixel")
_IMAGES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ATTEMPTS = 10


class RandomErasing:
    """Erase random boxes of normalised images in place, by the laws of `timm.data.random_erasing.RandomErasing`.

    An image is erased with chance `probability`. Its number of boxes is uniform in [min_count, max_count]; a box has a
    share of [min_area, max_area] of the image, divided by that number, an aspect ratio that is log-uniform, and a place
    inside. A box that does not fit is drawn again, ten times at most; later boxes lie over earlier ones.

    Args:
        probability: chance that an image is erased at all.
        min_area, max_area: shares of the image.
        min_aspect, max_aspect: of height over width; by default `max_aspect` is 1 / `min_aspect`.
        mode: "const" fills with 0, "rand" with one normal number per box and channel, "pixel" per pixel and channel.
        min_count, max_count: boxes per image.
        num_splits: of 2 or more, the first of so many parts of the batch is left alone.
        device: timm's; not used, since the images say where they are.
        seed: of this object's draws; as in `Mixup`.

    Example::

        erase = RandomErasing(0.25, mode="pixel")
        images = erase(images)  # (N, C, H, W), changed in place

    Source: Zhong et al. 2017, as timm has it.
    """

    def __init__(
        self,
        probability: float = 0.5,
        min_area: float = 0.02,
        max_area: float = 1 / 3,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
        mode: str = "const",
        min_count: int = 1,
        max_count: int | None = None,
        num_splits: int = 0,
        device: object = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.probability = check_number("probability", probability, low=0.0, high=1.0, what="a probability in [0, 1]")
        self.min_area = check_number("min_area", min_area, low=0.0, high=1.0, what="a share in [0, 1]")
        self.max_area = check_number(
            "max_area", max_area, low=self.min_area, high=1.0, what="a share, min_area or more"
        )
        low = check_number("min_aspect", min_aspect, low=1e-6, what="a number above 0")
        high = check_number("max_aspect", max_aspect or 1 / low, low=low, what="a number, min_aspect or more")
        self.log_aspect_ratio = (math.log(low), math.log(high))
        self.mode = mode.lower() or "const"
        check_choice("mode", self.mode, _MODES)
        self.min_count = check_integer("min_count", min_count, low=1, what="a number of boxes, 1 or more")
        self.max_count = check_integer(
            "max_count", max_count or min_count, low=self.min_count, what="a number of boxes, min_count or more"
        )
        self.num_splits = check_integer("num_splits", num_splits, low=0, what="a number of parts, 0 or more")
        self._draws = Draws(seed)

    def __call__(self, images: Tensor) -> Tensor:
        """Erase in place.

        Args:
            images: (N, C, H, W), or one (C, H, W); floating, normalised.

        Returns:
            The same tensor.

        Raises:
            TypeError, ValueError: for anything else.
        """
        if isinstance(images, Tensor) and images.ndim == 3:
            self(images[None])
            return images
        check_tensor("images", images, dtypes=_IMAGES, ndim=4, shape="(N, C, H, W)")
        size = (images.shape[2], images.shape[3])
        erased = self.erasure(len(images), images.shape[1], size, images.device)
        mix(images, keep_plan(len(images), size).to(images.device), erase=erased, out=images)
        return images

    def erasure(self, n: int, channels: int, size: tuple[int, int], device: torch.device) -> Erasure:
        """Draw what a call would erase of n images, for `mix` to do in the pass that mixes and normalises them.

        Args:
            n: number of images, 0 or more.
            channels: C.
            size: (H, W) in pixels.
            device: where the images are.

        Returns:
            An `Erasure` of n rows, on the device.
        """
        rng = self._draws.next()
        return filled(self.draw(rng, n, size), channels, self.mode, int(rng.integers(2**63)), device)

    def draw(self, rng: np.random.Generator, n: int, size: tuple[int, int]) -> np.ndarray:
        """(n, R, 4) int64 boxes of top, left, height, width; of no height where nothing is erased."""
        first = n // self.num_splits if self.num_splits > 1 else 0
        erased = (rng.random(n) <= self.probability) & (np.arange(n) >= first)
        count = rng.integers(self.min_count, self.max_count + 1, size=n)
        shape = (n, self.max_count, _ATTEMPTS)
        area = rng.uniform(self.min_area, self.max_area, size=shape) * size[0] * size[1] / count[:, None, None]
        aspect = np.exp(rng.uniform(*self.log_aspect_ratio, size=shape))
        sides = np.rint(np.sqrt(np.stack([area * aspect, area / aspect], axis=-1))).astype(np.int64)
        fits = (sides < np.array(size)).all(-1)
        tried = np.argmax(fits, axis=2)[..., None]
        sides = np.take_along_axis(sides, tried[..., None], axis=2)[:, :, 0]
        used = np.take_along_axis(fits, tried, axis=2)[..., 0] & erased[:, None]
        used &= np.arange(self.max_count) < count[:, None]
        sides[~used] = 0
        start = rng.integers(0, np.array(size) - sides + 1)
        return np.concatenate([start, sides], axis=-1)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(p={self.probability}, mode={self.mode}, count=({self.min_count}, {self.max_count}))"
        )


def filled(boxes: np.ndarray, channels: int, mode: str, seed: int, device: torch.device) -> Erasure:
    """Boxes with what a mode fills them with, on a device: as many launches for a batch as for one image, and no wait.

    Args:
        boxes: (N, R, 4) int64 of top, left, height, width inside the image; later ones lie over earlier ones.
        channels: C.
        mode: "const", "rand" or "pixel", as in `RandomErasing`.
        seed: of the normal numbers.
        device: where the images are.

    Raises:
        ValueError: for 2**31 pixels to erase, or more.
    """
    areas = boxes[..., 2] * boxes[..., 3]
    used = areas if mode == "pixel" else (areas > 0).astype(np.int64)  # rows of colours of each box
    rows = int(used.sum())
    if rows >= 2**31:
        raise ValueError(f"{rows} pixels would be erased, but 2**31 - 1 at most can be; take smaller batches")
    if mode == "const":
        first, fill = np.zeros_like(used), torch.zeros(1, channels, device=device)
    else:
        first = (np.cumsum(used) - used.ravel()).reshape(used.shape)
        normal = torch.Generator(device).manual_seed(seed)
        fill = torch.randn(max(rows, 1), channels, generator=normal, device=device, dtype=torch.float32)
    table = torch.from_numpy(np.concatenate([boxes, first[..., None]], axis=-1).astype(np.int32))
    return Erasure(table if device.type == "cpu" else moved([table], device)[0], fill, mode == "pixel")
