"""A linear classifier on frozen features: the protocols of MoCo v3 (Chen, Xie, He 2021) and DINO (Caron et al. 2021).

The best learning rate depends on the checkpoint, so that one number at one rate says little. All rates of a sweep are
trained at once, as so many classifiers over one forward pass of the backbone; each is trained as it would be alone.

Letters: N rows per rank, F features, H classifiers, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sdmp_kernels import MixPlan, TwoHot, soft_cross_entropy

from ..config import Config, OptimConfig
from ..data import Batch, Index, ViewRecipe, crop_flip_view
from ..distributed import World, distribute, join_world
from ..log import Log
from ..methods.method import At, Group, Loss, Setup
from ..models import feature_width
from ..run_folder import EXPORTED
from ..stop import StopRequest
from ..training import Training
from ..weights import weights_digest
from .accuracy import accuracies, in_words
from .classifier import export_classifier, lines_to_use
from .features import feature_maker, standardise
from .fitting import Fitting, fitted, measured_on, resolved_loader, run_settings
from .settings.linear import RECIPES, FeatureName, LinearConfig
from .subject import (
    PLACES,
    Subject,
    keep_result,
    labelled_images,
    open_subject,
    plain_settings,
    result_folder,
)

HEAD_STD = 0.01
NORM_EPS = 1e-6
WIDE = 768
"""From this width on DINO reads class token and mean patch token in place of four class tokens."""


def features_of(config: LinearConfig, backbone: nn.Module) -> FeatureName:
    """What the classifier reads of this backbone."""
    if config.features is not None:
        return config.features
    wide = config.recipe == "dino" and feature_width(backbone) >= WIDE
    return "output+mean" if wide else RECIPES[config.recipe].features


class LinearHeads(nn.Module):
    """H linear layers over the same features: (N, F) -> (N, H, K). All start alike, from N(0, 0.01)."""

    def __init__(self, width: int, classes: int, heads: int, *, batch_norm: bool, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=NORM_EPS, affine=False) if batch_norm else nn.Identity()
        start = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) * HEAD_STD
        self.weights = nn.ParameterList(start.clone() for _ in range(heads))
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in range(heads))

    def forward(self, features: Tensor) -> Tensor:
        scores = linear(self.norm(features), torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        return scores.unflatten(1, (len(self.weights), -1))

    def plain(self, head: int) -> tuple[Tensor, Tensor]:
        """Weight (K, F) and bias (K,) of one head on features as they come: the statistics of the norm worked in."""
        weight, bias = self.weights[head].detach(), self.biases[head].detach()
        if isinstance(self.norm, nn.Identity):
            return weight, bias
        mean, var = cast(Tensor, self.norm.running_mean), cast(Tensor, self.norm.running_var)
        scaled = weight * (var + NORM_EPS).rsqrt()
        return scaled, bias - scaled @ mean


class LinearProbe:
    """The method: a frozen backbone, and heads that each have a learning rate of their own."""

    Config: ClassVar[type] = LinearConfig

    def __init__(self, config: LinearConfig, backbone: nn.Module, setup: Setup) -> None:
        self.config, self.setup = config, setup
        self.backbone = backbone.requires_grad_(False).eval()
        self.read, width = feature_maker(backbone, features_of(config, backbone))
        heads = LinearHeads(width, setup.classes, len(config.rates), batch_norm=config.batch_norm, seed=setup.seed)
        self.heads = heads.to(setup.world.device)
        self.logits = distribute(self.heads, setup.world)
        self.state = nn.ModuleDict({"heads": self.heads})

    @staticmethod
    def backbone_options(config: Any) -> dict[str, Any]:
        """None: the backbone is given."""
        return {}

    @property
    def trained(self) -> nn.Module:
        """The heads."""
        return self.heads

    @property
    def backbones(self) -> list[nn.Module]:
        """The one that is evaluated."""
        return [self.backbone]

    @property
    def partners_follow_ranks(self) -> bool:
        """Nothing is mixed."""
        return False

    def views(self, at: At) -> list[ViewRecipe]:
        """One random crop, flipped or not."""
        interpolation = RECIPES[self.config.recipe].interpolation
        return [crop_flip_view(self.setup.data.image_px, self.config.crop_min, interpolation)]

    def plan(self, at: At) -> None:
        """Nothing is mixed."""

    def without_lost(self, plan: None, batch: Batch) -> None:
        """Never asked for: a damaged file ends this training."""

    def mix(self, batch: Batch, plan: None) -> Tensor:
        """The normalised view."""
        return standardise(batch.views[0], self.setup.data.mean, self.setup.data.std)

    def features(self, images: Tensor) -> Tensor:
        """(N, F) float32."""
        bf16 = self.setup.dtype == torch.bfloat16
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return self.read(images).float()

    def encode(self, images: Tensor) -> Tensor:
        """(N, H, K) logits; gradients end at the features."""
        with torch.no_grad():
            features = self.features(images)
        return self.logits(features)

    def loss(self, features: Tensor, plan: None, batch: Batch, at: At) -> Loss:
        """The sum over the heads of each one's cross-entropy, so that none sees the others.

        Shown are the lowest of them, and as `top1` the accuracy of the best: a rate that diverges says nothing of them.
        """
        labels = batch.labels.to(features.device, non_blocking=True)
        rows, heads, _ = features.shape
        target = TwoHot.from_labels(labels.repeat_interleave(heads))
        losses = soft_cross_entropy(features.flatten(0, 1), target, reduction="none").view(rows, heads).mean(0)
        right = (features.detach().argmax(-1) == labels[:, None]).float().mean(0)
        terms = {f"lr_{rate:g}": loss for rate, loss in zip(self.config.rates, losses.detach(), strict=True)}
        lowest = losses.detach().nan_to_num(nan=math.inf).min()
        return Loss(losses.sum(), terms, {"top1": right.max()}, lowest)

    def groups(self) -> list[Group]:
        """One per head, at its rate."""
        pairs = zip(self.heads.weights, self.heads.biases, strict=True)
        fastest = max(self.config.rates)
        return [Group(list(pair), lr_scale=rate / fastest) for pair, rate in zip(pairs, self.config.rates, strict=True)]

    def after_update(self, at: At, good: Tensor) -> None:
        """Nothing follows the optimiser."""

    def facts(self, plan: None) -> dict[str, Tensor]:
        """None."""
        return {}

    def health(self, features: Tensor) -> dict[str, Tensor]:
        """Nothing: the backbone is frozen."""
        return {}

    def collapse(self, numbers: Mapping[str, float]) -> str | None:
        """Never."""
        return None

    def describe(self) -> str:
        """The features, the rates, and the chance level."""
        rates, classes = self.config.rates, self.setup.classes
        width = self.heads.weights[0].shape[1]
        norm = ", batch norm" if self.config.batch_norm else ""
        return (
            f"the lowest of {len(rates)} cross-entropies of {classes} classes on {width} features "
            f"({features_of(self.config, self.backbone)}{norm}), lr {' '.join(f'{rate:g}' for rate in rates)}; "
            f"chance level {math.log(classes):.3f}"
        )

    def example(self, batch: Batch) -> list[tuple[str, Tensor, MixPlan]]:
        """Nothing is mixed."""
        return []


def evaluate_linear(config: LinearConfig) -> dict[str, Any]:
    """Train the classifiers and print each one's accuracy on the test images.

    Returns:
        top1, top5 and lr of the best, `sweep` with those of all, and what they were measured on.

    Raises:
        ConfigError, DataError: backbone or images cannot be used; the message says why, and what to give.
        Stopped, NotFinite: as `fitted`.
    """
    with StopRequest() as stop, join_world(config.device) as world, Log(quiet=not world.is_first) as log:
        stop.speaks = world.is_first
        subject = open_subject(config, "linear")
        train, test = labelled_images(subject.data, progress=stop.check, say=log.say)
        subject.backbone.to(world.device)
        digest = subject.digest
        fitting = linear_fitting(config, subject, world, train)
        with fitted(fitting, world, log, stop) as training:
            if weights_digest(subject.backbone) != digest:
                raise RuntimeError("the backbone was to stay as it is, and has changed")
            found = measure(training, train, test, log, stop)
            if world.is_first:
                if found["settings"]["features"] == "output":
                    found["exported"] = str(fitting.folder / EXPORTED)
                    export(training, subject, train, found)
                keep_result(result_folder(subject, config.output), "linear", subject, found, log.say)
        for line in lines_of(found, len(test.classes)):
            log.say(line)
        if world.is_first and "exported" in found:
            for line in lines_to_use(Path(found["exported"]), test):
                log.say(line)
        return found


def linear_fitting(config: LinearConfig, subject: Subject, world: World, train: Index) -> Fitting:
    """The training, with the recipe's settings where none were given."""
    recipe = RECIPES[config.recipe]
    batch_size = config.batch_size or max(2, min(recipe.batch_size, len(train)) // world.size * world.size)
    epochs = config.epochs or recipe.epochs
    data = replace(subject.data, loader=resolved_loader(subject.data.loader, world, train.channels))
    loop = Config(
        data=data,
        optim=OptimConfig(
            opt="sgd", base_lr=max(config.rates), weight_decay=0, epochs=epochs, warmup_epochs=0, batch_size=batch_size
        ),
        run=run_settings(config, f"linear/{config.recipe}", world),
    )
    features = features_of(config, subject.backbone)
    whole = replace(config, features=features, lr=config.rates, epochs=epochs, batch_size=batch_size)
    return Fitting(
        "linear",
        config,
        subject,
        plain_settings(whole),
        loop,
        lambda setup: LinearProbe(whole, subject.backbone, setup),
        train,
        usual_batch=0 if config.batch_size else recipe.batch_size,
    )


def measure(training: Training, train: Index, test: Index, log: Log, stop: StopRequest) -> dict[str, Any]:
    """Accuracies of every head on the test images."""
    method: Any = training.method
    method.heads.eval()
    try:
        found = accuracies(
            lambda images: method.heads(method.features(images)),
            test,
            training.config.data,
            world=training.world,
            batch_size=256,
            log=log,
            stop=stop,
            interpolation=RECIPES[method.config.recipe].interpolation,
        ).tolist()
    finally:
        method.heads.train()
    rates: Sequence[float] = method.config.rates
    sweep = [{"lr": rate, "top1": top1, "top5": top5} for rate, (top1, top5) in zip(rates, found, strict=True)]
    best = max(sweep, key=lambda row: row["top1"])
    settings = plain_settings(method.config, *PLACES)
    return {**best, "sweep": sweep, **measured_on(train, test), "settings": settings}


def export(training: Training, subject: Subject, train: Index, found: dict[str, Any]) -> None:
    """The best classifier in the folder `exported` of what was found: of the features that the backbone gives alone.

    Raises:
        OSError: where it cannot be written.
    """
    method = cast(LinearProbe, training.method)
    config, optim = method.config, training.config.optim
    export_classifier(
        Path(found["exported"]),
        subject,
        subject.backbone,
        method.heads.plain(config.rates.index(found["lr"])),
        train,
        evaluation="linear",
        steps=training.step,
        interpolation=RECIPES[config.recipe].interpolation,
        recipe=f"{config.recipe}, {optim.epochs} epochs, batch {optim.batch_size}, lr {found['lr']:g}",
        found=found,
    )


def lines_of(found: dict[str, Any], classes: int) -> list[str]:
    """The result for people."""
    sweep = found["sweep"]
    rows = [f"linear {in_words(row, classes)}  lr {row['lr']:g}" for row in sweep]
    chosen = f"the best of {len(sweep)} learning rates on these {found['test_images']} images"
    best = f"linear {found['top1']:7.2%} top-1, {chosen}"
    edge = found["lr"] in (min(row["lr"] for row in sweep), max(row["lr"] for row in sweep)) and len(sweep) > 1
    return [*rows, best + ("; it lies at the end of the sweep: try rates beyond it" if edge else "")]
