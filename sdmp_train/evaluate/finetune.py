"""Fine-tuning of the whole network by DeiT's recipe (Touvron et al. 2021), on all labels or on some.

timm's own RandAugment and random erasing run on the host; Mixup and CutMix are one fused `mix`, and their targets, with
label smoothing, one two-hot loss.

Letters: N rows per rank, K classes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn

from sdmp_kernels import MixPlan, draw_plan

from ..config import Config, OptimConfig
from ..data import Batch, Index, LoaderName, RandAugmentErase, ViewRecipe, crop_flip_view
from ..distributed import World, join_world
from ..log import Log
from ..methods.method import At, Group, Setup
from ..methods.mixing import place_of
from ..methods.supervised import Supervised, SupervisedConfig
from ..run_folder import EXPORTED
from ..settings import require
from ..stop import StopRequest
from ..training import Training
from .accuracy import accuracies, in_words
from .classifier import export_classifier, lines_to_use
from .fitting import Fitting, fitted, measured_on, resolved_loader, run_settings
from .settings.finetune import RECIPES, FinetuneConfig
from .subject import (
    IMAGENET_CLASSES,
    PLACES,
    Subject,
    keep_result,
    labelled_images,
    open_subject,
    plain_settings,
    result_folder,
)
from .subset import some_images

LEAST_LR = 1e-5
USUAL_BATCH = 1024
USUAL_WARMUP = 5


class FineTuning(Supervised):
    """The method: a classifier on a pretrained backbone, trained as a whole."""

    Config: ClassVar[type] = FinetuneConfig

    def __init__(self, config: FinetuneConfig, backbone: nn.Module, setup: Setup) -> None:
        self.asked = config
        mixing = SupervisedConfig(label_smoothing=config.label_smoothing, prob=1.0 if config.rules else 0.0)
        super().__init__(mixing, lambda **_: backbone.requires_grad_(True), setup)
        self.classifier.train()

    def views(self, at: At) -> list[ViewRecipe]:
        """One random crop, bicubic, flipped or not; what follows is the host's."""
        return [crop_flip_view(self.setup.data.image_px, self.asked.crop_min, "bicubic")]

    def plan(self, at: At) -> MixPlan:
        """timm's laws: one rule and one lam for the batch, the partner by the flip, boxes clipped at the edges."""
        setup, rules = self.setup, self.asked.rules
        return draw_plan(
            setup.rows,
            setup.data.size_px,
            rules={rule: 1 / len(rules) for rule in rules} or ("keep",),
            alpha=rules or 1.0,
            per=self.asked.mix_per,
            shared_lam=self.asked.mix_per == "batch",
            box="clip",
            seed=setup.seed,
            step=at.step,
            rank=place_of(setup, at),
            world_size=at.parts * setup.world.size,
            device=setup.world.device,
        )

    def groups(self) -> list[Group]:
        """Norms, biases, and what timm names (positions, class token) do not decay."""
        named: set[str] = cast(Any, getattr(self.classifier.backbone, "no_weight_decay", set))()
        still = {f"backbone.{name}" for name in named}
        decaying: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.classifier.named_parameters():
            (decaying if parameter.ndim > 1 and name not in still else others).append(parameter)
        return [Group(decaying), Group(others, decays=False)]

    def describe(self) -> str:
        """The loss, what is mixed, and the chance level."""
        config, classes = self.asked, self.setup.classes
        mixed = " or ".join(f"{rule} (alpha {alpha:g})" for rule, alpha in config.rules.items()) or "clean images"
        return (
            f"cross-entropy on {classes} classes, smoothing {config.label_smoothing:g}, {mixed}; "
            f"chance level {math.log(classes):.3f}"
        )

    def example(self, batch: Batch) -> list[tuple[str, Any, MixPlan]]:
        """No picture is made."""
        return []


def evaluate_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune, export the classifier, and print its accuracy on the test images.

    Returns:
        top1, top5, and what they were measured on. The classifier is in `exported/` of the training's folder, where
        `eval robustness` finds it.

    Raises:
        ConfigError, DataError: backbone or images cannot be used; the message says why, and what to give.
        Stopped, NotFinite: as `fitted`.
    """
    with StopRequest() as stop, join_world(config.device) as world, Log(quiet=not world.is_first) as log:
        stop.speaks = world.is_first
        subject = open_subject(config, "finetune", drop_path=config.drop_path)
        train, test = labelled_images(subject.data, progress=stop.check, say=log.say)
        recipe = RECIPES[config.recipe]
        fraction = recipe.fraction if config.fraction is None else config.fraction
        train, which = some_images(train, fraction, config.train_list, config.seed)
        log.say(f"labels   {which}")
        fitting = finetuning(config, subject, world, train)
        with fitted(fitting, world, log, stop) as training:
            found = measure(training, train, test, log, stop)
            if world.is_first:
                found["exported"] = str(fitting.folder / EXPORTED)
                export(training, subject, train, found)
                keep_result(result_folder(subject, config.output), "finetune", subject, found, log.say)
        log.say(f"finetune {in_words(found, len(test.classes))} on {len(test)} images")
        as_the_paper = (IMAGENET_CLASSES, recipe.epochs, recipe.fraction)
        if (len(train.classes), fitting.settings["epochs"], fraction) == as_the_paper:
            log.say(f"paper    {recipe.paper}")
        if world.is_first:
            for line in lines_to_use(Path(found["exported"]), test):
                log.say(line)
        return found


def finetuning(config: FinetuneConfig, subject: Subject, world: World, train: Index) -> Fitting:
    """The training, with the recipe's settings where none were given."""
    subject.digest  # noqa: B018  # kept from now on: of the weights as they come
    recipe = RECIPES[config.recipe]
    batch_size = config.batch_size or max(2, min(USUAL_BATCH, len(train)) // world.size * world.size)
    epochs = config.epochs or recipe.epochs
    fraction = None if config.train_list else config.fraction or recipe.fraction
    warmup = min(USUAL_WARMUP, epochs / 5) if config.warmup_epochs is None else config.warmup_epochs
    whole = replace(config, epochs=epochs, warmup_epochs=warmup, batch_size=batch_size, fraction=fraction)
    data = subject.data
    changes_views = config.randaugment is not None or config.erase_prob > 0
    require(
        data.channels == 3 or not changes_views,
        "channels",
        data.channels,
        "3 for RandAugment and random erasing; leave them out with --randaugment None --erase-prob 0",
    )
    host = RandAugmentErase(min(data.size_px), data.mean, data.std, config.randaugment, config.erase_prob)
    loader: LoaderName = "torchvision" if changes_views else resolved_loader(data.loader, world, train.channels)
    loop = Config(
        data=replace(data, loader=loader),
        optim=OptimConfig(
            base_lr=config.lr,
            min_lr=min(LEAST_LR, config.lr * batch_size / 256),
            weight_decay=config.weight_decay,
            epochs=epochs,
            warmup_epochs=warmup,
            batch_size=batch_size,
        ),
        run=run_settings(config, f"finetune/{config.recipe}", world),
    )
    return Fitting(
        "finetune",
        config,
        subject,
        plain_settings(whole),
        loop,
        lambda setup: FineTuning(whole, subject.backbone, setup),
        train,
        config.repeats,
        host if changes_views else None,
        usual_batch=0 if config.batch_size else USUAL_BATCH,
    )


def measure(training: Training, train: Index, test: Index, log: Log, stop: StopRequest) -> dict[str, Any]:
    """Accuracy of the plain weights on the test images: shorter side * 256 / 224, bicubic, centre."""
    method = cast(FineTuning, training.method)
    method.classifier.eval()
    try:
        (found,) = accuracies(
            lambda images: method.encode(images).float(),
            test,
            training.config.data,
            world=training.world,
            batch_size=256,
            log=log,
            stop=stop,
            interpolation="bicubic",
        ).tolist()
    finally:
        method.classifier.train()
    settings = plain_settings(method.asked, *PLACES)
    top1, top5 = found
    return {"top1": top1, "top5": top5, **measured_on(train, test), "settings": settings}


def export(training: Training, subject: Subject, train: Index, found: dict[str, Any]) -> None:
    """The fine-tuned classifier in the folder `exported` of what was found, with its card.

    Raises:
        OSError: where it cannot be written.
    """
    method = cast(FineTuning, training.method)
    optim = training.config.optim
    export_classifier(
        Path(found["exported"]),
        subject,
        method.classifier.backbone,
        (method.classifier.head.weight, method.classifier.head.bias),
        train,
        evaluation="finetune",
        steps=training.step,
        interpolation="bicubic",
        recipe=f"DeiT's, {optim.epochs} epochs, batch {optim.batch_size}, learning rate {optim.lr:.3g}",
        found=found,
    )
