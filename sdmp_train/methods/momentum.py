"""A model that follows another: momentum encoders and teachers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(leaders: Iterable[nn.Parameter], followers: Iterable[nn.Parameter], share: Tensor) -> None:
    """Move the followers by `share` (0-dim) of the way to their leaders. Batch statistics are the followers' own."""
    there: list[Tensor] = list(leaders)
    here: list[Tensor] = list(followers)
    ways = list(torch._foreach_sub(there, here))
    torch._foreach_mul_(ways, share)
    torch._foreach_add_(here, ways)
