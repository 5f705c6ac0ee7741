"""The start of a ViT: positions and weights as MoCo v3 says."""

from __future__ import annotations

import math

import torch
from torch import nn

from sdmp_train.config import Config
from sdmp_train.methods.start import sincos_positions, start_vit
from sdmp_train.models import build_backbone


def test_positions_are_sin_and_cos_of_row_and_column():
    positions = sincos_positions((3, 5), 8)[0]
    assert positions.shape == (1 + 15, 8)
    assert not positions[0].any()
    row, column = 2, 3
    slow = 10000 ** -(1 / 2)
    expected = [f(a * b) for a in (row, column) for f in (math.sin, math.cos) for b in (1, slow)]
    torch.testing.assert_close(positions[1 + row * 5 + column], torch.tensor(expected))


def test_a_vit_starts_as_moco_v3_says(tiny: Config):
    vit = build_backbone(tiny.model, 32, seed=0, start=lambda vit: start_vit(vit, freeze_patches=True))
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
