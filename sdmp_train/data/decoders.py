"""Which decoder reads a file where DALI is the loader.

DALI's decoders are several libraries, on a GPU others than on the CPU, and on rare kinds of files they do not agree
with Pillow. So DALI gets the kinds of which the tests show that it computes Pillow's bytes, told by their headers, and
Pillow reads everything else inside the DALI loader (docs/data.md holds the table).
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import BinaryIO

from ..reading import open_regular

_SCANS = frozenset({0xC0, 0xC1, 0xC2})
"""JPEG frames that every decoder knows: baseline, extended and progressive, all with Huffman codes."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
"""JPEG markers without a length."""
_MOST_SEGMENTS = 10_000


def needs_pillow(file: str | bytes) -> bool:
    """Whether Pillow decodes this file, by path or bytes, for DALI too. Reads headers only; a damaged one says True.

    Raises:
        OSError, ValueError: the file cannot be opened.
    """
    with io.BytesIO(file) if isinstance(file, bytes) else open_regular(file) as opened:
        start = opened.read(12)
        for looks, plain in _KINDS:
            if looks(start):
                opened.seek(0)
                return not plain(opened)
    return True


def _plain_jpeg(file: BinaryIO) -> bool:
    """8 bits, grey or YCbCr that says so, chroma at full or half resolution, Huffman codes, no CMYK."""
    jfif, transform = False, None
    file.seek(2)
    for _ in range(_MOST_SEGMENTS):
        marker = _next_marker(file)
        if marker in _BARE:
            continue
        length = int.from_bytes(file.read(2), "big")
        if length < 2 or marker is None or marker == 0xD9:
            return False
        if marker in _FRAMES:
            return marker in _SCANS and _plain_frame(file.read(length - 2), jfif, transform)
        if marker in (0xE0, 0xEE):
            body = file.read(length - 2)
            jfif = jfif or (marker == 0xE0 and body.startswith(b"JFIF\0"))
            if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
                transform = body[11]
        else:
            file.seek(length - 2, 1)
    return False


def _next_marker(file: BinaryIO) -> int | None:
    """The next marker's second byte; any number of 0xFF may stand before it. None where there is none."""
    if file.read(1) != b"\xff":
        return None
    while (byte := file.read(1)) == b"\xff":
        pass
    return byte[0] if byte else None


def _plain_frame(body: bytes, jfif: bool, transform: int | None) -> bool:
    if len(body) < 6 or body[0] != 8 or len(body) != 6 + 3 * body[5]:
        return False
    parts = [(body[i], body[i + 1] >> 4, body[i + 1] & 15) for i in range(6, len(body), 3)]
    if len(parts) == 1:
        # The sampling factors of a lone component mean nothing, and decoders are known to take other than 1 x 1 ill.
        return parts[0][1:] == (1, 1)
    if len(parts) != 3:
        return False
    names = tuple(name for name, _, _ in parts)
    is_ycbcr = transform == 1 or (transform is None and (jfif or names == (1, 2, 3)))
    luma, chroma = parts[0][1:], [part[1:] for part in parts[1:]]
    return is_ycbcr and luma in ((1, 1), (2, 1), (2, 2)) and chroma == [(1, 1), (1, 1)]


def _plain_png(file: BinaryIO) -> bool:
    """At most 8 bits a channel, not animated, without an orientation tag."""
    file.seek(8)
    for number in range(_MOST_SEGMENTS):
        head = file.read(8)
        if len(head) < 8:
            return False
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IDAT":
            return True
        if kind in (b"acTL", b"eXIf") or (number == 0) != (kind == b"IHDR"):
            return False
        if kind == b"IHDR":
            body = file.read(length) if length == 13 else b""
            if len(body) < 13 or body[8] > 8:
                return False
            length = 0
        file.seek(length + 4, 1)
    return False


def _plain_webp(file: BinaryIO) -> bool:
    """A still picture without an orientation tag."""
    start = file.read(21)
    if len(start) < 21:
        return False
    animated_or_exif = 0b0000_1010
    return start[12:16] in (b"VP8 ", b"VP8L") or (start[12:16] == b"VP8X" and not start[20] & animated_or_exif)


_KINDS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO], bool]], ...] = (
    (lambda start: start.startswith(b"\xff\xd8\xff"), _plain_jpeg),
    (lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), _plain_png),
    (lambda start: start.startswith(b"RIFF") and start[8:12] == b"WEBP", _plain_webp),
)


def looks_whole(data: bytes) -> bool:
    """Whether a JPEG, PNG or WebP has all its parts, each as long as it says, up to its end. False for all else.

    Bytes within a part may still be damaged.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _whole_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _whole_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return False


def _whole_jpeg(data: bytes) -> bool:
    """Segments up to the first scan, and behind it the end of the image."""
    file = io.BytesIO(data)
    file.seek(2)
    frames = 0
    for _ in range(_MOST_SEGMENTS):
        marker = _next_marker(file)
        if marker in _BARE:
            continue
        length = int.from_bytes(file.read(2), "big")
        if marker is None or length < 2 or marker == 0xD9:
            return False
        frames += marker in _FRAMES
        file.seek(length - 2, 1)
        if marker == 0xDA:
            return frames == 1 and data.find(b"\xff\xd9", file.tell()) >= 0
    return False


def _whole_png(data: bytes) -> bool:
    """Chunks up to the last, IEND; the check sums of all but the pixels (which have another) are right."""
    at = 8
    while len(data) - at >= 12:
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            return False
        if kind != b"IDAT" and zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if kind == b"IEND":
            return True
        at = end
    return False


def looks_like_image(path: str) -> bool:
    """Whether a file without a suffix begins as an image does. Formats whose first bytes also begin texts do not count.

    Raises:
        OSError, ValueError: the file cannot be opened.
    """
    with open_regular(path) as file:
        start = file.read(12)
    return any(looks(start) for looks, _ in _KINDS) or start.startswith((b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
