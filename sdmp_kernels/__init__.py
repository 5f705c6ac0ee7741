"""Per-sample image mixing and soft-label losses for accelerators. Everything public is named here."""

from sdmp_kernels._backends import backends, use_backend
from sdmp_kernels.ops.distillation import distillation
from sdmp_kernels.ops.info_nce import info_nce
from sdmp_kernels.ops.mix import mix
from sdmp_kernels.ops.soft_cross_entropy import soft_cross_entropy
from sdmp_kernels.plan import MixPlan, Rule, TwoHot, draw_plan, make_plan

__all__ = [
    "MixPlan",
    "Rule",
    "TwoHot",
    "backends",
    "distillation",
    "draw_plan",
    "info_nce",
    "make_plan",
    "mix",
    "soft_cross_entropy",
    "use_backend",
]
__version__ = "0.1.0"
