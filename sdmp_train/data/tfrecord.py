"""TFRecord files of `tf.train.Example` with encoded images, read without TensorFlow.

A record is its length (8 bytes, little endian), a masked CRC-32C of that, the data, and a masked CRC-32C of the data.
Taken are the images in `image/encoded` (ImageNet's records) or `image` (TensorFlow Datasets'), and the class in
`image/class/label` or `label`. Where an image lies is remembered (`walks.py`), and read from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ..text import printable
from .images import DataError
from .walks import Look, Walk

_IMAGES = ("image/encoded", "image")
_LABELS = ("image/class/label", "label")
_NAME = re.compile(r"[^.].*\.tfrecords?(-\d+-of-\d+)?|[^.]*-\d{5}-of-\d{5}", re.IGNORECASE)
_LANE = 512
"""Bytes that are checked one after another, while all such parts of a record are checked side by side."""

Part = tuple[int, int]
"""From, to: bytes of a record."""


def is_tfrecord(name: str) -> bool:
    """Whether a file is called as records are: `x.tfrecord`, `x.tfrecord-00000-of-00008`, `train-00000-of-01024`."""
    return _NAME.fullmatch(name) is not None


def walk_records(raw: IO[bytes], shard: str, size: int, stamp: int, look: Look, deep: bool) -> Walk:
    """What a file of records holds; `deep`: check the data of each record against its CRC too.

    Raises:
        DataError: it holds no records of images, or is compressed.
        OSError, ValueError: it cannot be read.
    """
    walk, at, number = Walk(stamp), 0, 0
    while at < size:
        head = raw.read(12)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 12 or _masked(head[:8]) != int.from_bytes(head[8:], "little"):
            if not walk.images and not walk.problems:
                raise DataError(f"{printable(shard)} cannot be read as an uncompressed TFRecord file")
            walk.problems.append(("", f"is damaged: no record begins at byte {at:,}"))
            break
        if at + length + 16 > size:
            walk.problems.append(("", f"is cut: record {number} ends behind it"))
            break
        data, check = raw.read(length), raw.read(4)
        if deep and _masked(data) != int.from_bytes(check, "little"):
            walk.problems.append((f"/{number:08d}", "is damaged: the check sum of its record is another"))
        else:
            _take(data, at + 12, number, look, walk)
        at, number = at + length + 16, number + 1
    return walk


def _take(data: bytes, start: int, number: int, look: Look, walk: Walk) -> None:
    name = f"{number:08d}.image"
    try:
        features = dict(_features(data))
        (first, end), *_ = [features[key] for key in _IMAGES if key in features]
        label = next((_first_number(data, *features[key]) for key in _LABELS if key in features), None)
    except (IndexError, ValueError, UnicodeDecodeError):
        walk.problems.append((f"/{number:08d}", "is no tf.train.Example with image/encoded or image"))
        return
    walk.images.append((name, start + first, end - first))
    if label is not None:
        walk.classes[name.removesuffix(".image")] = str(label)
    if (found := look(data[first:end])) is not None:
        walk.checked[name] = found


def _features(data: bytes) -> Iterator[tuple[str, Part]]:
    """Name, and where the value lies: the first of a list of bytes, or a list of whole numbers.

    Example {1: Features}; Features {1: entry}*; entry {1: name, 2: Feature}; Feature {1: bytes list | 3: int64 list};
    lists {1: value}*, numbers packed or one by one.
    """
    for features in _fields(data, (0, len(data)), 1):
        for entry in _fields(data, features, 1):
            first, end = next(_fields(data, entry, 1), (0, 0))
            name = data[first:end].decode("utf-8")
            for feature, kind in ((found, kind) for found in _fields(data, entry, 2) for kind in (1, 3)):
                for values in _fields(data, feature, kind):
                    value = next(_fields(data, values, 1), None)
                    if value is not None:
                        yield name, value


def _fields(data: bytes, part: Part, wanted: int) -> Iterator[Part]:
    """Where the fields of a number lie in a message; a whole number is the bytes that write it."""
    at, end = part
    while at < end:
        key, at = _varint(data, at, end)
        if key & 7 == 0:
            first, (_, at) = at, _varint(data, at, end)
        elif key & 7 == 2:
            length, first = _varint(data, at, end)
            at = first + length
        elif key & 7 in (1, 5):
            first, at = at, at + (8 if key & 7 == 1 else 4)
        else:
            raise ValueError("a field of no known kind")
        if at > end:
            raise ValueError("a field is cut")
        if key >> 3 == wanted:
            yield first, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A whole number and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is cut")


def _first_number(data: bytes, first: int, end: int) -> int:
    value = _varint(data, first, end)[0]
    return value - 2**64 if value >= 2**63 else value


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720)."""
    if len(data) < 4:
        register = 0xFFFFFFFF
        for byte in data:
            register = int(_table()[(register ^ byte) & 255]) ^ register >> 8
        return register ^ 0xFFFFFFFF
    # A register of ones is one of zeros where the first four bytes are inverted; and zeros before do nothing to it.
    padded = np.zeros(-(-len(data) // _LANE) * _LANE, dtype=np.uint8)
    padded[-len(data) :] = np.frombuffer(data, dtype=np.uint8)
    padded[len(padded) - len(data) :][:4] ^= 255
    registers, table = np.zeros(len(padded) // _LANE, dtype=np.uint32), _table()
    for column in padded.reshape(-1, _LANE).T:
        registers = table[(registers ^ column) & 255] ^ registers >> 8
    (a, b, c, d), total = _behind_a_lane(), 0
    for register in registers.tolist():
        total = a[total & 255] ^ b[total >> 8 & 255] ^ c[total >> 16 & 255] ^ d[total >> 24] ^ register
    return total ^ 0xFFFFFFFF


@cache
def _table() -> NDArray[np.uint32]:
    """What a byte does to the register."""
    table: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(0x82F63B78)
    return table


@cache
def _behind_a_lane() -> list[list[int]]:
    """What becomes of each byte of a register behind `_LANE` zeros."""
    bytes_ = np.arange(256, dtype=np.uint32)
    registers: NDArray[np.uint32] = np.stack([bytes_ << np.uint32(8 * place) for place in range(4)])
    for _ in range(_LANE):
        registers = _table()[registers & 255] ^ registers >> 8
    lists: list[list[int]] = registers.tolist()
    return lists
