"""What `--data` names: a folder of images, a list of files, tar shards, or CIFAR as it is published."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from .cifar import cifar_files, open_cifar
from .file_lists import SUFFIXES_OF_LISTS, open_list
from .images import MAX_PIXELS, SUFFIXES, DataError
from .index import Check, Checks, Index, open_folder
from .listing import is_folder, scan
from .shards import is_shard, open_shards

Kind = Literal["folder", "lists", "shards", "cifar"]


def kind_of(path: Path) -> Kind:
    """What a path is, by its name and the names in it; whatever is nothing else is a folder, for it to refuse.

    A folder is one of shards where it holds tar files, and neither folders nor images.
    """
    if cifar_files(path) is not None:
        return "cifar"
    if not path.is_dir():
        if not path.exists():
            return "folder"
        return "shards" if is_shard(path) else "lists" if path.suffix.lower() in SUFFIXES_OF_LISTS else "folder"
    try:
        entries = scan(path) or []
    except OSError:
        return "folder"
    others = any(is_folder(entry) or os.path.splitext(entry.name)[1].lower() in SUFFIXES for entry in entries)
    return "shards" if not others and any(is_shard(Path(entry.path)) for entry in entries) else "folder"


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
    """Index the images of a folder, list, set of shards or CIFAR; the arguments are those of `open_folder`.

    Lists and shards have no splits of their own: they are taken whole, whatever `split` says, but not as "val".

    Raises:
        DataError, TooManyBadFiles: as `open_folder`.
    """
    place = Path(os.path.abspath(Path(path).expanduser()))
    kind = kind_of(place)
    if kind == "folder":
        return open_folder(
            path,
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
    if kind == "cifar":
        return replace(open_cifar(place, split), channels=channels)
    if split == "val":
        raise DataError(f"{kind} name no test split; give one with --test-data")
    how = Checks(on_bad, check, max_bad_frac, max_pixels or MAX_PIXELS, cache_dir, workers, progress, channels)
    return open_list(place, how) if kind == "lists" else open_shards(place, how)
