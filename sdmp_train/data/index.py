"""A folder of images as a table: path, size, class. Built by reading headers only, and remembered between runs."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..reading import open_regular
from ..text import counted, printable
from .cache import Cache, Checked, cache_folder, digest_of
from .channels import decode, size_of, suffixes_of
from .decoders import looks_like_image, needs_pillow
from .folders import SPELLINGS, find_splits
from .images import (
    DECODE_ERRORS,
    MAX_PIXELS,
    SUFFIXES,
    BadFile,
    DataError,
    TooManyBadFiles,
    bad_file,
    let_pillow_open,
    unreachable_error,
)
from .listing import NO_SUFFIX, File, Listing, count_kinds, first_level, list_files, missing_classes
from .metadata import read_metadata
from .source import Source, channels_of

__all__ = ["Index", "Paths", "bad_files_error", "cache_folder", "find_bad", "open_folder", "open_row"]

_log = logging.getLogger(__name__)

Check = Literal["header", "decode", "digest"]
"""How much of a file is looked at."""
ROTTED = "has other bytes than when it was last verified, though neither its size nor its time has changed"

MAX_BAD_FRAC = 0.01
"""Share of bad files that may be left out, where nothing else is asked for."""

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

    root: Path | str
    """A folder, or a URL."""
    paths: Paths
    """Relative to `root`."""
    heights: NDArray[np.int32]
    """(N,) pixels, as stored in the file (EXIF orientation ignored)."""
    widths: NDArray[np.int32]
    labels: NDArray[np.int64]
    """(N,) number of the class folder in `classes`, -1 where there are none."""
    classes: tuple[str, ...]
    """Sorted names of the folders under `root`, when every image lies in one of them; else empty."""
    pillow: NDArray[np.bool_]
    """(N,) True where DALI's decoder is not known to agree with Pillow, so that Pillow decodes for both loaders."""
    bad: tuple[BadFile, ...] = field(default=())
    """Files, and folders that may not be read, left out with `on_bad="skip"`."""
    faults: str = ""
    """What `on_bad="stop"` raises on, as a text."""
    channels: int = 3
    """Of every image; see `channels.py`."""
    notes: tuple[str, ...] = field(default=())
    """What was passed over, one phrase each: other kinds of files, folders without an image."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.paths[row])

    def file(self, row: int) -> str | None:
        """The same: every row is a file of its own (see :class:`Source`)."""
        return self.path(row)

    def name(self, row: int) -> str:
        """What messages call it: the path."""
        return self.path(row)

    def read(self, row: int) -> bytes:
        """The file, undecoded; raises `OSError` or `ValueError`."""
        with open_regular(self.path(row)) as file:
            return file.read()

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or resized: tells whether a resumed run sees the same data."""
        digest = hashlib.sha256(self.paths.hash().encode())
        for column in (self.heights, self.widths, self.labels):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def subset(self, rows: NDArray[np.integer]) -> Self:
        """The given rows, in the given order, as an index of their own; class numbers stay."""
        return replace(
            self,
            paths=Paths(self.paths[int(row)] for row in rows),
            heights=self.heights[rows],
            widths=self.widths[rows],
            labels=self.labels[rows],
            pillow=self.pillow[rows],
        )

    def summary(self) -> str:
        """One line to print."""
        classes = counted(len(self.classes), "class", "classes") if self.classes else "no class folders"
        sizes = f"{_middle(self.widths)} x {_middle(self.heights)} px in the median"
        left_out = f", {counted(len(self.bad), 'bad file')} left out" if self.bad else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{counted(len(self), 'image')}, {classes}, {sizes}{left_out}: {printable(self.root)}{notes}"


def open_folder(
    path: str | os.PathLike[str],
    *,
    split: Literal["train", "val"] | None = "train",
    on_bad: Literal["stop", "skip", "list"] = "stop",
    check: Check = "header",
    max_bad_frac: float = MAX_BAD_FRAC,
    max_pixels: int | None = None,
    channels: int = 3,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Index the images under a folder.

    Any tree is accepted; links are followed. Names that begin with a dot, folders that systems put there (`__MACOSX`)
    and the folders of runs are passed over. When every image lies in a subfolder, the first level of subfolders are the
    classes (as torchvision's ImageFolder). Files of other kinds and folders without an image are counted in
    `Index.notes`; a folder that may be a class and holds not one usable image counts as bad. A folder that holds the
    splits of a data set is understood (`folders.find_splits`): `split="train"` takes the training split, or `path`
    itself where it holds none; `split="val"` the test split. `split=None` takes `path` as it is. Classes come from a
    `metadata.csv` or `metadata.jsonl` with a label for every image, where there is one (`metadata.py`).

    Args:
        on_bad: "stop" raises where a file is no readable image, naming up to ten, or a class folder has none;
            "skip" leaves such files out of the index and lists them in `Index.bad`;
            "list" leaves out any number of them without a word, for callers that tell of `Index.faults`.
        check: "header" reads sizes only; "decode" also decodes each file once, which finds truncated and damaged ones;
            "digest" does so again for every file, whatever is remembered, and compares its bytes with those that it had
            the last time.
        max_bad_frac: with "skip", the share of bad files above which the folder is refused after all.
        max_pixels: files whose header claims more pixels are bad (decompression bombs are never decoded); default
            `MAX_PIXELS`. More than twice that raises Pillow's own limit for the whole process.
        channels: of the images, 1 to 16; see `channels.py`.
        cache_dir: where results are remembered; default `$XDG_CACHE_HOME/sdmp` or `~/.cache/sdmp`. A file is read again
            when its size or time changes. A cache that cannot be written costs a notice, nothing else.
        workers: threads; default four per core, at most 32.
        progress: called with (files done, files in all) now and then.

    Raises:
        DataError: no such folder, no images, or bad files; the message says what was found and what to do.
        TooManyBadFiles: the share of bad files exceeds `max_bad_frac`.
    """
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    root = _resolve(Path(path), split)
    how = Checks(on_bad, check, max_bad_frac, max_pixels, cache_dir, workers, progress, channels)
    listing, listed = list_files(root, suffixes_of(channels)), read_metadata(root)
    if listed is None:
        return index_listing(root, listing, how)
    listing.others -= Counter({("", file.suffix): 1 for file in (listed[0],) if file.parent == root})
    unlisted = sum(file.name not in listed[1] for file in listing.files)
    if unlisted:
        index = index_listing(root, listing, how)
        said = f"{listed[0].name} not used: it has no label for {unlisted:,} of {len(listing.files):,} files"
        return replace(index, notes=(*index.notes, said))
    index = index_listing(root, listing, how, class_of=listed[1].get)
    return replace(index, notes=(*index.notes, f"classes read from {printable(listed[0])}"))


@dataclass(frozen=True)
class Checks:
    """How files are looked at, and what becomes of bad ones: the arguments of `open_folder`."""

    on_bad: Literal["stop", "skip", "list"] = "stop"
    check: Check = "header"
    max_bad_frac: float = MAX_BAD_FRAC
    max_pixels: int = MAX_PIXELS
    cache_dir: str | os.PathLike[str] | None = None
    workers: int | None = None
    progress: Callable[[int, int], None] | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        if self.on_bad not in ("stop", "skip", "list"):
            raise ValueError(f"on_bad must be 'stop', 'skip' or 'list', but is {self.on_bad!r}")


def index_listing(
    root: Path | str,
    listing: Listing,
    how: Checks,
    *,
    contents: Callable[[str], str | bytes] | None = None,
    class_of: Callable[[str], str | None] | None = None,
    cached_as: Path | str | None = None,
    known: Mapping[File, Checked] | None = None,
) -> Index:
    """Look at the files of a listing and make a table of those that are images.

    Args:
        root: what the names of the listing are relative to.
        contents: name -> the path or the bytes of a file; default: its path below `root`.
        class_of: name -> class; default: the folder of the first level.
        cached_as: what the cache is named after; default `root`.
        known: what has been looked at just now, on the way.

    Raises:
        DataError, TooManyBadFiles: as `open_folder`.
    """
    let_pillow_open(how.max_pixels)
    contents = contents or partial(os.path.join, root)
    cache, decode = Cache(cached_as or root, how.cache_dir, how.channels), how.check != "header"
    with cache.alone() if decode else nullcontext():
        former = cache.load()
        checked, bad = _check_files(root, listing, former, known or {}, how, contents)
        files = [file for file in listing.files if file.name in checked]
        rotted = any(file.reason == ROTTED for file in bad)  # to be found again the next time
        if not rotted and {file: checked[file.name] for file in files} != former:
            cache.store(files, checked)
    bad += listing.problems
    if not files and not bad and not listing.closed:
        raise DataError(_nothing_found(root, listing.by_suffix()))
    names = [file.name for file in files]
    classes, labels = numbered([class_of(name) for name in names]) if class_of else _classes(names)
    missing, harmless = missing_classes(listing, set(map(first_level, names))) if classes else ([], [])
    total = len(files) + len(bad)
    if bad and not files and all(file.other_channels for file in bad):
        raise DataError(
            f"--channels is {how.channels}, and none of {counted(total, 'image')} under {printable(root)} has so many: "
            f"{bad[0].path!r} {printable(bad[0].reason)}. Give the number that they have; 3 and 1 take any photograph"
        )
    faults = _faults(bad, listing.closed, missing, total, root)
    if faults:
        _judge(faults, len(bad), total, how.on_bad, how.max_bad_frac)
    return Index(
        root=root,
        paths=Paths(file.name for file in files),
        heights=np.array([checked[file.name].height for file in files], dtype=np.int32),
        widths=np.array([checked[file.name].width for file in files], dtype=np.int32),
        labels=labels,
        classes=classes,
        pillow=np.array([checked[file.name].pillow for file in files], dtype=np.bool_),
        bad=tuple(sorted(bad + listing.closed, key=lambda file: file.path)),
        faults=faults,
        notes=_notes(listing, missing + harmless),
        channels=how.channels,
    )


def open_row(source: Source, row: int) -> NDArray[np.uint8]:
    """A row's image, (H, W, C), by Pillow.

    Raises:
        One of `DECODE_ERRORS`: it cannot be decoded, or is of another size than when the folder was indexed (a crop
        that leaves the image would be padded with black, without a word).
    """
    image = decode(source.read(row), channels_of(source))
    expected = int(source.heights[row]), int(source.widths[row])
    if image.shape[:2] != expected:
        now, then = (f"{w} x {h}" for h, w in (image.shape[:2], expected))
        raise ValueError(f"is {now} pixels now, but was {then} when the folder was indexed")
    return image


def find_bad(source: Source, rows: Iterable[int]) -> list[BadFile]:
    """Decode rows with Pillow; those that fail, or changed size since then, with the reason."""
    bad = []
    for row in rows:
        try:
            open_row(source, int(row))
        except DECODE_ERRORS as error:
            bad.append(bad_file(source.name(int(row)), error))
    return bad


def bad_files_error(bad: Sequence[BadFile], total: int) -> DataError:
    """The error that a loader raises when files of its batch, of `total` ones, cannot be decoded, or not be had."""
    if unreachable := [file for file in bad if file.unreachable]:
        return unreachable_error(unreachable)
    it = "it" if len(bad) == 1 else "them"
    return DataError(
        f"{counted(len(bad), 'image file')} could not be decoded:\n{_listing(bad)}\n"
        f"Repair or remove {it}, or leave out all damaged files with {_skipping(len(bad), total)}, which decodes every "
        "file once before the start"
    )


def _skipping(bad: int, total: int, allowed: float = MAX_BAD_FRAC) -> str:
    """The flags that leave out so many bad files: with a share that suffices, where more are bad than `allowed`."""
    share = "" if bad <= allowed * total else f" --max-bad-frac {_enough(bad, total):g}"
    return f"--bad-images skip{share}"


def _enough(bad: int, total: int) -> float:
    """A round share of `total` that is not below `bad`."""
    return next((share for share in (0.02, 0.05, 0.1, 0.2, 0.5) if bad <= share * total), 1.0)


def _resolve(path: Path, split: str | None) -> Path:
    path = Path(os.path.abspath(path.expanduser()))
    if not path.exists():
        near = path
        while not near.exists():
            near = near.parent
        raise DataError(f"there is no folder {printable(path)}; the nearest that exists is {printable(near)}")
    if not path.is_dir():
        raise DataError(f"{printable(path)} is a file, not a folder of images{_unpack_hint(path.name)}")
    if split is None:
        return path
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train', 'val' or None, but is {split!r}")
    layout = find_splits(path)
    if split == "train":
        return layout.train
    if layout.test is None:
        raise DataError(f"{printable(path)} holds none of the folders {SPELLINGS}: name the folder of test images")
    return layout.test


def _check_files(
    root: Path | str,
    listing: Listing,
    former: Mapping[File, Checked],
    known: Mapping[File, Checked],
    how: Checks,
    contents: Callable[[str], str | bytes],
) -> tuple[dict[str, Checked], list[BadFile]]:
    """What is known by name, from the cache (`former`) or from just now (`known`) where that is enough, and the bad
    files.

    Files without a suffix that are no images go to those passed over.
    """
    checked: dict[str, Checked] = {}
    bad: list[BadFile] = []
    todo: list[File] = []
    for file in listing.files:
        old, new = former.get(file), known.get(file)
        if how.check != "digest" and _is_enough(old, how):
            checked[file.name] = old
        elif not _is_enough(new, how):
            todo.append(file)
        elif _has_rotted(old, new):
            bad.append(BadFile(os.path.join(root, file.name), ROTTED))
        else:
            checked[file.name] = new
    done = len(checked)
    chunks = [todo[first : first + _CHUNK] for first in range(0, len(todo), _CHUNK)]
    threads = how.workers or min(32, 4 * (os.cpu_count() or 1))
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # Our own limit is at or below the one Pillow warns at, and is reported by file.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        work = partial(_check_chunk, root, contents, how)
        for chunk, results in zip(chunks, pool.map(work, chunks), strict=True):
            for file, result in zip(chunk, results, strict=True):
                if result is None:
                    listing.pass_over(file.name, NO_SUFFIX)
                elif isinstance(result, BadFile) and result.unreachable:
                    raise unreachable_error([result])
                elif isinstance(result, BadFile):
                    bad.append(result)
                elif _has_rotted(former.get(file), result):
                    bad.append(BadFile(os.path.join(root, file.name), ROTTED))
                else:
                    checked[file.name] = result
            done += len(chunk)
            if how.progress is not None:
                how.progress(done, len(listing.files))
    return checked, bad


def _is_enough(found: Checked | None, how: Checks) -> TypeGuard[Checked]:
    """Whether no further look is needed."""
    if found is None or found.height * found.width > how.max_pixels:
        return False
    return found.decoded or how.check == "header"


def _has_rotted(former: Checked | None, found: Checked) -> bool:
    return former is not None and 0 != former.digest != found.digest != 0


def _check_chunk(
    root: Path | str, contents: Callable[[str], str | bytes], how: Checks, files: list[File]
) -> list[Checked | BadFile | None]:
    return [_check_file(os.path.join(root, file.name), file, contents, how) for file in files]


def _check_file(path: str, file: File, contents: Callable[[str], str | bytes], how: Checks) -> Checked | BadFile | None:
    try:
        if not file.has_suffix and not looks_like_image(path):
            return None
        return look_at(contents(file.name), how)
    except DECODE_ERRORS as error:
        return bad_file(path, error)


def look_at(held: str | bytes, how: Checks) -> Checked:
    """What a file tells, by its path or its bytes; raises one of `DECODE_ERRORS`."""
    digest = 0
    if how.check == "digest":
        if isinstance(held, str):
            with open_regular(held) as opened:
                held = opened.read()
        digest = digest_of(held)
    height, width = size_of(held, how.channels, how.max_pixels)
    pillow = needs_pillow(held)
    if how.check != "header":
        decode(held, how.channels)
    return Checked(height, width, how.check != "header", pillow, digest)


def _faults(bad: list[BadFile], closed: list[BadFile], missing: list[BadFile], total: int, root: Path | str) -> str:
    """What cannot be used, with the reasons; empty where all is well."""
    bad, closed = (sorted(files, key=lambda file: file.path) for files in (bad, closed))
    found = [
        f"{count} of {counted(total, 'file')} under {printable(root)} {'is' if count == 1 else 'are'} not "
        f"{'a readable image' if count == 1 else 'readable images'}:\n{_listing(bad)}"
        for count in (len(bad),)
        if count
    ]
    if closed:
        found.append(f"{counted(len(closed), 'folder')} under {printable(root)} cannot be read:\n{_listing(closed)}")
    if missing:
        holds = "has" if len(missing) == 1 else "have"
        found.append(
            f"{counted(len(missing), 'class folder')} under {printable(root)} {holds} no image:\n{_listing(missing)}"
        )
    return "\n".join(found)


def _judge(faults: str, bad: int, total: int, on_bad: str, max_bad_frac: float) -> None:
    """Raise where what cannot be used may not be left out; else say what is left out."""
    if on_bad == "stop":
        how = _skipping(bad, total, max_bad_frac)
        it = "it" if faults.count("\n") == 1 else "them"
        raise DataError(f"{faults}\nRepair or remove {it}, or leave {it} out with {how}")
    if bad == total:
        kind = DataError if on_bad == "list" else TooManyBadFiles
        raise kind(f"{faults}\nNo usable image is left")
    if on_bad == "list":
        return
    if bad > max_bad_frac * total:
        raise TooManyBadFiles(
            f"{faults}\nThat is {bad / total:.1%}, more than the {max_bad_frac:.1%} that --max-bad-frac allows; "
            f"--max-bad-frac {_enough(bad, total):g} allows them"
        )
    _log.warning("%s\nThey are left out.", faults)


def _notes(listing: Listing, empty: list[BadFile]) -> tuple[str, ...]:
    """Phrases on what is passed over: kinds of files by where they lie, folders without an image."""
    kinds = listing.by_suffix()
    notes = []
    if kinds:
        places = sorted({folder for folder, _ in listing.others if folder})
        where = f" (in {_named(places)})" if places else ""
        notes.append(f"{counted(sum(kinds.values()), 'file')} passed over: {count_kinds(kinds)}{where}")
    if empty:
        notes.append("no image in " + ", ".join(f"{printable(folder.path)} ({folder.reason})" for folder in empty[:10]))
    return tuple(notes)


def _named(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _listing(bad: Sequence[BadFile]) -> str:
    # repr of the path: a name may hold a line break or bytes that are no text.
    lines = [f"  {file.path!r} {printable(file.reason)}" for file in bad[:10]]
    if len(bad) > 10:
        lines.append(f"  and {len(bad) - 10} more")
    return "\n".join(lines)


def _nothing_found(root: Path | str, others: Counter[str]) -> str:
    if not others:
        return f"{printable(root)} is empty: no image files under it"
    packed = [suffix for suffix in others if _unpack_hint(suffix)]
    return (
        f"no image under {printable(root)}: looked for {' '.join(SUFFIXES)}, found {printable(count_kinds(others))}"
    ) + (_unpack_hint(packed[0]) if packed else "")


def _unpack_hint(name: str) -> str:
    if name.lower().endswith((".parquet", ".arrow")):
        return "; write it out as tar shards first (docs/data.md has the lines for it)"
    packed = name.lower().endswith((".tar", ".zip", ".gz", ".tgz", ".xz", ".zst", ".rar", ".7z"))
    return "; unpack it first and name the folder that results" if packed else ""


def _classes(names: list[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    if any("/" not in name for name in names):
        return (), np.full(len(names), -1, dtype=np.int64)
    folders = [first_level(name) for name in names]
    classes = tuple(sorted(set(folders)))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[folder] for folder in folders], dtype=np.int64)


def numbered(names: Sequence[str | None]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Sorted classes, numbers by their value, and the number of each row; no classes where one row has none."""
    given = [name for name in names if name is not None]
    if len(given) < len(names) or not names:
        return (), np.full(len(names), -1, dtype=np.int64)
    numbers = all(name.isdecimal() for name in given)
    classes = tuple(sorted(set(given), key=lambda name: (int(name) if numbers else 0, name)))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[name] for name in given], dtype=np.int64)


def _middle(values: NDArray[np.int32]) -> int:
    return int(np.median(values)) if len(values) else 0
