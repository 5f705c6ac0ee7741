"""What the backends of `augment` are told."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
