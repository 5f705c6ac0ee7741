"""The start of the backbones and the shape of the heads, as MoCo v3 has them."""

from __future__ import annotations

import math
import socket
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from sdmp_train.config import Config, ConfigError, MethodConfig, ModelConfig
from sdmp_train.models import build_backbone, build_student, mlp_head, sincos_positions


def test_positions_are_sin_and_cos_of_row_and_column():
    positions = sincos_positions((3, 5), 8)[0]
    assert positions.shape == (1 + 15, 8)
    assert not positions[0].any()
    row, column = 2, 3
    slow = 10000 ** -(1 / 2)
    expected = [f(a * b) for a in (row, column) for f in (math.sin, math.cos) for b in (1, slow)]
    torch.testing.assert_close(positions[1 + row * 5 + column], torch.tensor(expected))


def test_a_vit_starts_as_moco_v3_says(tiny: Config):
    vit = build_backbone(tiny.model, 32, seed=0)
    assert not vit.pos_embed.requires_grad
    assert not vit.patch_embed.proj.weight.requires_grad
    assert not vit.patch_embed.proj.bias.any()
    assert vit.cls_token.abs().max() < 1e-4
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            parts = 3 if name.endswith("qkv") else 1
            bound = math.sqrt(6 / (module.out_features / parts + module.in_features))
            largest = float(module.weight.detach().abs().max())
            assert 0.95 * bound < largest <= bound
    bound = math.sqrt(6 / (3 * 8 * 8 + 32))
    assert 0.95 * bound < float(vit.patch_embed.proj.weight.abs().max()) <= bound


def test_the_feature_is_the_class_token(tiny: Config):
    vit = build_backbone(tiny.model, 32, seed=0).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(images), vit.forward_features(images)[:, 0])


def test_the_start_depends_on_the_seed_alone_and_global_random_state_is_not_moved(tiny: Config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_student(build_backbone(tiny.model, 32, seed=3), tiny.method, seed=3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again = build_student(build_backbone(tiny.model, 32, seed=3), tiny.method, seed=3).state_dict()
    other = build_student(build_backbone(tiny.model, 32, seed=4), tiny.method, seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["predictor.0.weight"], other["predictor.0.weight"])


def layers(head: nn.Sequential) -> list[str]:
    return [
        f"{m.in_features}-{m.out_features}" if isinstance(m, nn.Linear) else type(m).__name__ for m in head.children()
    ]


def test_heads_of_a_vit(tiny: Config):
    student = build_student(build_backbone(tiny.model, 32, seed=0), tiny.method, seed=0)
    norm = ["BatchNorm1d", "ReLU"]
    assert layers(student.encoder.projector) == ["32-64", *norm, "64-64", *norm, "64-32", "BatchNorm1d"]
    assert layers(student.predictor) == ["32-64", *norm, "64-32", "BatchNorm1d"]
    assert not student.encoder.projector[-1].affine
    assert student.encoder.projector[1].affine
    assert all(m.bias is None for m in student.encoder.projector if isinstance(m, nn.Linear))


def test_heads_of_a_resnet(tiny_resnet: Config):
    student = build_student(build_backbone(tiny_resnet.model, 32, seed=0), tiny_resnet.method, seed=0)
    assert layers(student.encoder.projector) == ["96-64", "BatchNorm1d", "ReLU", "64-32", "BatchNorm1d"]
    assert layers(student.predictor) == ["32-64", "BatchNorm1d", "ReLU", "64-32"]


def test_cifar_stem_keeps_the_resolution():
    resnet = build_backbone(ModelConfig(arch="resnet18", stem="cifar"), 32, seed=0)
    assert (resnet.conv1.kernel_size, resnet.conv1.stride, resnet.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(torch.randn(2, 3, 32, 32))))).shape[-2:] == (32, 32)
    assert not resnet.layer1[0].bn2.weight.any()  # zero-init residual


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(arch="vit_smal"), "Did you mean vit_small"),
        (ModelConfig(arch="resnet18", width=32), "for a ViT only"),
        (ModelConfig(arch="vit_small", stem="cifar"), "expected a ResNet"),
        (ModelConfig(arch="vit_small", patch_px=7), "multiple of patch_px"),
        (ModelConfig(arch="vit_small", heads=7), "cannot build"),
        (ModelConfig(arch="vit_tiny_patch16_224", width=30, heads=3), "multiple of 4"),
    ],
)
def test_models_that_cannot_be_are_refused(model: ModelConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        build_backbone(model, 32, seed=0)


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
        build_backbone(ModelConfig(arch=arch), image_px, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arch", "image_px"),
    [
        ("deit_tiny_patch16_224", 32),
        ("swin_tiny_patch4_window7_224", 32),
        ("mobilenetv3_small_100", 32),
        ("convnext_atto", 40),
        ("test_resnet", 33),
        ("deit3_small_patch16_224", 32),
        ("vit_tiny_r_s16_p8_224", 64),
    ],
)
def test_the_heads_fit_whatever_architecture_takes_the_images(arch: str, image_px: int):
    backbone = build_backbone(ModelConfig(arch=arch), image_px, seed=0)
    student = build_student(backbone, MethodConfig(dim=8, mlp_dim=16), seed=0)
    (queries,) = student(torch.zeros(2, 3, image_px, image_px))
    assert queries.shape == (2, 8)


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


def test_one_layer_more_for_every_hidden_width():
    assert layers(mlp_head([3, 5, 7], last_norm=False)) == ["3-5", "BatchNorm1d", "ReLU", "5-7"]


def test_moco_widths_are_the_defaults():
    assert (MethodConfig().dim, MethodConfig().mlp_dim) == (256, 4096)
    assert replace(MethodConfig(), dim=3).dim == 3
