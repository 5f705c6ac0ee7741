"""Which images a run trains on, and which it is measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .config import Config, ConfigError, DataConfig
from .data import DataError, Index, open_folder, shapes_folder

EMBEDDED = "embedded"
Progress = Callable[[int, int], None]


def open_images(config: Config, progress: Progress | None = None) -> tuple[Index, Index | None]:
    """The images of --data, and those of its test split where it has one with the same classes.

    `progress` is called with (files done, files in all) now and then; what it raises ends the indexing.
    """
    index = open_split(config.data, "train", progress)
    if len(index) < config.optim.batch_size:
        raise ConfigError(
            f"batch_size is {config.optim.batch_size}, more than the {len(index)} images under {index.root}; "
            f"expected at most {len(index)}: give a smaller --batch-size"
        )
    return index, test_split(config.data, index, progress)


def open_split(data: DataConfig, split: Literal["train", "val"], progress: Progress | None = None) -> Index:
    """One split of --data; `embedded` is drawn on first use."""
    if data.data is None:
        raise ConfigError("data is missing; give --data DIR, a folder of images (or --data embedded)")
    path = shapes_folder() if data.data == EMBEDDED else Path(data.data)
    return open_folder(path, split=split, on_bad=data.bad_images, progress=progress)


def test_split(data: DataConfig, train: Index, progress: Progress | None) -> Index | None:
    """The test split of --data; None where it has none with the classes of `train`."""
    try:
        test = open_split(data, "val", progress)
    except DataError:
        return None
    return test if test.classes == train.classes else None
