"""A model that follows another: momentum encoders and teachers."""

from __future__ import annotations

import copy
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


PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast hands on in its own dtype, and nothing else of theirs; their subclasses may do more."""


class Lowered:
    """A follower's forward passes under autocast, with the weights of its products cast once a step.

    Autocast remembers its casts of trained parameters alone: those of a follower it makes anew in every forward pass,
    one launch for each. The twin shares all else with the follower, buffers included, so that the bits are the same.

    In float32 there is nothing to cast, and the twin is the follower itself.

    Attributes:
        twin: what to call, after `refresh`.
    """

    def __init__(self, follower: nn.Module, dtype: torch.dtype) -> None:
        self._from: list[Tensor] = []
        self._to: list[Tensor] = []
        self.twin = follower
        if dtype == torch.float32:
            return
        tensors = {id(t): t for t in (*follower.parameters(), *follower.buffers())}
        self.twin = copy.deepcopy(follower, memo=tensors)
        for own, part in zip(follower.modules(), self.twin.modules(), strict=True):
            part._buffers = own._buffers  # the dictionary: what is put in place of a buffer is the twin's too
            if type(own) not in PRODUCTS:
                part._parameters = own._parameters
                continue
            part._parameters = {name: lowered(p, dtype) for name, p in own._parameters.items()}
            pairs = ((own._parameters[name], p) for name, p in part._parameters.items())
            for source, target in ((a, b) for a, b in pairs if a is not None and b is not None):
                self._from.append(source)
                self._to.append(target)

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """Cast the follower's weights as they are now; returns the twin."""
        if self._to:
            torch._foreach_copy_(self._to, self._from)
        return self.twin


def lowered(parameter: nn.Parameter | None, dtype: torch.dtype) -> nn.Parameter | None:
    """A parameter of another dtype, without gradient."""
    return None if parameter is None else nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
