"""What is exported loads through timm, with every tensor matched and equal features."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sdmp_train import export
from sdmp_train.config import Config, ConfigError
from sdmp_train.export import export_backbone, load_exported
from sdmp_train.models import build_backbone


def trained(config: Config) -> torch.nn.Module:
    """A backbone with statistics that are not those of the start."""
    backbone = build_backbone(config.model, config.data.image_px, seed=1)
    generator = torch.Generator().manual_seed(0)
    backbone.train()(torch.randn(4, 3, 32, 32, generator=generator))
    return backbone


def test_timm_loads_a_vit_by_its_own_means(tiny: Config, tmp_path: Path):
    backbone = trained(tiny)
    export_backbone(backbone, tiny, tmp_path / "exported", step=8)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    assert loaded.state_dict().keys() == backbone.state_dict().keys()
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in backbone.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(images), loaded(images))
    assert loaded.pretrained_cfg["mean"] == pytest.approx(tiny.data.mean)
    again = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    again.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"), strict=True)
    assert torch.equal(again.eval()(images), loaded(images))


def test_a_cifar_stem_comes_back(tiny_resnet: Config, tmp_path: Path):
    backbone = trained(tiny_resnet)
    export_backbone(backbone, tiny_resnet, tmp_path / "exported", step=8)
    loaded, description = load_exported(tmp_path / "exported")
    assert description["stem"] == "cifar"
    assert description["pretraining"]["steps"] == 8
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), backbone.eval()(images), rtol=1e-5, atol=1e-6)  # other memory format
    assert torch.equal(loaded.bn1.running_mean, backbone.bn1.running_mean)
    assert loaded.bn1.running_mean.any()


def test_an_export_that_differs_is_noticed(tiny: Config, tmp_path: Path, monkeypatch):
    def spoiled(tensors, path):
        tensors["norm.weight"] = tensors["norm.weight"] * 2
        save_file(tensors, path)

    monkeypatch.setattr(export, "save_file", spoiled)
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        export_backbone(trained(tiny), tiny, tmp_path / "exported", step=8)
    assert not (tmp_path / "exported").exists()


def test_a_folder_without_an_export_is_refused(tiny: Config, tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no exported backbone"):
        load_exported(tmp_path)
    export_backbone(trained(tiny), tiny, tmp_path / "exported", step=8)
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    del tensors["cls_token"]
    save_file(tensors, tmp_path / "exported" / "model.safetensors")
    with pytest.raises(ConfigError, match="missing cls_token"):
        load_exported(tmp_path / "exported")
