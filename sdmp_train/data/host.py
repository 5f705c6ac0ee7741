"""What is done to a finished view on the host, an image at a time, by other people's code: RandAugment, random erasing.

The fused `augment` has no such step: it is for recipes that are defined by a library's own Python, and costs what that
costs. The Pillow loader carries it out in its worker processes. The random numbers of an image follow from (seed, step,
row) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

_STREAM = 0x484F5354
"""Highest counter word of the seeds: another stream than those of orders, views and plans."""


class HostTransform(Protocol):
    """One image's view -> the same view changed. May read Python's, numpy's and torch's global generators."""

    def __call__(self, view: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) -> (H, W, 3)."""


def host_seeds(*, seed: int, step: int, first_row: int, rows: int) -> NDArray[np.uint32]:
    """(rows,) seeds for the rows of the global batch from `first_row` on."""
    bits = np.random.Philox(key=[seed, step], counter=[0, 0, 0, _STREAM]).random_raw(first_row + rows)
    return (bits[first_row:] >> np.uint64(32)).astype(np.uint32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's global generators follow from `seed` within the block, and are then as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # what timm reads
    random.seed(int(seed))
    np.random.seed(int(seed))  # noqa: NPY002
    torch.default_generator.manual_seed(int(seed))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's operation, which at the highest magnitude asks for 0 bits: black, as older Pillows made of it."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


@dataclass(frozen=True)
class RandAugmentErase:
    """timm's RandAugment, then timm's random erasing by normal noise, as DeiT has them after crop and flip.

    Noise is drawn around the mean image in units of `std`, as timm draws it in normalised images, and stored as uint8:
    it ends where a pixel does (2 to 2.6 standard deviations with ImageNet's numbers).
    """

    size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    """As timm spells it; None leaves it out."""
    erase_prob: float = 0.25

    @cached_property
    def _augment(self) -> Callable[[Image.Image], Image.Image] | None:
        if self.randaugment is None:
            return None
        from timm.data.auto_augment import rand_augment_transform

        options = {
            "translate_const": int(self.size_px * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in self.mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        augment = rand_augment_transform(self.randaugment, options)
        for operation in augment.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
        return augment

    @cached_property
    def _erase(self) -> Any:
        from timm.data.random_erasing import RandomErasing

        return RandomErasing(self.erase_prob, mode="pixel", device="cpu")

    def __call__(self, view: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._augment is not None:
            view = np.asarray(self._augment(Image.fromarray(view)))
        if self.erase_prob == 0:
            return view
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        image = (torch.from_numpy(view.copy()).permute(2, 0, 1).float() / 255 - mean) / std
        image = self._erase(image)
        return ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
