"""The fault corpus: files as they go wrong, written by this script, with what is to become of each.

    python tests/train/data/fault_corpus.py FOLDER

writes them and prints the table that docs/data.md holds.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from file_kinds import HEIGHT, WIDTH, smooth_picture
from PIL import Image

Outcome = Literal["read", "header", "decode", "either", "passed"]
"""Read as an image; refused when the header is looked at; refused then or when all of it is decoded; read or so refused, the
same for all loaders; no file at all."""

FLIPS = 40


class Fault(NamedTuple):
    """A damaged file, or one that only looks damaged."""

    kind: str
    """The row of the table that it belongs to."""
    outcome: Outcome
    write: Callable[[Path], object]


SAID = {
    "read": "read as the image that it is",
    "header": "refused at the start: its header is looked at",
    "decode": "refused, at the latest where every file is decoded first (`--check decode`, `--bad-images skip`, `verify`), else when it "
    "is read",
    "passed": "passed over, as any folder without an image",
    "either": "refused, or read as other pixels: no decoder can tell; a second `verify` does",
}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb() -> bytes:
    """A few bytes that claim 900 megapixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b""))
        + png_chunk(b"IEND", b"")
    )


def flipped(data: bytes, seed: int) -> bytes:
    """One bit behind the header changed."""
    numbers = np.random.default_rng(seed)
    at = int(numbers.integers(len(data) // 3, len(data) - 2))
    return data[:at] + bytes([data[at] ^ (1 << int(numbers.integers(8)))]) + data[at + 1 :]


def faults() -> dict[str, Fault]:
    """By file name."""
    picture = smooth_picture(np.random.default_rng(0), WIDTH, HEIGHT)
    noise = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    jpeg, png = encoded(Image.fromarray(noise), "JPEG"), encoded(picture, "PNG")
    found: dict[str, Fault] = {}

    def add(name: str, kind: str, outcome: Outcome, data: bytes) -> None:
        found[name] = Fault(kind, outcome, lambda path: path.write_bytes(data))

    add("trailing.jpg", "JPEG with trailing bytes", "read", jpeg + b"more" * 9)
    add("png-inside.jpg", "PNG named JPEG", "read", png)
    add("empty.jpg", "no bytes", "header", b"")
    add("text.jpg", "text named JPEG", "header", b"<html>404 not found</html>\n")
    add("header.jpg", "a JPEG's first 20 bytes", "header", jpeg[:20])
    add("header.png", "a PNG's first 20 bytes", "header", png[:20])
    for percent in range(5, 100, 5):
        add(f"cut-{percent:02d}.jpg", "JPEG cut at each 5 %", "decode", jpeg[: len(jpeg) * percent // 100])
        add(f"cut-{percent:02d}.png", "PNG cut at each 5 %", "decode", png[: len(png) * percent // 100])
    add("cut-2.jpg", "JPEG without its last 2 bytes", "decode", jpeg[:-2])
    at = png.index(b"IDAT")
    length = int.from_bytes(png[at - 4 : at], "big")
    crc = png[: at + 4 + length] + bytes(4) + png[at + 8 + length :]
    add("crc.png", "PNG whose pixels have a wrong check sum, and are right", "read", crc)
    add("bomb.png", "a few bytes that claim 900 megapixels", "header", bomb())
    for seed in range(FLIPS):
        add(f"flip-{seed:02d}.jpg", f"one bit of a JPEG changed, {FLIPS} places", "either", flipped(jpeg, seed))
        add(f"flip-{seed:02d}.png", f"one bit of a PNG changed, {FLIPS} places", "either", flipped(png, seed))
    found["folder.jpg"] = Fault("folder named x.jpg, which holds no image", "passed", Path.mkdir)
    found["link.jpg"] = Fault("link that leads nowhere", "header", lambda path: path.symlink_to("nowhere.jpg"))
    found["line\nbreak.jpg"] = Fault("a line break in the name", "read", lambda path: path.write_bytes(jpeg))
    found[os.fsdecode(b"latin-\xe9.jpg")] = Fault(
        "a name that is no UTF-8", "read", lambda path: path.write_bytes(jpeg)
    )
    return found


def table() -> list[str]:
    """The rows of docs/data.md."""
    rows = dict.fromkeys((fault.kind, fault.outcome) for fault in faults().values())
    return [f"| {kind} | {SAID[outcome]} |" for kind, outcome in rows]


if __name__ == "__main__":
    for name, fault in faults().items():
        fault.write(Path(sys.argv[1]) / name)
    print("\n".join(table()))
