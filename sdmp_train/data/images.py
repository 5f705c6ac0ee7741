"""The one rule for image files, and Pillow's side of it.

Every file becomes RGB uint8: EXIF orientation ignored, grey replicated, CMYK converted, alpha dropped, palettes looked
up, 16-bit scaled to 8, the first frame of several. DALI's decoder computes the same bytes (checked by the tests), so
the index, which reads headers with Pillow, speaks for both loaders.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Suffixes taken for images, in any case. GIF is not among them: DALI does not decode it."""

MAX_PIXELS = 89_478_485
"""Largest width * height accepted, Pillow's own warning threshold (a quarter of a GiB as RGB)."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"})


DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises on damaged files (SyntaxError: broken PNG)."""


class DataError(ValueError):
    """The data folder cannot be used as it is; the message says what to do. Ends the program with exit code 2."""

    exit_code = 2


class TooManyBadFiles(DataError):
    """With `on_bad="skip"`: more files are bad than `max_bad_frac` allows. Exit code 4."""

    exit_code = 4


@dataclass(frozen=True)
class BadFile:
    path: str
    reason: str


def read_size(path: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) from the header alone; raises one of `DECODE_ERRORS`."""
    with Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        if image.mode not in _MODES:
            raise ValueError(f"has pixels of type {image.mode}, which has no agreed meaning as RGB")
    if width * height > max_pixels:
        raise ValueError(f"claims {width} x {height} pixels, more than the limit of {max_pixels:,} pixels")
    return height, width


def decode_rgb(path: str) -> Image.Image:
    """The whole file as an RGB image; raises one of `DECODE_ERRORS` where it is damaged."""
    with Image.open(path, formats=_FORMATS) as image:
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips at 255, which turns most 16-bit pictures white.
            scaled = np.rint(np.asarray(image, dtype=np.float32) * np.float32(255 / 65535)).astype(np.uint8)
            return Image.fromarray(scaled).convert("RGB")
        return image.convert("RGB")


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
    return str(error) or type(error).__name__
