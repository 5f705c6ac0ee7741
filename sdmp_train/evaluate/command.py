"""Which protocols `eval` knows. A protocol is one line in `PROTOCOLS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .finetune import FinetuneConfig, evaluate_finetune
from .knn import KnnConfig, evaluate_knn
from .linear import LinearConfig, evaluate_linear
from .robustness import RobustnessConfig, evaluate_robustness
from .subject import labelled_images

__all__ = ["PROTOCOLS", "labelled_images"]

PROTOCOLS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "knn": (KnnConfig, evaluate_knn),
    "linear": (LinearConfig, evaluate_linear),
    "finetune": (FinetuneConfig, evaluate_finetune),
    "robustness": (RobustnessConfig, evaluate_robustness),
}
"""Settings and function of each, by the name that `eval` knows it by."""
