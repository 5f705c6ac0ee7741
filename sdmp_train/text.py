"""Text that others chose, made fit for a terminal and a log."""

from __future__ import annotations

import os


def printable(text: object) -> str:
    """`str(text)` with every character that is not printable as an escape: control and format characters, line breaks,
    and bytes of a file name that are no text (`\\xff`).

    File and folder names are chosen by others: raw, they could move a cursor, forge a line or stop a UTF-8 stream.
    """
    text = os.fspath(text) if isinstance(text, os.PathLike) else str(text)
    return "".join(character if character.isprintable() else _escape(character) for character in os.fsdecode(text))


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:
        # How Python keeps a byte that is not UTF-8 in a file name.
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
