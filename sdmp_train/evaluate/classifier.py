"""A fine-tuned classifier as it is kept: an exported backbone, beside it the last layer and the classes' names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ..export import load_exported
from ..models import feature_width
from ..reading import read_json, read_tensors
from ..settings import ConfigError
from ..text import one_line, printable

HEAD, CLASSES = "classifier.safetensors", "classes.json"


class ClassifierModel(nn.Module):
    """(N, 3, H, W) normalised images -> (N, K) logits."""

    def __init__(self, backbone: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).float())


def as_json(classes: Sequence[str]) -> str:
    """The names of the classes, in the order of the logits."""
    return json.dumps({"classes": list(classes)}, indent=1) + "\n"


def load_classifier(folder: Path) -> tuple[ClassifierModel, dict, tuple[str, ...]]:
    """The classifier in a folder that `eval finetune` exported, its `pretrained_cfg`, and its classes.

    Raises:
        ConfigError: there is none, or its parts do not belong together.
    """
    backbone, description = load_exported(folder)
    if not (folder / HEAD).exists():
        raise ConfigError(
            f"{printable(folder)} holds a backbone without a classifier; `eval finetune` makes one, in "
            "RUN/evaluations/finetune/exported"
        )
    try:
        tensors = read_tensors(folder / HEAD)
        listed = read_json(folder / CLASSES).get("classes")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{printable(folder)} holds no classifier: {one_line(error)}") from error
    classes = tuple(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else ()
    expected = {"weight": (len(classes), feature_width(backbone)), "bias": (len(classes),)}
    if not classes or {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise ConfigError(f"{printable(folder / HEAD)} does not fit the backbone and the classes beside it")
    model = ClassifierModel(backbone, tensors["weight"], tensors["bias"]).eval()
    return model, description["pretrained_cfg"], classes
