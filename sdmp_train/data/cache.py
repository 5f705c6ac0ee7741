"""What is known of the files of a folder, remembered between runs: sizes, and whether they decode."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..reading import open_regular
from ..text import printable
from .images import DataError
from .listing import File

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

_VERSION = 3
_COLUMNS = {
    "bytes": np.int64,
    "mtimes": np.int64,
    "heights": np.int32,
    "widths": np.int32,
    "decoded": np.uint8,
    "pillow": np.uint8,
    "digests": np.uint64,
}


@dataclass(frozen=True)
class Checked:
    """What one look at a file told."""

    height: int
    width: int
    decoded: bool
    """The whole file was decoded without an error, not only its header read."""
    pillow: bool
    """DALI's decoder is not known to agree with Pillow on this kind of file."""
    digest: int = 0
    """Of all its bytes (`digest_of`), where `verify` has read them; else 0."""


def digest_of(data: bytes) -> int:
    """64 bits that change when a bit of a file does; never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class Cache:
    """What is known of the files of one folder, in one file named after the folder's path, or the URL (a text)."""

    def __init__(self, root: Path | str, cache_dir: str | os.PathLike[str] | None, channels: int = 3) -> None:
        place = root if isinstance(root, str) else os.path.realpath(root)
        name = hashlib.sha256(os.fsencode(place)).hexdigest()[:20]
        name += "" if channels == 3 else f"-{channels}"  # what is damaged as one kind may not be as another
        try:
            self._file: Path | None = cache_folder(cache_dir) / "index" / f"v{_VERSION}-{name}.npz"
        except DataError as error:
            self._file = None
            _log.warning("no index cache: %s; the next start reads all headers again", error)

    def load(self) -> dict[File, Checked]:
        """What was stored; nothing where that is not to be had or makes no sense."""
        if self._file is None:
            return {}
        try:
            names, columns = _read(self._file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            _log.warning(
                "the index cache %s cannot be read (%s); it is built anew", printable(self._file), printable(error)
            )
            return {}
        rows = zip(names, *(column.tolist() for column in columns.values()), strict=True)
        return {
            File(name, size, mtime): Checked(height, width, bool(decoded), bool(pillow), digest)
            for name, size, mtime, height, width, decoded, pillow, digest in rows
        }

    def store(self, files: list[File], checked: dict[str, Checked]) -> None:
        """Remember. What cannot be written costs a notice."""
        if self._file is None:
            return
        entries = [checked[file.name] for file in files]
        values = {
            "bytes": [file.bytes for file in files],
            "mtimes": [file.mtime_ns for file in files],
            "heights": [entry.height for entry in entries],
            "widths": [entry.width for entry in entries],
            "decoded": [entry.decoded for entry in entries],
            "pillow": [entry.pillow for entry in entries],
            "digests": [entry.digest for entry in entries],
        }
        columns: dict[str, Any] = {name: np.array(values[name], dtype=dtype) for name, dtype in _COLUMNS.items()}
        # A path holds no zero byte, so it can separate them.
        columns["names"] = np.frombuffer(os.fsencode("\0".join(file.name for file in files)), dtype=np.uint8)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._file.parent, suffix=".tmp", delete=False) as draft:
                try:
                    np.savez(draft, **columns)
                    draft.close()
                    os.replace(draft.name, self._file)
                except BaseException:
                    os.unlink(draft.name)
                    raise
        except OSError as error:
            _log.warning(
                "the index cache %s cannot be written (%s); the next start reads all headers again",
                printable(self._file),
                printable(error),
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process of a machine at a time: the others wait here, and then find its work in the cache.

        The system gives the lock back when its holder ends, however that happens. Where there can be no lock there is
        none, and every process does the work.
        """
        with ExitStack() as stack:
            if self._file is not None and fcntl is not None:
                place = self._file.parent.parent / "locks" / f"{self._file.stem}.lock"
                with suppress(OSError):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    lock = stack.enter_context(place.open("a"))
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _read(path: Path) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Names and columns. Nothing in the file is believed: no size is allocated that the file does not have."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        names_read = _array(archive, "names", np.uint8, size).tobytes()
        columns = {name: _array(archive, name, dtype, size) for name, dtype in _COLUMNS.items()}
    names = os.fsdecode(names_read).split("\0") if names_read else []
    if {len(column) for column in columns.values()} != {len(names)} or len(set(names)) != len(names):
        raise ValueError("its columns do not belong together")
    if any((columns[name] < 1).any() for name in ("heights", "widths")) or (columns["bytes"] < 0).any():
        raise ValueError("it holds sizes that no file has")
    return names, columns


def _array(archive: zipfile.ZipFile, name: str, dtype: type, size: int) -> NDArray[Any]:
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED or not 0 <= entry.file_size <= size:
        raise ValueError(f"{name} is longer than the file")
    data = archive.read(entry)
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is of another format")
    shape, _, found = np.lib.format.read_array_header_1_0(stream)
    start = stream.tell()
    if found != dtype or len(shape) != 1 or shape[0] * np.dtype(dtype).itemsize != len(data) - start:
        raise ValueError(f"{name} is not what its header says")
    return np.frombuffer(data, dtype=dtype, offset=start)


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """`cache_dir`, or the user's cache folder for this project (the XDG base directory specification).

    Raises:
        DataError: this user has no home folder and XDG_CACHE_HOME names none.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path there is to be ignored.
    if os.path.isabs(base):
        return Path(base) / "sdmp"
    try:
        return Path.home() / ".cache" / "sdmp"
    except RuntimeError:
        raise DataError("this user has no home folder; name a cache folder with XDG_CACHE_HOME") from None
