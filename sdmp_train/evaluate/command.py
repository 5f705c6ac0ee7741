"""Which protocols `eval` knows. A protocol is one line in `PROTOCOLS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..advice import elsewhere
from .embed import EmbedConfig, write_embeddings
from .finetune import FinetuneConfig, evaluate_finetune
from .knn import KnnConfig, evaluate_knn
from .linear import LinearConfig, evaluate_linear
from .pictures import PicturesConfig, make_pictures
from .robustness import RobustnessConfig, evaluate_robustness
from .subject import labelled_images

__all__ = ["PROTOCOLS", "describe_protocols", "labelled_images"]

PROTOCOLS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "knn": (KnnConfig, evaluate_knn),
    "linear": (LinearConfig, evaluate_linear),
    "finetune": (FinetuneConfig, evaluate_finetune),
    "robustness": (RobustnessConfig, evaluate_robustness),
    "pictures": (PicturesConfig, make_pictures),
    "embed": (EmbedConfig, write_embeddings),
}
"""Settings and function of each, by the name that `eval` knows it by."""


def describe_protocols(program: str) -> str:
    """What `eval --help` prints: a line for each."""
    lines = [f"  {name:12} {(settings.__doc__ or '').splitlines()[0]}" for name, (settings, _) in PROTOCOLS.items()]
    return "\n".join(
        [
            f"usage: {program} eval PROTOCOL WHAT [OPTIONS]",
            "",
            "WHAT (or --run, --weights): a run folder, the folder of an export, or timm:NAME for weights of timm's.",
            "--data: a folder of class folders; default: the run's own images.",
            "",
            *lines,
            "",
            f"{program} eval PROTOCOL --help lists a protocol's flags; docs/evaluation.md says what each measures.",
            *elsewhere(),
        ]
    )
