"""Weighted nearest neighbours on frozen features, DINO's protocol (Caron et al. 2021, after Wu et al. 2018).

Q queries, B bank rows, D features, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ..data import Index, eval_loader
from ..distributed import World, join_world
from ..log import Log
from ..run_folder import stored_config
from ..settings import ConfigError, DataConfig, between, require
from ..splits import describe_split, measured_images
from ..stop import StopRequest
from .features import standardise
from .settings.knn import KnnConfig
from .subject import (
    EVERY_IMAGE,
    PLACES,
    Steps,
    Subject,
    keep_result,
    knn_images,
    measured_data,
    open_subject,
    plain_settings,
    resolved_precision,
    result_folder,
    spread,
)

__all__ = [
    "Features",
    "KnnConfig",
    "collapse",
    "evaluate_knn",
    "image_features",
    "knn_images",
    "measured_data",
    "pixels",
    "spread",
    "standardise",
    "weighted_knn",
]

NEIGHBOURS = (10, 20, 100, 200)
RAW_PX = 32
SIMILARITIES = 2**26
"""float32 numbers at a time."""
# Rows of unit length that differ by no more than this, in no number, are one feature up to rounding.
SAME_FEATURE = 1e-5


@dataclass(frozen=True)
class Features:
    """Rows (N, D) of unit length, with their class numbers (N,)."""

    rows: Tensor
    labels: Tensor


def evaluate_knn(config: KnnConfig) -> dict[str, dict[int, float]]:
    """Print the kNN accuracy of an exported backbone, and of raw pixels, for every k.

    Returns:
        By what was measured ("backbone", "raw pixels") and by k: accuracies from 0 to 1.

    Raises:
        ConfigError, DataError: backbone or images cannot be measured; the message says why, and what to give.
    """
    with StopRequest() as stop, join_world(config.device) as world, Log(quiet=not world.is_first) as log:
        stop.speaks = world.is_first
        subject = open_subject(config, "knn")
        data = subject.data
        train, test = measured_images(data, stop.check, log.say)
        most, precision = as_the_run_did(config, subject, world)
        bank_images, query_images = knn_images(train, test, max_images=most)
        for what, images in (("bank images", bank_images), ("query images", query_images)):
            require(len(images) > 0, f"the number of {what} of kNN", 0, "at least 1; give --data more images")
        config = replace(config, k=neighbours_of(config, len(bank_images)))
        log.say(f"split    {describe_split(data, train, test)}")
        log.say(f"weights  {subject.name}, {precision}")
        log.say(f"images   {describe_shares(bank_images, query_images, train, test)}")
        subject.backbone.to(world.device)
        found: dict[str, dict[int, float]] = {}
        for name, model in (("backbone", subject.backbone), ("raw pixels", None)):
            if model is None and not config.raw_pixels:
                continue
            measured = []
            for what, images in (("bank", bank_images), ("queries", query_images)):
                step = Steps(log, stop, len(images), config.batch_size, f"images of the {what}, {name}")
                measured.append(
                    image_features(
                        model,
                        images,
                        data,
                        device=world.device,
                        bf16=precision == "bf16",
                        batch_size=config.batch_size,
                        between=step,
                    )
                )
                step.end()
            bank, queries = measured
            if (remark := collapse(bank)) is not None:
                log.say(f"{name}: {remark}")
            found[name] = weighted_knn(bank, queries, config.k or (), temperature=config.temperature, step=stop.check)
            for count, accuracy in found[name].items():
                log.say(f"kNN {accuracy:6.2%}  {name}, k = {count}")
        if world.is_first:
            row = {
                **{what: {str(k): accuracy for k, accuracy in by_k.items()} for what, by_k in found.items()},
                "bank_images": len(bank_images),
                "test_images": len(query_images),
                "settings": plain_settings(config, *PLACES),
            }
            keep_result(result_folder(subject, config.output), "knn", subject, row, log.say)
        return found


def neighbours_of(config: KnnConfig, bank: int) -> tuple[int, ...]:
    """The numbers of neighbours to measure at.

    Raises:
        ConfigError: a number was given that the bank does not have.
    """
    if config.k is None:
        return tuple(k for k in NEIGHBOURS if k <= bank) or (bank,)
    require(max(config.k) <= bank, "k", max(config.k), f"at most {bank:,}, the images of the bank")
    return config.k


def as_the_run_did(config: KnnConfig, subject: Subject, world: World) -> tuple[int, str]:
    """The most images to use, and the precision: those of the run, so that it and `eval` give the same number."""
    run = stored_config(subject.run).run if subject.run is not None else None
    most = config.knn_max_images or (run.knn_max_images if run is not None else 0) or EVERY_IMAGE
    return most, resolved_precision(config.precision or (run.precision if run is not None else "auto"), world)


def describe_shares(bank: Index, queries: Index, train: Index, test: Index | None) -> str:
    """How many of the images are bank and queries, and by which rule."""
    classes = f"{len(bank.classes)} classes"
    if test is None:
        used = "" if len(bank) + len(queries) == len(train) else f"of {len(train):,} images, evenly spread, "
        return f"{used}every fifth a query: {len(bank):,} bank, {len(queries):,} queries, {classes}"
    bank_of, queries_of = (
        f" of {len(all_of):,}, evenly spread" if len(some) < len(all_of) else ""
        for some, all_of in ((bank, train), (queries, test))
    )
    return f"{len(bank):,} bank{bank_of}; {len(queries):,} queries{queries_of}; {classes}"


def weighted_knn(
    bank: Features,
    queries: Features,
    neighbours: Sequence[int] = NEIGHBOURS,
    *,
    temperature: float = 0.07,
    chunk: int | None = None,
    step: Callable[[], None] | None = None,
) -> dict[int, float]:
    """Top-1 accuracy (0 to 1) for every k: the k nearest rows of the bank vote with weight exp(similarity / 0.07).

    The weights are those divided by the largest of the row, which changes no winner: at a low temperature the plain
    ones overflow. Similarities and votes are float32 whatever the rows are. A k above the size of the bank means the
    whole bank. Queries go through in chunks, on the device of the bank: as many as have similarities of 256 MiB.
    `step` is called before every chunk; what it raises ends the count.

    Raises:
        ConfigError: for a number of neighbours or a temperature that is not above 0, an empty bank, no query, rows
            that are not finite, and rows without a class (a negative number).
    """
    check_features(bank, queries)
    between("temperature", temperature, 0, 1e6, above=True)
    require(len(neighbours) > 0 and min(neighbours) >= 1, "k", tuple(neighbours), "whole numbers from 1")
    classes = int(torch.cat([bank.labels, queries.labels]).max()) + 1
    bank_rows = bank.rows.float()
    ks = {k: min(k, len(bank_rows)) for k in neighbours}
    right = dict.fromkeys(ks, 0)
    chunk = chunk or max(1, SIMILARITIES // len(bank_rows))
    for start in range(0, len(queries.rows), chunk):
        if step is not None:
            step()
        labels = queries.labels[start : start + chunk]
        similarity, nearest = (queries.rows[start : start + chunk].float() @ bank_rows.T).topk(max(ks.values()), dim=1)
        # The nearest row votes with exactly 1, so that no ballot is empty however low the temperature.
        votes, choices = ((similarity - similarity[:, :1]) / temperature).exp(), bank.labels[nearest]
        for name, k in ks.items():
            ballot = votes.new_zeros(len(labels), classes).scatter_add_(1, choices[:, :k], votes[:, :k])
            right[name] += int((ballot.argmax(1) == labels).sum())
    return {name: count / len(queries.rows) for name, count in right.items()}


def check_features(bank: Features, queries: Features) -> None:
    """Raise `ConfigError` unless both hold rows, all of them finite and with a class."""
    for what, given in (("bank", bank), ("queries", queries)):
        require(len(given.rows) > 0, f"the number of {what} rows of kNN", 0, "at least 1")
        broken = int((~given.rows.isfinite().all(dim=1)).sum())
        if broken:
            raise ConfigError(
                f"{broken} of the {len(given.rows)} features of the {what} are not finite: the backbone is broken, "
                "and its kNN accuracy would mean nothing"
            )
        require(int(given.labels.min()) >= 0, f"the class number of a row of the {what}", -1, "0 or more")


def collapse(features: Features) -> str | None:
    """A sentence where every image has the same feature, so that kNN measures chance alone; else None."""
    if len(features.rows) < 2 or float((features.rows - features.rows[0]).abs().max()) > SAME_FEATURE:
        return None
    return f"the features of all {len(features.rows)} images are the same: the backbone has collapsed"


def image_features(
    backbone: nn.Module | None,
    index: Index,
    data: DataConfig,
    *,
    device: torch.device,
    bf16: bool = False,
    batch_size: int = 256,
    between: Callable[[], None] | None = None,
) -> Features:
    """Unit-length features of every image that has a class; of the pixels themselves where `backbone` is None.

    The backbone is in eval mode for the time being. Pixels are averaged down to at most 32 a side. `between` is called
    before every batch; what it raises ends the measurement.
    """
    was_training = backbone is not None and backbone.training
    rows, labels = [], []
    with (
        uncompiled(backbone),
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        eval_loader(
            index, data.image_px, batch_size=batch_size, device=device, loader=data.loader, workers=data.workers
        ) as batches,
    ):
        if backbone is not None:
            backbone.eval()
        try:
            for batch in batches:
                if between is not None:
                    between()
                images = standardise(batch.views[0], data.mean, data.std)
                features = backbone(images) if backbone is not None else pixels(images)
                rows.append(normalize(features.float(), dim=1))
                labels.append(batch.labels.to(device))
        finally:
            if backbone is not None:
                backbone.train(was_training)
    known = torch.cat(labels) >= 0
    return Features(torch.cat(rows)[known], torch.cat(labels)[known])


def uncompiled(module: nn.Module | None) -> contextlib.AbstractContextManager[Any]:
    """Within the block a compiled module runs as it is written: a measurement has batches of other sizes, and few."""
    if module is None or module._compiled_call_impl is None:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def pixels(images: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, 3 * S * S) with S at most 32: what a backbone's features have to beat."""
    return (adaptive_avg_pool2d(images, RAW_PX) if images.shape[-1] > RAW_PX else images).flatten(1)
