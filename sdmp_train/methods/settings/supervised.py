"""The settings of training on labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ...flags import arg
from ...settings import DataConfig, between
from .method import Pass
from .mixing import RULES, check_rules

if TYPE_CHECKING:
    from ..method import Method


@dataclass(frozen=True)
class SupervisedConfig:
    """Cross-entropy on the classes of the folders, with mixed images and labels."""

    rules: tuple[str, ...] = RULES
    """Mixing rules drawn from, uniformly: mixup, cutmix, resizemix."""
    per: Annotated[Literal["batch", "sample"], arg(name="mix-per")] = "batch"
    """One rule per batch or per sample."""
    alpha: Annotated[float, arg(name="mix-alpha")] = 1.0
    """lam is drawn from Beta(alpha, alpha)."""
    prob: Annotated[float, arg(name="mix-prob")] = 1.0
    """Chance that a sample is mixed at all; 0 trains on clean images."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    drop_path: float = 0.0
    """Chance that the last residual branch is left out for a sample, falling to 0 towards the first."""

    def __post_init__(self) -> None:
        check_rules(self.rules, self.alpha)
        between("mix_prob", self.prob, 0, 1)
        between("label_smoothing", self.label_smoothing, 0, 1 - 1e-9)
        between("drop_path", self.drop_path, 0, 1 - 1e-9)

    def passes(self, data: DataConfig) -> list[Pass]:
        """One."""
        return [Pass(data.image_px, trained=True)]

    @staticmethod
    def method_class() -> type[Method]:
        """Supervised."""
        from ..supervised import Supervised

        return Supervised
