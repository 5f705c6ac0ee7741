"""Features against what hooks on the blocks see."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from subjects import DEEP_VIT, RESNET

from sdmp_train.config import ConfigError, ModelConfig
from sdmp_train.evaluate.features import feature_maker, standardise
from sdmp_train.models import build_backbone

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def outputs_of_blocks(vit: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """What each block gives, by hooks; before the final norm."""
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in vit.blocks]
    vit(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_of_a_vit():
    vit = cast(Any, build_backbone(ModelConfig(**{**DEEP_VIT.__dict__, "depth": 5}), 32, seed=0).eval())
    torch.nn.init.normal_(vit.norm.weight)  # so that a norm left out is seen
    with torch.inference_mode():
        tokens = [vit.norm(out) for out in outputs_of_blocks(vit, IMAGES)]
        expected = {
            "output": tokens[-1][:, 0],
            "last4": torch.cat([t[:, 0] for t in tokens[1:]], dim=1),
            "mean": tokens[-1][:, 1:].mean(1),
            "output+mean": torch.cat([tokens[-1][:, 0], tokens[-1][:, 1:].mean(1)], dim=1),
        }
        for name, features in expected.items():
            read, width = feature_maker(vit, name)
            assert features.shape == (3, width), name
            torch.testing.assert_close(read(IMAGES), features, msg=name)


def test_of_a_resnet_the_pooled_map():
    resnet = build_backbone(RESNET, 32, seed=0).eval()
    with torch.inference_mode():
        expected = cast(Any, resnet).forward_features(IMAGES).mean((2, 3))
        for name in ("output", "mean"):
            read, width = feature_maker(resnet, name)
            assert width == expected.shape[1]
            torch.testing.assert_close(read(IMAGES), expected)
    with pytest.raises(ConfigError, match="takes a ViT's class token"):
        feature_maker(resnet, "last4")


def test_too_few_blocks_are_refused():
    shallow = build_backbone(ModelConfig(**{**DEEP_VIT.__dict__, "depth": 3}), 32, seed=0)
    with pytest.raises(ConfigError, match="the backbone has 3 blocks; expected at least 4"):
        feature_maker(shallow, "last4")


def test_standardise_keeps_the_layout():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert standardise(images, (0.5,) * 3, (0.5,) * 3).is_contiguous(memory_format=torch.channels_last)
