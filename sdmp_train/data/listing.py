"""What lies under a folder of images: the files to look at, what cannot be one, and what is passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..reading import no_regular_file
from ..run_folder import MARKER
from .images import SUFFIXES, BadFile, DataError, describe

NO_SUFFIX = "no suffix"
DEAD_LINK = "dead link"
SPECIAL = "special file"

_SYSTEM = frozenset({"__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
"""Folders that systems put among data, passed over without a word as names with a leading dot are."""

_OLD_RUN = frozenset({"config.yaml", "metrics.jsonl", "checkpoints"})
"""What a run folder from before there was a marker holds."""

PAPERS = frozenset(
    {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".pdf", ".log"}
    | {
        ".py",
        ".ipynb",
        ".sh",
        ".m",
        ".mat",
        ".npy",
        ".npz",
        ".h5",
        ".pkl",
        ".pt",
        ".pth",
        ".safetensors",
        ".db",
        ".ini",
    }
)
"""Suffixes of what usually lies beside images: a folder that holds nothing else is no class that went missing."""
PICTURES = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".eps", ".ico", ".tga", ".exr", ".hdr", ".raw"}
    | {".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".dcm", ".nii", DEAD_LINK}
    | {".tar", ".zip", ".tgz", ".gz", ".xz", ".zst", ".rar", ".7z"}
)
"""Suffixes of pictures that no decoder of ours reads, and of packed ones."""


@dataclass(frozen=True)
class File:
    """A file that is taken for an image, or, without a suffix, may be one."""

    name: str
    """Path below the root."""
    bytes: int
    mtime_ns: int

    @property
    def has_suffix(self) -> bool:
        return bool(os.path.splitext(self.name)[1])


@dataclass
class Listing:
    """Everything under a root, in a fixed order: folder by folder, names sorted."""

    files: list[File] = field(default_factory=list)
    problems: list[BadFile] = field(default_factory=list)
    """Files with an image's suffix that cannot be opened as one."""
    closed: list[BadFile] = field(default_factory=list)
    """Folders that may not be read."""
    folders: list[str] = field(default_factory=list)
    """The first level of folders, dead links without a suffix among them."""
    runs: set[str] = field(default_factory=set)
    """Those of them that hold the folder of a run, or are one: a run's pictures are no data."""
    others: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(folder of the first level or an empty text, suffix) -> files that are passed over."""

    def pass_over(self, name: str, kind: str) -> None:
        """Count a file that is no image."""
        self.others[first_level(name), kind] += 1

    def by_suffix(self) -> Counter[str]:
        """How often each suffix is passed over."""
        found: Counter[str] = Counter()
        for (_, kind), count in self.others.items():
            found[kind] += count
        return found


def first_level(name: str) -> str:
    """The folder of the first level that a path below the root lies in, empty where it lies in none."""
    return name.split("/", 1)[0] if "/" in name else ""


def list_files(root: Path, suffixes: Collection[str] = SUFFIXES) -> Listing:
    """Look through `root`. Raises `DataError` where `root` itself may not be read."""
    listing = Listing()
    for entry, name in _walk(root, "", (), listing):
        _sort_in(entry, name, root, listing, suffixes)
    return listing


def _sort_in(entry: os.DirEntry[str], name: str, root: Path, listing: Listing, suffixes: Collection[str]) -> None:
    suffix = os.path.splitext(name)[1].lower()
    is_image = suffix in suffixes
    if suffix and not is_image:
        listing.pass_over(name, suffix)
        return
    try:
        status = entry.stat()
    except OSError as error:
        if is_image:
            listing.problems.append(BadFile(os.path.join(root, name), describe(error)))
        elif entry.is_symlink() and "/" not in name:
            listing.folders.append(name)
            listing.others[name, DEAD_LINK] += 1
        else:
            listing.pass_over(name, DEAD_LINK if entry.is_symlink() else NO_SUFFIX)
        return
    kind = no_regular_file(status.st_mode)
    if not kind:
        listing.files.append(File(name, status.st_size, status.st_mtime_ns))
    elif is_image:
        listing.problems.append(BadFile(os.path.join(root, name), kind))
    else:
        listing.pass_over(name, SPECIAL)


def _walk(
    root: Path, below: str, above: tuple[tuple[int, int], ...], listing: Listing
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every entry that is no folder with its path below `root`; a link to a folder that it lies in is not entered."""
    folder = os.path.join(root, below)
    try:
        here = os.stat(folder)
        listed = scan(folder)
    except OSError as error:
        if not below:
            raise DataError(f"the folder {folder!r} {describe(error)}") from error
        listing.closed.append(BadFile(folder, describe(error)))
        if "/" not in below:
            listing.folders.append(below)
        return
    if listed is None:
        if not below:
            raise DataError(f"{folder!r} is the folder of a run, not of images")
        listing.runs.add(below.split("/", 1)[0])
        return
    above = (*above, (here.st_dev, here.st_ino))
    for entry in listed:
        name = f"{below}/{entry.name}" if below else entry.name
        if not is_folder(entry):
            yield entry, name
        elif not entry.is_symlink() or _identity(entry) not in above:
            yield from _walk(root, name, above, listing)
    if below and "/" not in below:
        listing.folders.append(below)


def _identity(entry: os.DirEntry[str]) -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino


def scan(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]] | None:
    """The visible entries of a folder by name; None for the folder of a run. Raises `OSError`."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    names = {entry.name for entry in found}
    if MARKER in names or names >= _OLD_RUN:
        return None
    return [entry for entry in found if not entry.name.startswith(".") and entry.name not in _SYSTEM]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def missing_classes(listing: Listing, used: set[str]) -> tuple[list[BadFile], list[BadFile]]:
    """Folders of the first level without one usable image, with the reason: those that may be classes, and others.

    `used` are the folders with a usable image. Beside one such folder (`images/` beside `annotations/`) only what looks
    like pictures may be a class; beside several, everything but papers may.
    """
    missing: list[BadFile] = []
    harmless: list[BadFile] = []
    for name in listing.folders:
        kinds = Counter({kind: count for (folder, kind), count in listing.others.items() if folder == name})
        if name in used or (name in listing.runs and not kinds):
            continue
        pictures = bool(PICTURES & set(kinds))
        may_be = pictures or (len(used) > 1 and not (kinds and set(kinds) <= PAPERS))
        (missing if may_be else harmless).append(BadFile(name, _without_images(name, kinds, listing)))
    return missing, harmless


def _without_images(name: str, kinds: Counter[str], listing: Listing) -> str:
    closed = [folder.reason for folder in listing.closed if os.path.basename(folder.path) == name]
    if closed:
        return closed[0]
    if kinds == {DEAD_LINK: 1}:
        return "is, or holds only, a link that leads nowhere"
    if kinds:
        return f"holds no usable image, only {count_kinds(kinds)}"
    bad = sum(first_level(file.name) == name for file in listing.files)
    return f"holds no usable image, only {bad} bad files" if bad else "is empty"


def count_kinds(kinds: Counter[str]) -> str:
    """`4 .heic, 1 no suffix`: the five most frequent."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
