"""`verify`: every image of a data set read, decoded and compared with the last time; at most a screen of output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .config import ConfigError
from .data import DataError, Index, find_splits, has_test_shards, kind_of, open_source, place_of
from .durable import write_durably
from .splits import reporting
from .text import counted, printable

SCREEN_CLASSES = 12
"""Classes that are printed one by one, over all splits: the report fits on a screen of 24 lines."""

Split = tuple[str, Path | str, Literal["train", "val"] | None]
"""What it is called, where it is, and what of that is meant."""


def verify_data(place: str, max_pixels: int | None = None, bad_list: Path | None = None) -> int:
    """Read and decode every image once and print what is there, and what of it no run would use.

    What is learnt is remembered where a run looks for it: sizes, that the files decode, and a digest of their bytes. A
    file whose bytes have changed since the last time, though neither its size nor its time has, is bad.

    Args:
        bad_list: a file to write, with the path and the reason of each bad file, a tab between, one a line.

    Raises:
        DataError: some files are no readable images, or a class folder has none; it names up to ten of each split.
        ConfigError: `bad_list` cannot be written.
    """
    found = []
    for name, path, split in splits_of(place_of(place)):
        with progress_bar(name) as progress:
            index = open_source(
                path, split=split, on_bad="list", check="digest", max_pixels=max_pixels, progress=progress
            )
        found.append((name, index))
    for name, index in found:
        print(f"{name + ': ' if len(found) > 1 else ''}{index.summary()}")
        for line in class_lines(index, SCREEN_CLASSES // len(found)):
            print(line)
        if len(index) and not index.classes and isinstance(path, Path) and path.is_dir():
            print(f"  {why_no_classes(index)}")
    bad = [file for _, index in found for file in index.bad]
    if bad_list is not None:
        # repr: a name may hold a tab, a line break or bytes that are no text.
        lines = "".join(f"{file.path!r}\t{printable(file.reason)}\n" for file in bad)
        try:
            write_durably(bad_list, lines)
        except OSError as error:
            raise ConfigError(f"bad_list: {printable(bad_list)} cannot be written: {error}") from error
        print(f"{counted(len(bad), 'bad file')} {'is' if len(bad) == 1 else 'are'} listed in {printable(bad_list)}")
    faults = "\n".join(index.faults for _, index in found if index.faults)
    if faults:
        raise DataError(faults)
    print("every image decodes")
    return 0


def splits_of(place: Path | str) -> list[Split]:
    """The splits that a run would read, or all of the place where it has none or they cannot be told."""
    kind = kind_of(place)
    if kind == "cifar" or (kind == "shards" and has_test_shards(place)):
        return [("train", place, "train"), ("test", place, "val")]
    if kind == "folder" and isinstance(place, Path) and place.is_dir():
        try:
            layout = find_splits(place)
        except DataError as error:
            print(f"splits are not told apart: {error}")
            return [("images", place, None)]
        if layout.test is not None and layout.test != layout.train:
            return [("train", layout.train, None), ("test", layout.test, None)]
        return [("images", layout.train, None)]
    return [("images", place, None)]


def class_lines(index: Index, most: int) -> list[str]:
    """How many images each class has."""
    counts = [int((index.labels == number).sum()) for number in range(len(index.classes))]
    lines = [f"  {count:8}  {printable(name)}" for name, count in zip(index.classes[:most], counts, strict=False)]
    rest = counts[most:]
    return lines + ([f"  and {len(rest)} more classes of {min(rest)} to {max(rest)} images"] if rest else [])


def why_no_classes(index: Index) -> str:
    """What keeps the images of a folder from having classes, and the layout in which they would."""
    loose = [path for path in index.paths if os.sep not in path]
    first = f", such as {printable(loose[0])}" if loose else ""
    return (
        f"{len(loose)} of {counted(len(index), 'image')} in no class folder{first}; classes are told where every image "
        "lies at CLASS/IMAGE under that folder (pretraining needs none)"
    )


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield reporting(print, None)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)
