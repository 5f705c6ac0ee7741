"""MoCo v3 with SDMP: which views meet which keys, with which targets and weights.

Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers (2021), for MoCo v3; Ren et al.,
A Simple Data Mixing Prior for Improving Self-Supervised Learning (2022), sections 3.2 and 4.1.1, for SDMP.

Letters: N rows per rank, H W pixels. Views are named a, b, c, d; a~ is a mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from sdmp_kernels import MixPlan, TwoHot

from ..data import Batch
from ..distributed import mirror_rank
from .contrast import Contrast, Plan
from .method import At, Setup
from .mixing import draw_batch_plan, examples_of_rules, generator, half_unless_kept
from .settings.contrast import Term
from .settings.mocov3 import MoCoV3Config

# The stream of Philox(seed, step) that decides the swap; draw_plan uses the first counter words.
SWAP_STREAM = 2**62


class MoCoV3(Contrast):
    """MoCo v3, plain or with SDMP."""

    Config: ClassVar[type] = MoCoV3Config

    def __init__(self, config: MoCoV3Config, build_backbone: Callable[..., nn.Module], setup: Setup) -> None:
        super().__init__(config, build_backbone, setup, global_flip=config.flip == "global")
        self.config = config
        self.form = config.form

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
