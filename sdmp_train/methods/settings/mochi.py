"""The settings of MoCHi inside MoCo v3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ...flags import arg
from ...settings import between, require
from .contrast import ContrastConfig, Term

if TYPE_CHECKING:
    from ..method import Method

TERMS = (Term("hard", "a", "b", 1.0), Term("hard", "b", "a", 1.0))


@dataclass(frozen=True)
class MoCHiConfig(ContrastConfig):
    """MoCHi inside MoCo v3, our re-implementation."""

    hard: Annotated[int, arg(name="mochi-hard")] = 128
    """Hardest negatives that are mixed, for each query; at most as many as there are."""
    mixed: Annotated[int, arg(name="mochi-mixed")] = 128
    """Synthetic negatives that are mixtures of two of those, for each query."""
    query_mixed: Annotated[int, arg(name="mochi-query-mixed")] = 16
    """Synthetic negatives that are mixtures of one of those and the query itself."""
    warmup: Annotated[float, arg(name="mochi-warmup-epochs")] = 10
    """Epochs without synthetic negatives at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hard >= 1, "mochi_hard", self.hard, "at least 1")
        require(self.mixed >= 0, "mochi_mixed", self.mixed, "0 or more")
        require(self.query_mixed >= 0, "mochi_query_mixed", self.query_mixed, "0 or more")
        between("mochi_warmup_epochs", self.warmup, 0, 1e9)

    def terms(self) -> tuple[Term, ...]:
        """The loss as a table."""
        return TERMS

    @staticmethod
    def method_class() -> type[Method]:
        """MoCHi."""
        from ..mochi import MoCHi

        return MoCHi
