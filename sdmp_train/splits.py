"""Which images a run trains on, and which it is measured on."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .config import Config, ConfigError, DataConfig
from .data import Index, find_splits, has_test_shards, holds_images, kind_of, open_source, place_of, shapes_folder
from .data.annotations import KNOWN, read_annotations
from .settings import named_place
from .text import printable

EMBEDDED = "embedded"
NO_CLASSES = "that takes images in at least two folders, one per class"
REPORT_SECONDS = 5.0

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


class NoQueries(ConfigError):
    """There is a test split, but it cannot be measured on. Exit code 2 where that was asked for."""


def open_images(config: Config, progress: Progress | None = None, say: Say | None = None) -> tuple[Index, Index | None]:
    """The images to train on, and the queries of kNN: None where the training images have to serve for both.

    `progress` is called with (files done, files in all) now and then, what it raises ends the indexing; `say` is told
    every few seconds how far it is. Queries that cannot be had are an empty index, whose last note says why.

    Raises:
        ConfigError, DataError: no such folder, too few images, files that are no images.
    """
    data, batch_size = config.data, config.optim.batch_size
    index = open_split(data, "train", progress, say)
    if len(index) < batch_size:
        raise ConfigError(
            f"batch_size is {batch_size}, more than the {len(index)} images under {printable(index.root)}; "
            f"expected at most {len(index)}: give a smaller --batch-size"
        )
    if len(index.classes) < 2 or config.run.knn_max_images == 0:
        return index, None
    try:
        return index, test_split(data, index, progress, say)
    except NoQueries as error:
        return index, replace(index.subset(np.arange(0)), notes=(str(error),))


def measured_images(
    data: DataConfig, progress: Progress | None = None, say: Say | None = print
) -> tuple[Index, Index | None]:
    """The images of the bank, and those of the queries where they are of another split; the rest as `open_images`.

    Raises:
        ConfigError, DataError: they cannot be measured on; the message says why, and what to give.
    """
    train = open_split(data, "train", progress, say)
    if len(train.classes) < 2:
        raise ConfigError(f"{printable(train.root)} cannot be measured on: {NO_CLASSES}; found {len(train.classes)}")
    return train, test_split(data, train, progress, say)


def open_split(
    data: DataConfig, split: Literal["train", "val"], progress: Progress | None = None, say: Say | None = None
) -> Index:
    """One split of --data; `embedded` is drawn on first use."""
    return open_images_in(data, data_place(data), split, progress, say)


def data_place(data: DataConfig) -> Path | str:
    """The path or URL that --data means. Raises `ConfigError` where it is not given."""
    named = named_place(data)
    return shapes_folder() if named == EMBEDDED else place_of(named)


def from_anywhere(data: DataConfig) -> DataConfig:
    """`data` with places that mean the same in any working folder, as a run keeps them."""

    def absolute(named: str | None) -> str | None:
        return named if named in (None, EMBEDDED) else str(place_of(named))

    return replace(data, data=absolute(data.data), test_data=absolute(data.test_data))


def open_images_in(
    data: DataConfig,
    place: Path | str,
    split: Literal["train", "val"] | None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Index:
    """A place, or a split of it."""
    return open_source(place, split=split, **checks_of(data), progress=reporting(say, progress))


def checks_of(data: DataConfig) -> dict[str, Any]:
    """What is asked of every file, as arguments of what opens images.

    Where damaged files are left out, every file is decoded, so that all are found.
    """
    return {
        "on_bad": data.bad_images,
        "check": "decode" if data.bad_images == "skip" else data.check,
        "max_bad_frac": data.max_bad_frac,
        "max_pixels": data.max_pixels,
        "channels": data.channels,
    }


def reporting(say: Say | None, progress: Progress | None) -> Progress:
    """`progress`, and a line every few seconds."""
    said_at = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal said_at
        if progress is not None:
            progress(done, total)
        if say is not None and time.monotonic() - said_at >= REPORT_SECONDS:
            said_at = time.monotonic()
            say(f"data     {done:,} of {total:,} files looked at")

    return report


def test_split(data: DataConfig, train: Index, progress: Progress | None, say: Say | None) -> Index | None:
    """The queries: images of --test-data, or of the test split of --data, by the class numbers of `train`.

    None where neither exists. Classes that `train` lacks are left out, and counted in the notes; names that differ in
    their Unicode form alone are the same.

    Raises:
        NoQueries: there is a test split, but without images, without classes, or with none of those of `train`.
        ConfigError, DataError: --test-data is no folder; files that are no images.
    """
    if data.test_data is not None:
        return with_classes_of(train, open_images_in(data, place_of(data.test_data), None, progress, say))
    whole = data_place(data)
    kind = kind_of(whole)
    if kind == "cifar" or (kind == "shards" and has_test_shards(whole)):
        return with_classes_of(train, open_images_in(data, whole, "val", progress, say))
    found = find_splits(Path(whole)).test if kind == "folder" else None
    if found is None:
        return None
    if not holds_images(found):
        raise NoQueries(no_queries(found, "it holds no images"))
    return with_classes_of(train, open_images_in(data, found, None, progress, say))


def with_classes_of(train: Index, test: Index) -> Index:
    """The images of `test` whose class is one of those of `train`, with its numbers.

    Raises:
        NoQueries: there are none.
    """
    numbers = class_numbers(train.classes, test.classes)
    labels = np.array([*numbers, -1], dtype=np.int64)[test.labels]
    notes = test.notes
    if (labels < 0).all():
        listed = read_annotations(test.root, train.classes) if isinstance(test.root, Path) else None
        if listed is None:
            what = f"its classes ({some(test.classes)}) are none of the bank's ({some(train.classes)})"
            missing = (
                what if len(test.classes) > 1 else f"its images lie in no class folders, and no list names {KNOWN}"
            )
            raise NoQueries(no_queries(test.root, missing))
        path, look_up = listed
        names = [look_up(test.paths[row].rsplit("/", 1)[-1]) for row in range(len(test))]
        numbers = class_numbers(train.classes, [name or "" for name in names])
        labels = np.array(numbers, dtype=np.int64)
        notes = (*notes, f"classes read from {printable(path)}")
        if (labels < 0).all():
            raise NoQueries(no_queries(test.root, f"{printable(path)} gives its images none of the bank's classes"))
    left_out = int((labels < 0).sum())
    if left_out:
        unknown = [name for name, number in zip(test.classes, numbers, strict=False) if number < 0]
        which = f" of {len(unknown)} classes ({some(unknown)})" if len(unknown) < len(test.classes) and unknown else ""
        notes = (*notes, f"{left_out} images{which} left out, whose class is not in the bank")
    absent = len(train.classes) - len(set(labels[labels >= 0].tolist()))
    if absent:
        notes = (*notes, f"{absent} of the bank's {len(train.classes)} classes have no query")
    return replace(replace(test, labels=labels, classes=train.classes).subset(np.flatnonzero(labels >= 0)), notes=notes)


def class_numbers(known: Sequence[str], names: Sequence[str]) -> list[int]:
    """The place of each name in `known`, -1 where it is not there. Other Unicode forms of a name are that name."""
    exact = {name: number for number, name in enumerate(known)}
    composed = {unicodedata.normalize("NFC", name): number for number, name in enumerate(known)}
    return [exact.get(name, composed.get(unicodedata.normalize("NFC", name), -1)) for name in names]


def no_queries(folder: Path | str, why: str) -> str:
    """Why a test split cannot be measured on, and what to give."""
    return (
        f"{printable(folder)} cannot be measured on: {why}. Name a folder of class folders with --test-data, or name "
        "the training folder itself with --data: then every fifth of its images is a query"
    )


def describe_split(data: DataConfig, train: Index, test: Index | None) -> str:
    """Which images are bank and queries of kNN, and why, as one line."""
    if len(train.classes) < 2:
        return f"no bank and queries: {NO_CLASSES}"
    if test is None:
        return f"bank and queries from {printable(train.root)}, every fifth image a query: {why_split(data)}"
    if len(test) == 0:
        return f"no bank and queries: {test.notes[-1]}"
    chosen = "named by --test-data"
    if data.test_data is None:
        chosen = why_split(data)
    return f"bank from {printable(train.root)}, queries from {printable(test.root)}: {'; '.join([chosen, *test.notes])}"


def why_split(data: DataConfig) -> str:
    """Which split of --data is which, and why."""
    whole = data_place(data)
    kind = kind_of(whole)
    if kind == "folder":
        return find_splits(Path(whole)).why
    if kind == "cifar" or (kind == "shards" and has_test_shards(whole)):
        return "the data set's own test split"
    return f"{kind} name no test split; --test-data does"


def some(names: Sequence[str]) -> str:
    """The first few names, fit to print."""
    shown = ", ".join(printable(name) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
