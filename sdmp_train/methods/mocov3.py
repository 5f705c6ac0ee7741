"""MoCo v3 with SDMP: which views meet which keys, with which targets and weights.

Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers (2021), for MoCo v3; Ren et al.,
A Simple Data Mixing Prior for Improving Self-Supervised Learning (2022), sections 3.2 and 4.1.1, for SDMP.

Letters: N rows per rank, H W pixels. Views are named a, b, c, d; a~ is a mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from sdmp_kernels import MixPlan, TwoHot

from ..data import Batch
from ..distributed import mirror_rank
from ..flags import arg
from ..settings import DataConfig, between
from .contrast import Contrast, ContrastConfig, Plan, Term, passes_of
from .method import At, Pass, Setup
from .mixing import RULES, Flip, check_rules, draw_batch_plan, examples_of_rules, generator, half_unless_kept

# The stream of Philox(seed, step) that decides the swap; draw_plan uses the first counter words.
SWAP_STREAM = 2**62


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


def terms_of(config: MoCoV3Config) -> tuple[Term, ...]:
    """The loss as a table. In `replace` and `algorithm1`, a and b swap roles at random from step to step."""
    extra = config.extra_weight
    if config.mixing == "none":
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
    }[config.variant]


class MoCoV3(Contrast):
    """MoCo v3, plain or with SDMP."""

    Config: ClassVar[type] = MoCoV3Config

    def __init__(self, config: MoCoV3Config, build_backbone: Callable[..., nn.Module], setup: Setup) -> None:
        super().__init__(config, build_backbone, setup, terms_of(config), global_flip=config.flip == "global")
        self.config = config
        self.form = config.form

    @staticmethod
    def passes(config: MoCoV3Config, data: DataConfig) -> list[Pass]:
        """One pass for each query and each key of the terms."""
        return passes_of(terms_of(config), data)

    def plan(self, at: At) -> Plan:
        """Decide, from (seed, step) alone, what is mixed with what. Views share rule and lam, not boxes."""
        config = self.config
        plans = {
            view: draw_batch_plan(
                self.setup,
                at,
                "abcd".index(view),
                rules=config.rules,
                alpha=config.alpha,
                per=config.per,
                shared_lam=config.shared_lam,
                flip=config.flip,
            )
            for view in self.mixed_views
        }
        swap = generator(self.setup, at, SWAP_STREAM).random() > 0.5
        return Plan(bool(swap and plans and config.variant != "extra"), plans)

    def target(self, term: Term, plan: Plan) -> TwoHot:
        """Where the query's probability should lie, from the plan that mixed the pixels (Eq. 3, Eq. 4)."""
        offset = self.offset
        if term.name == "clean":
            return self.keep.source_target(offset)
        mixed = plan.mixes[term.query[0]]
        holder = mirror_rank(self.world) if self.global_flip else self.world.rank
        partner_offset = holder * len(self.keep)
        if term.name == "source":
            target, static = mixed.source_target(offset, partner_offset), self.config.source_weight == "static"
        else:
            target = mixed.pair_target(offset, partner_offset, other=plan.mixes[term.key[0]])
            static = self.config.pair_weight == "static"
        return target._replace(weight=half_unless_kept(target.weight, mixed)) if static else target

    def example(self, batch: Batch) -> list[tuple[str, Tensor, MixPlan]]:
        """The first view, mixed by each rule in turn."""
        if self.config.mixing == "none":
            return []
        config = self.config
        return examples_of_rules(batch.views[0], rules=config.rules, alpha=config.alpha, seed=self.setup.seed)
