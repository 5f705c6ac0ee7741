"""i-mix inside MoCo v3: every query is mixed, and its target is split between the keys of its two sources.

Lee et al., i-Mix: A Domain-Agnostic Strategy for Contrastive Representation Learning (2021). Table 1 and Table 5 of the
SDMP paper compare with it "re-implemented in MoCo v3", without saying how: this is our re-implementation.

    pi: a random permutation of the batch; lam_i ~ Beta(alpha, alpha), folded to max(lam_i, 1 - lam_i)
    a~_i = lam_i a_i + (1 - lam_i) a_pi(i), b~ likewise with the same pi and lam
    loss = ctr(a~, b) + ctr(b~, a),  ctr(q, k) = 2T mean_i (lam_i CE(q_i, k; i) + (1 - lam_i) CE(q_i, k; pi(i)))

Keys are clean and there is no clean query. The i-mix authors mix queries alone too, by Mixup on CIFAR (one lam a
sample) and by CutMix on ImageNet (one lam a batch); they have a memory bank of keys, which MoCo v3 does not.

Letters: N rows per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sdmp_kernels import MixPlan, Rule, TwoHot, make_plan
from sdmp_kernels.plan import draw_boxes

from ..data import Batch
from ..distributed import World
from .contrast import Contrast, Plan
from .method import At, Setup
from .mixing import draw_partners, draw_rows
from .settings.contrast import Term
from .settings.imix import IMixConfig

LAM_STREAM, PARTNER_STREAM, BOX_STREAM = 2**61, 2**61 + 1, 2**61 + 2


class IMix(Contrast):
    """i-mix inside MoCo v3."""

    Config: ClassVar[type] = IMixConfig

    def __init__(self, config: IMixConfig, build_backbone: Callable[..., nn.Module], setup: Setup) -> None:
        super().__init__(config, build_backbone, setup)
        self.config = config
        self.form = config.form

    def plan(self, at: At) -> Plan:
        """Partners and lam of both views; where the rule is CutMix, boxes of one size at places of their own."""
        return Plan(False, {view: draw_mix(self.config, self.setup, at, "ab".index(view)) for view in self.mixed_views})

    def target(self, term: Term, plan: Plan) -> TwoHot:
        """lam at the row's own key, the rest at its partner's."""
        return plan.mixes[term.query[0]].source_target(self.offset)

    def example(self, batch: Batch) -> list[tuple[str, Tensor, MixPlan]]:
        """The first view, mixed as in a first step of so few images."""
        images = batch.views[0].cpu()
        few = self.setup._replace(rows=len(images), world=World(images.device))
        return [(self.config.rule, images, draw_mix(self.config, few, At(0, 1, 1), 0))]


def draw_mix(config: IMixConfig, setup: Setup, at: At, view: int) -> MixPlan:
    """The plan of a view's mixing; views share partners and lam."""
    size, one_lam = setup.data.size_px, config.rule == "cutmix"
    lam = draw_rows(setup, at, LAM_STREAM, lambda numbers, rows: folded_beta(numbers, config.alpha, rows, one_lam))
    box = None
    if config.rule == "cutmix":

        def draw(numbers: np.random.Generator, rows: int) -> np.ndarray:
            everywhere = np.full(rows, int(Rule.CUTMIX), np.uint8)
            return draw_boxes(numbers, everywhere, np.full(rows, lam[0]), (0.0, 1.0), size, clip=False)

        box = torch.from_numpy(draw_rows(setup, at, BOX_STREAM + view, draw).copy())
    return make_plan(
        config.rule,
        torch.from_numpy(lam.astype(np.float32)),
        size,
        box=box,
        partner=draw_partners(setup, at, PARTNER_STREAM),
        device=setup.world.device,
    )


def folded_beta(numbers: np.random.Generator, alpha: float, rows: int, shared: bool) -> np.ndarray:
    """(rows,) float64 max(lam, 1 - lam) of lam ~ Beta(alpha, alpha), one for each row or the same for all."""
    lam = numbers.beta(alpha, alpha, 1 if shared else rows)
    return np.broadcast_to(np.maximum(lam, 1 - lam), (rows,)).copy()
