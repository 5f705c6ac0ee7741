"""What a training costs, by arithmetic that is stated: operations of the backbone per image, and hours of one GPU.

    hours = images x epochs x GFLOP per image / (TFLOP/s x 1000) / 3600
    GFLOP per image = forward GFLOP x (3 for each image that gradients go through, 1 for each other)

Heads, losses, augmentation and optimiser are left out. The rate is an assumption, not a measurement: see `SUSTAINED`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from .config import Config
from .settings import ModelConfig

if TYPE_CHECKING:
    from sdmp_kernels.views import Size

GPU = "H100"
SUSTAINED = {"vit": 280.0, "conv": 75.0}
"""TFLOP/s that one H100 is assumed to sustain in bf16: ViTs at 28 % of its dense peak of 989 (what this project asks of
itself, docs/benchmarks.md), convolutions at 8 % (about 3,000 training images of a ResNet-50 a second)."""

ARITHMETIC = (
    f"hours: images x epochs x GFLOP an image (backbone alone: forward, x 3 with gradients), one {GPU} at an assumed",
    f"{SUSTAINED['vit']:.0f} TFLOP/s for a ViT, {SUSTAINED['conv']:.0f} for a ResNet; not measured, without decoding",
)
"""The same, for people."""

FORWARD_GFLOP = {
    ("vit_small", "imagenet", 224): 9.197,
    ("vit_small", "imagenet", 96): 1.618,
    ("vit_base", "imagenet", 224): 35.126,
    ("resnet50", "imagenet", 224): 8.174,
    ("resnet50", "cifar", 32): 2.595,
    ("resnet101", "cifar", 32): 5.020,
}
"""Of the presets' backbones, as `count_gflop` counts them: (arch, stem, px of an image) -> GFLOP."""


@cache
def count_gflop(model: ModelConfig, image_px: Size) -> float:
    """Operations of one forward pass of one image, a multiply and an add as two, by torch's own counter.

    Raises:
        ConfigError: for a model that timm cannot build.
    """
    import torch  # not above: the table of presets needs none of this
    from torch.utils.flop_counter import FlopCounterMode

    from sdmp_kernels.views import view_size

    from .models import make_model, timm_arguments

    name, arguments = timm_arguments(model, image_px)
    backbone = make_model(model, name, arguments, "meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.empty(1, 3, *view_size(image_px), device="meta"))
    return float(counter.get_total_flops()) / 1e9


def forward_gflop(model: ModelConfig, image_px: Size) -> float:
    """The same, from the table where it is there."""
    resized = model != ModelConfig(arch=model.arch, stem=model.stem)
    known = (
        None
        if resized
        else FORWARD_GFLOP.get((model.arch, model.stem, image_px))
        if isinstance(image_px, int)
        else None
    )
    return count_gflop(model, image_px) if known is None else known


def image_gflop(config: Config) -> float:
    """Operations of the backbone for every image of a batch: forward passes, and twice as much for gradients."""
    passes = config.method.passes(config.data)
    return sum((3 if one.trained else 1) * forward_gflop(config.model, one.px) for one in passes)


def gpu_hours(config: Config, images: int) -> float:
    """Hours of one GPU for the whole schedule, at the assumed rate."""
    rate = SUSTAINED["conv" if "net" in config.model.arch else "vit"]
    return images * config.optim.epochs * image_gflop(config) / (rate * 1000) / 3600
