"""Classes from the `metadata.csv` or `metadata.jsonl` of an image folder as Hugging Face's `datasets` has them.

A line per image: `file_name`, relative to the file's own folder, and any other columns, of which `label` is the class.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..reading import read_text
from ..text import printable
from .images import DataError

FILES = ("metadata.csv", "metadata.jsonl")
_MOST_BYTES = 2**30


def read_metadata(root: Path) -> tuple[Path, dict[str, str]] | None:
    """The file, and by the path of an image below `root` its class.

    Looked for in `root` and, since `root` may be a split, beside it. None where there is none, or one of other columns.

    Raises:
        DataError: the one in `root` cannot be read or makes no sense.
    """
    for folder, name in ((folder, name) for folder in (root, root.parent) for name in FILES):
        path = folder / name
        if not path.exists():
            continue
        try:
            found = dict(_labels(path, root.relative_to(folder).as_posix()))
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            if folder != root:
                continue  # it may be anything's
            raise DataError(f"{printable(path)} cannot be read: {printable(error)}") from error
        if found:
            return path, found
    return None


def _labels(path: Path, within: str) -> Iterator[tuple[str, str]]:
    """(path below `within`, class) of each line that has both."""
    for line in _rows(path, read_text(path, _MOST_BYTES).removeprefix("\ufeff")):
        name, label = line.get("file_name"), line.get("label")
        if not isinstance(name, str) or label is None or label == "":
            continue
        if isinstance(label, (dict, list)):
            raise ValueError(f"the label of {name!r} is no class")
        below = posixpath.relpath(posixpath.normpath(name), within)
        if not below.startswith("../"):
            yield below, str(label)


def _rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    if path.suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line is no object with names and values")
            yield row
