"""A backbone as others load it: safetensors with timm's names, timm's config.json and a model card (README.md).

    timm.create_model("local-dir:runs/.../exported", pretrained=True, num_classes=10)

A ResNet with the CIFAR stem needs `load_exported` of this file, since timm has no such stem: what config.json calls it
makes timm refuse it in every call, where it would otherwise leave the stem untrained in some. `how_to_load` says which.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import nn

from .card import CARD, is_edited, model_card
from .checkpoint import compare
from .config import Config, ConfigError, DataConfig, ModelConfig
from .durable import draft_of
from .models import check_name, create, make_model, timm_arguments
from .reading import is_whole_number, read_json, read_tensors
from .settings import require
from .text import one_line, printable

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
# What a description may pass to timm, and from where to where. timm itself knows arguments that open files.
MODEL_ARGUMENTS = {
    "img_size": (8, 2**14),
    "patch_size": (1, 512),
    "embed_dim": (1, 2**14),
    "depth": (1, 256),
    "num_heads": (1, 256),
    "stem_width": (1, 2**12),
    "in_chans": (1, 16),
}
STAGES, WIDEST = 4, 2**14
"""What `channels` of a ResNet may be: that many numbers, up to that."""
POOLS = ("token", "avg", "max", "avgmax", "catavgmax", "fast", "map")
"""What `global_pool` may be, which timm's own exports name."""
SWITCHES = ("fc_norm",)
"""Arguments of timm's models that are true or false."""
TIMM_NAME = "timm_architecture"
"""Of a description: timm's name of the model, where `architecture` is none that timm knows."""
MOST_CLASSES = 2**20


def export_backbone(backbone: nn.Module, config: Config, folder: Path, step: int) -> None:
    """Write `folder` anew, then load it again: every tensor must match and features must be equal.

    Raises:
        RuntimeError: where what was written does not give the same model.
    """
    frozen = copy.deepcopy(backbone).cpu().to(memory_format=torch.contiguous_format).eval()
    description = description_of(frozen, config, step)
    write_export(frozen, description, folder, card=model_card(config, step, {}))


def description_of(backbone: nn.Module, config: Config, step: int) -> dict[str, Any]:
    """What config.json of an export says of the backbone of a run with these settings, after so many steps."""
    name, arguments = timm_arguments(
        config.model, config.data.image_px, channels=config.data.channels, **config.backbone_options
    )
    return {
        **named(name, config.model.stem),
        "num_classes": 0,
        "num_features": int(backbone.num_features),  # type: ignore[arg-type]
        "model_args": {**arguments, **norm_arguments(backbone, name, arguments)},
        "pretrained_cfg": {
            "input_size": [config.data.channels, *config.data.size_px],
            "mean": list(config.data.mean),
            "std": list(config.data.std),
            "num_classes": 0,
            **layer_names(backbone),
        },
        "stem": config.model.stem,
        "pretraining": {
            "preset": config.run.preset,
            "method": config.method_name,
            "steps": step,
            **(
                {key: getattr(config.model, key) for key in ("init_from", "init_sha256")}
                if config.model.init_from
                else {}
            ),
        },
    }


def named(name: str, stem: str) -> dict[str, str]:
    """What config.json calls a model: timm's name, or where timm lacks the stem, what its error shall say."""
    if stem != "cifar":
        return {"architecture": name}
    # timm says "Unknown model (...)" before it builds anything or reads a weight.
    reason = f"{name} with the CIFAR stem, which timm does not have: load it by sdmp_train.export.load_exported"
    return {"architecture": reason, TIMM_NAME: name}


def timm_name(description: Mapping[str, Any]) -> str:
    """What timm calls the model that a checked description is of; `architecture` in exports of before."""
    return description[TIMM_NAME if TIMM_NAME in description else "architecture"]


def plain_name(description: Mapping[str, Any]) -> str:
    """The same without the tag of weights, which is no part of the model."""
    return timm_name(description).partition(".")[0]


def write_export(frozen: nn.Module, description: dict[str, Any], folder: Path, *, card: str | None = None) -> None:
    """Write `folder` anew from a backbone in eval mode on the CPU and what its config.json and card shall say."""
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({key: value.clone().contiguous() for key, value in frozen.state_dict().items()}, draft / WEIGHTS)
    (draft / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
    if card is not None:
        (draft / CARD).write_text(card, encoding="utf-8")
    (draft / WEIGHTS).chmod((draft / DESCRIPTION).stat().st_mode)  # safetensors writes for the owner alone
    check_equal(frozen, load_exported(draft)[0], description["pretrained_cfg"]["input_size"])
    put_in_place(draft, folder)


def layer_names(backbone: nn.Module) -> dict[str, Any]:
    """What timm reads to give a model another classifier or other input channels: the names of those layers."""
    known = getattr(backbone, "pretrained_cfg", None) or {}
    return {key: known[key] for key in ("classifier", "first_conv") if known.get(key) is not None}


def norm_arguments(backbone: nn.Module, name: str, arguments: dict[str, Any]) -> dict[str, bool]:
    """What keeps a ViT's last norm where it was trained, before the pooling, where `global_pool="avg"` is asked for.

    timm would otherwise look for the norm after the pooling, which these weights do not have.
    """
    held = backbone.state_dict().keys()
    for extra in ({}, {"fc_norm": False}):
        try:
            averaged = create(name, {**arguments, **extra, "global_pool": "avg"}, "meta")
        except Exception:  # the family pools in one way, or has no such norm
            return {}
        if averaged.state_dict().keys() == held:
            return extra
    return {}


def put_in_place(draft: Path, folder: Path) -> None:
    """Let the export in `draft` be the one in `folder`. A former export goes, what else lies there stays."""
    if is_edited(folder / CARD):
        (draft / CARD).unlink(missing_ok=True)
    names = [name for name in (WEIGHTS, DESCRIPTION, CARD) if (draft / name).exists()]
    if folder.is_dir() and (folder.is_symlink() or {path.name for path in folder.iterdir()} - set(names)):
        for name in names:
            (draft / name).replace(folder / name)
        draft.rmdir()
        return
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def load_exported(
    folder: Path | str, *, drop_path: float = 0.0, classifier: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in an exported folder, in eval mode on the CPU, and its description.

    A backbone, (N, C, H, W) -> (N, D); with the classifier where the export has one, (N, K), unless told otherwise.

    The folder may be anybody's: only what `check_description` knows reaches timm, and no memory is taken for weights
    that the file does not hold. `drop_path`: as `build_backbone` has it; it takes effect in training mode.

    Raises:
        ConfigError: where the folder holds no export, or its tensors are not those of the model it describes.
    """
    folder = Path(folder)
    description = read_description(folder)
    try:
        tensors = read_tensors(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no exported backbone: {one_line(error)}") from error
    stem: Literal["imagenet", "cifar"] = description.get("stem", "imagenet")
    config = ModelConfig(arch=timm_name(description), stem=stem)
    classes: int = description.get("num_classes", 0)
    with torch.random.fork_rng(devices=[]):
        expected = make_model(config, config.arch, description["model_args"], "meta", classes).state_dict()
        compare(str(folder / WEIGHTS), expected, tensors)
        arguments = {**description["model_args"], **({"drop_path_rate": drop_path} if drop_path else {})}
        model = make_model(config, config.arch, arguments, "cpu", classes if classifier else 0)
    model.load_state_dict({key: tensors[key] for key in model.state_dict()})
    return model.eval(), description


def read_description(folder: Path) -> dict[str, Any]:
    """The checked config.json of an exported folder. Raises `ConfigError` where there is none, or none of ours."""
    if not folder.exists():
        raise ConfigError(f"there is no folder {printable(folder)}; expected that of a run or of an export")
    try:
        description = read_json(folder / DESCRIPTION)
        check_description(description)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no exported backbone: {one_line(error)}") from error
    return description


def check_description(description: dict[str, Any]) -> None:
    """Raise `ConfigError` unless a config.json says what `export_backbone` writes, with values within reason."""
    key = TIMM_NAME if TIMM_NAME in description else "architecture"
    name = description.get(key)
    require(isinstance(name, str), key, name, "the name of a timm model")
    check_name(cast(str, name))
    classes = description.get("num_classes", 0)
    require(
        is_whole_number(classes, 0, MOST_CLASSES), "num_classes", classes, f"a whole number from 0 to {MOST_CLASSES}"
    )
    require(
        description.get("stem", "imagenet") in ("imagenet", "cifar"), "stem", description.get("stem"), "a known one"
    )
    arguments = description.setdefault("model_args", {})
    require(isinstance(arguments, dict), "model_args", arguments, "names and values")
    if arguments.get("num_classes") == classes:
        del arguments["num_classes"]  # timm's own exports say it twice
    for key, value in arguments.items():
        if key == "stem_type":
            require(value == "deep", "model_args: stem_type", value, "'deep'")
            continue
        if key == "global_pool":
            require(value in POOLS, "model_args: global_pool", value, f"one of {', '.join(POOLS)}")
            continue
        if key == "channels":
            four = (
                isinstance(value, list) and len(value) == STAGES and all(is_whole_number(v, 1, WIDEST) for v in value)
            )
            require(four, "model_args: channels", value, f"{STAGES} whole numbers from 1 to {WIDEST}")
            continue
        known = ", ".join([*MODEL_ARGUMENTS, *SWITCHES, "channels", "global_pool", "stem_type"])
        if key in SWITCHES:
            require(isinstance(value, bool), f"model_args: {key}", value, "true or false")
            continue
        require(key in MODEL_ARGUMENTS, "a name in model_args", key, f"one of {known}: others could open files")
        low, high = MODEL_ARGUMENTS[key]
        if key == "img_size" and isinstance(value, list):
            pair = len(value) == 2 and all(is_whole_number(v, low, high) for v in value)
            require(pair, "model_args: img_size", value, f"one or two whole numbers from {low} to {high}")
            continue
        require(is_whole_number(value, low, high), f"model_args: {key}", value, f"a whole number from {low} to {high}")
    pixels = description.get("pretrained_cfg")
    require(isinstance(pixels, dict), "pretrained_cfg", pixels, "an object with input_size, mean and std")
    settings = cast(dict[str, Any], pixels)
    size = settings.get("input_size")
    low, high = MODEL_ARGUMENTS["img_size"]
    fits = isinstance(size, list) and len(size) == 3 and size[0] == arguments.get("in_chans", 3)
    expected = f"[C, H, W] with the C of in_chans, or 3, and H and W from {low} to {high}"
    sides = cast(list[Any], size)[1:] if fits else []
    require(fits and all(is_whole_number(side, low, high) for side in sides), "input_size", size, expected)
    for key in ("mean", "std"):
        values = settings.get(key)
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        require(numbers, key, values, "a number for each channel")
    DataConfig(
        channels=cast(list[Any], size)[0], mean=tuple(settings["mean"]), std=tuple(settings["std"])
    )  # checks their values


def check_equal(ours: nn.Module, loaded: nn.Module, input_size: Sequence[int]) -> None:
    """Raise `RuntimeError` unless both models hold equal tensors and give equal features."""
    other = loaded.state_dict()
    wrong = [name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, other[name])]
    images = torch.linspace(-2, 2, 2 * math.prod(input_size)).view(2, *input_size).sin()
    with torch.inference_mode():
        equal = torch.equal(ours(images), loaded(images))
    if wrong or not equal:
        raise RuntimeError(f"the export differs from the trained backbone: tensors {wrong}, features equal: {equal}")
