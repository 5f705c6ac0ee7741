"""Files that are there whole or not at all: written beside their place, flushed to disk, then renamed.

What a killed process leaves behind is called `<name>.tmp-<process id>`; `remove_leftovers` takes it away.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def draft_of(path: Path) -> Path:
    """Where this process writes what shall become `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def write_durably(path: Path, text: str) -> None:
    """Replace a text file atomically, and be on disk when this returns."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file within the block, at whose end it is `path` and on disk. If it fails nothing changes."""
    draft = draft_of(path)
    try:
        yield draft
        sync(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, name: str) -> list[str]:
    """Delete the drafts of `name` (a regular expression) in a folder; returns what they were called."""
    if not folder.is_dir():
        return []
    left = sorted(p for p in folder.iterdir() if re.fullmatch(rf"(?:{name})\.tmp-\d+", p.name))
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left]
