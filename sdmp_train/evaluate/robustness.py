"""Accuracy on other ImageNets: A (Hendrycks et al. 2021), R (Hendrycks et al. 2021) and C (Hendrycks, Dietterich 2019).

A and R hold 200 of ImageNet's 1000 classes each, not the same ones: the classifier chooses among those of the set. C is
the mean top-1 accuracy over 15 corruptions at 5 severities, as the paper has it, not the mCE of its authors.

Letters: N images, K classes of the classifier, S classes of a set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..advice import command
from ..data import Index, open_folder
from ..distributed import World, join_world
from ..log import Log
from ..run_folder import EVALUATED, EXPORTED
from ..settings import ConfigError, DataConfig, require
from ..splits import checks_of, class_numbers, reporting, some
from ..stop import StopRequest
from ..text import printable
from ..weights import TIMM, describe_timm, load_timm
from .accuracy import accuracies
from .classifier import holds_classifier, load_classifier
from .settings.robustness import RobustnessConfig
from .subject import (
    IMAGENET_CLASSES,
    PLACES,
    Subject,
    keep_result,
    named_backbone,
    plain_settings,
    read_as_asked,
    resolved_precision,
    result_folder,
)

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen of the benchmark, without its four extras (speckle noise, gaussian blur, spatter, saturate)."""
SEVERITIES = (1, 2, 3, 4, 5)
PAPER = (
    "Table 4, ViT-S fine-tuned for 100 epochs, A / R / C: MoCo v3 18.1 / 42.1 / 52.9 %, + SDMP 18.9 / 42.8 / 53.4 %; "
    "DINO 20.0 / 44.9 / 54.7 %, + SDMP 21.1 / 45.3 / 55.0 %"
)


@dataclass(frozen=True)
class Measuring:
    """A classifier, and how it is measured."""

    model: nn.Module
    classes: tuple[str, ...]
    """(K,) names in the order of its logits; ImageNet's are WordNet ids in ascending order."""
    data: DataConfig
    world: World
    bf16: bool
    batch_size: int
    log: Log
    stop: StopRequest

    def top1(self, index: Index, what: str, *, resize_px: int | None = None) -> float:
        """Share of the images for which the highest logit, among the classes that the set has, is the right one."""
        columns = columns_of(self.classes, index).to(self.world.device)

        def logits(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                return self.model(images)[:, columns].float()

        found = accuracies(
            logits,
            index,
            self.data,
            world=self.world,
            batch_size=self.batch_size,
            log=self.log,
            stop=self.stop,
            what=f"images of {what}",
            resize_px=resize_px,
        )
        return float(found[0, 0])

    def open(self, folder: Path) -> Index:
        """The images of a folder of class folders."""
        index = open_folder(
            folder,
            split=None,
            **checks_of(self.data),
            progress=reporting(self.log.say, self.stop.check),
        )
        count = len(index.classes)
        require(count >= 2, f"the number of class folders of {printable(folder)}", count, "at least 2")
        return index


def columns_of(classes: Sequence[str], index: Index) -> Tensor:
    """(S,) where in the logits the classes of a set are, in the order of its class numbers.

    Raises:
        ConfigError: the classifier does not know some of them.
    """
    numbers = class_numbers(classes, index.classes)
    unknown = [name for name, number in zip(index.classes, numbers, strict=True) if number < 0]
    if unknown:
        raise ConfigError(
            f"{len(unknown)} of the {len(index.classes)} class folders of {printable(index.root)} ({some(unknown)}) "
            f"are none of the classifier's {len(classes)} classes ({some(classes)})"
        )
    return torch.tensor(numbers)


def corrupted_folders(root: Path) -> dict[tuple[str, int], Path]:
    """The 75 folders of ImageNet-C by corruption and severity.

    Raises:
        ConfigError: some are not there, which are named: a mean over the others would be another number.
    """
    folders: dict[tuple[str, int], Path] = {}
    for name in CORRUPTIONS:
        place = next((path for path in (root / name, *sorted(root.glob(f"*/{name}"))) if path.is_dir()), root / name)
        folders |= {(name, severity): place / str(severity) for severity in SEVERITIES}
    missing = [f"{name}/{severity}" for (name, severity), path in folders.items() if not path.is_dir()]
    if missing:
        raise ConfigError(
            f"{printable(root)} lacks {len(missing)} of the {len(folders)} folders of ImageNet-C: {some(missing)}; "
            "expected CORRUPTION/SEVERITY/CLASS for the 15 corruptions and 5 severities"
        )
    return folders


def evaluate_robustness(config: RobustnessConfig) -> dict[str, Any]:
    """Measure a classifier on those of the sets that are given, and print it.

    Returns:
        By the set's name its top-1 accuracy; `corruptions` with those of every corruption at every severity.

    Raises:
        ConfigError, DataError: there is no classifier, or images cannot be measured on; the message says why.
        Stopped: asked for meanwhile.
    """
    with StopRequest() as stop, join_world(config.device) as world, Log(quiet=not world.is_first) as log:
        stop.speaks = world.is_first
        folders = corrupted_folders(Path(config.imagenet_c)) if config.imagenet_c else {}
        subject, classes = open_classifier(config)
        precision = resolved_precision(config.precision, world)
        log.say(f"weights  {subject.name}: {len(classes)} classes, {precision}")
        subject.backbone.to(world.device)
        measuring = Measuring(
            subject.backbone, classes, subject.data, world, precision == "bf16", config.batch_size, log, stop
        )
        found: dict[str, Any] = {}
        for name, folder in (("imagenet_a", config.imagenet_a), ("imagenet_r", config.imagenet_r)):
            if folder is not None:
                index = measuring.open(Path(folder))
                found[name] = measuring.top1(index, name)
                log.say(
                    f"{name} {found[name]:7.2%} top-1 among its {len(index.classes)} classes, {len(index):,} images"
                )
        if folders:
            by_corruption = measure_corruptions(measuring, folders)
            found["imagenet_c"] = mean_of_means(by_corruption)
            found["corruptions"] = by_corruption
            log.say(f"imagenet_c {found['imagenet_c']:7.2%} top-1, mean of {len(folders)} sets (not mCE)")
        if len(classes) == IMAGENET_CLASSES:
            log.say(f"paper    {PAPER}")
        if world.is_first:
            row = {**found, "settings": plain_settings(config, *PLACES)}
            keep_result(result_folder(subject, config.output), "robustness", subject, row, log.say)
        return found


def measure_corruptions(measuring: Measuring, folders: Mapping[tuple[str, int], Path]) -> dict[str, list[float]]:
    """Top-1 accuracy of every corruption, by severity. The images have the size that is looked at: none is resized."""
    found: dict[str, list[float]] = {}
    for (name, severity), folder in folders.items():
        index = measuring.open(folder)
        top1 = measuring.top1(index, f"{name} {severity}", resize_px=min(measuring.data.size_px))
        found.setdefault(name, []).append(top1)
        if severity == SEVERITIES[-1]:
            measuring.log.say(f"{name:18} " + " ".join(f"{share:7.2%}" for share in found[name]))
    return found


def mean_of_means(by_corruption: Mapping[str, Sequence[float]]) -> float:
    """The mean over corruptions of the mean over severities."""
    means = [sum(shares) / len(shares) for shares in by_corruption.values()]
    return sum(means) / len(means)


def open_classifier(config: RobustnessConfig) -> tuple[Subject, tuple[str, ...]]:
    """The classifier that `config` means, and the names of its classes.

    Raises:
        ConfigError: there is none; the message says what to give.
    """
    run, weights = named_backbone(config)
    if run is None and weights is None:
        raise ConfigError(
            "eval robustness needs a classifier: give the folder of a run that `eval finetune` has trained on, that of "
            "the fine-tuning, or timm:NAME"
        )
    data = read_as_asked(DataConfig(), config)
    if weights is not None and weights.startswith(TIMM):
        name = weights.removeprefix(TIMM)
        model, pixels = load_timm(name, num_classes=None)
        classes, description, place = imagenet_classes(model), describe_timm(name, pixels), weights
    else:
        given = run or weights or ""
        folder = next(filter(holds_classifier, places(given)), Path(given))
        if run is not None and folder == Path(given):
            raise ConfigError(no_classifier(folder))
        model, pixels, classes = load_classifier(folder)
        description, place = {}, str(folder)
    data = replace(data, image_px=tuple(pixels["input_size"][1:]), mean=tuple(pixels["mean"]), std=tuple(pixels["std"]))
    return Subject(model, place, Path(run) if run is not None else None, data, description), classes


def places(given: str) -> Iterator[Path]:
    """Where the classifier of a run, of a fine-tuning or of an export lies."""
    folder = Path(given)
    yield from (folder / EVALUATED / "finetune" / EXPORTED, folder / EXPORTED, folder)


def no_classifier(run: Path) -> str:
    """What to do where the usual place of a run holds no classifier; trainings in other folders of it are named."""
    others = sorted(str(path.parent) for path in run.glob(f"{EVALUATED}/*/{EXPORTED}") if holds_classifier(path))
    if others:
        return (
            f"{printable(run)} holds no classifier at {EVALUATED}/finetune; give one of those it holds: {some(others)}"
        )
    return f"{printable(run)} holds no classifier; first: {command('sdmp_train', 'eval', 'finetune', str(run))}"


def imagenet_classes(model: nn.Module) -> tuple[str, ...]:
    """The WordNet ids of ImageNet's classes, in the order of the logits of a classifier of timm's."""
    from timm.data import ImageNetInfo

    count = getattr(model, "num_classes", 0)
    expected = f"{IMAGENET_CLASSES}, those of ImageNet-1k"
    require(count == IMAGENET_CLASSES, "the number of classes of timm's classifier", count, expected)
    return tuple(ImageNetInfo("imagenet-1k").label_names())
