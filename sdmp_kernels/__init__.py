"""Per-sample image mixing and soft-label losses for accelerators. Everything public is named here."""

import importlib.util
import sys

if sys.argv[:1] == ["-m"] and importlib.util.find_spec("torch") is None:
    # `python -m sdmp_kernels` begins here: a line in place of a traceback. An import elsewhere fails as it always does.
    from sdmp_train.advice import leave_without

    leave_without(ModuleNotFoundError(name="torch"), "sdmp_kernels", "")

from sdmp_kernels._backends import backends, use_backend
from sdmp_kernels.clip import clip_loss
from sdmp_kernels.ops.augment import augment
from sdmp_kernels.ops.augment.arguments import FlatImages
from sdmp_kernels.ops.distillation import distillation
from sdmp_kernels.ops.info_nce import info_nce
from sdmp_kernels.ops.mix import mix
from sdmp_kernels.ops.mix.arguments import Erasure
from sdmp_kernels.ops.soft_cross_entropy import soft_cross_entropy
from sdmp_kernels.plan import MixPlan, Rule, TwoHot, draw_plan, make_plan
from sdmp_kernels.views import ViewDraws, ViewRecipe, byol_views, dino_views, draw_views

__all__ = [
    "Erasure",
    "FlatImages",
    "MixPlan",
    "Rule",
    "TwoHot",
    "ViewDraws",
    "ViewRecipe",
    "augment",
    "backends",
    "byol_views",
    "clip_loss",
    "dino_views",
    "distillation",
    "draw_plan",
    "draw_views",
    "info_nce",
    "make_plan",
    "mix",
    "soft_cross_entropy",
    "use_backend",
]
__version__ = "0.1.0"
