"""A backbone as others load it: safetensors with timm's names, and timm's config.json beside it.

    timm.create_model("local-dir:runs/.../exported", pretrained=True)

A ResNet with the CIFAR stem needs `load_exported` of this file, since timm has no such stem.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .checkpoint import compare
from .config import Config, ConfigError
from .models import timm_arguments, use_cifar_stem

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


def export_backbone(backbone: nn.Module, config: Config, folder: Path, step: int) -> None:
    """Write `folder` anew, then load it again: every tensor must match and features must be equal.

    Raises:
        RuntimeError: where what was written does not give the same model.
    """
    name, arguments = timm_arguments(config.model, config.data.image_px, **config.backbone_options)
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
        },
        "stem": config.model.stem,
        "pretraining": {"preset": config.run.preset, "method": config.method_name, "steps": step},
    }
    draft = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({key: value.clone().contiguous() for key, value in frozen.state_dict().items()}, draft / WEIGHTS)
    (draft / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
    (draft / WEIGHTS).chmod((draft / DESCRIPTION).stat().st_mode)  # safetensors writes for the owner alone
    check_equal(frozen, load_exported(draft)[0], config.data.image_px)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def load_exported(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in an exported folder, in eval mode on the CPU, and its description.

    Raises:
        ConfigError: where the folder holds no export, or its tensors are not those of the model it describes.
    """
    import timm

    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        backbone = timm.create_model(description["architecture"], num_classes=0, **description.get("model_args", {}))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{folder} holds no exported backbone: {error}") from error
    if description.get("stem") == "cifar":
        with torch.random.fork_rng(devices=[]):
            use_cifar_stem(backbone)
    own = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    compare(str(folder / WEIGHTS), own, {name: tensor.shape for name, tensor in tensors.items()})
    backbone.load_state_dict(tensors)
    return backbone.eval(), description


def check_equal(ours: nn.Module, loaded: nn.Module, image_px: int) -> None:
    """Raise `RuntimeError` unless both models hold equal tensors and give equal features."""
    other = loaded.state_dict()
    wrong = [name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, other[name])]
    images = torch.linspace(-2, 2, 2 * 3 * image_px * image_px).view(2, 3, image_px, image_px).sin()
    with torch.inference_mode():
        equal = torch.equal(ours(images), loaded(images))
    if wrong or not equal:
        raise RuntimeError(f"the export differs from the trained backbone: tensors {wrong}, features equal: {equal}")
