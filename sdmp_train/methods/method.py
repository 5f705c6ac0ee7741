"""What a training loop asks of a method, and what it hands on: the loop knows this file and no method.

Letters: N rows per rank, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sdmp_kernels import MixPlan

from ..data import Batch, ViewRecipe
from ..distributed import World
from ..settings import DataConfig

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class At(NamedTuple):
    """Where a training stands; every schedule is a function of it."""

    step: int
    """Steps made."""
    steps: int
    """Steps that the schedules span."""
    steps_per_epoch: int
    part: int = 0
    """Which of the step's batches, where gradients accumulate over several."""
    parts: int = 1

    @property
    def epoch(self) -> float:
        """Epochs made, with their fraction."""
        return self.step / self.steps_per_epoch


class Setup(NamedTuple):
    """What a method learns of the run besides its own settings."""

    world: World
    dtype: torch.dtype
    """Of the images: bfloat16 where the encoders run under autocast, else float32."""
    seed: int
    rows: int
    """Rows of one batch on this rank."""
    data: DataConfig
    classes: int
    """Class folders of the images; 0 where there are none."""


class Loss(NamedTuple):
    """What one batch costs, 0-dim tensors on the device."""

    total: Tensor
    """With gradient."""
    terms: Mapping[str, Tensor]
    """Its summands, detached, logged as loss_<name>."""
    facts: Mapping[str, Tensor] = NOTHING
    """Other numbers worth logging, detached, under their own names."""
    shown: Tensor | None = None
    """What is logged as the loss, detached, where the total says little to people."""


def mean_of(losses: Sequence[Loss]) -> Loss:
    """The mean of every number over the batches of a step."""
    if len(losses) == 1:
        return losses[0]

    def mean(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}

    total = torch.stack([loss.total for loss in losses]).mean()
    terms, facts = mean([loss.terms for loss in losses]), mean([loss.facts for loss in losses])
    shown = [loss.shown for loss in losses if loss.shown is not None]
    return Loss(total, terms, facts, torch.stack(shown).mean() if shown else None)


class Group(NamedTuple):
    """Parameters that the optimiser treats alike; those that need no gradient are left out."""

    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    decays: bool = True
    from_epoch: float = 0.0
    """Frozen until then."""


class Step(NamedTuple):
    """What a step came to, on the device."""

    loss: Loss
    """The mean over the step's batches, detached."""
    grad_norm: Tensor
    """Before clipping."""
    flags: Tensor
    """[bad, stop], 1 or 0, the largest over the ranks."""


class Method(Protocol):
    """How images become a loss. A step calls `plan`, `mix`, `encode`, `loss` and `after_update`, in this order.

    What `plan`, `mix` and `encode` return is the method's own business: the loop only hands it on.
    """

    Config: ClassVar[type]
    """Its own frozen dataclass of settings, mixing included; its `method_class` leads back here."""

    def __init__(self, config: Any, build_backbone: Callable[..., nn.Module], setup: Setup) -> None:
        """`config`: an instance of `Config`.

        `build_backbone(**options)`, see `models.build_backbone`, gives an equal backbone at every call.
        """

    @staticmethod
    def backbone_options(config: Any) -> dict[str, Any]:
        """What is asked of the backbone that is evaluated and exported; see `models.timm_arguments`."""

    @property
    def trained(self) -> nn.Module:
        """What the optimiser and the gradient's norm see."""

    @property
    def state(self) -> nn.ModuleDict:
        """All that checkpoints hold, one part per entry, and that a bad step must not change."""

    @property
    def backbone(self) -> nn.Module:
        """What is evaluated and exported; a part of `state`."""

    @property
    def backbones(self) -> list[nn.Module]:
        """Every backbone that a step runs, `backbone` among them or not: what `--compile` compiles."""

    @property
    def partners_follow_ranks(self) -> bool:
        """Whether another number of processes mixes images, or features, with other partners."""

    def views(self, at: At) -> Sequence[ViewRecipe]:
        """How the views of a batch are made."""

    def plan(self, at: At) -> Any:
        """What is mixed with what, from the seed and `at` alone."""

    def without_lost(self, plan: Any, batch: Batch) -> Any:
        """The plan for a batch of which some rows, by `batch.all_valid`, are no images: nothing of them comes into
        another row. Their own rows then have no part in the loss."""

    def mix(self, batch: Batch, plan: Any) -> Any:
        """(N, 3, H, W) uint8 views -> the images that the encoders see."""

    def encode(self, images: Any) -> Any:
        """Images -> features."""

    def loss(self, features: Any, plan: Any, batch: Batch, at: At) -> Loss:
        """Features -> the loss of this rank's rows."""

    def groups(self) -> list[Group]:
        """The parameters of `trained`, each in one group."""

    def after_update(self, at: At, good: Tensor) -> None:
        """What follows the optimiser, such as a momentum encoder; `good`: 0-dim, 1 or, where nothing may move, 0."""

    def facts(self, plan: Any) -> dict[str, Tensor]:
        """Numbers of a step's plan that are worth a line in metrics.jsonl."""

    def health(self, features: Any) -> dict[str, Tensor]:
        """Numbers that say whether features still tell images apart, where a line is written; see `health.py`."""

    def collapse(self, numbers: Mapping[str, float]) -> str | None:
        """Why the numbers of a line (all of them, by their names in metrics.jsonl) say that features have collapsed."""

    def describe(self) -> str:
        """The terms of the loss and its chance level, for people."""

    def example(self, batch: Batch) -> list[tuple[str, Tensor, MixPlan]]:
        """For mix.png: (what it shows, (N, 3, H, W) uint8 images on the CPU, their plan), none where nothing mixes."""
