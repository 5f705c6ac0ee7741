"""What of a backbone an evaluation reads. N images, T tokens, D width of the backbone, F features.

| name | features |
|---|---|
| output | what the backbone gives: a ViT's final class token after its norm, a ResNet's pooled map (MoCo v3) |
| last4 | the class tokens of the last four blocks, each after the final norm, side by side: F = 4 D (DINO, ViT-S) |
| mean | the mean patch token of the last block, after the norm; a ResNet's pooled map |
| output+mean | both, side by side: F = 2 D (DINO, ViT-B) |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models import feature_width
from ..settings import ConfigError
from .settings.linear import FeatureName

BLOCKS = 4


def feature_maker(backbone: nn.Module, name: FeatureName) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function from normalised images to (N, F), and F. It does not switch gradients off.

    Raises:
        ConfigError: for class tokens of a backbone that has none.
    """
    width = feature_width(backbone)
    if name == "output":
        return backbone, width
    if not has_tokens(backbone):
        if name == "mean":
            return backbone, width  # a pooled map is that
        raise ConfigError(f"features is {name!r}, which takes a ViT's class token; expected 'output' for this backbone")
    if name == "last4":
        check_depth(backbone)
        return lambda images: torch.cat([classes for classes, _ in last_tokens(backbone, images, BLOCKS)], 1), 4 * width
    if name == "mean":
        return lambda images: last_tokens(backbone, images, 1)[0][1].mean(1), width
    return lambda images: both(*last_tokens(backbone, images, 1)[0]), 2 * width


def has_tokens(backbone: nn.Module) -> bool:
    """Whether it is a ViT with a class token."""
    return getattr(backbone, "cls_token", None) is not None and hasattr(backbone, "forward_intermediates")


def check_depth(backbone: nn.Module) -> None:
    """Raise `ConfigError` where there are fewer blocks than `last4` reads."""
    depth = len(cast(Any, backbone).blocks)
    if depth < BLOCKS:
        raise ConfigError(
            f"features is 'last4', and the backbone has {depth} blocks; expected at least {BLOCKS}, "
            "or give --features output"
        )


def last_tokens(backbone: nn.Module, images: Tensor, blocks: int) -> list[tuple[Tensor, Tensor]]:
    """Of each of the last blocks, after the final norm: class tokens (N, D) and patch tokens (N, T, D)."""
    found = cast(Any, backbone).forward_intermediates(
        images, indices=blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    return [(prefix[:, 0], patches) for patches, prefix in found]


def both(classes: Tensor, patches: Tensor) -> Tensor:
    """Class token and mean patch token, side by side."""
    return torch.cat([classes, patches.mean(1)], dim=1)


def standardise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images as float32, (x / 255 - mean) / std per channel."""
    centre, scale = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - centre) / scale
