"""The loader of sets that fit in memory: every image is decoded once and kept as uint8 on the device.

One flat buffer holds the images one after another, so that they may be of many sizes. A step then costs what `augment`
costs: no file is read, nothing is decoded. The pixels are Pillow's, and so, on a CPU, are the bytes of the views those
of the other loaders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sdmp_kernels import FlatImages, augment

from .ahead import Ahead
from .batch import Batch, Loader, made_batch, paint
from .images import DECODE_ERRORS, BadFile, DataError, bad_file
from .index import bad_files_error, open_row
from .schedule import Schedule
from .source import Source, at_once, channels_of

_CHUNK = 64
"""Images a thread decodes before it hands them on."""
_SHARE = 0.8
"""Of the memory that is free, what images may take: the training needs some too."""


class ResidentLoader(Loader):
    """Carries out a schedule from images that this object holds; a thread of ours makes the views ahead."""

    name = "resident"

    def __init__(self, schedule: Schedule, *, device: torch.device, workers: int, why: str) -> None:
        self.why = why
        self._schedule = schedule
        self._device = device
        self._workers = max(workers, at_once(schedule.source))
        self._ahead: Ahead | None = None
        self._images: Images | None = self._hold()

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        self._end()
        if self._images is None:
            self._images = self._hold()
        self._ahead = Ahead(partial(self._make, self._images), len(self), self._device)
        return iter(self._ahead)

    def ready(self) -> int | None:
        return None if self._ahead is None else self._ahead.ready()

    def close(self) -> None:
        self._end()
        self._images = None

    def _end(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _hold(self) -> Images:
        check_memory(self._schedule.source, self._device)
        images = Images(self._schedule.source, self._device, self._workers)
        lost = [images.lost[row] for row in sorted(images.lost)]
        if lost and (self._schedule.fill is None or any(file.unreachable for file in lost)):
            raise bad_files_error(lost, len(self._schedule.source))
        return images

    def _make(self, images: Images, position: int) -> Batch:
        rows = self._schedule.rows(position)
        chosen = images.take(rows)
        views = [
            augment(chosen, drawn.to(self._device), recipe.size_px, interpolation=recipe.interpolation)
            for recipe, drawn in zip(self._schedule.recipes, self._schedule.draws(position, rows), strict=True)
        ]
        lost = {place: images.lost[row] for place, row in enumerate(rows.tolist()) if row in images.lost}
        if self._schedule.fill is not None:
            paint(views, lost, self._schedule.fill)
        return made_batch(views, rows, self._schedule.source.labels, lost)


class Images:
    """All images of a source, decoded.

    Attributes:
        pixels: (bytes,) uint8 on the device: the images one after another, each (H, W, C).
        offsets: (N + 1,) int64 on the CPU: where each begins in `pixels`, and where the last ends.
        lost: row -> the file that could not be decoded, in whose place there are pixels of no meaning.
    """

    def __init__(self, source: Source, device: torch.device, workers: int) -> None:
        self._heights, self._widths, self._channels = source.heights, source.widths, channels_of(source)
        self.offsets = _offsets(source)
        self.pixels = torch.empty(int(self.offsets[-1]), dtype=torch.uint8, device=device)
        firsts = range(0, len(source), _CHUNK)
        self.lost: dict[int, BadFile] = {}
        with ThreadPoolExecutor(workers) as pool:
            for found in pool.map(partial(self._decode, source), firsts):
                self.lost |= found

    def take(self, rows: NDArray[np.int64]) -> FlatImages:
        """Images of rows: the buffer, and where in it they lie. No pixel is copied."""
        offsets, heights, widths = (
            torch.from_numpy(table).to(self.pixels.device, non_blocking=True)
            for table in (
                self.offsets[rows],
                self._heights[rows].astype(np.int32),
                self._widths[rows].astype(np.int32),
            )
        )
        return FlatImages(self.pixels, offsets, heights, widths, self._channels)

    def _decode(self, source: Source, first: int) -> dict[int, BadFile]:
        """Decode the chunk that begins with row `first` into its place; returns the damaged files."""
        end = min(first + _CHUNK, len(source))
        start = int(self.offsets[first])
        place = self.pixels[start : int(self.offsets[end])]
        chunk = torch.empty(place.shape, dtype=torch.uint8) if place.is_cuda else place
        target, lost = chunk.numpy(), dict[int, BadFile]()
        for row in range(first, end):
            part = target[self.offsets[row] - start : self.offsets[row + 1] - start]
            try:
                part[:] = open_row(source, row).reshape(-1)
            except DECODE_ERRORS as error:
                lost[row] = bad_file(source.name(row), error)
        if chunk is not place:
            place.copy_(chunk)
        return lost


def check_memory(source: Source, device: torch.device) -> None:
    """Refuse a set that does not fit, before anything is decoded.

    Raises:
        DataError: naming what the images take and what is free.
    """
    needed, free = int(_offsets(source)[-1]), free_bytes(device)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    if free is not None and needed * sharing > _SHARE * free:
        each = f" in each of {sharing} processes" if sharing > 1 else ""
        raise DataError(
            f"loader='resident' cannot be used: {len(source):,} decoded images take {_gib(needed)}{each}, but "
            f"{_gib(free)} are free on {device}, of which images may take {_SHARE:.0%}; use loader='auto', or store "
            "smaller images"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that may still be taken on a device: a GPU's own, or the host's within the limit of this container.

    None where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [bytes_ for bytes_ in (_available(), _left_in_container()) if bytes_ is not None]
    return min(known, default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _left_in_container() -> int | None:
    """Of the limit of this process's control group (version 2), what nothing but the file cache holds."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(counts.get("inactive_file", 0))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _offsets(source: Source) -> NDArray[np.int64]:
    sizes = source.heights.astype(np.int64) * source.widths * channels_of(source)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
