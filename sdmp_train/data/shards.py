"""Tar files of images (WebDataset shards) as a source: walked once, then read at random by their offsets.

The images of a shard are those members with an image's suffix; `KEY.cls` beside `KEY.jpg` holds its class. Where no
member names a class, the folders of the first level are the classes, as in a folder. Shards lie in a folder, or behind
a URL: those are read whole when they are first indexed, and what was learnt is remembered (`walks.py`).
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..reading import open_regular
from ..text import printable
from .cache import Checked
from .images import SUFFIXES, BadFile, DataError, describe
from .index import Checks, Index, index_listing
from .listing import File, Listing, first_level
from .remote import AT_ONCE, is_url, list_remote, read_range
from .walks import Look, Walk, remembered_walks

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


def open_shards(path: Path | str, how: Checks) -> ShardIndex:
    """The images of a tar file, or of all tar files of a folder, shard by shard in the order of their names.

    `path`: a text is a URL (see `list_remote`).

    Raises:
        DataError: a shard is no uncompressed tar file; or as `open_folder`, for members that are no images.
    """
    if isinstance(path, str):
        root: Path | str
        root, remote = list_remote(path, lambda name: is_shard(PurePosixPath(name)))
        if not remote:
            raise DataError(f"{printable(path)} holds no .tar files: of what URLs name, only tar shards are read")
        names, shards = [file.name for file in remote], tuple(file.url for file in remote)
        cached_as: Path | str = path
        walks = remembered_walks(path, remote, how, _walk)
    else:
        root = path if path.is_dir() else path.parent
        names = sorted(file.name for file in path.iterdir() if is_shard(file)) if path.is_dir() else [path.name]
        shards = tuple(os.path.join(root, name) for name in names)
        cached_as = path / "*.tar" if path.is_dir() else path
        walks = [_walk_local(shard) for shard in shards]
    listing, places, classes, known = Listing(), dict[str, Place](), dict[str, str](), dict[File, Checked]()
    for number, (name, walk) in enumerate(zip(names, walks, strict=True)):
        listing.problems += [BadFile(f"{shards[number]}{inner}", reason) for inner, reason in walk.problems]
        listing.others.update({("", suffix): count for suffix, count in walk.others.items()})
        classes |= {f"{name}/{key}": value for key, value in walk.classes.items()}
        for inner, offset, length in walk.images:
            file = File(f"{name}/{inner}", length, walk.stamp)
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
        cached_as=cached_as,
        known=known,
    )
    table = np.array([places[name] for name in index.paths], dtype=np.int64).reshape(-1, 3)
    parts = {part.name: getattr(index, part.name) for part in fields(index)}
    return ShardIndex(**parts, shards=shards, places=table)


def is_shard(path: PurePath) -> bool:
    """Whether a name is that of a tar file as it is listed: not hidden, not compressed."""
    return path.suffix.lower() == ".tar" and not path.name.startswith(".")


def _walk_local(shard: str) -> Walk:
    try:
        with open_regular(shard) as raw:
            status = os.fstat(raw.fileno())
            return _walk(raw, shard, status.st_size, status.st_mtime_ns)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"the shard {printable(shard)} {describe(error)}") from error


def _walk(raw: IO[bytes], shard: str, size: int, stamp: int, look: Look | None = None) -> Walk:
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
