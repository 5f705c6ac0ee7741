"""The settings of i-mix inside MoCo v3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ...flags import arg
from ...settings import between
from .contrast import ContrastConfig, Term

if TYPE_CHECKING:
    from ..method import Method

TERMS = (Term("mixed", "a~", "b", 1.0), Term("mixed", "b~", "a", 1.0))


@dataclass(frozen=True)
class IMixConfig(ContrastConfig):
    """i-mix inside MoCo v3, our re-implementation."""

    rule: Annotated[Literal["mixup", "cutmix"], arg(name="imix-rule")] = "mixup"
    """`mixup`: one lam per sample; `cutmix`: one per batch, the boxes' places per sample and view."""
    alpha: Annotated[float, arg(name="mix-alpha")] = 1.0
    """lam is drawn from Beta(alpha, alpha), and folded to at least one half."""
    form: Annotated[Literal["ce", "log_mixture"], arg(name="loss-form")] = "ce"
    """`ce`: cross-entropy with two shares (i-mix); `log_mixture`: minus the log of the mixed probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between("mix_alpha", self.alpha, 0, 1e6, above=True)

    def terms(self) -> tuple[Term, ...]:
        """The loss as a table."""
        return TERMS

    @staticmethod
    def method_class() -> type[Method]:
        """IMix."""
        from ..imix import IMix

        return IMix
