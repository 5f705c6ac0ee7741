"""Files that others may have written: read with limits, as plain data, and only where they are files.

Nothing here runs code, waits for ever (a pipe, a device) or takes memory out of proportion to the file. Whatever is
wrong raises `OSError` or `ValueError` with one line, which the callers put into an error of their own.
"""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

# Our own configurations take 3 KB and descriptions 2 KB; a checkpoint's state grows by its settings alone.
TEXT_BYTES = 2**18
YAML_BYTES = 2**16
YAML_DEPTH = 8


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file, for reading in binary. Anything else is refused at once: opening a FIFO would wait for a writer.

    Raises:
        OSError, ValueError: it cannot be opened, or is no regular file.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        kind = no_regular_file(os.fstat(number).st_mode)
        if kind:
            raise ValueError(kind)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def no_regular_file(mode: int) -> str:
    """What a file's mode says it is, as a reason, where that is no regular file; else an empty text."""
    if stat.S_ISREG(mode):
        return ""
    for holds, kind in (
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISDIR, "a folder"),
    ):
        if holds(mode):
            return f"is {kind}, not a regular file"
    return "is not a regular file"


def open_for_append(path: Path, *, follow: bool) -> FileIO:
    """A file to read and append to without a buffer, made where there is none. A pipe raises `OSError` at once.

    follow: whether it may be a link, such as to another disk; it may lead to a file that is not ours.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return FileIO(descriptor, "ab+")


def read_text(path: Path, limit: int = TEXT_BYTES) -> str:
    """UTF-8 text of at most `limit` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit} bytes, more than such a file ever holds")
    return data.decode("utf-8")


def read_json(path: Path, limit: int = TEXT_BYTES) -> dict[str, Any]:
    """A JSON object. NaN and infinities, which are no JSON, and nesting beyond Python's stack raise `ValueError`."""
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> dict[str, Any]:
    """The same of a text."""
    try:
        found = json.loads(text, parse_constant=refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}; expected an object with names and values")
    return found


def refuse_constant(name: str) -> None:
    """What `json` calls for NaN, Infinity and -Infinity."""
    raise ValueError(f"it holds {name}, which is no number")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, by the safe loader, without anchors, aliases and tags."""
    try:
        return yaml.load(read_text(path, YAML_BYTES), Loader=_PlainLoader)
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(error) from error


class _PlainLoader(yaml.SafeLoader):
    """The safe loader without what lets a small file become a large value or a value of another kind.

    Aliases may hold one list a billion times, tags may name kinds whose texts the loader does not check.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"anchors and aliases (& and *) are not accepted, line {event.start_mark.line + 1}")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags (!) are not accepted, line {event.start_mark.line + 1}")
        if self.depth >= YAML_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {YAML_DEPTH}, line {event.start_mark.line + 1}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Its library checks that header and size of the file agree."""
    from safetensors import SafetensorError  # not above: settings are read without torch
    from safetensors.torch import load, load_file

    with open_regular(path) as file:
        named = is_utf8(path)  # safetensors opens no other names
        data = b"" if named else file.read()
    try:
        return load_file(path) if named else load(data)
    except (SafetensorError, KeyError, RuntimeError, TypeError, MemoryError) as error:
        raise ValueError(f"it is no safetensors file: {error}") from error


def is_utf8(path: Path) -> bool:
    """Whether a path's bytes are UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_whole_number(value: Any, low: int, high: int) -> bool:
    """Whether a value read from a file is an int from `low` to `high`."""
    return type(value) is int and low <= value <= high
