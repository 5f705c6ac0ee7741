"""The backbones: which timm model, from which start."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
import timm
import torch

from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.methods.start import start_vit
from sdmp_train.models import build_backbone, timm_arguments


def test_the_feature_is_the_class_token(tiny: Config):
    vit = build_backbone(tiny.model, 32, seed=0).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(images), vit.forward_features(images)[:, 0])


def test_the_start_depends_on_the_seed_alone_and_global_random_state_is_not_moved(tiny: Config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_backbone(tiny.model, 32, seed=3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again = build_backbone(tiny.model, 32, seed=3).state_dict()
    other = build_backbone(tiny.model, 32, seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["cls_token"], other["cls_token"])


def test_drop_path_is_there_in_training_alone(tiny: Config):
    images = torch.randn(8, 3, 32, 32)
    plain, dropping = (build_backbone(tiny.model, 32, seed=0, drop_path=rate) for rate in (0.0, 0.9))
    assert torch.equal(plain.eval()(images), dropping.eval()(images))
    assert not torch.equal(plain.train()(images), dropping.train()(images))


def test_the_method_says_how_many_heads_a_short_name_has(tiny: Config):
    short, full = ModelConfig(arch="vit_small"), ModelConfig(arch="vit_small_patch16_224")
    assert timm_arguments(short, 32, heads=6)[1]["num_heads"] == 6
    assert timm_arguments(short, 32)[1]["num_heads"] == 12
    assert timm_arguments(replace(short, heads=3), 32, heads=6)[1]["num_heads"] == 3
    assert "num_heads" not in timm_arguments(full, 32, heads=6)[1]


def test_cifar_stem_keeps_the_resolution():
    resnet = build_backbone(ModelConfig(arch="resnet18", stem="cifar"), 32, seed=0)
    assert (resnet.conv1.kernel_size, resnet.conv1.stride, resnet.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(torch.randn(2, 3, 32, 32))))).shape[-2:] == (32, 32)
    assert not resnet.layer1[0].bn2.weight.any()  # zero-init residual


@pytest.mark.parametrize(("arch", "expansion"), [("resnet18", 1), ("resnet50", 4), ("resnet10t", 1)])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_width_of_a_resnet_is_that_of_its_first_stage(arch: str, expansion: int, stem: str):
    resnet = build_backbone(ModelConfig(arch=arch, stem=stem, width=8), 32, seed=0)
    assert [stage[-1].bn2.num_features for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)] == [
        8,
        16,
        32,
        64,
    ]
    assert resnet(torch.randn(2, 3, 32, 32)).shape == (2, 64 * expansion)
    if stem == "cifar":
        assert resnet.conv1.weight.shape == (8, 3, 3, 3) and resnet.bn1.num_features == 8
    same = build_backbone(ModelConfig(arch="resnet18", stem=stem, width=64), 32, seed=0).state_dict()
    plain = build_backbone(ModelConfig(arch="resnet18", stem=stem), 32, seed=0).state_dict()
    assert {k: v.shape for k, v in same.items()} == {k: v.shape for k, v in plain.items()}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(arch="vit_smal"), "Did you mean vit_small"),
        (ModelConfig(arch="resnet18", depth=3), "for a ViT only"),
        (ModelConfig(arch="resnet18", width=8, heads=2), "for a ViT only"),
        (ModelConfig(arch="convnext_atto", width=32), "for a ViT only"),
        (ModelConfig(arch="resnet18", width=7, stem="cifar"), "even number"),
        (ModelConfig(arch="vit_small", stem="cifar"), "expected a ResNet"),
        (ModelConfig(arch="vit_small", patch_px=7), "multiple of patch_px"),
        (ModelConfig(arch="vit_small", heads=7), "cannot build"),
        (ModelConfig(arch="vit_tiny_patch16_224", width=30, heads=3), "multiple of 4"),
    ],
)
def test_models_that_cannot_be_are_refused(model: ModelConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        build_backbone(model, 32, seed=0, start=lambda vit: start_vit(vit, freeze_patches=True))


@pytest.mark.parametrize(
    ("arch", "image_px", "message"),
    [
        ("vit_tiny_patch16_224", 40, r"leave 8 of 40 rows \(its patches are 16 a side\)"),
        ("vit_small", 230, "leave 6 of 230 rows"),
        ("deit_tiny_patch16_224", 40, "leave 8 of 40 rows"),
        ("mixer_s32_224", 40, "leave 8 of 40 rows"),
        ("convnext_atto", 42, "leave 2 of 42 rows"),
        ("levit_128s", 40, "cannot take images of 40 px"),
        ("inception_v3", 32, "cannot take images of 32 px"),
        ("hiera_tiny_224", 40, "cannot take images of 40 px"),
        ("test_vit", 40, "should be divisible by patch size"),
        ("nest_tiny", 40, "timm cannot build nest_tiny"),
        ("crossvit_tiny_240", 224, "cannot take images of 224 px"),
        ("qwen3_vit_306m_enc", 32, r"features of shape \(2, .*; expected \(2, "),
        ("vit_base_mci_224", 224, "patch projection"),
        ("vit_base_patch16_gap_224", 224, "class token"),
    ],
)
def test_an_architecture_that_cannot_take_the_images_or_loses_some_of_them_is_refused(
    arch: str, image_px: int, message: str
):
    with pytest.raises(ConfigError, match=message) as error:
        build_backbone(ModelConfig(arch=arch), image_px, seed=0, start=lambda vit: start_vit(vit, freeze_patches=True))
    assert "\n" not in str(error.value)


def test_sizes_of_a_deit_are_settings_as_those_of_a_vit():
    tiny = {"patch_px": 8, "width": 32, "depth": 2, "heads": 2}
    one, other = (
        build_backbone(ModelConfig(arch=f"{kind}_tiny_patch16_224", **tiny), 32, seed=3) for kind in ("vit", "deit")
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "arch",
    [
        "hf-hub:timm/resnet18.a1_in1k",
        "hf_hub:timm/resnet18",
        "timm/resnet18.a1_in1k",
        "local-dir:exported",
        "local-dir:/etc",
        "timm:resnet18",
        "../resnet18",
        "resnet18.a1_in1k/x",
        "",
        "resnet18\n",
        "x" * 100_000,
    ],
)
def test_a_name_that_is_no_plain_architecture_reaches_neither_network_nor_files(arch: str, monkeypatch):
    def reached(*given: object, **more: object) -> None:
        raise AssertionError("timm was asked to build it")

    monkeypatch.setattr(timm, "create_model", reached)
    monkeypatch.setattr(socket, "socket", reached)
    with pytest.raises(ConfigError, match=r"arch is|unknown arch") as error:
        build_backbone(ModelConfig(arch=arch), 32, seed=0)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)
