"""The list of images that a run trains on, kept in its folder: what a resume compares with the files it finds.

One file per list, named after the list's fingerprint, which checkpoints hold too: `images-<16 digits>.jsonl.gz`, a line
of JSON per image: name, height, width.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from .data import Index
from .durable import replacing
from .reading import open_regular
from .text import printable

_MOST_LINE = 64 * 2**10
_MOST_LINES = 100_000_000
_MOST_RATIO = 200
"""Long paths that only count up take a thirtieth when packed; a file made to fill the memory a thousandth."""
_SHOWN = 10


def store_file_list(index: Index, folder: Path) -> None:
    """Write the list, unless it is there. Raises `OSError`."""
    path = folder / file_list_name(index.fingerprint)
    if path.exists():
        return
    with (
        replacing(path) as draft,
        draft.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=4, filename="", mtime=0) as packed,
    ):
        sizes = zip(index.paths, index.heights.tolist(), index.widths.tolist(), strict=True)
        for entry in sizes:
            packed.write(json.dumps(entry).encode("ascii") + b"\n")


def file_list_name(fingerprint: str) -> str:
    """What the list of an index of that fingerprint is called."""
    return f"images-{fingerprint[:16]}.jsonl.gz"


def changed_files(fingerprint: str, index: Index, folder: Path) -> str:
    """What came, went and changed its size since the list with this fingerprint was stored, in words."""
    try:
        before = dict(_stored(folder / file_list_name(fingerprint)))
    except (OSError, ValueError, LookupError, TypeError, EOFError, zlib.error) as error:
        return f"the images are not the same (which ones cannot be said: {printable(error)})"
    sizes = zip(index.heights.tolist(), index.widths.tolist(), strict=True)
    now = dict(zip(index.paths, sizes, strict=True))
    came = [name for name in now if name not in before]
    went = [name for name in before if name not in now]
    resized = [name for name in now if name in before and now[name] != before[name]]
    found = [_counted(names, what) for names, what in ((came, "came"), (went, "went"), (resized, "changed size"))]
    found = [phrase for phrase in found if phrase]
    return f"of {len(before):,} images {', '.join(found)}" if found else "the classes of the images are not the same"


def _counted(names: list[str], what: str) -> str:
    if not names:
        return ""
    shown = " ".join(printable(name) for name in names[:_SHOWN])
    return f"{len(names):,} {what} ({shown}{' ...' if len(names) > _SHOWN else ''})"


def _stored(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """The lines of a list, read with limits: a packed file may hold far more than its size."""
    with open_regular(path) as raw, gzip.GzipFile(fileobj=raw) as packed:
        most = _MOST_RATIO * os.fstat(raw.fileno()).st_size + _MOST_LINE
        for number in range(_MOST_LINES):
            if packed.tell() > most:
                break
            line = packed.readline(_MOST_LINE)
            if not line:
                return
            if not line.endswith(b"\n"):
                break
            name, height, width = json.loads(line)
            if not isinstance(name, str):
                raise ValueError(f"line {number + 1} names no file")
            yield name, (height, width)
    raise ValueError("it is no list of images")
