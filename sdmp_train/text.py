"""Text that others chose, made fit for a terminal and a log."""

from __future__ import annotations

import os
import reprlib


def shown_size(image_px: int | tuple[int, int]) -> str:
    """224, or 224 x 448: height and width."""
    return str(image_px) if isinstance(image_px, int) else f"{image_px[0]} x {image_px[1]}"


def printable(text: object) -> str:
    """`str(text)` with every character that is not printable as an escape: control and format characters, line breaks,
    and bytes of a file name that are no text (`\\xff`).

    File and folder names are chosen by others: raw, they could move a cursor, forge a line or stop a UTF-8 stream.
    """
    text = os.fspath(text) if isinstance(text, os.PathLike) else str(text)
    return "".join(character if character.isprintable() else _escape(character) for character in os.fsdecode(text))


def brief(value: object) -> str:
    """The value as Python writes it, shortened where it is long: a hostile one must not fill the screen."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    short.maxlist = short.maxtuple = short.maxdict = 10
    try:
        return one_line(short.repr(value))
    except ValueError:  # Python does not write out whole numbers of more than 4300 digits
        return f"a {type(value).__name__} too large to print"


def one_line(text: object) -> str:
    """What an exception (or a text) says, printable, in one line and shortened; its kind where it says nothing."""
    words = printable(" ".join(str(text).split()))
    return (words if len(words) <= 400 else f"{words[:390]}...") or type(text).__name__


def printable_lines(text: object) -> str:
    """The same of every line of a text; its line breaks stay."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


def counted(count: int, one: str, many: str = "") -> str:
    """`1 file`, `1,200 files`; `many` where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """`0.25 s`, `42 s`, `7 min 05 s`, `3 h 20 min`, `2 d 04 h`: two units, so that a line stays short."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    for large, small, size, part in (("min", "s", 60, 1), ("h", "min", 3600, 60)):
        count = round(seconds / part)
        if count * part < size * (60 if large == "min" else 24):
            return f"{count * part // size} {large} {count % (size // part):02d} {small}"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:
        # How Python keeps a byte that is not UTF-8 in a file name.
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
