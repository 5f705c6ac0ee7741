"""Which images a run trains on, and which it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .config import Config, ConfigError, DataConfig
from .data import DataError, Index, open_folder, shapes_folder

EMBEDDED = "embedded"


def open_images(config: Config) -> tuple[Index, Index | None]:
    """The images of --data, and those of its test split where it has one with the same classes."""
    index = open_split(config.data, "train")
    if len(index) < config.optim.batch_size:
        raise ConfigError(
            f"batch_size is {config.optim.batch_size}, more than the {len(index)} images under {index.root}; "
            f"expected at most {len(index)}: give a smaller --batch-size"
        )
    return index, test_split(config.data, index)


def open_split(data: DataConfig, split: Literal["train", "val"]) -> Index:
    """One split of --data; `embedded` is drawn on first use."""
    if data.data is None:
        raise ConfigError("data is missing; give --data DIR, a folder of images (or --data embedded)")
    path = shapes_folder() if data.data == EMBEDDED else Path(data.data)
    return open_folder(path, split=split, on_bad=data.bad_images)


def test_split(data: DataConfig, train: Index) -> Index | None:
    """The test split of --data; None where it has none with the classes of `train`."""
    try:
        test = open_split(data, "val")
    except DataError:
        return None
    return test if test.classes == train.classes else None
