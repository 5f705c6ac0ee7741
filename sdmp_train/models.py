"""timm backbones, and the start that some methods give a ViT. N batch, D features.

timm is imported when a model is built, not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .settings import ConfigError, ModelConfig, near

if TYPE_CHECKING:
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

# Names that leave the number of heads to the method.
SHORT_NAMES = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}


def timm_arguments(config: ModelConfig, image_px: int, *, heads: int = 12) -> tuple[str, dict[str, Any]]:
    """The name and keyword arguments that make `timm.create_model` build this backbone (but for a CIFAR stem).

    heads: of the ViTs that have a short name, unless `config` says otherwise (the SDMP paper: 12).
    """
    import timm

    name = SHORT_NAMES.get(config.arch, config.arch)
    if not timm.is_model(name):
        raise ConfigError(f"unknown arch {config.arch!r}.{near(config.arch, [*SHORT_NAMES, *timm.list_models()])}")
    sizes = {"patch_size": config.patch_px, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    given = {key: value for key, value in sizes.items() if value is not None}
    if name.startswith("vit_"):
        by_method = {"num_heads": heads} if config.arch in SHORT_NAMES else {}
        return name, {"img_size": image_px, **by_method, **given}
    if given:
        raise ConfigError(f"{', '.join(given)} can be set for a ViT only, and arch is {config.arch!r}")
    return name, {}


def build_backbone(
    config: ModelConfig,
    image_px: int,
    seed: int,
    *,
    drop_path: float = 0.0,
    start: Callable[[VisionTransformer], None] | None = None,
    **options: Any,
) -> nn.Module:
    """A timm model without classifier, (N, 3, image_px, image_px) -> (N, D), started from `seed` alone.

    drop_path: chance in [0, 1) that the last residual branch is left out for a sample while training, falling to 0
        towards the first.
    start: what to do to a ViT after timm has started it, with random numbers of the same stream.
    options: of `timm_arguments`.

    Raises:
        ConfigError: where timm has no such model or cannot build it.
    """
    import timm
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    name, arguments = timm_arguments(config, image_px, **options)
    stochastic = {"drop_path_rate": drop_path} if drop_path else {}
    patch_px = config.patch_px or 16
    if name.startswith("vit_") and config.patch_px and image_px % patch_px:
        raise ConfigError(f"image_px is {image_px}; expected a multiple of patch_px, which is {patch_px}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            backbone = timm.create_model(name, pretrained=False, num_classes=0, **arguments, **stochastic)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"timm cannot build {name} with {arguments}: {error}") from error
        if isinstance(backbone, VisionTransformer) and start is not None:
            start(backbone)
        if config.stem == "cifar":
            if not isinstance(backbone, ResNet):
                raise ConfigError(f"stem is 'cifar'; expected a ResNet, and arch is {config.arch!r}")
            use_cifar_stem(backbone)
    return backbone if isinstance(backbone, VisionTransformer) else backbone.to(memory_format=torch.channels_last)


def use_cifar_stem(resnet: ResNet) -> None:
    """Replace the 7x7 stride-2 convolution and max-pool by one 3x3 stride-1 convolution (paper, section 4.2)."""
    resnet.conv1 = nn.Conv2d(3, resnet.bn1.num_features, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def start_vit(vit: VisionTransformer, freeze_patches: bool) -> None:
    """MoCo v3's start: fixed 2-D sin-cos positions, Xavier-uniform weights, zero biases."""
    if vit.cls_token is None or vit.num_prefix_tokens != 1 or vit.pos_embed is None:
        raise ConfigError("MoCo v3 takes its feature from a class token: choose a plain ViT such as vit_small")
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            parts = 3 if name.endswith("qkv") else 1  # q, k and v are three matrices
            bound = math.sqrt(6 / (module.out_features / parts + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = vit.patch_embed.proj
    inputs = projection.in_channels * math.prod(projection.kernel_size)
    bound = math.sqrt(6 / (inputs + vit.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    vit.pos_embed.data.copy_(sincos_positions(vit.patch_embed.grid_size, vit.embed_dim))
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
