"""The settings of every evaluation that trains."""

from __future__ import annotations

from dataclasses import dataclass

from ...settings import ConfigError, between, require
from .subject import Precision, SubjectConfig


@dataclass(frozen=True)
class FitConfig(SubjectConfig):
    """Settings of every evaluation that trains."""

    seed: int = 0
    """Fixes the start, the order and the augmentation."""
    precision: Precision = "auto"
    """Autocast of the backbone; auto is bf16 on a GPU, fp32 elsewhere. Losses are always fp32."""
    resume: bool = False
    """Go on where an earlier call of this command stopped, or start where there is none."""
    overwrite: bool = False
    """Delete what an earlier call has trained."""
    save_every_minutes: float = 5
    """Minutes between checkpoints; one is also written at the end."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2**63 - 1")
        between("save_every_minutes", self.save_every_minutes, 0, 1e6, above=True)
        require(self.log_every_steps >= 1, "log_every_steps", self.log_every_steps, "at least 1")
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on with a training and --overwrite deletes it; give one of them")
