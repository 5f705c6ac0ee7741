"""The settings that every run has: frozen dataclasses, a unit in each name, checked on construction.

The fields' docstrings are the help of the command line; `tyro.conf.arg` gives a field the spelling its users know
(timm's, where timm has one). What one method alone needs is in that method's file; `config.py` puts both together.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from .flags import arg
from .text import brief

RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's."""
GREY_MEAN, GREY_STD = 0.449, 0.226
"""Their means."""


class ConfigError(ValueError):
    """A setting, a preset, a folder or a file that the user gave cannot be used. Exit code 2."""

    exit_code = 2


def near(word: object, known: Iterable[str]) -> str:
    """` Did you mean a, b?` for the known words closest to `word`, if about as close; or an empty string."""
    if not isinstance(word, str):
        return ""
    matches = difflib.get_close_matches(word[:100], list(known), n=3, cutoff=0.5)
    ratios = [difflib.SequenceMatcher(None, match, word[:100]).ratio() for match in matches]
    matches = [match for match, ratio in zip(matches, ratios, strict=True) if ratio >= ratios[0] - 0.15]
    return f" Did you mean {', '.join(matches)}?" if matches else ""


def require(ok: bool, name: str, got: object, expected: str) -> None:
    """Raise `ConfigError` in the one form all settings use."""
    if not ok:
        raise ConfigError(f"{name} is {brief(got)}; expected {expected}")


def between(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Require `low <= value <= high`, or `low < value <= high` with `above`."""
    ok = math.isfinite(value) and low <= value <= high and not (above and value == low)
    require(ok, name, value, f"a number {'above' if above else 'from'} {low:g} to {high:g}")


MOST_WORKERS = 1024
"""Decoding processes or threads of one process of a run: more would take minutes to start, and then not run."""


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is augmented."""

    data: Annotated[str | None, arg(aliases=("--data-dir",))] = None
    """Images: a folder, any tree (with one folder per class, kNN is measured); a list of files (.txt); tar shards or
    TFRecords, one or a folder of them, or their URL (s3://); CIFAR's binary archive. `embedded`: built-in shapes."""
    test_data: str | None = None
    """Folder of class folders whose images are kNN's queries; default: the test split of --data where it has one."""
    image_px: Annotated[int | tuple[int, int], arg(aliases=("--img-size",))] = 224
    """Side of the square views, in pixels; or their height and width."""
    crop_min_frac: Annotated[float, arg(name="crop-min")] = 0.08
    """Smallest area of a random crop, as a fraction of the image (DINO has crop scales of its own)."""
    gray_prob: float = 0.2
    """Chance that a view loses its colours (BYOL: 0.2); raise it where colour says nothing about what is shown."""
    blur: bool = True
    """Gaussian blur in the views (the BYOL recipe); usual for photographs, off for 32 px images."""
    channels: int = 3
    """Of the images, 1 to 16: 1 is grey, 3 RGB; others are .npy (H, W, C) or TIFFs of as many grey frames."""
    mean: tuple[float, ...] = RGB_MEAN
    """Mean of each channel on the 0 to 1 scale; by default ImageNet's, for other than 3 channels that of its grey."""
    std: tuple[float, ...] = RGB_STD
    """Standard deviation of each channel on the 0 to 1 scale; likewise."""
    loader: Literal["auto", "dali", "torchvision", "resident"] = "auto"
    """Who decodes. `auto` measures dali and torchvision for a second where a run is long enough, and keeps the faster;
    `resident` decodes every image once and keeps all on the device, where they fit."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What to do where a file is no readable image: stop and name it, or leave it out."""
    max_bad_frac: float = 0.01
    """With --bad-images skip: the share of files that may be left out; more end the run with exit code 4."""
    check: Literal["header", "decode"] = "header"
    """`decode` also decodes every file once before the first step, as --bad-images skip does in any case."""
    max_pixels: int | None = None
    """Files that claim more pixels are bad (decompression bombs); None is 89,478,485, Pillow's own limit."""
    workers: Annotated[int | None, arg(aliases=("-j",))] = None
    """Decoding threads (DALI) or processes (torchvision) per GPU; None chooses by the number of cores."""

    def __post_init__(self) -> None:
        if isinstance(self.image_px, tuple) and self.image_px[0] == self.image_px[-1]:
            object.__setattr__(self, "image_px", self.image_px[0])  # one spelling of a square
        require(min(self.size_px) >= 8, "image_px", self.image_px, "at least 8 pixels")
        between("crop_min", self.crop_min_frac, 0, 1, above=True)
        between("gray_prob", self.gray_prob, 0, 1)
        between("max_bad_frac", self.max_bad_frac, 0, 1)
        require(self.max_pixels is None or self.max_pixels >= 1, "max_pixels", self.max_pixels, "at least 1")
        require(1 <= self.channels <= 16, "channels", self.channels, "1 to 16")
        for name, rgb, grey in (("mean", RGB_MEAN, GREY_MEAN), ("std", RGB_STD, GREY_STD)):
            if self.channels != 3 and getattr(self, name) == rgb:
                object.__setattr__(self, name, (grey,) * self.channels)
            given = getattr(self, name)
            require(len(given) == self.channels, name, given, f"a number for each of the {self.channels} channels")
        require(all(math.isfinite(v) for v in self.mean), "mean", self.mean, "finite numbers")
        require(all(math.isfinite(v) and v > 0 for v in self.std), "std", self.std, "numbers above 0")
        few = self.workers is None or 0 <= self.workers <= MOST_WORKERS
        require(few, "workers", self.workers, f"0 to {MOST_WORKERS}")

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the views."""
        return self.image_px if isinstance(self.image_px, tuple) else (self.image_px, self.image_px)


def named_place(data: DataConfig) -> str:
    """Where the images are. Raises `ConfigError` where no place is named."""
    if data.data is None:
        raise ConfigError("data is missing; give --data DIR, a folder of images (or --data embedded)")
    return data.data


def with_channels(data: DataConfig, channels: int) -> DataConfig:
    """`data` for images of so many channels; mean and std, where those are others than before, are the defaults."""
    if channels == data.channels:
        return data
    return replace(data, channels=channels, mean=RGB_MEAN, std=RGB_STD)


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, by timm's names."""

    arch: Annotated[str, arg(aliases=("-a", "--model"))] = "vit_small_patch16_224"
    """Any timm ViT or ResNet; vit_small and vit_base are those of the method's paper (MoCo v3: 12 heads)."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """`cifar` gives a ResNet a 3x3 stride-1 first convolution and no max-pool."""
    patch_px: int | None = None
    """ViT: side of a patch in pixels; None keeps the architecture's."""
    width: int | None = None
    """ViT: width of the tokens; ResNet: channels of the first stage, doubled by each further one. None: its own."""
    depth: int | None = None
    """ViT: number of blocks; None keeps the architecture's."""
    heads: int | None = None
    """ViT: number of attention heads; None keeps the architecture's (the paper's ViT-S has 12)."""
    init_from: str | None = None
    """Continue from trained weights: timm:NAME, the folder of an export, or of a run. Model, image size, channels, mean
    and std are theirs where no flag says otherwise; heads are fresh (docs/continuing.md)."""
    init_sha256: str | None = None
    """SHA-256 of those weights, which a run stores; where it is given, they must have it."""

    def __post_init__(self) -> None:
        if self.init_sha256 is not None:
            require(self.init_from is not None, "init_from", self.init_from, "weights that have the init_sha256 given")
            right = re.fullmatch(r"[0-9a-f]{64}", self.init_sha256) is not None
            require(right, "init_sha256", self.init_sha256, "64 hexadecimal digits")
        for name in ("patch_px", "width", "depth", "heads"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive whole number")


@dataclass(frozen=True)
class OptimConfig:
    """How long, how fast, in what batches."""

    batch_size: Annotated[int, arg(aliases=("-b",))] = 1024
    """GLOBAL batch, over all GPUs and nodes."""
    epochs: int = 300
    """Passes over the data."""
    warmup_epochs: float = 40
    """Epochs in which the learning rate rises from 0."""
    opt: Literal["adamw", "lars", "sgd"] = "adamw"
    """Optimiser."""
    base_lr: Annotated[float, arg(name="lr")] = 1.5e-4
    """Base learning rate at batch 256; the effective one is lr * batch-size / 256, and printed."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule; effective as it stands, not scaled by the batch."""
    weight_decay: Annotated[float, arg(aliases=("--wd",))] = 0.1
    """Weight decay: AdamW on every trained parameter (MoCo v3's), LARS on matrices only."""
    weight_decay_end: float | None = None
    """Let the weight decay go to this along half a cosine; None keeps it."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None does not clip."""
    clip_mode: Literal["global", "parameter"] = "global"
    """What that norm is taken over: the whole gradient, or each parameter's by itself (DINO)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    momentum: Annotated[float, arg(name="sgd-momentum")] = 0.9
    """SGD's momentum."""
    lars_momentum: float = 0.9
    """LARS's momentum."""
    lars_trust: float = 0.001
    """LARS's trust coefficient."""
    lars_clip: bool = False
    """LARS: never let a layer step further than the plain learning rate."""
    heads_only_epochs: float | None = None
    """Epochs at the start in which the heads alone are trained and no parameter of the backbone (batch norms go on
    counting); None: a twentieth of --epochs with --init-from, else 0."""
    backbone_lr_scale: float | None = None
    """The backbone's learning rate, as a share of the heads'; None: 0.1 with --init-from, else 1."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2 (a contrast needs another image)")
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        between("warmup_epochs", self.warmup_epochs, 0, 1e9)
        require(
            self.warmup_epochs <= self.epochs,
            "warmup_epochs",
            self.warmup_epochs,
            f"at most epochs, which is {self.epochs} (give both --epochs and --warmup-epochs)",
        )
        between("lr", self.base_lr, 0, 1e6, above=True)
        between("min_lr", self.min_lr, 0, self.lr)
        between("weight_decay", self.weight_decay, 0, 1e6)
        if self.weight_decay_end is not None:
            between("weight_decay_end", self.weight_decay_end, 0, 1e6)
        if self.clip_grad is not None:
            between("clip_grad", self.clip_grad, 0, 1e9, above=True)
        for beta in self.betas:
            between("betas", beta, 0, 1 - 1e-9)
        between("sgd_momentum", self.momentum, 0, 1 - 1e-9)
        between("lars_momentum", self.lars_momentum, 0, 1 - 1e-9)
        between("lars_trust", self.lars_trust, 0, 1e6, above=True)
        if self.heads_only_epochs is not None:
            between("heads_only_epochs", self.heads_only_epochs, 0, 1e9)
            below = f"less than epochs, which is {self.epochs}: the backbone would never be trained"
            require(self.heads_only_epochs < self.epochs, "heads_only_epochs", self.heads_only_epochs, below)
        if self.backbone_lr_scale is not None:
            between("backbone_lr_scale", self.backbone_lr_scale, 0, 1e3, above=True)

    @property
    def lr(self) -> float:
        """The learning rate after warm-up, by the linear scaling rule."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class RunConfig:
    """Where it runs, what it writes and when."""

    preset: str = "custom"
    """Recipe to begin from, see `python -m sdmp_train presets`; --config and flags override it."""
    seed: int = 0
    """Fixes the start, the order, the augmentation and the plans."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast of the encoders; auto is bf16 on a GPU, fp32 elsewhere. Losses are always fp32."""
    compile: bool = False
    """torch.compile of the backbones: for faster steps on a GPU (not measured yet), after a minute of compiling, in
    other bits."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every_epochs: int = 10
    """Epochs between checkpoints; one is also written at the start and at the end."""
    save_every_minutes: float = 15
    """Minutes between checkpoints within an epoch; 0 saves at the ends of epochs only."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones go once a newer one has been verified."""
    knn_every_epochs: int | None = None
    """Epochs between kNN measurements; 0 measures before and after training only; None: a tenth of --epochs with
    --init-from, else 0."""
    knn_max_images: int = 10_000
    """Images used for kNN (four fifths bank, one fifth queries); 0 switches kNN off."""
    tensorboard: bool = False
    """Log to TensorBoard too, in the run folder (extra: tensorboard)."""
    wandb: bool = False
    """Log to Weights & Biases too (extra: wandb)."""
    mlflow: bool = False
    """Log to MLflow too (extra: mlflow)."""
    max_steps: int | None = None
    """Stop after this step; the schedules still follow --epochs."""
    max_bad_steps: int = 20
    """Give up (exit code 3) after so many non-finite steps in a row."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2**63 - 1")
        for name in ("log_every_steps", "save_every_epochs", "keep_checkpoints", "max_bad_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("knn_every_epochs", "knn_max_images"):
            require((getattr(self, name) or 0) >= 0, name, getattr(self, name), "0 (off) or more")
        between("save_every_minutes", self.save_every_minutes, 0, 1e6)
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
