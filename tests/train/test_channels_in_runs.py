"""A grey set and one of 12 channels: trained, evaluated, exported, and loaded by timm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tiny_runs import TINY

from sdmp_train.cli import main
from sdmp_train.commands import pretrain
from sdmp_train.config import Config, ConfigError, DataConfig
from sdmp_train.export import load_exported


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twelve")
    numbers = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (root / name).mkdir()
        for i in range(12):
            np.save(root / name / f"{i}.npy", numbers.integers(0, 256, (40, 40, 12), dtype=np.uint8))
    return root


@pytest.mark.parametrize(
    ("kind", "channels"), [("tiny", 1), *((kind, 12) for kind in TINY.values()), ("tiny_resnet", 12)]
)
def test_trained_evaluated_and_exported(
    request: pytest.FixtureRequest, twelve: Path, tmp_path: Path, kind: str, channels: int
) -> None:
    config: Config = request.getfixturevalue(kind)
    folder = str(twelve) if channels == 12 else str(config.data.data)
    data = DataConfig(data=folder, channels=channels, image_px=32, blur=False, loader="auto", workers=0)
    run = replace(config.run, max_steps=2, knn_max_images=30 if kind == "tiny" else 0)
    assert pretrain(replace(config, data=data, run=run), tmp_path / "run") == 0
    exported = tmp_path / "run" / "exported"
    backbone, description = load_exported(exported)
    assert description["pretrained_cfg"]["input_size"] == [channels, 32, 32]
    assert description["pretrained_cfg"]["mean"] == [0.449] * channels
    images = torch.randn(2, channels, 32, 32)
    with torch.inference_mode():
        expected = backbone(images)
        assert expected.isfinite().all()
        if kind == "tiny":
            assert torch.equal(timm.create_model(f"local-dir:{exported}", pretrained=True).eval()(images), expected)
            assert (tmp_path / "run" / "mix.png").exists()
    if kind == "tiny":
        here = [str(tmp_path / "run"), "--data", folder, "--device", "cpu"]
        assert main(["eval", "knn", *here]) == 0
        assert main(["eval", "linear", *here, "--epochs", "1", "--batch-size", "8"]) == 0
        assert main(["export", "--run", here[0], "--output", str(tmp_path / "again")]) == 0


def test_settings() -> None:
    assert DataConfig(channels=2).std == (0.226, 0.226)
    assert DataConfig(channels=2, mean=(0.1, 0.2)).mean == (0.1, 0.2)
    for wrong in ({"channels": 17}, {"channels": 0}, {"channels": 2, "mean": (0.1,)}, {"mean": (0.1, 0.2)}):
        with pytest.raises(ConfigError):
            DataConfig(**wrong)
