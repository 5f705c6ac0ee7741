"""Complete recipes: one function per family, one name per row of the paper's tables, and small ones to try things on.

What the paper leaves open (most of Table 5's recipe, for instance) comes from the source that the function names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from .config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    near,
)
from .methods.mocov3 import MoCoV3Config
from .methods.supervised import SupervisedConfig

Mixing = Literal["none", "sdmp"]

FOR_OWN_IMAGES = {
    "cuda": "table1/mocov3-vit_s-sdmp --batch-size 256",
    "cpu": "quickstart --image-px 64 --gray-prob 0.2",
}
"""By kind of device, the preset and flags that a run on embedded images proposes for the user's own."""


@dataclass(frozen=True)
class Preset:
    """A recipe, and the number to compare its result with."""

    config: Config
    result: str
    source: str


def imagenet_vit(arch: str, mixing: Mixing, *, epochs: int = 300, batch_size: int = 1024) -> Config:
    """MoCo v3 on a ViT at 224 px: AdamW, wd 0.1 on all, warm-up 40, temperature 0.2 (MoCo v3 and SDMP readmes)."""
    return Config(
        model=ModelConfig(arch=arch),
        method=MoCoV3Config(mixing=mixing),
        optim=OptimConfig(epochs=epochs, batch_size=batch_size),
    )


def imagenet_r50(mixing: Mixing) -> Config:
    """MoCo v3 on a ResNet-50, 300 epochs: LARS, warm-up 10, temperature 1 (MoCo v3 readme)."""
    return Config(
        data=DataConfig(crop_min_frac=0.2),
        model=ModelConfig(arch="resnet50"),
        method=MoCoV3Config(temperature=1.0, mixing=mixing),
        optim=OptimConfig(opt="lars", base_lr=0.3, weight_decay=1e-6, warmup_epochs=10, batch_size=4096),
    )


def cifar(arch: str, mixing: Mixing, *, epochs: int = 200, classes: int = 10) -> Config:
    """MoCo v3 at 32 px with the CIFAR stem, after solo-learn's recipe with padding 1 (the paper states none)."""
    mean, std = {
        10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        100: ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    }[classes]
    return Config(
        data=DataConfig(image_px=32, blur=False, mean=mean, std=std),
        model=ModelConfig(arch=arch, stem="cifar"),
        method=MoCoV3Config(mixing=mixing),
        optim=OptimConfig(
            batch_size=256,
            epochs=epochs,
            warmup_epochs=10,
            opt="lars",
            base_lr=0.3,
            weight_decay=1e-6,
            lars_trust=0.02,
            lars_clip=True,
        ),
        run=RunConfig(save_every_epochs=20, knn_every_epochs=20),
    )


def quickstart() -> Config:
    """A tiny ViT on drawn textures: the whole job within minutes on two CPU cores.

    The momentum is low because the run is short; views are mostly grey because the classes are textures in random
    colours, and a net that may tell pictures apart by colour learns little else in a few hundred steps.
    """
    return Config(
        data=DataConfig(
            data="embedded",
            image_px=32,
            crop_min_frac=0.5,
            gray_prob=0.8,
            blur=False,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        model=ModelConfig(arch="vit_tiny_patch16_224", patch_px=4, width=64, depth=3, heads=2),
        method=MoCoV3Config(dim=256, mlp_dim=1024, momentum=0.9),
        optim=OptimConfig(batch_size=128, epochs=6, warmup_epochs=0.3, base_lr=4e-3, weight_decay=0.1),
        run=RunConfig(log_every_steps=5, save_every_epochs=3),
    )


def quickstart_supervised() -> Config:
    """The quickstart's images and ViT, trained on their labels with mixed images: what labels give within minutes."""
    base = quickstart()
    return replace(
        base,
        method=SupervisedConfig(),
        optim=replace(base.optim, base_lr=4e-3, weight_decay=0.05, warmup_epochs=0.5),
    )


def paper(table: int, top1: float, config: Config, data: str = "ImageNet", **ablation: Any) -> Preset:
    """A row of the paper: its linear-evaluation top-1, and the recipe with this row's `ablation` of the method."""
    config = replace(config, method=replace(config.method, **ablation))
    return Preset(config, f"{top1:.1f} % linear top-1, {data}", f"paper, Table {table}")


def table1() -> dict[str, Preset]:
    """Main results, 300 epochs."""
    return {
        "table1/mocov3-vit_s": paper(1, 73.2, imagenet_vit("vit_small", "none")),
        "table1/mocov3-vit_s-sdmp": paper(1, 73.8, imagenet_vit("vit_small", "sdmp")),
        "table1/mocov3-vit_b": paper(1, 76.7, imagenet_vit("vit_base", "none")),
        "table1/mocov3-vit_b-sdmp": paper(1, 77.2, imagenet_vit("vit_base", "sdmp")),
        "table1/mocov3-r50": paper(1, 72.8, imagenet_r50("none")),
        "table1/mocov3-r50-sdmp": paper(1, 73.5, imagenet_r50("sdmp")),
    }


def table5() -> dict[str, Preset]:
    """CIFAR-10 and CIFAR-100: (architecture, epochs) -> top-1 of MoCo v3 and of SDMP on each."""
    rows = {
        ("50", 200): {10: (86.5, 89.5), 100: (63.2, 68.2)},
        ("50", 2000): {10: (93.7, 95.8), 100: (69.0, 78.7)},
        ("101", 200): {10: (86.4, 90.0), 100: (63.3, 69.7)},
        ("101", 2000): {10: (93.8, 95.8), 100: (68.5, 80.0)},
    }
    presets = {}
    for (layers, epochs), by_classes in rows.items():
        for classes, (baseline, ours) in by_classes.items():
            name = f"table5/cifar{classes}-r{layers}"
            tail = "" if epochs == 200 else f"-{epochs}ep"
            recipe = partial(cifar, f"resnet{layers}", epochs=epochs, classes=classes)
            data = f"CIFAR-{classes}, recipe after solo-learn"
            presets[f"{name}{tail}"] = paper(5, baseline, recipe("none"), data)
            presets[f"{name}-sdmp{tail}"] = paper(5, ours, recipe("sdmp"), data)
    return presets


def ablations() -> dict[str, Preset]:
    """Tables 6 to 9 and 11, their MoCo v3 rows."""
    vit = imagenet_vit("vit_small", "sdmp")
    short = imagenet_vit("vit_small", "sdmp", epochs=100)
    small = partial(imagenet_vit, "vit_small", batch_size=512)
    return {
        "table6/mocov3-vit_s-sdmp-static-source": paper(6, 71.5, vit, source_weight="static"),
        "table6/mocov3-vit_s-sdmp-static-pair": paper(6, 72.5, vit, pair_weight="static"),
        "table7/mocov3-vit_s-sdmp-shared": paper(7, 72.3, vit, shared_lam=True),
        "table8/mocov3-vit_s": paper(8, 64.7, short, mixing="none"),
        "table8/mocov3-vit_s-sdmp-mixup": paper(8, 65.1, short, rules=("mixup",)),
        "table8/mocov3-vit_s-sdmp-resizemix": paper(8, 65.4, short, rules=("resizemix",)),
        "table8/mocov3-vit_s-sdmp": paper(8, 65.5, short),
        "table9/mocov3-vit_s": paper(9, 66.7, imagenet_vit("vit_small", "none", epochs=150)),
        "table9/mocov3-vit_s-sdmp-replace": paper(9, 67.4, imagenet_vit("vit_small", "sdmp", epochs=150)),
        "table9/mocov3-vit_s-sdmp-extra": paper(9, 67.5, short, variant="extra"),
        "table11/mocov3-vit_s": paper(11, 79.1, small("none"), "ImageNet-100"),
        "table11/mocov3-vit_s-sdmp": paper(11, 81.8, small("sdmp"), "ImageNet-100"),
    }


def trials() -> dict[str, Preset]:
    """Small recipes of this project, without a number in the paper."""
    return {
        "quickstart": Preset(quickstart(), "kNN, printed by the run", "this project: embedded data, two CPU cores"),
        "quickstart-supervised": Preset(quickstart_supervised(), "kNN, printed by the run", "this project"),
        "cifar10-r18": Preset(cifar("resnet18", "none"), "none yet", "this project: CIFAR-10 on one GPU"),
        "cifar10-r18-sdmp": Preset(cifar("resnet18", "sdmp"), "none yet", "this project: CIFAR-10 on one GPU"),
    }


def presets() -> dict[str, Preset]:
    """All presets by name, each with its name in its configuration."""
    named = {"custom": Preset(Config(), "none", "this project: every default; MoCo v3 + SDMP, ViT-S, 300 epochs")}
    named |= trials() | table1() | table5() | ablations()
    return {
        name: replace(preset, config=replace(preset.config, run=replace(preset.config.run, preset=name)))
        for name, preset in named.items()
    }


def get_preset(name: str) -> Config:
    """The configuration of a preset; `ConfigError` with near matches for an unknown name."""
    known = presets()
    if name not in known:
        raise ConfigError(f"unknown preset {name!r}.{near(name, known)} `python -m sdmp_train presets` lists them all.")
    return known[name].config
