"""Tar files of images (WebDataset shards) and TFRecords as a source: walked once, then read at random by their offsets.

The images of a shard are those members with an image's suffix; `KEY.cls` beside `KEY.jpg` holds its class. Where no
member names a class, the folders of the first level are the classes, as in a folder. Shards lie in a folder or behind
a URL: those, and TFRecords anywhere, are read whole when they are first indexed, and what was learnt is remembered
(`walks.py`).
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..reading import open_regular
from ..text import printable
from .cache import Checked
from .folders import split_of
from .images import SUFFIXES, BadFile, DataError, describe
from .index import Checks, Index, index_listing
from .listing import File, Listing, first_level
from .remote import AT_ONCE, StoredFile, is_url, list_remote, read_range
from .tfrecord import is_tfrecord, walk_records
from .walks import Look, Walk, remembered_walks

_MOST_CLASS_BYTES = 256

Split = Literal["train", "val"] | None


class Place(NamedTuple):
    """Where an image lies."""

    shard: int
    offset: int
    length: int


@dataclass(frozen=True)
class ShardIndex(Index):
    """One row per image in a set of tar files."""

    shards: tuple[str, ...] = field(default=())
    """Paths, or URLs, of the tar files."""
    places: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    """(N, 3) shard, offset and length in bytes of each image."""

    @property
    def at_once(self) -> int:
        """See `source.at_once`."""
        return AT_ONCE if any(map(is_url, self.shards[:1])) else 1

    def file(self, row: int) -> str | None:
        """None: an image is only a part of a shard."""
        return None

    def read(self, row: int) -> bytes:
        """The image file of a row, undecoded; raises `OSError` or `ValueError`."""
        return read_part(self.shards, Place(*self.places[row].tolist()))

    def subset(self, rows: NDArray[np.integer]) -> Self:
        """The given rows, in the given order, as an index of their own; class numbers stay."""
        return replace(super().subset(rows), places=self.places[rows])


def read_part(shards: Sequence[str], place: Place) -> bytes:
    """Some bytes of a shard.

    Raises:
        OSError, ValueError: the shard cannot be read, or has become too short.
    """
    if is_url(shards[place.shard]):
        return read_range(shards[place.shard], place.offset, place.length)
    with open_regular(shards[place.shard]) as file:
        file.seek(place.offset)
        data = file.read(place.length)
    if len(data) < place.length:
        raise ValueError(f"is cut: the shard ends {place.length - len(data)} bytes too early")
    return data


def open_shards(place: Path | str, split: Split, how: Checks) -> ShardIndex:
    """The images of a shard, or of all shards of a folder, one by one in the order of their names.

    Args:
        place: a text is a URL (see `list_remote`).
        split: where some shards are named after a training and some after a test split, which of them.

    Raises:
        DataError: a shard is no uncompressed tar or TFRecord file, or none is of this split; or as `open_folder`, for
            members that are no images.
    """
    root, files = list_shards(place)
    chosen = _of_split(files, split)
    if not chosen:
        raise DataError("shards name no test split; give one with --test-data")
    if isinstance(place, Path) and not is_tfrecord(chosen[0].name):
        walks = [_walk_local(file.url) for file in chosen]
    else:
        walks = remembered_walks(str(place), chosen, how, walk_records if is_tfrecord(chosen[0].name) else _walk)
    shards = tuple(file.url for file in chosen)
    listing, places, classes, known = Listing(), dict[str, Place](), dict[str, str](), dict[File, Checked]()
    for number, (shard, walk) in enumerate(zip(chosen, walks, strict=True)):
        listing.problems += [BadFile(f"{shard.url}{inner}", reason) for inner, reason in walk.problems]
        listing.others.update({("", suffix): count for suffix, count in walk.others.items()})
        classes |= {f"{shard.name}/{key}": value for key, value in walk.classes.items()}
        for inner, offset, length in walk.images:
            file = File(f"{shard.name}/{inner}", length, walk.stamp)
            listing.files.append(file)
            places[file.name] = Place(number, offset, length)
            if inner in walk.checked:
                known[file] = walk.checked[inner]
    index = index_listing(
        root,
        listing,
        how,
        contents=lambda name: read_part(shards, places[name]),
        class_of=(lambda name: classes.get(_key(name))) if classes else _folder_of,
        cached_as=_cached_as(place, split if len(chosen) < len(files) else None),
        known=known,
    )
    if len(chosen) < len(files):
        index = replace(index, notes=(*index.notes, f"shards of another split not used: {len(files) - len(chosen)}"))
    table = np.array([places[name] for name in index.paths], dtype=np.int64).reshape(-1, 3)
    parts = {part.name: getattr(index, part.name) for part in fields(index)}
    return ShardIndex(**parts, shards=shards, places=table)


def list_shards(place: Path | str) -> tuple[Path | str, list[StoredFile]]:
    """The folder (or its URL), and the shards in it that are meant: tar files, or where there are none TFRecords.

    Raises:
        DataError: a URL names none.
    """
    root: Path | str
    if isinstance(place, str):
        root, files = list_remote(place, is_shard)
        if not files:
            raise DataError(f"{printable(place)} holds no shards: of what URLs name, only .tar and .tfrecord are read")
    else:
        root = place if place.is_dir() else place.parent
        names = sorted(file.name for file in place.iterdir() if is_shard(file.name)) if place.is_dir() else [place.name]
        files = [_stored(root, name) for name in names]
    tars = [file for file in files if not is_tfrecord(file.name)]
    return root, tars or files


def has_test_shards(place: Path | str) -> bool:
    """Whether some shards are named after a test split, beside others that are named after the training split."""
    return bool(_of_split(list_shards(place)[1], "val"))


def _of_split(files: list[StoredFile], split: Split) -> list[StoredFile]:
    """Those of a split by their names (`imagenet1k-validation-00.tar`); all, where the names tell none."""
    told = {file: split_of(file.name) for file in files}
    tests = [[file for file in files if told[file] == name] for name in ("val", "test")]
    if "train" not in told.values() or not any(tests):
        return [] if split == "val" else files
    if split == "val":
        return tests[0] or tests[1]
    return files if split is None else [file for file in files if told[file] not in ("val", "test")]


def _stored(root: Path, name: str) -> StoredFile:
    """A local shard; one that cannot be looked at is empty, and its walk says why."""
    try:
        status = os.stat(root / name)
    except OSError:
        return StoredFile(str(root / name), name, 0, 0)
    return StoredFile(str(root / name), name, status.st_size, status.st_mtime_ns)


def _cached_as(place: Path | str, split: Split) -> Path | str:
    named = "" if split is None else f" {split}"
    if isinstance(place, str):
        return f"{place}{named}"
    return place / f"*.tar{named}" if place.is_dir() else place


def is_shard(name: str) -> bool:
    """Whether a file is called as a shard is: not hidden, not compressed."""
    base = posixpath.basename(name)
    return not base.startswith(".") and (base.lower().endswith(".tar") or is_tfrecord(base))


def _walk_local(shard: str) -> Walk:
    try:
        with open_regular(shard) as raw:
            status = os.fstat(raw.fileno())
            return _walk(raw, shard, status.st_size, status.st_mtime_ns)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"the shard {printable(shard)} {describe(error)}") from error


def _walk(raw: IO[bytes], shard: str, size: int, stamp: int, look: Look | None = None, deep: bool = False) -> Walk:
    """What a shard holds, from its beginning to its end.

    Args:
        look: what an image's bytes tell, where they are to be read at once; None where they are no image.

    Raises:
        DataError: it is no tar file.
        OSError, ValueError: it cannot be read.
    """
    walk, seen = Walk(stamp), set[str]()
    try:
        with tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                if not _is_image(member):
                    _note_other(archive, member, walk)
                elif member.name in seen or member.offset_data + member.size > size or member.issparse():
                    reason = "is in the shard twice" if member.name in seen else "is cut, or stored with holes"
                    walk.problems.append((f"/{member.name}", reason))
                else:
                    seen.add(member.name)
                    walk.images.append((member.name, member.offset_data, member.size))
                    held = archive.extractfile(member) if look is not None else None
                    if look is not None and held is not None and (found := look(held.read())) is not None:
                        walk.checked[member.name] = found
    except tarfile.TarError as error:
        if not walk.images:
            raise DataError(f"{printable(shard)} cannot be read as an uncompressed tar file: {error}") from error
        walk.problems.append(("", f"is cut ({error})"))
    return walk


def _note_other(archive: tarfile.TarFile, member: tarfile.TarInfo, walk: Walk) -> None:
    """Note a class, or count what is neither a class nor an image."""
    if not member.isreg():
        return
    suffix = os.path.splitext(member.name)[1].lower()
    held = archive.extractfile(member) if suffix == ".cls" and member.size <= _MOST_CLASS_BYTES else None
    if held is not None:
        walk.classes[_key(member.name)] = held.read().decode("utf-8", "replace").strip()
    else:
        walk.others[suffix or "no suffix"] += 1


def _is_image(member: tarfile.TarInfo) -> bool:
    base = os.path.basename(member.name)
    return member.isreg() and not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file's own name."""
    folder, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _folder_of(name: str) -> str | None:
    """The folder of the first level within the shard."""
    within = name.split("/", 1)[1].removeprefix("./")
    return first_level(within) or None
