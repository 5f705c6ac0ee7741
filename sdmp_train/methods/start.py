"""MoCo v3's start of a ViT (Chen, Xie and He 2021), for the methods that build on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..settings import ConfigError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


def start_vit(vit: VisionTransformer, freeze_patches: bool) -> None:
    """MoCo v3's start: fixed 2-D sin-cos positions, Xavier-uniform weights, zero biases."""
    if vit.cls_token is None or vit.num_prefix_tokens != 1 or vit.pos_embed is None:
        raise ConfigError("MoCo v3 takes its feature from a class token: choose a plain ViT such as vit_small")
    projection = vit.patch_embed.proj
    if not isinstance(projection, nn.Conv2d):
        raise ConfigError(
            "MoCo v3 starts a ViT's patch projection, and this one has none: choose one such as vit_small"
        )
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            parts = 3 if name.endswith("qkv") else 1  # q, k and v are three matrices
            bound = math.sqrt(6 / (module.out_features / parts + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    inputs = projection.in_channels * math.prod(projection.kernel_size)
    bound = math.sqrt(6 / (inputs + vit.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    positions = sincos_positions(vit.patch_embed.grid_size, vit.embed_dim)
    vit.pos_embed.data.copy_(positions[:, -vit.pos_embed.shape[1] :])  # some have none for the class token
    vit.pos_embed.requires_grad_(False)
    projection.requires_grad_(not freeze_patches)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """(1, 1 + rows * columns, width): zeros for the class token, then sin and cos of row and of column."""
    if width % 4:
        raise ConfigError(f"the width of a ViT is {width}; expected a multiple of 4 (sin, cos of row and column)")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    row_angles, column_angles = rows.reshape(-1, 1) * frequency, columns.reshape(-1, 1) * frequency
    waves = [row_angles.sin(), row_angles.cos(), column_angles.sin(), column_angles.cos()]
    patches = torch.cat(waves, dim=1)
    return torch.cat([torch.zeros(1, width), patches]).unsqueeze(0)
