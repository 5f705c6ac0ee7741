"""DACL inside MoCo v3: Mixup as noise on the inputs of queries and of keys, and the ordinary contrastive loss.

Verma et al., Towards Domain-Agnostic Contrastive Learning (2021). Table 1 of the SDMP paper compares with it inside
MoCo v3, without saying how: this is our re-implementation, with the noise on the pixels and by Mixup alone.

    pi, pi': random permutations of the batch; lam_i, lam'_i ~ U(alpha, 1), all independent
    a~_i = lam_i a_i + (1 - lam_i) a_pi(i),  b~_i = lam'_i b_i + (1 - lam'_i) b_pi'(i)
    loss = ctr(a~, b~) + ctr(b~, a~),  ctr(q, k) = 2T mean_i CE(q_i, k; i)

The target is the row itself, however much of another image it holds: that is what SDMP's targets correct.

Letters: N rows per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sdmp_kernels import MixPlan, TwoHot, make_plan

from ..data import Batch
from ..distributed import World
from .contrast import Contrast, Plan
from .method import At, Setup
from .mixing import draw_partners, draw_rows
from .settings.contrast import Term
from .settings.dacl import DACLConfig

LAM_STREAM, PARTNER_STREAM = 2**60, 2**60 + 64


class DACL(Contrast):
    """DACL inside MoCo v3."""

    Config: ClassVar[type] = DACLConfig

    def __init__(self, config: DACLConfig, build_backbone: Callable[..., nn.Module], setup: Setup) -> None:
        super().__init__(config, build_backbone, setup)
        self.config = config

    def plan(self, at: At) -> Plan:
        """Partners and lam of each view by itself."""
        return Plan(False, {view: draw_noise(self.config, self.setup, at, "ab".index(view)) for view in "ab"})

    def target(self, term: Term, plan: Plan) -> TwoHot:
        """The row's own key."""
        return self.keep.source_target(self.offset)

    def example(self, batch: Batch) -> list[tuple[str, Tensor, MixPlan]]:
        """The first view, noised as in a first step of so few images."""
        images = batch.views[0].cpu()
        few = self.setup._replace(rows=len(images), world=World(images.device))
        return [("noise", images, draw_noise(self.config, few, At(0, 1, 1), 0))]


def draw_noise(config: DACLConfig, setup: Setup, at: At, view: int) -> MixPlan:
    """The plan of a view's noise; views share nothing."""
    lam = draw_rows(setup, at, LAM_STREAM + view, lambda numbers, rows: numbers.uniform(config.alpha, 1, rows))
    return make_plan(
        "mixup",
        torch.from_numpy(lam.astype(np.float32)),
        setup.data.size_px,
        partner=draw_partners(setup, at, PARTNER_STREAM + view),
        device=setup.world.device,
    )
