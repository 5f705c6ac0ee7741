"""Tar files of images (WebDataset shards) as a source: indexed once, then read at random by their offsets.

The images of a shard are those members with an image's suffix; `KEY.cls` beside `KEY.jpg` holds its class. Where no
member names a class, the folders of the first level are the classes, as in a folder.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..reading import open_regular
from ..text import printable
from .images import SUFFIXES, BadFile, DataError, describe
from .index import Checks, Index, index_listing
from .listing import File, Listing, first_level

_MOST_CLASS_BYTES = 256


class Place(NamedTuple):
    """Where an image lies."""

    shard: int
    offset: int
    length: int


@dataclass(frozen=True)
class ShardIndex(Index):
    """One row per image in a set of tar files."""

    shards: tuple[str, ...] = field(default=())
    """Paths of the tar files."""
    places: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    """(N, 3) shard, offset and length in bytes of each image."""

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
    with open_regular(shards[place.shard]) as file:
        file.seek(place.offset)
        data = file.read(place.length)
    if len(data) < place.length:
        raise ValueError(f"is cut: the shard ends {place.length - len(data)} bytes too early")
    return data


def open_shards(path: Path, how: Checks) -> ShardIndex:
    """The images of a tar file, or of all tar files of a folder, shard by shard in the order of their names.

    Raises:
        DataError: a shard is no uncompressed tar file; or as `open_folder`, for members that are no images.
    """
    root = path if path.is_dir() else path.parent
    names = sorted(file.name for file in path.iterdir() if is_shard(file)) if path.is_dir() else [path.name]
    shards = tuple(os.path.join(root, name) for name in names)
    listing, places, classes = Listing(), dict[str, Place](), dict[str, str]()
    for number, name in enumerate(names):
        _list_shard(shards[number], name, number, listing, places, classes)
    index = index_listing(
        root,
        listing,
        how,
        contents=lambda name: read_part(shards, places[name]),
        class_of=(lambda name: classes.get(_key(name))) if classes else _folder_of,
        cached_as=path / "*.tar" if path.is_dir() else path,
    )
    table = np.array([places[name] for name in index.paths], dtype=np.int64).reshape(-1, 3)
    known = {part.name: getattr(index, part.name) for part in fields(index)}
    return ShardIndex(**known, shards=shards, places=table)


def is_shard(path: Path) -> bool:
    """Whether a name is that of a tar file as it is listed: not hidden, not compressed."""
    return path.suffix.lower() == ".tar" and not path.name.startswith(".")


def _list_shard(
    shard: str, name: str, number: int, listing: Listing, places: dict[str, Place], classes: dict[str, str]
) -> None:
    try:
        with open_regular(shard) as raw:
            status = os.fstat(raw.fileno())
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                for member in archive:
                    _list_member(archive, member, f"{name}/{member.name}", listing, classes)
                    full = f"{name}/{member.name}"
                    if not _is_image(member):
                        continue
                    if full in places or member.offset_data + member.size > status.st_size or member.issparse():
                        reason = "is in the shard twice" if full in places else "is cut, or stored with holes"
                        listing.problems.append(BadFile(f"{shard}/{member.name}", reason))
                        continue
                    places[full] = Place(number, member.offset_data, member.size)
                    listing.files.append(File(full, member.size, status.st_mtime_ns))
    except tarfile.TarError as error:
        if any(place.shard == number for place in places.values()):
            listing.problems.append(BadFile(shard, f"is cut ({error})"))
        else:
            raise DataError(f"{printable(shard)} cannot be read as an uncompressed tar file: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"the shard {printable(shard)} {describe(error)}") from error


def _list_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, full: str, listing: Listing, classes: dict[str, str]
) -> None:
    """Note a class, or count what is neither a class nor an image."""
    suffix = os.path.splitext(member.name)[1].lower()
    if not member.isreg() or _is_image(member):
        return
    held = archive.extractfile(member) if suffix == ".cls" and member.size <= _MOST_CLASS_BYTES else None
    if held is not None:
        classes[_key(full)] = held.read().decode("utf-8", "replace").strip()
    else:
        listing.others["", suffix or "no suffix"] += 1


def _is_image(member: tarfile.TarInfo) -> bool:
    base = os.path.basename(member.name)
    return member.isreg() and not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file's own name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _folder_of(name: str) -> str | None:
    """The folder of the first level within the shard."""
    within = name.split("/", 1)[1].removeprefix("./")
    return first_level(within) or None
