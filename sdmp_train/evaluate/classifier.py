"""A classifier on a pretrained backbone as it is kept: one model that timm loads, with the names of its classes.

Where timm's model has no plain linear classifier on these features, the backbone is exported alone and the last layer
lies beside it; `load_classifier` takes both.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdmp_kernels.views import Interpolation, eval_view

from ..card import classifier_card, how_to_classify
from ..config import ModelConfig
from ..data import Index
from ..durable import replacing, write_durably
from ..export import DESCRIPTION, layer_names, load_exported, named, plain_name, write_export
from ..models import feature_width, make_model
from ..reading import read_json, read_tensors
from ..settings import ConfigError
from ..text import one_line, printable
from .accuracy import in_words
from .subject import Subject

HEAD, CLASSES = "classifier.safetensors", "classes.json"
UP_TO_ROUNDING = 1e-4
"""Of logits, relative to the largest: the same products may be summed in another order."""


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


def export_classifier(
    folder: Path,
    subject: Subject,
    backbone: nn.Module,
    head: tuple[Tensor, Tensor],
    train: Index,
    *,
    evaluation: str,
    steps: int,
    interpolation: Interpolation,
    recipe: str,
    found: Mapping[str, Any],
) -> None:
    """Write the classifier, the names of its classes, and its card.

    head: weight (K, D) and bias (K,) of the layer on the backbone's features. train: what it was trained on.
    interpolation: of the images that it was measured on. recipe, found: how it was trained and what was measured, for
    the card.

    Raises:
        OSError: where it cannot be written.
        RuntimeError: what was written does not give the same model.
    """
    classes = train.classes
    made = {"evaluation": evaluation, "from": subject.name, "weights_sha256": subject.digest, "steps": steps}
    numbers = {
        "data": f"{printable(subject.data.data or 'not stated')}: {len(train):,} images, {len(classes)} classes",
        "recipe": recipe,
        "accuracy": f"{in_words(found, len(classes)).strip()} on {found['test_images']:,} test images",
    }
    weight, bias = (tensor.detach().cpu().float().contiguous() for tensor in head)
    frozen = copy.deepcopy(backbone).cpu().to(memory_format=torch.contiguous_format).eval()
    pixels = subject.description["pretrained_cfg"]
    whole = whole_model(subject.description, ClassifierModel(frozen, weight, bias).eval(), pixels["input_size"])
    _, height, width = pixels["input_size"]
    stem = subject.description.get("stem", "imagenet")
    name = plain_name(subject.description)
    description = {
        **{key: value for key, value in subject.description.items() if key != "label_names"},
        **named(name, stem),
        "num_classes": 0 if whole is None else len(classes),
        **({} if whole is None else {"label_names": list(classes)}),
        "pretrained_cfg": {
            **pixels,
            **layer_names(frozen),
            "num_classes": 0 if whole is None else len(classes),
            # timm reads these where it makes the transform of test images.
            "crop_pct": min(height, width) / eval_view((height, width)).resize_px,
            "interpolation": interpolation,
        },
        "classifier": made,
    }
    card = classifier_card(description, made, numbers)
    write_export(frozen if whole is None else whole, description, folder, card=card)
    if whole is not None:
        (folder / HEAD).unlink(missing_ok=True)  # of an earlier version
    else:
        with replacing(folder / HEAD) as draft:
            save_file({"weight": weight, "bias": bias}, draft)
        (folder / HEAD).chmod((folder / DESCRIPTION).stat().st_mode)
    write_durably(folder / CLASSES, as_json(classes))


def whole_model(description: Mapping[str, Any], parts: ClassifierModel, input_size: Sequence[int]) -> nn.Module | None:
    """timm's model with its own classifier, which holds these weights and gives the same logits; None where none does.

    Such are models with two heads, or with a layer between features and classifier.
    """
    weight, bias = parts.head.weight, parts.head.bias
    name = plain_name(description)
    config = ModelConfig(arch=name, stem=description.get("stem", "imagenet"))
    with torch.random.fork_rng(devices=[]):
        model = make_model(config, name, description["model_args"], "cpu", len(weight))
    held = parts.backbone.state_dict()
    extra = [key for key in model.state_dict() if key not in held]
    shapes = {key: tuple(model.state_dict()[key].shape) for key in extra}
    wanted = {tuple(weight.shape): weight, tuple(bias.shape): bias}
    if len(extra) != 2 or set(shapes.values()) != set(wanted) or not held.keys() <= model.state_dict().keys():
        return None
    model.load_state_dict({**held, **{key: wanted[shape] for key, shape in shapes.items()}})
    model.eval()
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = parts(images), model(images)
    close = (found - expected).abs().max() <= UP_TO_ROUNDING * expected.abs().max().clamp(min=1e-12)
    return model if close else None


def lines_to_use(folder: Path, test: Index) -> list[str]:
    """What loads the classifier and names the class of a test image, for people to paste."""
    description = read_json(folder / DESCRIPTION)
    image = test.file(0)
    load, predict = how_to_classify(
        description, str(folder.absolute()), os.path.abspath(image) if image else "IMAGE.jpg"
    )
    lines = [f"load     {'; '.join(load)}"]
    return [*lines, f"predict  {'; '.join(predict)}"] if predict else lines


def holds_classifier(folder: Path) -> bool:
    """Whether a folder is one that `export_classifier` has written."""
    return (folder / CLASSES).exists()


def load_classifier(folder: Path | str) -> tuple[nn.Module, dict, tuple[str, ...]]:
    """The classifier in a folder that `eval finetune` or `eval linear` exported, its `pretrained_cfg`, and its classes.

    Raises:
        ConfigError: there is none, or its parts do not belong together.
    """
    folder = Path(folder)
    model, description = load_exported(folder)
    whole = description.get("num_classes", 0) > 0
    if not whole and not (folder / HEAD).exists():
        raise ConfigError(
            f"{printable(folder)} holds a backbone without a classifier; `eval finetune` makes one, in "
            "RUN/evaluations/finetune/exported"
        )
    try:
        listed = read_json(folder / CLASSES).get("classes")
        tensors = {} if whole else read_tensors(folder / HEAD)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{printable(folder)} holds no classifier: {one_line(error)}") from error
    classes = tuple(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else ()
    if whole:
        if len(classes) != description["num_classes"]:
            raise ConfigError(f"{printable(folder / CLASSES)} does not name as many classes as the classifier has")
        return model, description["pretrained_cfg"], classes
    expected = {"weight": (len(classes), feature_width(model)), "bias": (len(classes),)}
    if not classes or {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise ConfigError(f"{printable(folder / HEAD)} does not fit the backbone and the classes beside it")
    return ClassifierModel(model, tensors["weight"], tensors["bias"]).eval(), description["pretrained_cfg"], classes
