"""Complete recipes: one function per family, one name per row of the paper's tables, and small ones to try things on.

What the paper leaves open (most of Table 5's recipe, for instance) comes from the source that the function names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .advice import command
from .config import (
    NOT_MATHS,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    flatten,
    near,
)
from .cost import ARITHMETIC, GPU, gpu_hours, image_gflop
from .flags import words_of
from .methods.settings.contrast import ContrastConfig
from .methods.settings.dacl import DACLConfig
from .methods.settings.dino import DINOConfig
from .methods.settings.imix import IMixConfig
from .methods.settings.mochi import MoCHiConfig
from .methods.settings.mocov3 import MoCoV3Config
from .methods.settings.supervised import SupervisedConfig

PLAIN, SDMP = MoCoV3Config(mixing="none"), MoCoV3Config(mixing="sdmp")

FOR_OWN_IMAGES = {
    "cuda": "table1/mocov3-vit_s-sdmp --batch-size 256",
    "cpu": "quickstart --image-px 64 --gray-prob 0.2",
}
"""By kind of device, the preset and flags that a run on embedded images proposes for the user's own."""


@dataclass(frozen=True)
class Images:
    """A data set of the paper."""

    name: str
    count: int
    """Images that are trained on."""


IMAGENET = Images("ImageNet", 1_281_167)
IMAGENET_100 = Images("ImageNet-100", 126_689)
CIFAR = {10: Images("CIFAR-10", 50_000), 100: Images("CIFAR-100", 50_000)}


@dataclass(frozen=True)
class Preset:
    """A recipe, where it comes from, and the number to compare its result with."""

    config: Config
    result: str
    source: str
    top1: float | None = None
    """The paper's figure, in percent."""
    images: Images | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where each setting's value comes from, by its name in `config.yaml`, such as `optim.epochs`."""

    @property
    def gpu_hours(self) -> float | None:
        """Hours of one GPU on the paper's images, by the arithmetic of `cost.py`."""
        return None if self.images is None else gpu_hours(self.config, self.images.count)


@dataclass(frozen=True)
class Recipe:
    """A configuration, and the source of each setting that matters in it."""

    config: Config
    origins: Mapping[str, str]

    def but(self, source: str, **method: Any) -> Recipe:
        """With other settings of the method, which come from `source`."""
        config = replace(self.config, method=replace(self.config.method, **method))
        return Recipe(config, {**self.origins, **{f"method.{name}": source for name in method}})


def recipe(config: Config, *tables: Mapping[str, str]) -> Recipe:
    """Tables of {source: "names of settings"}, of which later ones win, turned about: {setting: source}."""
    return Recipe(
        config, {name: source for table in tables for source, names in table.items() for name in names.split()}
    )


ROW = "this row of the paper's table"
MOCO = "MoCo v3's code and readme"
DINO_CODE = "DINO's code and readme"
OURS = "this project's reading; the paper released no code for DINO"
SOLO = "solo-learn's MoCo v3 on CIFAR; the paper states no recipe"
OWN = "this project"
DEIT = "DeiT, from which the paper takes row and number"

# Where the settings of a method come from, unless a recipe or a row says otherwise.
CONTRAST_SOURCES = {
    MOCO: "method.dim method.mlp_dim method.momentum method.momentum_cosine method.temperature method.stop_grad_conv1",
}
MOCOV3_SOURCES = {
    **CONTRAST_SOURCES,
    ROW: "method.mixing",
    "the paper's released code, both versions; section 4.1.1 in words": "method.variant",
    "paper, section 4.3.2": "method.rules method.per",
    "the paper's released code; the paper says Beta(alpha, alpha)": "method.alpha",
    "paper, section 4.3.1": "method.shared_lam",
    "paper, Eq. 3 and 4": "method.source_weight method.pair_weight method.form",
    "this project; the released code pairs over all GPUs": "method.flip",
    "this project, by analogy with `replace`": "method.extra_weight",
}
IMIX_SOURCES = {
    **CONTRAST_SOURCES,
    "i-mix's code: Mixup on CIFAR, CutMix on ImageNet; the paper does not say": "method.rule",
    "i-mix's code": "method.alpha method.form",
}
DACL_SOURCES = {
    **CONTRAST_SOURCES,
    "this project: DACL tunes it for each data set, and the paper does not say": "method.alpha",
}
MOCHI_SOURCES = {
    **CONTRAST_SOURCES,
    "this project: an eighth of MoCHi's, which has a queue; the paper does not say": "method.hard method.mixed "
    "method.query_mixed",
    "SynCo's code; the paper does not say": "method.warmup",
}
DINO_SOURCES = {
    DINO_CODE: "method.out_dim method.head_dim method.bottleneck_dim method.norm_last_layer method.use_bn_in_head "
    "method.student_temp method.warmup_teacher_temp method.teacher_temp method.warmup_teacher_temp_epochs "
    "method.momentum_teacher method.center_momentum method.freeze_last_layer method.drop_path_rate "
    "method.vit_start method.local_crops_number method.local_px method.global_crops_scale method.local_crops_scale",
    ROW: "method.mixing",
    "paper, section 4.3.2": "method.rules method.per",
    "the paper's released code for MoCo v3; the paper says Beta(alpha, alpha)": "method.alpha",
    "paper, section 4.3.1": "method.shared_lam",
    "paper, Eq. 7 and 8": "method.source_weight method.pair_weight",
    "paper, Eq. 9": "method.mix_weight",
    OURS: "method.flip",
}
SOURCES = {
    DINOConfig: DINO_SOURCES,
    MoCoV3Config: MOCOV3_SOURCES,
    IMixConfig: IMIX_SOURCES,
    DACLConfig: DACL_SOURCES,
    MoCHiConfig: MOCHI_SOURCES,
}
IMAGENET_SOURCES = {
    "paper, section 4": "data.image_px",
    "usual for ImageNet": "data.mean data.std",
    "paper, section 4: BYOL's views": "data.gray_prob data.blur",
    ROW: "model.arch optim.epochs",
    "timm": "model.stem",
}


def imagenet_vit(arch: str, method: ContrastConfig, *, epochs: int = 300, batch_size: int = 1024) -> Recipe:
    """MoCo v3 on a ViT at 224 px: AdamW, wd 0.1 on all, warm-up 40, temperature 0.2 (MoCo v3 and SDMP readmes)."""
    config = Config(
        model=ModelConfig(arch=arch),
        method=replace(method, temperature=0.2),
        optim=OptimConfig(epochs=epochs, batch_size=batch_size),
    )
    moco = {
        MOCO: "data.crop_min_frac optim.opt optim.weight_decay optim.warmup_epochs optim.betas optim.min_lr",
        "the paper's released code; its text says 5e-4, which is DINO's": "optim.base_lr",
        "paper, section 4" if batch_size == 1024 else "first readme of the paper's released code": "optim.batch_size",
    }
    return recipe(config, IMAGENET_SOURCES, SOURCES[type(method)], moco)


def imagenet_r50(method: ContrastConfig) -> Recipe:
    """MoCo v3 on a ResNet-50, 300 epochs: LARS, warm-up 10, temperature 1 (MoCo v3 readme)."""
    config = Config(
        data=DataConfig(crop_min_frac=0.2),
        model=ModelConfig(arch="resnet50"),
        method=replace(method, temperature=1.0),
        optim=OptimConfig(opt="lars", base_lr=0.3, weight_decay=1e-6, warmup_epochs=10, batch_size=4096),
    )
    moco = {
        MOCO: "data.crop_min_frac optim.opt optim.base_lr optim.weight_decay optim.warmup_epochs optim.batch_size "
        "optim.lars_momentum optim.lars_trust optim.lars_clip optim.min_lr",
    }
    return recipe(config, IMAGENET_SOURCES, SOURCES[type(method)], moco)


def imagenet_dino(epochs: int = 300, batch_size: int = 1024, **method: Any) -> Recipe:
    """DINO on ViT-S: AdamW, weight decay 0.04 to 0.4, each parameter's gradient cut at 3 (DINO's readme).

    Its 300-epoch recipe frees the length of the prototypes and lets the teacher's temperature rise to 0.07.
    """
    long: dict[str, Any] = {"norm_last_layer": False, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30}
    config = Config(
        model=ModelConfig(arch="vit_small"),
        method=DINOConfig(**{**(long if epochs >= 300 else {}), **method}),
        optim=OptimConfig(
            epochs=epochs,
            batch_size=batch_size,
            warmup_epochs=10,
            base_lr=5e-4,
            min_lr=1e-6,
            weight_decay=0.04,
            weight_decay_end=0.4,
            clip_grad=3.0,
            clip_mode="parameter",
        ),
    )
    dino = {
        DINO_CODE: "optim.opt optim.weight_decay optim.weight_decay_end optim.warmup_epochs optim.betas optim.min_lr "
        "optim.clip_grad optim.clip_mode optim.base_lr",
    }
    batch = {"paper, section 4" if batch_size == 1024 else DINO_CODE: "optim.batch_size"}
    return recipe(config, IMAGENET_SOURCES, SOURCES[DINOConfig], dino, batch)


def cifar(arch: str, method: ContrastConfig, *, epochs: int = 200, classes: int = 10) -> Recipe:
    """MoCo v3 at 32 px with the CIFAR stem, after solo-learn's recipe with padding 1 (the paper states none)."""
    mean, std = {
        10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        100: ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    }[classes]
    config = Config(
        data=DataConfig(image_px=32, blur=False, mean=mean, std=std),
        model=ModelConfig(arch=arch, stem="cifar"),
        method=replace(method, temperature=0.2),
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
    solo = {
        ROW: "model.arch optim.epochs",
        "paper, section 4.2; the convolution's padding of 1 is this project's": "data.image_px model.stem",
        "usual for this data set": "data.mean data.std",
        SOLO: "data.crop_min_frac data.gray_prob data.blur method.momentum method.temperature optim.opt "
        "optim.base_lr optim.weight_decay optim.batch_size optim.warmup_epochs optim.lars_trust optim.lars_clip",
        MOCO: "optim.lars_momentum optim.min_lr",
    }
    return recipe(config, SOURCES[type(method)], solo)


def imagenet_supervised(epochs: int = 300, batch_size: int = 1024) -> Recipe:
    """ViT-S on labels, as near to DeiT's recipe as the trainer comes.

    DeiT's RandAugment, random erasing, repeated augmentation and average of weights are not in it: expect less than
    the paper's number.
    """
    config = Config(
        data=DataConfig(gray_prob=0.0, blur=False),
        model=ModelConfig(arch="vit_small"),
        method=SupervisedConfig(rules=("mixup", "cutmix"), label_smoothing=0.1, drop_path=0.1),
        optim=OptimConfig(
            epochs=epochs,
            batch_size=batch_size,
            base_lr=2.5e-4,
            min_lr=1e-5,
            weight_decay=0.05,
            warmup_epochs=5,
        ),
    )
    deit = {
        DEIT: "data.crop_min_frac data.gray_prob data.blur method.rules method.per method.prob method.label_smoothing "
        "method.drop_path optim.opt optim.betas optim.min_lr optim.weight_decay optim.warmup_epochs optim.batch_size",
        "DeiT's 5e-4 at a batch of 512": "optim.base_lr",
        "this project: one law for both rules, where DeiT has 0.8 for Mixup": "method.alpha",
    }
    return recipe(config, IMAGENET_SOURCES, deit)


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


def quickstart_dino() -> Config:
    """The quickstart's images, by DINO + SDMP on a small ResNet: few prototypes, small local crops, nothing frozen.

    An untrained teacher says nearly the same of every image. Batch norms, in the head and in the backbone, spread what
    it says (a ViT of the quickstart's size falls to four directions of its features here), a quick centre takes the
    rest away before the student has learnt it, and the teacher is cold and, as the run is short, quick.
    """
    base = quickstart()
    return replace(
        base,
        model=ModelConfig(arch="resnet10t", stem="cifar", width=16),
        method=DINOConfig(
            out_dim=256,
            head_dim=256,
            use_bn_in_head=True,
            warmup_teacher_temp=0.02,
            teacher_temp=0.02,
            momentum_teacher=0.98,
            center_momentum=0.5,
            local_crops_number=4,
            local_px=16,
            global_crops_scale=(0.5, 1.0),
            local_crops_scale=(0.3, 0.8),
            drop_path_rate=0.0,
            freeze_last_layer=0,
        ),
        optim=replace(
            base.optim,
            batch_size=64,
            base_lr=1e-2,
            weight_decay=0.04,
            clip_grad=3.0,
            clip_mode="parameter",
        ),
    )


def paper(table: int, top1: float, made: Recipe, images: Images = IMAGENET, **ablation: Any) -> Preset:
    """A row of the paper: its linear-evaluation top-1, and the recipe with this row's `ablation` of the method."""
    made = made.but(ROW, **ablation)
    result = f"{top1:.1f} % top-1 on {images.name}"
    return Preset(made.config, result, f"paper, Table {table}", top1, images, made.origins)


def table1() -> dict[str, Preset]:
    """Main results, 300 epochs. Rows of methods that the paper only quotes are no presets."""
    return {
        "table1/supervised-vit_s": paper(1, 79.8, imagenet_supervised()),
        "table1/mocov3-vit_s": paper(1, 73.2, imagenet_vit("vit_small", PLAIN)),
        "table1/mocov3-vit_s-imix": paper(1, 71.6, imagenet_vit("vit_small", IMixConfig(rule="cutmix"))),
        "table1/mocov3-vit_s-dacl": paper(1, 72.3, imagenet_vit("vit_small", DACLConfig())),
        "table1/mocov3-vit_s-mochi": paper(1, 73.0, imagenet_vit("vit_small", MoCHiConfig())),
        "table1/mocov3-vit_s-sdmp": paper(1, 73.8, imagenet_vit("vit_small", SDMP)),
        "table1/dino-vit_s": paper(1, 76.0, imagenet_dino(mixing="none")),
        "table1/dino-vit_s-sdmp": paper(1, 76.4, imagenet_dino()),
        "table1/mocov3-vit_b": paper(1, 76.7, imagenet_vit("vit_base", PLAIN)),
        "table1/mocov3-vit_b-sdmp": paper(1, 77.2, imagenet_vit("vit_base", SDMP)),
        "table1/mocov3-r50": paper(1, 72.8, imagenet_r50(PLAIN)),
        "table1/mocov3-r50-imix": paper(1, 72.8, imagenet_r50(IMixConfig(rule="cutmix"))),
        "table1/mocov3-r50-sdmp": paper(1, 73.5, imagenet_r50(SDMP)),
    }


def table2() -> dict[str, Preset]:
    """The rows of Table 2 that are trained on labels from scratch; its other rows fine-tune what Table 1 trained."""
    return {
        "table2/supervised-vit_s-100ep": paper(2, 75.8, imagenet_supervised(epochs=100)),
        "table2/supervised-vit_s": paper(2, 79.8, imagenet_supervised()),
    }


def table5() -> dict[str, Preset]:
    """CIFAR-10 and CIFAR-100: (layers, epochs) -> top-1 of MoCo v3, of i-mix and of SDMP on each."""
    rows = {
        ("50", 200): {10: (86.5, 88.6, 89.5), 100: (63.2, 66.1, 68.2)},
        ("50", 2000): {10: (93.7, 95.4, 95.8), 100: (69.0, 77.3, 78.7)},
        ("101", 200): {10: (86.4, 89.4, 90.0), 100: (63.3, 67.7, 69.7)},
        ("101", 2000): {10: (93.8, 95.8, 95.8), 100: (68.5, 78.4, 80.0)},
    }
    methods = {"": PLAIN, "-imix": IMixConfig(rule="mixup"), "-sdmp": SDMP}
    presets = {}
    for (layers, epochs), by_classes in rows.items():
        tail = "" if epochs == 200 else f"-{epochs}ep"
        for classes, figures in by_classes.items():
            for (name, method), top1 in zip(methods.items(), figures, strict=True):
                made = cifar(f"resnet{layers}", method, epochs=epochs, classes=classes)
                presets[f"table5/cifar{classes}-r{layers}{name}{tail}"] = paper(5, top1, made, CIFAR[classes])
    return presets


def ablations() -> dict[str, Preset]:
    """Tables 6 to 9 and 11, their rows of MoCo v3 and of labels."""
    plain, ours = imagenet_vit("vit_small", PLAIN), imagenet_vit("vit_small", SDMP)
    short = imagenet_vit("vit_small", SDMP, epochs=100)
    small = partial(imagenet_vit, "vit_small", batch_size=512)
    return {
        "table6/mocov3-vit_s": paper(6, 73.2, plain),
        "table6/mocov3-vit_s-sdmp-static-source": paper(6, 71.5, ours, source_weight="static"),
        "table6/mocov3-vit_s-sdmp-static-pair": paper(6, 72.5, ours, pair_weight="static"),
        "table6/mocov3-vit_s-sdmp": paper(6, 73.8, ours),
        "table7/mocov3-vit_s": paper(7, 73.2, plain),
        "table7/mocov3-vit_s-sdmp-shared": paper(7, 72.3, ours, shared_lam=True),
        "table7/mocov3-vit_s-sdmp": paper(7, 73.8, ours),
        "table8/mocov3-vit_s": paper(8, 64.7, short, mixing="none"),
        "table8/mocov3-vit_s-sdmp-mixup": paper(8, 65.1, short, rules=("mixup",)),
        "table8/mocov3-vit_s-sdmp-resizemix": paper(8, 65.4, short, rules=("resizemix",)),
        "table8/mocov3-vit_s-sdmp": paper(8, 65.5, short),
        "table9/mocov3-vit_s": paper(9, 66.7, imagenet_vit("vit_small", PLAIN, epochs=150)),
        "table9/mocov3-vit_s-sdmp-replace": paper(9, 67.4, imagenet_vit("vit_small", SDMP, epochs=150)),
        "table9/mocov3-vit_s-sdmp-extra": paper(9, 67.5, short, variant="extra"),
        "table11/supervised-vit_s": paper(11, 88.0, imagenet_supervised(), IMAGENET_100),
        "table11/mocov3-vit_s": paper(11, 79.1, small(PLAIN), IMAGENET_100),
        "table11/mocov3-vit_s-sdmp": paper(11, 81.8, small(SDMP), IMAGENET_100),
    }


def dino_ablations() -> dict[str, Preset]:
    """Tables 6, 7, 8, 10 and 11, their rows of DINO."""
    plain, ours = imagenet_dino(mixing="none"), imagenet_dino()
    presets = {
        "table6/dino-vit_s": paper(6, 76.0, plain),
        "table6/dino-vit_s-sdmp-static-source": paper(6, 75.5, ours, source_weight="static"),
        "table6/dino-vit_s-sdmp-static-pair": paper(6, 76.1, ours, pair_weight="static"),
        "table6/dino-vit_s-sdmp": paper(6, 76.4, ours),
        "table7/dino-vit_s": paper(7, 76.0, plain),
        "table7/dino-vit_s-sdmp-shared": paper(7, 74.5, ours, shared_lam=True),
        "table7/dino-vit_s-sdmp": paper(7, 76.4, ours),
        # The paper's baseline of Table 8 equals Table 10's row of six local crops, its other rows that of eight.
        "table8/dino-vit_s": paper(8, 73.8, imagenet_dino(100, 512, mixing="none", local_crops_number=6)),
        "table8/dino-vit_s-sdmp-mixup": paper(8, 74.3, imagenet_dino(100, 512), rules=("mixup",)),
        "table8/dino-vit_s-sdmp-resizemix": paper(8, 74.4, imagenet_dino(100, 512), rules=("resizemix",)),
        "table8/dino-vit_s-sdmp": paper(8, 74.4, imagenet_dino(100, 512)),
        "table11/dino-vit_s": paper(11, 82.0, imagenet_dino(300, 512, mixing="none"), IMAGENET_100),
        "table11/dino-vit_s-sdmp": paper(11, 83.2, imagenet_dino(300, 512), IMAGENET_100),
    }
    for count, (without, mixed) in {0: (67.8, 64.1), 2: (71.5, 70.9), 6: (73.8, 74.0), 8: (74.0, 74.4)}.items():
        made = imagenet_dino(100, 512)
        name = f"table10/dino-vit_s-l{count}"
        presets[name] = paper(10, without, made, local_crops_number=count, mixing="none")
        presets[f"{name}-sdmp"] = paper(10, mixed, made, local_crops_number=count)
    return presets


def trials() -> dict[str, Preset]:
    """Small recipes of this project, without a number in the paper."""
    own = "this project: CIFAR-10 on one GPU"
    none = "no result to compare with yet"
    return {
        "quickstart": Preset(quickstart(), "kNN, printed by the run", "this project: embedded data, two CPU cores"),
        "quickstart-dino": Preset(quickstart_dino(), "kNN, printed by the run", "this project: embedded data"),
        "quickstart-supervised": Preset(quickstart_supervised(), "kNN, printed by the run", "this project"),
        "cifar10-r18": Preset(cifar("resnet18", PLAIN).config, none, own, origins=_unlisted(cifar("resnet18", PLAIN))),
        "cifar10-r18-sdmp": Preset(
            cifar("resnet18", SDMP).config, none, own, origins=_unlisted(cifar("resnet18", SDMP))
        ),
    }


def _unlisted(made: Recipe) -> dict[str, str]:
    """The sources of a recipe that is no row of the paper's tables."""
    return {name: OWN if source == ROW else source for name, source in made.origins.items()}


def table_of(name: str) -> int:
    """The number of the table that `table11/dino-vit_s` is a row of."""
    return int(name.partition("/")[0].removeprefix("table"))


def presets() -> dict[str, Preset]:
    """All presets by name, each with its name in its configuration."""
    named = {"custom": Preset(Config(), "none", "this project: every default; MoCo v3 + SDMP, ViT-S, 300 epochs")}
    for rows in (trials, table1, table2, table5):
        named |= rows()
    ablated = ablations() | dino_ablations()
    named |= {name: ablated[name] for name in sorted(ablated, key=table_of)}  # the order within a table is kept
    return {
        name: replace(preset, config=replace(preset.config, run=replace(preset.config.run, preset=name)))
        for name, preset in named.items()
    }


def find_preset(name: str) -> Preset:
    """The preset of this name; `ConfigError` with near matches for an unknown one."""
    known = presets()
    if name not in known:
        listed = command("sdmp_train", "presets")
        raise ConfigError(f"unknown preset {name!r}.{near(name, known)} `{listed}` lists them all.")
    return known[name]


def get_preset(name: str) -> Config:
    """The configuration of a preset; `ConfigError` with near matches for an unknown name."""
    return find_preset(name).config


def table_of_presets() -> list[str]:
    """All presets as a table, and how its hours were reckoned."""
    titles = ("preset", "paper, top-1", "images", "epochs", "batch", f"{GPU} hours", "source")
    rows = []
    for name, preset in presets().items():
        top1 = "-" if preset.top1 is None else f"{preset.top1:.1f} %"
        hours = "-" if preset.gpu_hours is None else f"{preset.gpu_hours:.3g}"
        images = "-" if preset.images is None else preset.images.name
        optim = preset.config.optim
        rows.append((name, top1, images, str(optim.epochs), str(optim.batch_size), hours, preset.source))
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (titles, *rows)]
    return [
        *(line.rstrip() for line in lines),
        "",
        *ARITHMETIC,
        "`presets NAME` prints its settings as flags, with their values and where these come from.",
    ]


def origins_of(name: str) -> list[str]:
    """A preset's number, its hours, and every setting that matters in it with its value and where that comes from."""
    preset = find_preset(name)
    lines = [f"{name}: {preset.result} [{preset.source}]"]
    if preset.gpu_hours is not None and preset.images is not None:
        lines += [
            f"{preset.gpu_hours:.3g} hours of one {GPU}: {preset.images.count:,} images x "
            f"{preset.config.optim.epochs} epochs x {image_gflop(preset.config):.1f} GFLOP an image",
            *ARITHMETIC,
        ]
    cells = [("flag", "value", "where it comes from")]
    for setting, value in flatten(preset.config):
        if setting in preset.origins or (not preset.origins and matters(setting, value, preset.config)):
            group, _, key = setting.partition(".")
            words = (
                ("--method", str(value)) if setting == "method.name" else words_of(getattr(preset.config, group), key)
            )
            cells.append((*words, preset.origins.get(setting, OWN)))
    widths = [max(len(row[i]) for row in cells) for i in (0, 1)]
    return [*lines, "", *(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in cells)]


def matters(name: str, value: object, config: Config) -> bool:
    """Whether a setting moves a number: it is on, of the optimiser that is chosen, and no matter of running."""
    group, _, key = name.partition(".")
    owners = {"betas": "adamw", "momentum": "sgd", "lars_momentum": "lars", "lars_trust": "lars", "lars_clip": "lars"}
    other_optimiser = group == "optim" and owners.get(key, config.optim.opt) != config.optim.opt
    has_scales = key == "crop_min_frac" and hasattr(config.method, "global_crops_scale")
    return not (group == "run" or value is None or other_optimiser or has_scales or name in NOT_MATHS)
