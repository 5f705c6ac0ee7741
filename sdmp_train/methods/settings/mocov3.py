"""The settings of MoCo v3, plain and with SDMP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ...flags import arg
from ...settings import between
from .contrast import ContrastConfig, Term
from .mixing import RULES, Flip, check_rules

if TYPE_CHECKING:
    from ..method import Method


@dataclass(frozen=True)
class MoCoV3Config(ContrastConfig):
    """MoCo v3, and what is mixed with what (Tables 6 to 9 of the paper are flags here)."""

    mixing: Literal["none", "sdmp"] = "sdmp"
    """`none` is the plain method."""
    variant: Literal["replace", "algorithm1", "extra"] = "replace"
    """`replace`: clean + 1/2 source + 1/2 pair; `algorithm1`: source + pair as printed; `extra`: four views."""
    rules: tuple[str, ...] = RULES
    """Mixing rules drawn from, uniformly: mixup, cutmix, resizemix (Table 8)."""
    per: Annotated[Literal["batch", "sample"], arg(name="mix-per")] = "batch"
    """One rule per batch (the paper) or per sample."""
    alpha: Annotated[float, arg(name="mix-alpha")] = 1.0
    """lam is drawn from Beta(alpha, alpha)."""
    shared_lam: bool = False
    """One lam for the whole batch (Table 7)."""
    flip: Flip = "local"
    """Partners within a GPU, or over all of them, so that their number changes no partner (images are exchanged)."""
    source_weight: Annotated[Literal["random", "static"], arg(name="source-weight")] = "random"
    """`static` puts 1/2 in place of lam in the source loss (Table 6)."""
    pair_weight: Annotated[Literal["random", "static"], arg(name="pair-weight")] = "random"
    """`static` puts 1 in place of the overlap c in the pair loss (Table 6)."""
    form: Annotated[Literal["ce", "log_mixture"], arg(name="loss-form")] = "ce"
    """`ce`: the paper's cross-entropy with two shares; `log_mixture`: minus the log of the mixed probability, as in the
    newest released code. They differ where images are mixed."""
    extra_weight: float = 0.5
    """Weight of source and pair loss in the variant `extra`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rules(self.rules, self.alpha)
        between("extra_weight", self.extra_weight, 0, 1e6)

    def terms(self) -> tuple[Term, ...]:
        """The loss as a table. In `replace` and `algorithm1`, a and b swap roles at random from step to step."""
        extra = self.extra_weight
        if self.mixing == "none":
            return Term("clean", "a", "b", 1.0), Term("clean", "b", "a", 1.0)
        return {
            "replace": (Term("clean", "a", "b", 1.0), Term("source", "b~", "a", 0.5), Term("pair", "b~", "a~", 0.5)),
            "algorithm1": (Term("source", "b~", "a", 1.0), Term("pair", "b~", "a~", 1.0)),
            "extra": (
                Term("clean", "a", "b", 1.0),
                Term("clean", "b", "a", 1.0),
                Term("source", "c~", "d", extra),
                Term("pair", "c~", "d~", extra),
            ),
        }[self.variant]

    @staticmethod
    def method_class() -> type[Method]:
        """MoCoV3."""
        from ..mocov3 import MoCoV3

        return MoCoV3
