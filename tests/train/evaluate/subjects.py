"""Exported backbones of a few thousand weights, and what tests of evaluations ask of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdmp_train.config import Config, ModelConfig
from sdmp_train.export import export_backbone
from sdmp_train.models import build_backbone

DEEP_VIT = ModelConfig(arch="vit_tiny_patch16_224", patch_px=8, width=32, depth=4, heads=2)
RESNET = ModelConfig(arch="test_resnet", stem="cifar")


def export(config: Config, folder: Path, model: ModelConfig | None = None) -> str:
    """An untrained backbone, exported; the folder as text."""
    config = replace(config, model=model or config.model)
    export_backbone(build_backbone(config.model, config.data.image_px, seed=0), config, folder, 1)
    return str(folder)


def run_lines(printed: str, capsys: Any) -> str:
    """What the code prints that an evaluation's lines `load` and `predict` hold."""
    code = [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith(("load ", "predict "))]
    assert len(code) == 2
    capsys.readouterr()
    exec("\n".join(code), {})
    return capsys.readouterr().out.strip()


def results(folder: Path) -> list[dict[str, Any]]:
    """The lines of `evaluations.jsonl`."""
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
