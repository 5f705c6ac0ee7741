"""The settings that contrastive methods with a momentum encoder share, and their loss as a table of terms.

Views are named a, b, c, d; a~ is a mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ...flags import arg
from ...settings import DataConfig, between, require
from .method import Pass


@dataclass(frozen=True)
class Term:
    """One summand of the loss: `weight` times the cross-entropy of a query view against the keys of a key view."""

    name: str
    """Terms of one name are one number in the log."""
    query: str
    key: str
    weight: float


def views_of(terms: Sequence[Term]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The views that are queries and those that are keys, each once."""
    return tuple(dict.fromkeys(term.query for term in terms)), tuple(dict.fromkeys(term.key for term in terms))


@dataclass(frozen=True)
class ContrastConfig:
    """Heads, momentum encoder and temperature; the flags keep the names of MoCo v3's reference code."""

    dim: Annotated[int, arg(name="moco-dim")] = 256
    """Features that are compared."""
    mlp_dim: Annotated[int, arg(name="moco-mlp-dim")] = 4096
    """Hidden width of projector and predictor."""
    momentum: Annotated[float, arg(name="moco-m")] = 0.99
    """Momentum of the key encoder at the start."""
    momentum_cosine: Annotated[bool, arg(name="moco-m-cos")] = True
    """Let that momentum rise to 1 along half a cosine."""
    temperature: Annotated[float | None, arg(name="moco-t")] = None
    """Softmax temperature; None is MoCo v3's own: 0.2 for a ViT, 1 for a ResNet."""
    stop_grad_conv1: bool = True
    """ViT: freeze the patch projection at its random start."""

    def __post_init__(self) -> None:
        require(self.dim > 0, "moco_dim", self.dim, "a positive whole number")
        require(self.mlp_dim > 0, "moco_mlp_dim", self.mlp_dim, "a positive whole number")
        between("moco_m", self.momentum, 0, 1)
        if self.temperature is not None:
            between("moco_t", self.temperature, 0, 100, above=True)

    def terms(self) -> tuple[Term, ...]:
        """The loss as a table."""
        raise NotImplementedError

    def passes(self, data: DataConfig) -> list[Pass]:
        """Every query of the terms with gradient, every key without."""
        queries, keys = views_of(self.terms())
        return [Pass(data.image_px, trained=True)] * len(queries) + [Pass(data.image_px, trained=False)] * len(keys)
