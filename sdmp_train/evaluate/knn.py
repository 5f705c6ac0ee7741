"""Weighted nearest neighbours on frozen features, DINO's protocol (Caron et al. 2021, after Wu et al. 2018).

Q queries, B bank rows, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ..data import Index, eval_loader
from ..distributed import join_world
from ..export import load_exported
from ..flags import arg
from ..run_folder import EXPORTED, stored_config
from ..settings import ConfigError, DataConfig, between, require
from ..splits import describe_split, measured_images
from ..text import printable

NEIGHBOURS = (10, 20, 100, 200)
RAW_PX = 32
EVERY_IMAGE = 10**9
# Rows of unit length that differ by no more than this, in no number, are one feature up to rounding.
SAME_FEATURE = 1e-5


@dataclass(frozen=True)
class KnnConfig:
    """Weighted nearest neighbours on frozen features: bank from --data, queries from --test-data."""

    run: str | None = None
    """Run folder, whose exported backbone is measured."""
    weights: str | None = None
    """Or the folder of an exported backbone."""
    data: Annotated[str | None, arg(aliases=("--data-dir",))] = None
    """Folder of class folders; default: the run's."""
    test_data: str | None = None
    """Folder of the queries; default: the run's, the test split of --data, else every fifth image of --data."""
    k: tuple[int, ...] = NEIGHBOURS
    """Numbers of neighbours."""
    temperature: float = 0.07
    """Votes weigh exp(similarity / temperature)."""
    batch_size: Annotated[int, arg(aliases=("-b",))] = 256
    """Images per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""
    workers: Annotated[int | None, arg(aliases=("-j",))] = None
    """Decoding threads; None chooses by the number of cores."""
    raw_pixels: bool = True
    """Also measure the pixels themselves."""
    bad_images: Literal["stop", "skip"] | None = None
    """What to do where a file is no readable image: stop and name it, or leave it out; default: as the run did."""
    max_bad_frac: float | None = None
    """With --bad-images skip: the share of files that may be left out; default: as the run did."""
    max_pixels: int | None = None
    """Files that claim more pixels are bad; default: as the run did."""
    loader: Literal["auto", "dali", "torchvision"] | None = None
    """Who decodes; default: the run's choice."""

    def __post_init__(self) -> None:
        require(len(self.k) > 0 and min(self.k) >= 1, "k", self.k, "whole numbers from 1")
        between("temperature", self.temperature, 0, 1e6, above=True)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more")


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
    if (config.run is None) == (config.weights is None):
        raise ConfigError("eval knn needs a backbone: give --run RUN (a run folder) or --weights DIR (an export)")
    exported = Path(config.weights) if config.weights is not None else Path(config.run or "") / EXPORTED
    backbone, description = load_exported(exported)
    data = measured_data(config, description["pretrained_cfg"])
    train, test = measured_images(data)
    bank_images, query_images = knn_images(train, test, max_images=EVERY_IMAGE)
    for what, images in (("bank images", bank_images), ("query images", query_images)):
        require(len(images) > 0, f"the number of {what} of kNN", 0, "at least 1; give --data more images")
    print(describe_split(data, train, test))
    accuracies = {}
    with join_world(config.device) as world:
        backbone.to(world.device)
        sizes = f"{len(bank_images)} bank, {len(query_images)} queries, {len(bank_images.classes)} classes"
        print(f"{printable(exported)}: {sizes}")
        for name, model in (("backbone", backbone), ("raw pixels", None)):
            if model is None and not config.raw_pixels:
                continue
            bank, queries = (
                image_features(model, images, data, device=world.device, batch_size=config.batch_size)
                for images in (bank_images, query_images)
            )
            if (remark := collapse(bank)) is not None:
                print(f"{name}: {remark}")
            accuracies[name] = weighted_knn(bank, queries, config.k, temperature=config.temperature)
            for count, accuracy in accuracies[name].items():
                print(f"kNN {accuracy:6.2%}  {name}, k = {count}")
    return accuracies


def measured_data(config: KnnConfig, pixels: dict[str, Any]) -> DataConfig:
    """The images that `config` means, as the run reads them, in the size and range of the export's `pretrained_cfg`."""
    stored = stored_config(Path(config.run)).data if config.run is not None else DataConfig()
    if config.data is None and stored.data is None:
        raise ConfigError("data is missing; give --data DIR, a folder with one folder per class")
    return replace(
        stored,
        data=config.data or stored.data,
        # A split that belongs to the run's data belongs to no other.
        test_data=config.test_data or (stored.test_data if config.data is None else None),
        image_px=pixels["input_size"][1],
        mean=tuple(pixels["mean"]),
        std=tuple(pixels["std"]),
        workers=config.workers,
        bad_images=config.bad_images or stored.bad_images,
        max_bad_frac=stored.max_bad_frac if config.max_bad_frac is None else config.max_bad_frac,
        max_pixels=stored.max_pixels if config.max_pixels is None else config.max_pixels,
        loader=config.loader or stored.loader,
    )


def weighted_knn(
    bank: Features,
    queries: Features,
    neighbours: Sequence[int] = NEIGHBOURS,
    *,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, float]:
    """Top-1 accuracy (0 to 1) for every k: the k nearest rows of the bank vote with weight exp(similarity / 0.07).

    The weights are those divided by the largest of the row, which changes no winner: at a low temperature the plain
    ones overflow. Similarities and votes are float32 whatever the rows are. A k above the size of the bank means the
    whole bank. Queries go through in chunks, so memory stays at chunk * B.

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
    for start in range(0, len(queries.rows), chunk):
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


def standardise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images as float32, (x / 255 - mean) / std per channel."""
    centre, scale = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - centre) / scale


def pixels(images: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, 3 * S * S) with S at most 32: what a backbone's features have to beat."""
    return (adaptive_avg_pool2d(images, RAW_PX) if images.shape[-1] > RAW_PX else images).flatten(1)


def knn_images(train: Index, test: Index | None, max_images: int) -> tuple[Index, Index]:
    """Bank and queries, at most `max_images` together: the two splits, or four fifths and one fifth of the first."""
    if test is not None:
        return spread(train, max_images * 4 // 5), spread(test, max_images // 5)
    chosen = spread(train, max_images)
    is_query = np.arange(len(chosen)) % 5 == 4
    return chosen.subset(np.flatnonzero(~is_query)), chosen.subset(np.flatnonzero(is_query))


def spread(index: Index, count: int) -> Index:
    """At most `count` rows, evenly spread over the index, so over its classes."""
    if len(index) <= count:
        return index
    return index.subset(np.linspace(0, len(index) - 1, max(count, 1)).astype(np.int64))
