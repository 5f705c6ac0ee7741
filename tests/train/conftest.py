"""A tiny configuration and a tiny folder of images for the tests of the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdmp_train.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from sdmp_train.methods.dacl import DACLConfig
from sdmp_train.methods.dino import DINOConfig
from sdmp_train.methods.imix import IMixConfig
from sdmp_train.methods.mochi import MoCHiConfig
from sdmp_train.methods.mocov3 import MoCoV3Config
from sdmp_train.methods.supervised import SupervisedConfig

CLASSES, IMAGES_PER_CLASS = ("bars", "checks", "dots"), 12


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 JPEG files of 40 px in three class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(IMAGES_PER_CLASS):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            pixels[:: number + 2] = rng.integers(0, 256, 3)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg", quality=90)
    return root


@pytest.fixture
def tiny(image_folder: Path) -> Config:
    """A ViT of width 32 on 32 px views, batch 8, four steps per epoch, without kNN."""
    return Config(
        data=DataConfig(data=str(image_folder), image_px=32, blur=False, loader="torchvision", workers=0),
        model=ModelConfig(arch="vit_tiny_patch16_224", patch_px=8, width=32, depth=2, heads=2),
        method=MoCoV3Config(dim=32, mlp_dim=64),
        optim=OptimConfig(batch_size=8, epochs=2, warmup_epochs=0.5, base_lr=0.02),
        run=RunConfig(device="cpu", log_every_steps=1, knn_max_images=0),
    )


@pytest.fixture
def tiny_resnet(tiny: Config) -> Config:
    """The same with a ResNet and LARS, so that the backbone has batch norms."""
    return replace(
        tiny,
        model=ModelConfig(arch="test_resnet", stem="cifar"),
        optim=replace(tiny.optim, opt="lars", base_lr=1.0, lars_trust=0.02),
    )


@pytest.fixture
def tiny_dino(tiny: Config) -> Config:
    """DINO with SDMP: two of four local crops mixed, and drop path."""
    method = DINOConfig(
        out_dim=64,
        head_dim=32,
        bottleneck_dim=16,
        local_crops_number=4,
        local_px=16,
        drop_path_rate=0.5,
        freeze_last_layer=0,
    )
    return replace(tiny, method=method)


@pytest.fixture
def tiny_imix(tiny: Config) -> Config:
    """i-mix, by CutMix."""
    return replace(tiny, method=IMixConfig(dim=32, mlp_dim=64, rule="cutmix"))


@pytest.fixture
def tiny_dacl(tiny: Config) -> Config:
    """DACL."""
    return replace(tiny, method=DACLConfig(dim=32, mlp_dim=64, alpha=0.5))


@pytest.fixture
def tiny_mochi(tiny: Config) -> Config:
    """MoCHi, with synthetic negatives from the third step on."""
    return replace(tiny, method=MoCHiConfig(dim=32, mlp_dim=64, hard=4, mixed=6, query_mixed=3, warmup=0.5))


@pytest.fixture
def tiny_supervised(tiny: Config) -> Config:
    """Training on labels, with drop path: a stochastic layer."""
    return replace(tiny, method=SupervisedConfig(drop_path=0.5))
