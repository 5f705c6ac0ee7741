"""CIFAR's binary versions, written as their page describes them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

NAMES = {
    10: ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    100: [f"fine {number:02d}" for number in range(100)],
}


def files(kind: int, each: int = 4) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """The files of a small set of `each` images a part, its (N, 32, 32, 3) pixels and its fine labels, training images
    first."""
    rng = np.random.default_rng(kind)
    parts = (
        [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"] if kind == 10 else ["train.bin", "test.bin"]
    )
    pixels = rng.integers(0, 256, (each * len(parts), 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, kind, len(pixels))
    held = {"batches.meta.txt" if kind == 10 else "fine_label_names.txt": "\n".join([*NAMES[kind], "", ""]).encode()}
    for number, part in enumerate(parts):
        record = b""
        for row in range(each * number, each * number + each):
            record += (b"" if kind == 10 else b"\x13") + bytes([int(labels[row])])
            record += b"".join(pixels[row, :, :, channel].tobytes() for channel in range(3))
        held[part] = record
    return held, pixels, labels


def written(folder: Path, kind: int, packed: bool = False, each: int = 4) -> Path:
    """The archive as it is downloaded, or the folder with its files."""
    held, _, _ = files(kind, each)
    if not packed:
        for name, data in held.items():
            (folder / name).write_bytes(data)
        return folder
    path = folder / f"cifar-{kind}-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in held.items():
            member = tarfile.TarInfo(f"cifar-{kind}-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
