"""Views that are no squares: trained, evaluated, exported, and loaded by timm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tiny_runs import TINY
from torch import Tensor

from sdmp_train.checkpoint import newest_checkpoint
from sdmp_train.cli import main, parse_pretrain
from sdmp_train.commands import pretrain
from sdmp_train.config import Config, ConfigError, DataConfig, from_dict, to_dict
from sdmp_train.export import load_exported
from sdmp_train.models import build_backbone


def rectangular(config: Config, size: tuple[int, int] = (16, 32), **run: object) -> Config:
    data = replace(config.data, image_px=size, loader="torchvision")
    return replace(config, data=data, run=replace(config.run, max_steps=2, **run))


@pytest.mark.parametrize("kind", [*TINY.values(), "tiny_resnet"])
def test_every_method_trains_and_exports_for_timm(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = rectangular(request.getfixturevalue(kind))
    assert pretrain(config, tmp_path / "run") == 0
    exported = tmp_path / "run" / "exported"
    backbone, description = load_exported(exported)
    assert description["pretrained_cfg"]["input_size"] == [3, 16, 32]
    images = torch.randn(2, 3, 16, 32)
    with torch.inference_mode():
        expected: Tensor = backbone(images)
    assert expected.shape[0] == 2 and expected.isfinite().all()
    if kind == "tiny":  # the same from timm itself; and with the pixels turned it is another image
        plain = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
        with torch.inference_mode():
            assert torch.equal(plain(images), expected)
            assert not torch.allclose(plain(images.flip(-1)), expected)
        assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-000002"


@pytest.mark.parametrize("size", [(16, 32), pytest.param((224, 448), marks=pytest.mark.slow)], ids=str)
def test_a_run_is_gone_on_with_evaluated_exported_and_loaded(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: tuple[int, int]
) -> None:
    config = rectangular(tiny, size, knn_max_images=30)
    if size == (224, 448):  # 14 x 28 patches
        config = replace(config, model=replace(config.model, patch_px=16), optim=replace(config.optim, batch_size=4))
    assert pretrain(config, tmp_path / "run") == 0
    assert f"at {size[0]} x {size[1]} px" in capsys.readouterr().out
    more = replace(config, run=replace(config.run, max_steps=3))
    assert pretrain(more, tmp_path / "run", resume=True) == 0
    run, data = str(tmp_path / "run"), str(config.data.data)
    assert main(["eval", "knn", run, "--data", data, "--device", "cpu"]) == 0
    assert main(["eval", "embed", run, "--data", data, "--device", "cpu", "--output", str(tmp_path / "e")]) == 0
    words = ["eval", "linear", run, "--data", data, "--device", "cpu", "--epochs", "1", "--batch-size", "8"]
    assert main(words) == 0
    assert "knn" in capsys.readouterr().out.lower()
    assert np.isfinite(np.load(next((tmp_path / "e").glob("*.npy")))).all()
    assert main(["export", "--run", run, "--output", str(tmp_path / "again")]) == 0
    ours, description = load_exported(tmp_path / "run" / "exported")
    assert description["pretrained_cfg"]["input_size"] == [3, *size]
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        for folder in (tmp_path / "run" / "exported", tmp_path / "again"):
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            assert torch.equal(loaded(images), ours(images))


def test_how_it_is_spelled(tiny: Config) -> None:
    config = parse_pretrain("pretrain", ["--image-px", "224", "448"]).config
    assert config.data.image_px == config.data.size_px == (224, 448)
    assert parse_pretrain("pretrain", ["--image-px", "96"]).config.data.size_px == (96, 96)
    assert DataConfig(image_px=(96, 96)).image_px == 96
    assert from_dict(to_dict(config), Config()).data.image_px == (224, 448)
    with pytest.raises(ConfigError, match="image_px"):
        DataConfig(image_px=(224, 4))
    with pytest.raises(ConfigError, match="expected tuple"):
        from_dict({"data": {"image_px": [1, 2, 3]}}, Config())


def test_columns_that_no_patch_reads_are_refused(tiny: Config) -> None:
    with pytest.raises(ConfigError, match="4 of 36 columns"):
        build_backbone(tiny.model, (16, 36), 0)
