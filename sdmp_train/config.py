"""Every setting of a run: frozen dataclasses, a unit in each name, checked on construction, and their YAML form.

The fields' docstrings are the help of the command line; `tyro.conf.arg` gives a field the spelling its users know
(timm's, or moco-v3's for the `--moco-*` flags). Order of precedence: preset < `--config` file < flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from tyro.conf import OmitArgPrefixes, arg

from .reading import read_yaml


class ConfigError(ValueError):
    """A setting, a preset, a folder or a file that the user gave cannot be used. Exit code 2."""


RULES = ("mixup", "cutmix", "resizemix")


def near(word: object, known: Iterable[str]) -> str:
    """` Did you mean a, b?` for the known words closest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word[:100], list(known), n=3, cutoff=0.5) if isinstance(word, str) else []
    return f" Did you mean {', '.join(matches)}?" if matches else ""


def brief(value: object) -> str:
    """The value as Python writes it, shortened where it is long: a hostile one must not fill the screen."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    short.maxlist = short.maxtuple = short.maxdict = 10
    try:
        return one_line(short.repr(value))
    except ValueError:  # Python does not write out whole numbers of more than 4300 digits
        return f"a {type(value).__name__} too large to print"


def one_line(text: object) -> str:
    """What an exception (or a text) says, without line breaks and shortened; its kind where it says nothing."""
    words = " ".join(str(text).split())
    return (words if len(words) <= 400 else f"{words[:390]}...") or type(text).__name__


def require(ok: bool, name: str, got: object, expected: str) -> None:
    """Raise `ConfigError` in the one form all settings use."""
    if not ok:
        raise ConfigError(f"{name} is {brief(got)}; expected {expected}")


def between(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Require `low <= value <= high`, or `low < value <= high` with `above`."""
    ok = math.isfinite(value) and low <= value <= high and not (above and value == low)
    require(ok, name, value, f"a number {'above' if above else 'from'} {low:g} to {high:g}")


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is augmented."""

    data: Annotated[str | None, arg(aliases=("--data-dir",))] = None
    """Folder of images, any tree; with one folder per class, kNN is measured. `embedded`: the built-in shapes."""
    image_px: Annotated[int, arg(aliases=("--img-size",))] = 224
    """Side of the square views, in pixels."""
    crop_min_frac: Annotated[float, arg(name="crop-min")] = 0.08
    """Smallest area of a random crop, as a fraction of the image."""
    gray_prob: float = 0.2
    """Chance that a view loses its colours (BYOL: 0.2); raise it where colour says nothing about what is shown."""
    blur: bool = True
    """Gaussian blur in the views (the BYOL recipe); usual for photographs, off for 32 px images."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue on the 0 to 1 scale."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue on the 0 to 1 scale."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """Who decodes and augments."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What to do where a file is no readable image: stop and name it, or leave it out (up to 1 % of the files)."""
    workers: Annotated[int | None, arg(aliases=("-j",))] = None
    """Decoding threads (DALI) or processes (torchvision) per GPU; None chooses by the number of cores."""

    def __post_init__(self) -> None:
        require(self.image_px >= 8, "image_px", self.image_px, "at least 8 pixels")
        between("crop_min", self.crop_min_frac, 0, 1, above=True)
        between("gray_prob", self.gray_prob, 0, 1)
        require(all(math.isfinite(v) for v in self.mean), "mean", self.mean, "three finite numbers")
        require(all(math.isfinite(v) and v > 0 for v in self.std), "std", self.std, "three numbers above 0")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more")


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, by timm's names."""

    arch: Annotated[str, arg(aliases=("-a", "--model"))] = "vit_small_patch16_224"
    """Any timm ViT or ResNet; vit_small and vit_base are moco-v3's (12 heads)."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """`cifar` gives a ResNet a 3x3 stride-1 first convolution and no max-pool."""
    patch_px: int | None = None
    """ViT: side of a patch in pixels; None keeps the architecture's."""
    width: int | None = None
    """ViT: width of the tokens; None keeps the architecture's."""
    depth: int | None = None
    """ViT: number of blocks; None keeps the architecture's."""
    heads: int | None = None
    """ViT: number of attention heads; None keeps the architecture's (the paper's ViT-S has 12)."""
    stop_grad_conv1: bool = True
    """ViT: freeze the patch projection at its random start."""

    def __post_init__(self) -> None:
        for name in ("patch_px", "width", "depth", "heads"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive whole number")


@dataclass(frozen=True)
class MethodConfig:
    """MoCo v3; the flags keep the names of its reference code."""

    method: Literal["mocov3"] = "mocov3"
    """Pretext task."""
    dim: Annotated[int, arg(name="moco-dim")] = 256
    """Features that are compared."""
    mlp_dim: Annotated[int, arg(name="moco-mlp-dim")] = 4096
    """Hidden width of projector and predictor."""
    momentum: Annotated[float, arg(name="moco-m")] = 0.99
    """Momentum of the key encoder at the start."""
    momentum_cosine: Annotated[bool, arg(name="moco-m-cos")] = True
    """Let that momentum rise to 1 along half a cosine."""
    temperature: Annotated[float, arg(name="moco-t")] = 0.2
    """Softmax temperature."""

    def __post_init__(self) -> None:
        require(self.dim > 0, "moco_dim", self.dim, "a positive whole number")
        require(self.mlp_dim > 0, "moco_mlp_dim", self.mlp_dim, "a positive whole number")
        between("moco_m", self.momentum, 0, 1)
        between("moco_t", self.temperature, 0, 100, above=True)


@dataclass(frozen=True)
class MixingConfig:
    """What is mixed with what, and what the loss makes of it (Tables 6 to 9 of the paper are flags here)."""

    mixing: Literal["none", "sdmp"] = "sdmp"
    """`none` is the plain method."""
    variant: Literal["replace", "algorithm1", "extra"] = "replace"
    """`replace`: clean + 1/2 source + 1/2 pair; `algorithm1`: source + pair as printed; `extra`: four views."""
    rules: tuple[str, ...] = RULES
    """Mixing rules drawn from, uniformly: mixup, cutmix, resizemix (Table 8)."""
    per: Annotated[Literal["batch", "sample"], arg(name="mix-per")] = "batch"
    """One rule per batch (the paper) or per sample."""
    alpha: Annotated[float, arg(name="mix-alpha")] = 1.0
    """lam is drawn from Beta(alpha, alpha)."""
    shared_lam: bool = False
    """One lam for the whole batch (Table 7)."""
    source_weight: Annotated[Literal["random", "static"], arg(name="source-weight")] = "random"
    """`static` puts 1/2 in place of lam in the source loss (Table 6)."""
    pair_weight: Annotated[Literal["random", "static"], arg(name="pair-weight")] = "random"
    """`static` puts 1 in place of the overlap c in the pair loss (Table 6)."""
    extra_weight: float = 0.5
    """Weight of source and pair loss in the variant `extra`."""

    def __post_init__(self) -> None:
        for rule in self.rules:
            require(rule in RULES, "rules", rule, f"some of {', '.join(RULES)}.{near(rule, RULES)}")
        require(len(self.rules) > 0, "rules", self.rules, "at least one rule (or --mixing none)")
        require(len(set(self.rules)) == len(self.rules), "rules", self.rules, "each rule once")
        between("mix_alpha", self.alpha, 0, 1e6, above=True)
        between("extra_weight", self.extra_weight, 0, 1e6)


@dataclass(frozen=True)
class OptimConfig:
    """How long, how fast, in what batches."""

    batch_size: Annotated[int, arg(aliases=("-b",))] = 1024
    """GLOBAL batch, over all GPUs and nodes."""
    epochs: int = 300
    """Passes over the data."""
    warmup_epochs: float = 40
    """Epochs in which the learning rate rises from 0."""
    opt: Literal["adamw", "lars"] = "adamw"
    """Optimiser."""
    base_lr: Annotated[float, arg(name="lr")] = 1.5e-4
    """Base learning rate at batch 256; the effective one is lr * batch-size / 256, and printed."""
    weight_decay: Annotated[float, arg(aliases=("--wd",))] = 0.1
    """Weight decay: AdamW on every trained parameter (MoCo v3's), LARS on matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    lars_momentum: float = 0.9
    """LARS's momentum."""
    lars_trust: float = 0.001
    """LARS's trust coefficient."""
    lars_clip: bool = False
    """LARS: never let a layer step further than the plain learning rate."""

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
        between("weight_decay", self.weight_decay, 0, 1e6)
        for beta in self.betas:
            between("betas", beta, 0, 1 - 1e-9)
        between("lars_momentum", self.lars_momentum, 0, 1 - 1e-9)
        between("lars_trust", self.lars_trust, 0, 1e6, above=True)

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
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every_epochs: int = 10
    """Epochs between checkpoints; one is also written at the start and at the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones go once a newer one has been verified."""
    knn_every_epochs: int = 0
    """Epochs between kNN measurements; 0 measures before and after training only."""
    knn_max_images: int = 10_000
    """Images used for kNN (four fifths bank, one fifth queries); 0 switches kNN off."""
    max_steps: int | None = None
    """Stop after this step; the schedules still follow --epochs."""
    max_bad_steps: int = 20
    """Give up (exit code 3) after so many non-finite steps in a row."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2**63 - 1")
        for name in ("log_every_steps", "save_every_epochs", "keep_checkpoints", "max_bad_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("knn_every_epochs", "knn_max_images"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 (off) or more")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    model: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    method: OmitArgPrefixes[MethodConfig] = field(default_factory=MethodConfig)
    mixing: OmitArgPrefixes[MixingConfig] = field(default_factory=MixingConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)


# Fields that may differ between a run and its resumption: they move no number of the training itself. The data folder
# may move, but its list of files is digested and compared.
NOT_MATHS = frozenset(
    {"data.data", "data.workers"}
    | {"run.preset", "run.device", "run.log_every_steps", "run.save_every_epochs", "run.keep_checkpoints"}
    | {"run.knn_every_epochs", "run.knn_max_images", "run.max_steps", "run.max_bad_steps"}
)


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """All settings as ("group.field", value)."""
    for group in dataclasses.fields(config):
        for item in dataclasses.fields(getattr(config, group.name)):
            yield f"{group.name}.{item.name}", getattr(getattr(config, group.name), item.name)


def drift(old: Config, new: Config) -> list[str]:
    """The settings that differ and would change the training, one line each."""
    before = dict(flatten(old))
    return [
        f"{name}: {before[name]!r} -> {value!r}"
        for name, value in flatten(new)
        if name not in NOT_MATHS and value != before[name]
    ]


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dictionaries, tuples as lists: what YAML and JSON hold."""
    plain: dict[str, dict[str, Any]] = {}
    for name, value in flatten(config):
        group, _, key = name.partition(".")
        plain.setdefault(group, {})[key] = list(value) if isinstance(value, tuple) else value
    return plain


def from_dict(settings: Mapping[str, Any], base: Config, source: str = "config") -> Config:
    """`base` with the given groups' fields replaced. Unknown names and wrong types raise `ConfigError`."""
    groups = {}
    known_groups = [item.name for item in dataclasses.fields(base)]
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{source}: expected groups ({', '.join(known_groups)}), found {type(settings).__name__}")
    for group, values in settings.items():
        if group not in known_groups:
            raise ConfigError(f"{source}: unknown group {brief(group)}.{near(group, known_groups)}")
        current = getattr(base, group)
        hints = typing.get_type_hints(type(current))
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: {group} must hold names and values, found {brief(values)}")
        for key in values:
            if key not in hints:
                name = one_line(key) if isinstance(key, str) else brief(key)
                raise ConfigError(f"{source}: unknown setting {group}.{name}.{near(key, hints)}")
        coerced = {key: coerce(value, hints[key], f"{source}: {group}.{key}") for key, value in values.items()}
        groups[group] = dataclasses.replace(current, **coerced)
    return dataclasses.replace(base, **groups)


def coerce(value: Any, wanted: Any, name: str) -> Any:
    """`value` read from YAML as the type of the field; `ConfigError` when it is not one."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is Literal and value in inner:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else coerce(value, next(t for t in inner if t is not type(None)), name)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if Ellipsis in inner else list(inner)
        if len(kinds) == len(value):
            return tuple(coerce(v, kind, name) for v, kind in zip(value, kinds, strict=True))
    if wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 (no point) as text
        except (ValueError, OverflowError):
            pass
    if wanted is int and type(value) is int and abs(value) < 2**63:
        return value
    if wanted is str and type(value) is str and "\0" not in value:
        return value
    if wanted is bool and type(value) is bool:
        return value
    expected = f"one of {', '.join(map(str, inner))}" if origin is Literal else str(getattr(wanted, "__name__", wanted))
    raise ConfigError(f"{name} is {brief(value)}; expected {expected}.{near(value, map(str, inner))}")


def save_config(config: Config, path: Path) -> None:
    """Write the YAML that `--config` accepts."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def load_config(path: Path, base: Config) -> Config:
    """`base` overridden by a YAML file."""
    try:
        settings = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config file {path}: {one_line(error)}") from error
    return from_dict({} if settings is None else settings, base, str(path))
