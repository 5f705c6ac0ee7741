"""What `--data` names: a folder of images, a list of files, tar shards here or behind a URL, or CIFAR as it is
published."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from .cifar import cifar_files, open_cifar, refuse_python_version
from .file_lists import SUFFIXES_OF_LISTS, open_list
from .images import MAX_PIXELS, SUFFIXES, DataError
from .index import Check, Checks, Index, open_folder
from .listing import is_folder, scan
from .remote import is_url, without_scheme
from .shards import is_shard, open_shards

Kind = Literal["folder", "lists", "shards", "cifar"]


def place_of(given: str | os.PathLike[str]) -> Path | str:
    """What `--data` names: an absolute path, or the URL as it is. `~` is the user's home."""
    text = os.fspath(given)
    return text if is_url(text) else Path(os.path.abspath(Path(without_scheme(text)).expanduser()))


def kind_of(place: Path | str) -> Kind:
    """What a place is, by its name and the names in it; whatever is nothing else is a folder, for it to refuse.

    A folder is one of shards where it holds tar files or TFRecords, and neither folders nor images. All that URLs name
    are shards.
    """
    if isinstance(place, str):
        return "shards"
    path = place
    if cifar_files(path) is not None:
        return "cifar"
    if not path.is_dir():
        if not path.exists():
            return "folder"
        return "shards" if is_shard(path.name) else "lists" if path.suffix.lower() in SUFFIXES_OF_LISTS else "folder"
    try:
        entries = scan(path) or []
    except OSError:
        return "folder"
    others = any(is_folder(entry) or os.path.splitext(entry.name)[1].lower() in SUFFIXES for entry in entries)
    return "shards" if not others and any(is_shard(entry.name) for entry in entries) else "folder"


def open_source(
    path: str | os.PathLike[str],
    *,
    split: Literal["train", "val"] | None = "train",
    on_bad: Literal["stop", "skip", "list"] = "stop",
    check: Check = "header",
    max_bad_frac: float = 0.01,
    max_pixels: int | None = None,
    channels: int = 3,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Index the images of a folder, list, set of shards (here or behind a URL) or CIFAR; arguments as `open_folder`.

    Lists have no splits of their own, and shards where their names tell none: they are taken whole, whatever `split`
    says, but not as "val".

    Raises:
        DataError, TooManyBadFiles: as `open_folder`.
    """
    place = place_of(path)
    kind = kind_of(place)
    if kind == "folder" and isinstance(place, Path):
        refuse_python_version(place)
        return open_folder(
            place,
            split=split,
            on_bad=on_bad,
            check=check,
            max_bad_frac=max_bad_frac,
            max_pixels=max_pixels,
            channels=channels,
            cache_dir=cache_dir,
            workers=workers,
            progress=progress,
        )
    if kind == "cifar" and isinstance(place, Path):
        return replace(open_cifar(place, split), channels=channels)
    how = Checks(on_bad, check, max_bad_frac, max_pixels or MAX_PIXELS, cache_dir, workers, progress, channels)
    if kind == "shards" or isinstance(place, str):
        return open_shards(place, split, how)
    if split == "val":
        raise DataError("lists name no test split; give one with --test-data")
    return open_list(place, how)
