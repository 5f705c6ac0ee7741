"""The settings of DACL inside MoCo v3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ...flags import arg
from ...settings import between
from .contrast import ContrastConfig, Term

if TYPE_CHECKING:
    from ..method import Method

TERMS = (Term("noised", "a~", "b~", 1.0), Term("noised", "b~", "a~", 1.0))


@dataclass(frozen=True)
class DACLConfig(ContrastConfig):
    """DACL inside MoCo v3, our re-implementation."""

    alpha: Annotated[float, arg(name="dacl-alpha")] = 0.9
    """lam, the share of the image itself, is drawn uniformly between this and 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between("dacl_alpha", self.alpha, 0, 1)

    def terms(self) -> tuple[Term, ...]:
        """The loss as a table."""
        return TERMS

    @staticmethod
    def method_class() -> type[Method]:
        """DACL."""
        from ..dacl import DACL

        return DACL
