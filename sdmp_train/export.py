"""A backbone as others load it: safetensors with timm's names, timm's config.json and a model card (README.md).

    timm.create_model("local-dir:runs/.../exported", pretrained=True, num_classes=10)

A ResNet with the CIFAR stem needs `load_exported` of this file, since timm has no such stem. `how_to_load` says which.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import nn

from .checkpoint import compare
from .config import Config, ConfigError, DataConfig, ModelConfig
from .durable import draft_of, write_durably
from .models import check_name, create, make_model, timm_arguments
from .reading import is_whole_number, read_json, read_tensors
from .settings import require
from .text import one_line, printable

WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
CARD_MARK = "<!-- Written with the export; an edited card without this line is kept. -->"
# What a description may pass to timm, and from where to where. timm itself knows arguments that open files.
MODEL_ARGUMENTS = {
    "img_size": (8, 2**14),
    "patch_size": (1, 512),
    "embed_dim": (1, 2**14),
    "depth": (1, 256),
    "num_heads": (1, 256),
    "stem_width": (1, 2**12),
}
STAGES, WIDEST = 4, 2**14
"""What `channels` of a ResNet may be: that many numbers, up to that."""
SWITCHES = ("fc_norm",)
"""Arguments of timm's models that are true or false."""


def export_backbone(backbone: nn.Module, config: Config, folder: Path, step: int) -> None:
    """Write `folder` anew, then load it again: every tensor must match and features must be equal.

    Raises:
        RuntimeError: where what was written does not give the same model.
    """
    name, arguments = timm_arguments(config.model, config.data.image_px, **config.backbone_options)
    arguments = {**arguments, **norm_arguments(backbone, name, arguments)}
    frozen = copy.deepcopy(backbone).cpu().to(memory_format=torch.contiguous_format).eval()
    description = {
        "architecture": name,
        "num_classes": 0,
        "num_features": int(frozen.num_features),  # type: ignore[arg-type]
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, config.data.image_px, config.data.image_px],
            "mean": list(config.data.mean),
            "std": list(config.data.std),
            "num_classes": 0,
            **layer_names(frozen),
        },
        "stem": config.model.stem,
        "pretraining": {"preset": config.run.preset, "method": config.method_name, "steps": step},
    }
    write_export(frozen, description, folder, card=model_card(config, step, {}))


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
    check_equal(frozen, load_exported(draft)[0], description["pretrained_cfg"]["input_size"][1])
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


def how_to_load(config: Config, place: str) -> list[str]:
    """The lines of Python that load the export in the folder `place`."""
    if config.model.stem == "cifar":  # timm has no such stem
        return ["from sdmp_train.export import load_exported", f"backbone, _ = load_exported({place!r})"]
    return ["import timm", f"backbone = timm.create_model({'local-dir:' + place!r}, pretrained=True)"]


def model_card(config: Config, step: int, numbers: Mapping[str, str]) -> str:
    """README.md as Hugging Face reads it: what it is, of which data, by which settings, and how it is loaded.

    numbers: what was measured, by name.
    """
    data, optim = config.data, config.optim
    timm_loads = config.model.stem == "imagenet"
    classifier = (
        "`num_classes=10` beside `pretrained=True` gives a new classifier, `in_chans=1` other input channels."
        if timm_loads
        else "`backbone.reset_classifier(10)` gives a new classifier. timm alone has no such stem."
    )
    rows = {
        "data": printable(data.data or "not stated"),
        "preset": config.run.preset,
        "steps": str(step),
        "batch": str(optim.batch_size),
        "epochs": str(optim.epochs),
        "learning rate": f"{optim.lr:.3g}, {optim.opt}",
        "image side": f"{data.image_px} px",
        "mean, std": f"{list(data.mean)}, {list(data.std)}",
        **numbers,
    }
    lines = [
        "---",
        *(["library_name: timm"] if timm_loads else ["library_name: pytorch"]),
        "license: other",
        "license_name: not-stated",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        f"- {config.method_name}",
        "- sdmp",
        "---",
        CARD_MARK,
        "",
        f"# {config.model.arch}, {config.method_name}",
        "",
        f"A backbone without classifier, trained with `{config.method_name}` by `sdmp_train`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()),
        "",
        "## How to load",
        "",
        "From within this folder (from elsewhere, put its path in place of the dot):",
        "",
        "```python",
        *how_to_load(config, "."),
        "```",
        "",
        classifier,
        "",
        "## Licence",
        "",
        "Not stated: the maker of these weights has to name one that the terms of the training images allow.",
        "",
    ]
    return "\n".join(lines)


def write_card(config: Config, folder: Path, step: int, numbers: Mapping[str, str]) -> None:
    """The card of an export anew, with more numbers; one that somebody has edited stays."""
    if not is_edited(folder / CARD):
        write_durably(folder / CARD, model_card(config, step, numbers))


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


def is_edited(card: Path) -> bool:
    """Whether something other than a card that an export wrote lies there."""
    if not card.is_file():
        return card.exists() or card.is_symlink()
    with card.open(encoding="utf-8", errors="replace") as file:
        return CARD_MARK not in file.read(2**12)


def load_exported(folder: Path | str, *, drop_path: float = 0.0) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in an exported folder, in eval mode on the CPU, and its description.

    The folder may be anybody's: only what `check_description` knows reaches timm, and no memory is taken for weights
    that the file does not hold. `drop_path`: as `build_backbone` has it; it takes effect in training mode.

    Raises:
        ConfigError: where the folder holds no export, or its tensors are not those of the model it describes.
    """
    folder = Path(folder)
    try:
        description = read_json(folder / DESCRIPTION)
        check_description(description)
        tensors = read_tensors(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no exported backbone: {one_line(error)}") from error
    stem: Literal["imagenet", "cifar"] = description.get("stem", "imagenet")
    model = ModelConfig(arch=description["architecture"], stem=stem)
    with torch.random.fork_rng(devices=[]):
        expected = make_model(model, model.arch, description["model_args"], "meta").state_dict()
        compare(str(folder / WEIGHTS), expected, tensors)
        arguments = {**description["model_args"], **({"drop_path_rate": drop_path} if drop_path else {})}
        backbone = make_model(model, model.arch, arguments, "cpu")
    backbone.load_state_dict(tensors)
    return backbone.eval(), description


def check_description(description: dict[str, Any]) -> None:
    """Raise `ConfigError` unless a config.json says what `export_backbone` writes, with values within reason."""
    name = description.get("architecture")
    require(isinstance(name, str), "architecture", name, "the name of a timm model")
    check_name(cast(str, name))
    require(
        description.get("stem", "imagenet") in ("imagenet", "cifar"), "stem", description.get("stem"), "a known one"
    )
    arguments = description.setdefault("model_args", {})
    require(isinstance(arguments, dict), "model_args", arguments, "names and values")
    for key, value in arguments.items():
        if key == "stem_type":
            require(value == "deep", "model_args: stem_type", value, "'deep'")
            continue
        if key == "channels":
            four = (
                isinstance(value, list) and len(value) == STAGES and all(is_whole_number(v, 1, WIDEST) for v in value)
            )
            require(four, "model_args: channels", value, f"{STAGES} whole numbers from 1 to {WIDEST}")
            continue
        known = ", ".join([*MODEL_ARGUMENTS, *SWITCHES, "channels", "stem_type"])
        if key in SWITCHES:
            require(isinstance(value, bool), f"model_args: {key}", value, "true or false")
            continue
        require(key in MODEL_ARGUMENTS, "a name in model_args", key, f"one of {known}: others could open files")
        low, high = MODEL_ARGUMENTS[key]
        require(is_whole_number(value, low, high), f"model_args: {key}", value, f"a whole number from {low} to {high}")
    pixels = description.get("pretrained_cfg")
    require(isinstance(pixels, dict), "pretrained_cfg", pixels, "an object with input_size, mean and std")
    settings = cast(dict[str, Any], pixels)
    size = settings.get("input_size")
    low, high = MODEL_ARGUMENTS["img_size"]
    fits = isinstance(size, list) and len(size) == 3 and size[0] == 3 and size[1] == size[2]
    expected = f"[3, S, S] with S from {low} to {high}"
    require(fits and is_whole_number(cast(list[Any], size)[1], low, high), "input_size", size, expected)
    for key in ("mean", "std"):
        values = settings.get(key)
        three = isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values)
        require(three, key, values, "three numbers")
    DataConfig(mean=tuple(settings["mean"]), std=tuple(settings["std"]))  # checks their values


def check_equal(ours: nn.Module, loaded: nn.Module, image_px: int) -> None:
    """Raise `RuntimeError` unless both models hold equal tensors and give equal features."""
    other = loaded.state_dict()
    wrong = [name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, other[name])]
    images = torch.linspace(-2, 2, 2 * 3 * image_px * image_px).view(2, 3, image_px, image_px).sin()
    with torch.inference_mode():
        equal = torch.equal(ours(images), loaded(images))
    if wrong or not equal:
        raise RuntimeError(f"the export differs from the trained backbone: tensors {wrong}, features equal: {equal}")
