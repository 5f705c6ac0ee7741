"""What the backends of `augment` are told, and images of many sizes in one buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FlatImages:
    """N images of many sizes in one buffer, all on one device: how a GPU holds a set of images that fits.

    A row may lie anywhere in the buffer, so that rows are chosen by indexing `offsets`, `heights` and `widths`.
    """

    pixels: Tensor
    """(bytes,) uint8, contiguous."""
    offsets: Tensor
    """(N,) int64: where each image begins; it is (height, width, channels), contiguous."""
    heights: Tensor
    """(N,) int32, in pixels."""
    widths: Tensor
    """(N,) int32, in pixels."""
    channels: int = 3
    """Of every image."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> FlatImages:
        """The same images on another device."""
        pixels, offsets, heights, widths = (
            tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.pixels, self.offsets, self.heights, self.widths)
        )
        return FlatImages(pixels, offsets, heights, widths, self.channels)

    def unbind(self) -> list[Tensor]:
        """N images (H, W, C), views into the buffer. On a GPU the host waits for the sizes."""
        rows = zip(self.offsets.tolist(), self.heights.tolist(), self.widths.tolist(), strict=True)
        return [self.pixels[o : o + h * w * self.channels].view(h, w, self.channels) for o, h, w in rows]


class Draws(NamedTuple):
    """The tensors of `ViewDraws`, in its order: N rows each."""

    box: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor
