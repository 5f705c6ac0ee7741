"""CIFAR-10 and CIFAR-100 in their published binary version: plain records, read without running anything.

A record is the class (CIFAR-100: the coarse class, then the fine one), a byte each, and 3 x 32 x 32 bytes: the red,
green and blue planes (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version"). Taken are the archive as it is
downloaded, or the folder that it unpacks to.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..reading import open_regular
from ..text import printable
from .images import DataError, describe
from .index import Index, Paths

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MOST_BYTES = 2**28


class Version(NamedTuple):
    """The files of one of the two sets."""

    archive: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    names: str
    """The file of the classes' names, one a line."""
    label_bytes: int
    """Bytes before the pixels; the last is the class."""
    pickles: tuple[str, ...]
    """Files by which the version for Python is known."""


_CIFAR10 = Version(
    "cifar-10-binary.tar.gz",
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    ("test_batch.bin",),
    "batches.meta.txt",
    1,
    ("data_batch_1", "test_batch", "batches.meta"),
)
_CIFAR100 = Version(
    "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), "fine_label_names.txt", 2, ("train", "test", "meta")
)


@dataclass(frozen=True)
class CifarIndex(Index):
    """One row per record, held in memory: 3 KB each."""

    pixels: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 3, _SIDE, _SIDE), dtype=np.uint8))
    """(N, 3, 32, 32)."""

    def file(self, row: int) -> str | None:
        """None: a record is only a part of a file."""
        return None

    def read(self, row: int) -> bytes:
        """The image as a PPM file, which holds the same bytes."""
        return b"P6 %d %d 255\n" % (_SIDE, _SIDE) + self.pixels[row].transpose(1, 2, 0).tobytes()

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a pixel does."""
        digest = hashlib.sha256(super().fingerprint.encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    def subset(self, rows: NDArray[np.integer]) -> Self:
        """The given rows, in the given order, as an index of their own; class numbers stay."""
        return replace(super().subset(rows), pixels=self.pixels[rows])


def cifar_files(path: Path) -> Version | None:
    """Which of the two sets a path is: the archive by its name, a folder by the files in it; None for anything else."""
    for version in (_CIFAR10, _CIFAR100):
        named = path.name == version.archive and path.is_file()
        if named or all((path / name).is_file() for name in (version.train[0], version.val[0], version.names)):
            return version
    return None


def refuse_python_version(path: Path) -> None:
    """Raise `DataError` where a path is one of the two sets in the version for Python, packed or unpacked."""
    for version in (_CIFAR10, _CIFAR100):
        packed = path.name == version.archive.replace("binary", "python")
        if packed or all((path / name).is_file() for name in version.pickles):
            raise DataError(
                f"{printable(path)} is CIFAR's version for Python: pickles, which could run any program as they are "
                f"read. The binary version is read, {version.archive} from the same page, packed as it is"
            )


def open_cifar(path: Path, split: Literal["train", "val"] | None) -> CifarIndex:
    """The records of a split; of both, the training split first, with None.

    Raises:
        DataError: a file is missing, cannot be read, or is no whole number of records of known classes.
    """
    version = cifar_files(path)
    if version is None:
        raise DataError(f"{printable(path)} is neither CIFAR-10 nor CIFAR-100 in its binary version")
    wanted = (version.train if split != "val" else ()) + (version.val if split != "train" else ())
    held = _contents(path, {*wanted, version.names})
    missing = [name for name in (*wanted, version.names) if name not in held]
    if missing:
        raise DataError(f"{printable(path)} lacks {', '.join(missing)}")
    names = held[version.names].decode("utf-8", "replace").splitlines()
    classes = tuple(name.strip() for name in names if name.strip())
    length = version.label_bytes + _PIXELS
    parts = []
    for name in wanted:
        if not held[name] or len(held[name]) % length:
            raise DataError(
                f"{name} in {printable(path)} is cut: {len(held[name]):,} bytes are no whole number of records of "
                f"{length:,} bytes"
            )
        parts.append(np.frombuffer(held[name], dtype=np.uint8).reshape(-1, length))
        largest = int(parts[-1][:, version.label_bytes - 1].max())
        if largest >= len(classes):
            raise DataError(f"{name} in {printable(path)} holds class {largest}, but only {len(classes)} have names")
    records = np.concatenate(parts)
    count = len(records)
    return CifarIndex(
        root=path,
        paths=Paths(f"{name}/{row}" for name, part in zip(wanted, parts, strict=True) for row in range(len(part))),
        heights=np.full(count, _SIDE, dtype=np.int32),
        widths=np.full(count, _SIDE, dtype=np.int32),
        labels=records[:, version.label_bytes - 1].astype(np.int64),
        classes=classes,
        pillow=np.ones(count, dtype=np.bool_),
        pixels=np.ascontiguousarray(records[:, version.label_bytes :]).reshape(-1, 3, _SIDE, _SIDE),
    )


def _contents(path: Path, names: set[str]) -> dict[str, bytes]:
    """The files of these names, from the folder or out of the archive, each read within a limit."""
    held: dict[str, bytes] = {}
    try:
        for name, file in _files(path, names):
            with file:
                held[name] = file.read(_MOST_BYTES)
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{printable(path)} cannot be read: {describe(error)}") from error
    return held


def _files(path: Path, names: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    if path.is_dir():
        yield from ((name, open_regular(path / name)) for name in sorted(names) if (path / name).exists())
        return
    with open_regular(path) as raw, tarfile.open(fileobj=raw, mode="r|gz") as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            file = archive.extractfile(member) if member.isreg() and name in names else None
            if file is not None:
                yield name, file
