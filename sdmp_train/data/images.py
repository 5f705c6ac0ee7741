"""The one rule for image files, and Pillow's side of it.

Every file becomes RGB uint8: orientation tags ignored, grey replicated, CMYK converted, alpha dropped, palettes looked
up, 16-bit scaled to 8, the first frame of several. Which files DALI may decode instead, with the same bytes, is said in
`decoders.py`; the index, which reads headers with Pillow, speaks for both loaders.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, features

from ..reading import open_regular
from ..text import printable

# Pillow older than 11.3 has no AVIF, and one built without OpenJPEG no JPEG 2000.
_AVIF = (".avif",) if "avif" in features.modules and features.check("avif") else ()
_JPEG_2000 = (".jp2", ".j2k", ".jpx") if features.check("jpg_2000") else ()

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".jfif", ".jpe", ".pbm", ".pnm", ".dib", ".gif"),
    *_AVIF,
    *_JPEG_2000,
)
"""Suffixes taken for images, in any case. A file without a suffix is one where its first bytes say so."""

MAX_PIXELS = 89_478_485
"""Largest width * height accepted, Pillow's own warning threshold (a quarter of a GiB as RGB)."""

_FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF"),
    *(("AVIF",) if _AVIF else ()),
    *(("JPEG2000",) if _JPEG_2000 else ()),
)
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"})
_DEEP_GREY = ("PNG", "PPM")
"""Formats whose mode "I" is 16-bit grey from 0 to 65535; in a TIFF it is 32-bit numbers of unknown range."""

DECODE_ERRORS = (
    *(OSError, ValueError, SyntaxError, Image.DecompressionBombError),
    *(struct.error, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError, MemoryError),
)
"""What Pillow raises on damaged files (SyntaxError: broken PNG; the second row: headers that contradict themselves)."""

_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""By orientation tag: what takes Pillow's turn of a TIFF back."""


class DataError(ValueError):
    """The data folder cannot be used as it is; the message says what to do. Ends the program with exit code 2."""

    exit_code = 2


class TooManyBadFiles(DataError):
    """With `on_bad="skip"`: more files are bad than `max_bad_frac` allows. Exit code 4."""

    exit_code = 4


class OtherChannels(ValueError):
    """A whole file, of another number of channels than was asked for."""


class Unreachable(OSError):
    """A store does not answer: nothing is known of the file, and another time it may be read."""


@dataclass(frozen=True)
class BadFile:
    """A file, or a folder, that cannot be used."""

    path: str
    reason: str
    unreachable: bool = False
    """Its store does not answer: nothing is known of the file, so that it is not left out either."""
    other_channels: bool = False
    """It is whole, but of another number of channels than was asked for."""


def bad_file(path: str, error: BaseException) -> BadFile:
    """The file whose reading or decoding raised one of `DECODE_ERRORS`."""
    return BadFile(path, describe(error), isinstance(error, Unreachable), isinstance(error, OtherChannels))


def unreachable_error(files: Sequence[BadFile]) -> DataError:
    """What ends a run, once it is saved, where a store does not answer."""
    more = f" and {len(files) - 1} more images" if len(files) > 1 else ""
    return DataError(f"{files[0].path!r}{more} {printable(files[0].reason)}. Go on once the store answers")


def let_pillow_open(max_pixels: int) -> None:
    """Raise Pillow's own limit, at twice which it refuses to open a file, where somebody allows more than that."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


def read_size(file: str | bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) as stored, from the header alone, of a path or a file's bytes; raises one of `DECODE_ERRORS`."""
    with open_image(file) as image:
        width, height = stored_size(image)
        if image.mode not in _MODES and not (image.mode == "I" and image.format in _DEEP_GREY):
            raise ValueError(f"has pixels of type {image.mode}, which has no agreed meaning as RGB")
    if width * height > max_pixels:
        raise ValueError(
            f"claims {width} x {height} pixels, more than the limit of {max_pixels:,} pixels (--max-pixels)"
        )
    return height, width


def decode_rgb(file: str | bytes) -> Image.Image:
    """A whole file, by its path or its bytes, as an RGB image as stored; raises one of `DECODE_ERRORS` if damaged."""
    with open_image(file) as image:
        if is_deep(image):
            return Image.fromarray(to_grey(image)).convert("RGB")
        pixels = _unturned(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else image
        return pixels.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an opened file is 16-bit grey."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in _DEEP_GREY)


def to_grey(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W) of an opened file, or of its present frame, that is 8-bit or 16-bit grey."""
    deep = is_deep(image)
    pixels = _unturned(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else image
    if not deep:
        return np.asarray(pixels.convert("L"))
    # Pillow's own conversion clips at 255, which turns most 16-bit pictures white.
    return np.rint(np.asarray(pixels, dtype=np.float32) * np.float32(255 / 65535)).astype(np.uint8)


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the pixels in the file: Pillow gives those of a TIFF as its orientation tag turns them."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(image.tag_v2[TiffImagePlugin.IMAGEWIDTH]), int(image.tag_v2[TiffImagePlugin.IMAGELENGTH])
    return image.size


def _unturned(image: TiffImagePlugin.TiffImageFile) -> Image.Image:
    """The pixels of a TIFF as stored. Pillow turns TIFFs, alone of all formats, by their tag (or XMP) on loading."""
    size = stored_size(image)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    image.load()
    turned = orientation in _UNDO and image.getexif().get(ExifTags.Base.Orientation) != orientation
    pixels = image.transpose(_UNDO[orientation]) if turned else image
    if pixels.size != size:
        raise ValueError(f"is {pixels.size[0]} x {pixels.size[1]} pixels, but its header says {size[0]} x {size[1]}")
    return pixels


@contextmanager
def open_image(file: str | bytes) -> Iterator[Image.Image]:
    """A file of a known format, by its path or bytes, of which the header has been read."""
    opened = io.BytesIO(file) if isinstance(file, bytes) else open_regular(file)
    with opened, Image.open(opened, formats=_FORMATS) as image:
        if min(image.size) < 1:
            raise ValueError("holds no pixels")
        yield image


def describe(error: BaseException) -> str:
    """An error of Pillow's as a short reason without the path."""
    if isinstance(error, FileNotFoundError):
        return "is gone, or is a link that leads nowhere"
    if isinstance(error, PermissionError):
        return "may not be read by this user"
    if type(error).__name__ == "UnidentifiedImageError":
        return "is not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return "claims far more pixels than any picture has (a decompression bomb)"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, MemoryError):
        return "asks for more memory than there is"
    return str(error) or type(error).__name__
