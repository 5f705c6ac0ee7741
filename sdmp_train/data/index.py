"""A folder of images as a table: path, size, class. Built by reading headers only, and remembered between runs."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .images import (
    DECODE_ERRORS,
    MAX_PIXELS,
    SUFFIXES,
    BadFile,
    DataError,
    TooManyBadFiles,
    decode_rgb,
    describe,
    read_size,
)

_log = logging.getLogger(__name__)

_SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}
_CACHE_VERSION = 1
_CHUNK = 64
"""Files per task of the thread pool: enough to hide the pool's own cost."""


class Paths(Sequence[str]):
    """Many relative paths in one block of bytes: forked workers then share it instead of copying a million strings."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return os.fsdecode(self._text[self._ends[row] : self._ends[row + 1]])

    def hash(self) -> str:
        digest = hashlib.sha256(self._text)
        digest.update(self._ends.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Index:
    """One row per usable image file, in a fixed order (folder by folder, names sorted)."""

    root: Path
    paths: Paths
    """Relative to `root`."""
    heights: NDArray[np.int32]
    """(N,) pixels, as stored in the file (EXIF orientation ignored)."""
    widths: NDArray[np.int32]
    labels: NDArray[np.int64]
    """(N,) number of the class folder in `classes`, -1 where there are none."""
    classes: tuple[str, ...]
    """Sorted names of the folders under `root`, when every image lies in one of them; else empty."""
    bad: tuple[BadFile, ...] = field(default=())
    """Files left out with `on_bad="skip"`."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.paths[row])

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or resized: tells whether a resumed run sees the same data."""
        digest = hashlib.sha256(self.paths.hash().encode())
        for column in (self.heights, self.widths, self.labels):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def subset(self, rows: NDArray[np.integer]) -> Index:
        """The given rows, in the given order, as an index of their own; class numbers stay."""
        return replace(
            self,
            paths=Paths(self.paths[int(row)] for row in rows),
            heights=self.heights[rows],
            widths=self.widths[rows],
            labels=self.labels[rows],
        )

    def summary(self) -> str:
        """One line to print."""
        classes = f"{len(self.classes)} classes" if self.classes else "no class folders"
        sizes = f"{_middle(self.widths)} x {_middle(self.heights)} px in the median"
        left_out = f", {len(self.bad)} bad files left out" if self.bad else ""
        return f"{len(self):,} images, {classes}, {sizes}{left_out}: {self.root}"


@dataclass(frozen=True)
class _File:
    name: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class _Checked:
    height: int
    width: int
    decoded: bool
    """The whole file was decoded without an error, not only its header read."""


def open_folder(
    path: str | os.PathLike[str],
    *,
    split: Literal["train", "val"] | None = "train",
    on_bad: Literal["stop", "skip"] = "stop",
    check: Literal["header", "decode"] = "header",
    max_bad_frac: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Index the images under a folder.

    Any tree is accepted; links are followed, names that begin with a dot are passed over. When every image lies in a
    subfolder, the first level of subfolders are the classes (as torchvision's ImageFolder). A folder that holds the
    splits of a data set is understood: `split="train"` goes into `path/train` where that exists, `split="val"` into the
    first of `path/val`, `path/validation`, `path/test`; where none exists, `path` itself is taken for "train" and
    refused for "val". `split=None` takes `path` as it is.

    Args:
        on_bad: "stop" raises on the first run that meets a file that is no readable image, naming up to ten;
            "skip" leaves such files out of the index and lists them in `Index.bad`.
        check: "header" reads sizes only; "decode" also decodes each file once, which finds truncated and damaged ones.
        max_bad_frac: with "skip", the share of bad files above which the folder is refused after all.
        max_pixels: files whose header claims more pixels are bad (decompression bombs are never decoded).
        cache_dir: where results are remembered; default `$XDG_CACHE_HOME/sdmp` or `~/.cache/sdmp`. A file is read again
            when its size or time changes. A cache that cannot be written costs a notice, nothing else.
        workers: threads; default four per core, at most 32.
        progress: called with (files done, files in all) now and then.

    Raises:
        DataError: no such folder, no images, or bad files; the message says what was found and what to do.
        TooManyBadFiles: the share of bad files exceeds `max_bad_frac`.
    """
    root = _resolve(Path(path), split)
    files, problems, others = _list_files(root)
    if not files and not problems:
        raise DataError(_nothing_found(root, others))
    cache = _Cache(root, cache_dir)
    known = cache.load()
    checked, bad = _check_files(root, files, known, check == "decode", max_pixels, workers, progress)
    bad = sorted(problems + bad, key=lambda file: file.path)
    if bad:
        _judge(bad, len(files) + len(problems), root, on_bad, max_bad_frac)
    files = [file for file in files if file.name in checked]
    if {file: checked[file.name] for file in files} != known:
        cache.store(files, checked)
    classes, labels = _classes([file.name for file in files])
    return Index(
        root=root,
        paths=Paths(file.name for file in files),
        heights=np.array([checked[file.name].height for file in files], dtype=np.int32),
        widths=np.array([checked[file.name].width for file in files], dtype=np.int32),
        labels=labels,
        classes=classes,
        bad=tuple(bad),
    )


def find_bad(index: Index, rows: Iterable[int]) -> list[BadFile]:
    """Decode rows of an index with Pillow; those that fail, or changed size since then, with the reason."""
    bad = []
    for row in rows:
        path = index.path(int(row))
        try:
            image = decode_rgb(path)
        except DECODE_ERRORS as error:
            bad.append(BadFile(path, describe(error)))
            continue
        expected = int(index.widths[row]), int(index.heights[row])
        if image.size != expected:
            now, then = (f"{w} x {h}" for w, h in (image.size, expected))
            bad.append(BadFile(path, f"is {now} pixels now, but was {then} when the folder was indexed"))
    return bad


def bad_files_error(bad: Sequence[BadFile]) -> DataError:
    """The error that a loader raises when files of its batch cannot be decoded."""
    return DataError(
        f"{len(bad)} image file{'s' if len(bad) > 1 else ''} could not be decoded:\n{_listing(bad)}\n"
        "Repair or remove them, or leave out all damaged files: check every file once with check='decode' "
        "and on_bad='skip'"
    )


def _resolve(path: Path, split: str | None) -> Path:
    path = Path(os.path.abspath(path.expanduser()))
    if not path.exists():
        near = path
        while not near.exists():
            near = near.parent
        raise DataError(f"there is no folder {path}; the nearest that exists is {near}")
    if not path.is_dir():
        raise DataError(f"{path} is a file, not a folder of images{_unpack_hint(path.name)}")
    if split is None:
        return path
    if split not in _SPLITS:
        raise ValueError(f"split must be 'train', 'val' or None, but is {split!r}")
    for name in _SPLITS[split]:
        if (path / name).is_dir():
            return path / name
    if split == "val":
        raise DataError(f"{path} holds none of the folders {', '.join(_SPLITS['val'])}: name the folder of test images")
    return path


def _list_files(root: Path) -> tuple[list[_File], list[BadFile], Counter[str]]:
    """Images and unusable entries in a fixed order, and how often other suffixes occurred."""
    files: list[_File] = []
    problems: list[BadFile] = []
    others: Counter[str] = Counter()
    for entry, name in _walk(root, "", ()):
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in SUFFIXES:
            others[suffix or "no suffix"] += 1
            continue
        try:
            stat = entry.stat()
        except OSError as error:
            problems.append(BadFile(os.path.join(root, name), describe(error)))
            continue
        files.append(_File(name, stat.st_size, stat.st_mtime_ns))
    return files, problems, others


def _walk(root: Path, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every entry that is no folder with its path below `root`; a link to a folder that it lies in is not entered."""
    folder = os.path.join(root, below)
    try:
        here = os.stat(folder)
        with os.scandir(folder) as entries:
            listed = sorted(
                (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name
            )
    except OSError as error:
        raise DataError(f"the folder {folder} {describe(error)}") from error
    above = (*above, (here.st_dev, here.st_ino))
    for entry in listed:
        name = f"{below}/{entry.name}" if below else entry.name
        if not entry.is_dir():
            yield entry, name
        elif not entry.is_symlink() or _identity(entry) not in above:
            yield from _walk(root, name, above)


def _identity(entry: os.DirEntry[str]) -> tuple[int, int]:
    stat = entry.stat()
    return stat.st_dev, stat.st_ino


def _check_files(
    root: Path,
    files: list[_File],
    known: dict[_File, _Checked],
    decode: bool,
    max_pixels: int,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, _Checked], list[BadFile]]:
    """Sizes by name, from the cache where it knows the file, and the bad files."""
    checked: dict[str, _Checked] = {}
    todo: list[_File] = []
    for file in files:
        old = known.get(file)
        if old is None or (decode and not old.decoded) or old.height * old.width > max_pixels:
            todo.append(file)
        else:
            checked[file.name] = old
    bad: list[BadFile] = []
    chunks = [todo[first : first + _CHUNK] for first in range(0, len(todo), _CHUNK)]
    threads = workers or min(32, 4 * (os.cpu_count() or 1))
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # Our own limit is at or below the one Pillow warns at, and is reported by file.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        work = partial(_check_chunk, root, decode=decode, max_pixels=max_pixels)
        for chunk, results in zip(chunks, pool.map(work, chunks), strict=True):
            for file, result in zip(chunk, results, strict=True):
                if isinstance(result, BadFile):
                    bad.append(result)
                else:
                    checked[file.name] = result
            if progress is not None:
                progress(len(checked) + len(bad), len(files))
    return checked, bad


def _check_chunk(root: Path, files: list[_File], *, decode: bool, max_pixels: int) -> list[_Checked | BadFile]:
    return [_check_file(os.path.join(root, file.name), decode, max_pixels) for file in files]


def _check_file(path: str, decode: bool, max_pixels: int) -> _Checked | BadFile:
    try:
        height, width = read_size(path, max_pixels)
        if decode:
            decode_rgb(path)
    except DECODE_ERRORS as error:
        return BadFile(path, describe(error))
    return _Checked(height, width, decode)


def _judge(bad: list[BadFile], total: int, root: Path, on_bad: str, max_bad_frac: float) -> None:
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad must be 'stop' or 'skip', but is {on_bad!r}")
    found = f"{len(bad)} of {total} files under {root} are not readable images:\n{_listing(bad)}"
    if on_bad == "stop":
        raise DataError(f"{found}\nRepair or remove them, or leave them out with on_bad='skip'")
    if len(bad) == total:
        raise TooManyBadFiles(f"{found}\nNo usable image is left")
    if len(bad) > max_bad_frac * total:
        raise TooManyBadFiles(
            f"{found}\nThat is {len(bad) / total:.1%}, more than the {max_bad_frac:.1%} that max_bad_frac allows"
        )
    _log.warning("%s\nThey are left out.", found)


def _listing(bad: Sequence[BadFile]) -> str:
    # repr of the path: a name may hold a line break or bytes that are no text.
    lines = [f"  {file.path!r} {file.reason}" for file in bad[:10]]
    if len(bad) > 10:
        lines.append(f"  and {len(bad) - 10} more")
    return "\n".join(lines)


def _nothing_found(root: Path, others: Counter[str]) -> str:
    if not others:
        return f"{root} is empty: no image files under it"
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    packed = [suffix for suffix in others if _unpack_hint(suffix)]
    return f"no image under {root}: looked for {' '.join(SUFFIXES)}, found {found}" + (
        _unpack_hint(packed[0]) if packed else ""
    )


def _unpack_hint(name: str) -> str:
    packed = name.lower().endswith((".tar", ".zip", ".gz", ".tgz", ".xz", ".zst", ".rar", ".7z"))
    return "; unpack it first and name the folder that results" if packed else ""


def _classes(names: list[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    if any("/" not in name for name in names):
        return (), np.full(len(names), -1, dtype=np.int64)
    folders = [name.split("/", 1)[0] for name in names]
    classes = tuple(sorted(set(folders)))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[folder] for folder in folders], dtype=np.int64)


def _middle(values: NDArray[np.int32]) -> int:
    return int(np.median(values)) if len(values) else 0


class _Cache:
    """What is known of the files of one folder, in one file named after the folder's path."""

    def __init__(self, root: Path, cache_dir: str | os.PathLike[str] | None) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:20]
        self._file = cache_folder(cache_dir) / "index" / f"v{_CACHE_VERSION}-{name}.npz"

    def load(self) -> dict[_File, _Checked]:
        try:
            with np.load(self._file, allow_pickle=False) as stored:
                names = os.fsdecode(stored["names"].tobytes()).split("\0")
                columns = [stored[key].tolist() for key in ("bytes", "mtimes", "heights", "widths", "decoded")]
            return {
                _File(name, size, mtime): _Checked(height, width, bool(decoded))
                for name, size, mtime, height, width, decoded in zip(names, *columns, strict=True)
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("the index cache %s cannot be read (%s); it is built anew", self._file, error)
            return {}

    def store(self, files: list[_File], checked: dict[str, _Checked]) -> None:
        entries = [checked[file.name] for file in files]
        columns: dict[str, Any] = {
            # A path holds no zero byte, so it can separate them.
            "names": np.frombuffer(os.fsencode("\0".join(file.name for file in files)), dtype=np.uint8),
            "bytes": np.array([file.bytes for file in files], dtype=np.int64),
            "mtimes": np.array([file.mtime_ns for file in files], dtype=np.int64),
            "heights": np.array([entry.height for entry in entries], dtype=np.int32),
            "widths": np.array([entry.width for entry in entries], dtype=np.int32),
            "decoded": np.array([entry.decoded for entry in entries], dtype=np.uint8),
        }
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
                "the index cache %s cannot be written (%s); the next start reads all headers again", self._file, error
            )


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """`cache_dir`, or the user's cache folder for this project (the XDG base directory specification)."""
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path there is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sdmp"
