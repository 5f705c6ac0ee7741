"""Which folder of a data set is the training split, and which the test split."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..text import printable
from .decoders import looks_like_image
from .images import SUFFIXES, DataError, describe
from .listing import is_folder, scan

_TRAIN = ("train", "training")
_TEST = (("val", "valid", "validation", "dev", "eval", "evaluation"), ("test", "testing"))
"""Usual names of splits to measure on; those of the first group go before those of the second."""
SPELLINGS = "val, validation, test, valid, dev, eval, evaluation, testing"
_BEHIND = r"[\W_]*(?:set|data|split|images?|imgs?)?[\W_]*\d*"
"""What may follow the word: a year, `_set`, `-images`."""
_ASK = "Name the folders themselves: --data for the training images, --test-data for those to measure on"


@dataclass(frozen=True)
class Layout:
    """The splits under a folder."""

    train: Path
    """The folder itself where it holds no splits."""
    test: Path | None
    """May be empty: what is measured on asks for images in it."""
    why: str
    """A phrase to print."""


def find_splits(root: Path) -> Layout:
    """The training and the test split of a data set.

    A folder that holds none is its own training split. `train`, `training` and for the other split `val`, `valid`,
    `validation`, `dev`, `eval`, `evaluation`, `test`, `testing` are understood in any case and with a year or "set"
    behind (`Train`, `val2017`, `test_set`); val and its like go before test. Among three or more folders that hold
    images and no folders, one called "train" or "test" without the other is a class, as its neighbours are.

    Raises:
        DataError: more than one reading is plausible; the message says what was found and what to give.
    """
    try:
        entries = scan(root)
    except OSError as error:
        raise DataError(f"the folder {printable(root)} {describe(error)}") from error
    names = [entry.name for entry in entries or () if is_folder(entry)]
    trains = [name for name in names if _means(name, _TRAIN)]
    tests = [name for name in names if any(_means(name, words) for words in _TEST)]
    if not trains and not tests:
        return Layout(root, None, f"{printable(root)} holds no test split (looked for {SPELLINGS})")
    others = _with_images(root, [name for name in names if name not in trains and name not in tests])
    trains = _with_images(root, trains) or trains
    filled = [*trains, *_with_images(root, tests)]
    if others and len(filled + others) > 2 and not (trains and tests) and _all_flat(root, filled + others):
        why = f"{_listed(filled)} counts as a class, as {_listed(others)} beside it"
        return Layout(root, None, f"{printable(root)} holds no test split: {why}")
    if len(trains) != 1 or (others and _all_flat(root, trains)):
        found = _listed(sorted({*trains, *tests, *others}))
        raise DataError(f"{printable(root)} holds {found}: it is not clear which are splits. {_ASK}")
    return _take(root, trains[0], tests, others)


def split_of(name: str) -> Literal["train", "val", "test"] | None:
    """Which split a file's name tells of, as a word of its own (`imagenet1k-train-0000.tar`)."""
    words = set(re.findall("[a-z]+", name.casefold()))
    splits: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
    found = [split for split, known in zip(splits, (_TRAIN, *_TEST), strict=True) if words & set(known)]
    return found[0] if len(found) == 1 else None


def holds_images(folder: str | os.PathLike[str], above: tuple[str, ...] = ()) -> bool:
    """Whether there is an image, by its name, anywhere under a folder. What cannot be read holds none."""
    real = os.path.realpath(folder)
    entries = [] if real in above else _entries(folder)
    return any(_is_image(entry) for entry in entries) or any(
        holds_images(entry.path, (*above, real)) for entry in entries if is_folder(entry)
    )


def _take(root: Path, train: str, tests: list[str], others: list[str]) -> Layout:
    groups = [[name for name in tests if _means(name, words)] for words in _TEST]
    chosen = next((group for group in groups if group), [])
    chosen = _with_images(root, chosen) or chosen[:1]
    if len(chosen) > 1:
        found = _listed(chosen)
        raise DataError(f"{printable(root)} holds {found}: it is not clear which one to measure on. {_ASK}")
    unused = [name for name in (*tests, *others) if name not in chosen]
    beside = f"; {_listed(unused)} beside it not used (--test-data names another)" if unused else ""
    if not chosen:
        return Layout(root / train, None, f"no test split beside {printable(root / train)}{beside}")
    return Layout(root / train, root / chosen[0], f"the test split of {printable(root)}{beside}")


def _means(name: str, words: tuple[str, ...]) -> bool:
    return re.fullmatch(f"(?:{'|'.join(words)}){_BEHIND}", name.casefold()) is not None


def _with_images(root: Path, names: list[str]) -> list[str]:
    return [name for name in names if holds_images(root / name)]


def _all_flat(root: Path, names: list[str]) -> bool:
    """Whether each of the folders holds images, and none in folders of its own."""
    return all(
        any(map(_is_image, entries)) and not any(is_folder(entry) and holds_images(entry.path) for entry in entries)
        for entries in (_entries(root / name) for name in names)
    )


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        return scan(folder) or []
    except OSError:
        return []


def _is_image(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix or is_folder(entry):
        return suffix in SUFFIXES and not is_folder(entry)
    try:
        return entry.is_file() and looks_like_image(entry.path)
    except (OSError, ValueError):
        return False


def _listed(names: list[str]) -> str:
    shown = [f"{printable(name)}/" for name in names[:6]] + ["..."] * (len(names) > 6)
    return ", ".join(shown)
