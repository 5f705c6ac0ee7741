"""A list of image files as a source: a path a line, and where there are classes the class behind it."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from ..reading import no_regular_file, open_regular
from ..text import printable
from .images import SUFFIXES, BadFile, DataError, describe
from .index import Checks, Index, index_listing
from .listing import File, Listing

SUFFIXES_OF_LISTS = (".txt", ".lst", ".list", ".tsv")
_MOST_BYTES = 2**31


def open_list(path: Path, how: Checks) -> Index:
    """The images that a text file lists, in its order, with the paths in it relative to its own folder.

    A tab, or where there is none the last blank, stands before the class; a line that ends like an image file is a path
    alone. Either every line names a class or none does.

    Raises:
        DataError: the list cannot be read, is empty, names a file twice, or a class on some lines only; or as
            `open_folder`, for files that are no images.
    """
    classes = _lines(path)
    root, listing = path.parent, Listing()
    for name in classes:
        full = os.path.join(root, name)
        try:
            status = os.stat(full)
        except (OSError, ValueError) as error:
            listing.problems.append(BadFile(full, describe(error)))
            continue
        kind = no_regular_file(status.st_mode)
        if kind:
            listing.problems.append(BadFile(full, kind))
        else:
            listing.files.append(File(name, status.st_size, status.st_mtime_ns))
    return index_listing(root, listing, how, class_of=classes.get, cached_as=path)


def _lines(path: Path) -> dict[str, str | None]:
    """File -> class, in the order of the lines."""
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"the list {printable(path)} {describe(error)}") from error
    if len(data) > _MOST_BYTES or b"\0" in data:
        raise DataError(f"{printable(path)} is no list of image files: it is too long, or holds bytes that are no text")
    found: dict[str, str | None] = {}
    unlike, kind = 0, None
    for number, line in enumerate(os.fsdecode(data.removeprefix(codecs.BOM_UTF8)).split("\n"), 1):
        if not line.strip():
            continue
        name, class_name = _parts(line.rstrip("\r"))
        if name in found:
            raise DataError(f"line {number} of {printable(path)} names {printable(name)} again; list every file once")
        if kind is not None and kind != (class_name is not None):
            unlike = unlike or number
        kind = class_name is not None
        found[name] = class_name
    if unlike:
        raise DataError(f"of the lines of {printable(path)} some name a class and some none, as line {unlike} shows")
    if not found:
        raise DataError(f"the list {printable(path)} is empty: expected the path of an image file a line")
    return found


def _parts(line: str) -> tuple[str, str | None]:
    if "\t" in line:
        name, class_name = line.rsplit("\t", 1)
        return name.strip(), class_name.strip()
    line = line.strip()
    parts = line.rsplit(None, 1)
    if len(parts) == 1 or os.path.splitext(line)[1].lower() in SUFFIXES:
        return line, None
    return parts[0], parts[1]
