"""Some of the training images: a share of every class, or those that a published list names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ..data import Index
from ..reading import read_text
from ..settings import ConfigError
from ..text import one_line, printable

_STREAM = 0x53554253
_LIST_BYTES = 2**28
_SHOWN = 5


def some_images(train: Index, fraction: float | None, train_list: str | None, seed: int) -> tuple[Index, str]:
    """The images that a listing names, or `fraction` of every class (at least one of each), and which, in words.

    The draw is a function of `seed` and the number of images alone.

    Raises:
        ConfigError: the list cannot be read, or names images that are not there, or several that are called alike.
    """
    if train_list is not None:
        rows = listed_rows(train, Path(train_list))
        return train.subset(rows), f"{len(rows):,} of {len(train):,} images, those listed in {printable(train_list)}"
    if fraction is None or fraction == 1:
        return train, f"all {len(train):,} images"
    rows = balanced_rows(train, fraction, seed)
    what = f"{fraction:.0%} of every class, drawn from seed {seed} (--train-list takes a published list)"
    return train.subset(rows), f"{len(rows):,} of {len(train):,} images: {what}"


def balanced_rows(train: Index, fraction: float, seed: int) -> np.ndarray:
    """(M,) sorted rows: of each class the nearest whole number to its share, at least one."""
    order = np.argsort(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, _STREAM]).random_raw(len(train)))
    labels = train.labels[order]
    chosen = [
        order[labels == label][: max(1, round(fraction * int((labels == label).sum())))]
        for label in range(len(train.classes))
    ]
    return np.sort(np.concatenate(chosen))


def listed_rows(train: Index, path: Path) -> np.ndarray:
    """(M,) sorted rows of the images that a file names, a line each: by path under the folder, or by file name."""
    try:
        lines = [line.strip() for line in read_text(path, _LIST_BYTES).splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"the list {printable(path)} cannot be read: {one_line(error)}") from error
    wanted = [line for line in lines if line and not line.startswith("#")]
    whole = {name: row for row, name in enumerate(train.paths)}
    short = {name.rsplit("/", 1)[-1]: row for name, row in whole.items()}
    alike = Counter(name.rsplit("/", 1)[-1] for name in whole)
    missing = [line for line in wanted if line not in whole and line not in short]
    if missing or not wanted:
        shown = " ".join(printable(line) for line in missing[:_SHOWN])
        raise ConfigError(
            f"{len(missing)} of the {len(wanted)} images that {printable(path)} names are not under "
            f"{printable(train.root)} ({shown}); expected a file name or CLASS/NAME a line"
        )
    unclear = [line for line in wanted if line not in whole and alike[line] > 1]
    if unclear:
        raise ConfigError(
            f"{printable(path)} names {printable(unclear[0])}, and {alike[unclear[0]]} images under "
            f"{printable(train.root)} are called so; expected CLASS/NAME a line"
        )
    return np.array(sorted({whole[line] if line in whole else short[line] for line in wanted}), dtype=np.int64)
