"""Images of any number of channels from 1 to 16, and the rule for each.

1: the luma (ITU-R 601) of the RGB image that `images.py` makes, so that grey stays what it is. 3: that image. 4: RGBA
files too. Any but 3: a `.npy` file of (H, W, C) uint8 or uint16 (for 1 also (H, W)); from 2 on also a TIFF with as many
grey frames. 16 bits are scaled to 8, as everywhere: value * 255 / 65535, rounded.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from ..reading import open_regular
from .images import MAX_PIXELS, SUFFIXES, OtherChannels, decode_rgb, open_image, read_size, stored_size, to_grey

NPY = b"\x93NUMPY"


def suffixes_of(channels: int) -> tuple[str, ...]:
    """Suffixes taken for images of so many channels."""
    return SUFFIXES if channels == 3 else (*SUFFIXES, ".npy")


def size_of(file: str | bytes, channels: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of a file from its header, by its path or bytes; raises one of `DECODE_ERRORS`."""
    if channels == 3:
        return read_size(file, max_pixels)
    start = file[: len(NPY)] if isinstance(file, bytes) else _start(file)
    if start != NPY:
        size = read_size(file, max_pixels)
        if channels != 1:
            with open_image(file) as image:
                _check_channels(image, channels)
        return size
    height, width = _npy(_bytes(file), channels).shape[:2]
    if height * width > max_pixels:
        raise ValueError(f"has {width} x {height} pixels, more than the limit of {max_pixels:,} pixels (--max-pixels)")
    return height, width


def decode(file: str | bytes, channels: int) -> NDArray[np.uint8]:
    """(H, W, channels) uint8 of a whole file, by its path or bytes; raises one of `DECODE_ERRORS`."""
    if channels == 3:
        return np.asarray(decode_rgb(file))
    data = _bytes(file)
    if data.startswith(NPY):
        return _eight_bits(_npy(data, channels))
    if channels == 1:
        return np.asarray(decode_rgb(data).convert("L"))[:, :, None]
    with open_image(data) as image:
        _check_channels(image, channels)
        if image.mode == "RGBA":
            return np.asarray(image)
        size, found = stored_size(image), []
        for frame in range(channels):
            image.seek(frame)
            if image.mode not in ("L", "1") and not image.mode.startswith("I;16"):
                raise ValueError(f"frame {frame} has pixels of type {image.mode}; expected 8 or 16 bits of grey")
            if stored_size(image) != size:
                raise ValueError(f"frame {frame} is of another size than the first")
            found.append(to_grey(image))
        return np.stack(found, axis=2)


def _check_channels(image: Image.Image, channels: int) -> None:
    """Raise `OtherChannels` unless an opened file is RGBA for 4 channels, or a TIFF of as many frames."""
    frames = getattr(image, "n_frames", 1)
    if (channels == 4 and image.mode == "RGBA") or (
        isinstance(image, TiffImagePlugin.TiffImageFile) and frames == channels
    ):
        return
    what = f"{frames} frames" if frames > 1 else f"pixels of type {image.mode}"
    raise OtherChannels(
        f"has {what}; expected {channels} channels: a TIFF with as many grey frames, or .npy (H, W, {channels})"
    )


def _eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values.astype(np.uint8)
    return np.rint(values.astype(np.float32) * np.float32(255 / 65535)).astype(np.uint8)


def _npy(data: bytes, channels: int) -> NDArray[np.generic]:
    """(H, W, C) without a copy. Nothing in the header is believed, and nothing in the file is run."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is of version {version} of the .npy format; expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    except Exception as error:  # numpy lets through whatever its reader of the header raises
        raise ValueError("has a header that makes no sense") from error
    shape = (*shape, 1) if channels == 1 and len(shape) == 2 else shape
    if len(shape) != 3 or shape[2] != channels or min(shape) < 1 or dtype not in (np.uint8, np.uint16) or fortran:
        order = " in Fortran order" if fortran else ""
        raise ValueError(f"holds {shape} {dtype}{order}; expected (H, W, {channels}) uint8 or uint16")
    held = len(data) - stream.tell()
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if held != needed:
        raise ValueError(f"holds {held} bytes of pixels; expected {needed}")
    return np.frombuffer(data, dtype=dtype, offset=stream.tell()).reshape(shape)


def _bytes(file: str | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    with open_regular(file) as opened:
        return opened.read()


def _start(path: str) -> bytes:
    with open_regular(path) as opened:
        return opened.read(len(NPY))
