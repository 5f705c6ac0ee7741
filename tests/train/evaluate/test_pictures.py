"""Attention, components and neighbours against independent computations; the files as a user gets them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdmp_train.cli import main
from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.data import DataError
from sdmp_train.evaluate import pictures
from sdmp_train.evaluate.pictures import (
    PicturesConfig,
    attention_maps,
    embedding_of,
    make_pictures,
    nearest_rows,
    patch_features,
    pca_colours,
)
from sdmp_train.export import export_backbone
from sdmp_train.models import build_backbone


@pytest.fixture
def exported(tiny: Config, tmp_path: Path) -> Path:
    export_backbone(build_backbone(tiny.model, 32, seed=0), tiny, tmp_path / "net", 7)
    return tmp_path / "net"


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_attention_is_the_softmax_that_the_block_used(tiny: Config):
    """Written out from the weights of the last block, in float64."""
    net = build_backbone(tiny.model, 32, seed=0).eval()
    images = noise()
    found = attention_maps(net, images)
    assert found is not None and found.shape == (2, 2, 4, 4)
    net = net.double().requires_grad_(False)
    x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images.double()))))
    x = net.blocks[0](x)
    block = net.blocks[1]
    q, k, _ = torch.nn.functional.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=2)
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        weights = (q[:, :, part] @ k[:, :, part].transpose(1, 2) / 4).softmax(dim=2)
        expected = weights[:, 0, 1:].reshape(2, 4, 4)
        assert torch.allclose(found[:, head].double(), expected, atol=1e-6)
        assert float((expected[0] - expected[1]).abs().max()) > 1e-4


def test_looking_leaves_the_backbone_as_it_was(tiny: Config):
    net = build_backbone(tiny.model, 32, seed=0).eval()
    before, fused = net(noise()), net.blocks[-1].attn.fused_attn
    attention_maps(net, noise())
    assert net.blocks[-1].attn.fused_attn == fused and torch.equal(net(noise()), before)
    assert not net.blocks[-1].attn.attn_drop._forward_hooks


def test_patch_features_are_the_tokens_in_their_places(tiny: Config, tiny_resnet: Config):
    vit = build_backbone(tiny.model, 32, seed=0).eval()
    tokens = vit.forward_features(noise())
    patches = patch_features(vit, noise())
    assert patches.shape == (2, 4, 4, 32)
    assert torch.equal(patches[1, 2, 3], tokens[1, 1 + 4 * 2 + 3])
    resnet = build_backbone(tiny_resnet.model, 32, seed=0).eval()
    stage = resnet.forward_features(noise())
    assert torch.equal(patch_features(resnet, noise()), stage.permute(0, 2, 3, 1))
    assert attention_maps(resnet, noise()) is None
    pooled = ModelConfig(arch="vit_tiny_patch16_224", patch_px=8, width=32, depth=1, heads=2)
    net = build_backbone(pooled, 32, seed=0)
    net.cls_token = None
    assert attention_maps(net, noise()) is None


def test_components_against_a_singular_value_decomposition():
    generator = np.random.default_rng(0)
    patches = torch.tensor(generator.normal(size=(3, 4, 5, 8)) * np.arange(1, 9), dtype=torch.float32)
    colours = pca_colours(patches)
    rows = patches.reshape(-1, 8).double().numpy()
    rows = rows - rows.mean(0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    for channel in range(3):
        axis = axes[channel] * np.sign(axes[channel][np.abs(axes[channel]).argmax()])
        values = rows @ axis
        low, high = np.quantile(values, [0.01, 0.99])
        expected = np.clip((values - low) / (high - low), 0, 1)
        assert np.allclose(colours[..., channel].reshape(-1).numpy(), expected, atol=1e-5)


def test_equal_patches_have_one_colour():
    assert torch.equal(pca_colours(torch.ones(1, 2, 2, 8)), torch.zeros(1, 2, 2, 3))


def test_nearest_rows_are_the_nearest():
    bank = torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    similarity, nearest = nearest_rows(bank[[3, 11]], bank, 5)
    assert nearest[:, 0].tolist() == [3, 11]
    slow = sorted(range(20), key=lambda i: -float(bank[3] @ bank[i]))[:5]
    assert nearest[0].tolist() == slow
    assert similarity[0].tolist() == pytest.approx([float(bank[3] @ bank[i]) for i in slow])


def test_files_and_captions(tiny: Config, exported: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    flags = ["--data", tiny.data.data, "--device", "cpu", "--workers", "0", "--count", "3", "--embedding", "none"]
    assert main(["eval", "pictures", "--weights", str(exported), "--output", str(out), *flags]) == 0
    names = {"attention.png", "patches.png", "neighbours.png"}
    assert {path.name for path in out.iterdir()} == names | {"captions.json"}
    captions = json.loads((out / "captions.json").read_text())["captions"]
    assert set(captions) == names and all("after 7 steps" in text for text in captions.values())
    for name in names:
        pixels = np.asarray(Image.open(out / name))
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 10
    assert "not made: embedding.png: switched off" in capsys.readouterr().out


def test_chosen_files_and_a_folder_without_classes(tiny: Config, exported: Path, tmp_path: Path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    files = [str(path) for path in sorted(Path(tiny.data.data).rglob("*.jpg"))]
    for number, file in enumerate(files):
        shutil.copy(file, flat / f"{number}.jpg")
    config = PicturesConfig(
        weights=str(exported), data=str(flat), images=tuple(files[:2]), output=str(tmp_path / "out"), device="cpu"
    )
    assert set(make_pictures(config)) == {"attention.png", "patches.png"}
    assert "not made: neighbours.png: that takes images in at least two folders" in capsys.readouterr().out
    with pytest.raises(DataError, match="no readable image"):
        make_pictures(replace(config, images=(__file__,)))


def test_a_picture_that_is_not_made_again_goes(tiny: Config, exported: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "embedding.png").write_bytes(b"old")
    (out / "mine.png").write_bytes(b"mine")
    make_pictures(PicturesConfig(weights=str(exported), data=tiny.data.data, output=str(out), embedding="none"))
    assert (out / "mine.png").exists() and not (out / "embedding.png").exists()


def test_what_is_asked_for_wrongly(exported: Path):
    with pytest.raises(ConfigError, match="needs a backbone"):
        make_pictures(PicturesConfig())
    with pytest.raises(ConfigError, match="output is missing"):
        make_pictures(PicturesConfig(weights=str(exported)))


def test_a_map_keeps_classes_together():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[:3].repeat_interleave(20, dim=0)
    rows = torch.nn.functional.normalize(centres + 0.05 * torch.randn(60, 8, generator=generator), dim=1)
    points = embedding_of(PicturesConfig(), rows)
    assert np.array_equal(points, embedding_of(PicturesConfig(), rows))
    labels = np.repeat(np.arange(3), 20)
    middles = np.stack([points[labels == c].mean(0) for c in range(3)])
    distances = np.linalg.norm(points[:, None] - middles, axis=2)
    assert np.array_equal(distances.argmin(1), labels)
    assert embedding_of(PicturesConfig(), rows[:5]) == "5 images are too few for a map"


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    assert embedding_of(PicturesConfig(), torch.eye(12)) == pictures.NO_TSNE
    with pytest.raises(ConfigError, match="scikit-learn is not installed"):
        embedding_of(PicturesConfig(embedding="tsne"), torch.eye(12))
