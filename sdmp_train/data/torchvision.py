"""The portable loader: Pillow decodes, torchvision augments, in the worker processes of a torch DataLoader.

It carries out the same numbers as DALI and is the yardstick that DALI is measured against. A worker builds whole
batches and draws nothing, so their number changes nothing but the speed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from .batch import Batch, Loader
from .images import DECODE_ERRORS, BadFile, describe
from .index import bad_files_error, open_row
from .schedule import Schedule
from .views import EvalParams, EvalView, ViewParams, ViewRecipe

_PREFETCH_BATCHES = 2
_INTERPOLATION = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


class TorchvisionLoader(Loader):
    """Carries out a schedule with `workers` processes, or in this process with none."""

    name = "torchvision"

    def __init__(self, schedule: Schedule, *, device: torch.device, workers: int, why: str) -> None:
        self.why = why
        self._schedule = schedule
        self._device = device
        self._workers = workers
        self._batches: Any = None
        self._iteration = 0

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        loader = DataLoader(
            _Batches(self._schedule),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=_PREFETCH_BATCHES if self._workers else None,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_ignore_signals,
            # Or torch would take a number from the global generator for seeds that no worker uses.
            generator=torch.Generator(),
        )
        with _signals_wait():
            self._batches = iter(loader)
        mine = self._iteration
        for position in range(len(self)):
            if self._iteration != mine:
                return
            views, bad = next(self._batches)
            if bad:
                raise bad_files_error(bad)
            rows = self._schedule.rows(position)
            yield Batch(
                views=tuple(view.to(self._device, non_blocking=True).permute(0, 3, 1, 2) for view in views),
                ids=torch.from_numpy(rows.astype(np.int64)),
                labels=torch.from_numpy(self._schedule.index.labels[rows]),
            )

    def close(self) -> None:
        # An iteration still under way sees the new number and ends. Deleting torch's iterator ends its workers.
        self._iteration += 1
        self._batches = None


@dataclass
class _Batches(Dataset[tuple[list[Tensor], list[BadFile]]]):
    """Item `position` is the whole batch; damaged files come back as values, not as tracebacks."""

    schedule: Schedule

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, position: int) -> tuple[list[Tensor], list[BadFile]]:
        schedule = self.schedule
        rows = schedule.rows(position)
        params = schedule.params(position, rows)
        views = [np.empty((len(rows), r.size_px, r.size_px, 3), dtype=np.uint8) for r in schedule.recipes]
        bad: list[BadFile] = []
        for i, row in enumerate(rows):
            image = self._decode(int(row), bad)
            if image is None:
                continue
            for view, recipe, drawn in zip(views, schedule.recipes, params, strict=True):
                view[i] = _make_view(image, recipe, drawn, i)
        return [torch.from_numpy(view) for view in views], bad

    def _decode(self, row: int, bad: list[BadFile]) -> Image.Image | None:
        index = self.schedule.index
        try:
            return open_row(index, row)
        except DECODE_ERRORS as error:
            bad.append(BadFile(index.path(row), describe(error)))
            return None


def _make_view(
    image: Image.Image, recipe: ViewRecipe | EvalView, drawn: ViewParams | EvalParams, i: int
) -> NDArray[np.uint8]:
    if isinstance(drawn, EvalParams):
        return _eval_view(image, recipe, drawn, i)
    return _random_view(image, recipe, drawn, i)


def _eval_view(image: Image.Image, view: ViewRecipe | EvalView, drawn: EvalParams, i: int) -> NDArray[np.uint8]:
    image = tv.resize(image, drawn.resized[i].tolist(), _INTERPOLATION[view.interpolation])
    top, left = drawn.corner[i].tolist()
    return np.asarray(tv.crop(image, top, left, view.size_px, view.size_px))


def _random_view(image: Image.Image, recipe: ViewRecipe | EvalView, drawn: ViewParams, i: int) -> NDArray[np.uint8]:
    top, left, height, width = drawn.box[i].tolist()
    size = [recipe.size_px, recipe.size_px]
    view = tv.resized_crop(image, top, left, height, width, size, _INTERPOLATION[recipe.interpolation])
    for adjust, value, neutral in (
        (tv.adjust_brightness, drawn.brightness[i], 1),
        (tv.adjust_contrast, drawn.contrast[i], 1),
        (tv.adjust_saturation, drawn.saturation[i], 1),
        (tv.adjust_hue, drawn.hue[i], 0),
    ):
        if value != neutral:
            view = adjust(view, float(value))
    if drawn.gray[i]:
        view = tv.rgb_to_grayscale(view, num_output_channels=3)
    if drawn.sigma[i] > 0:
        # Pillow's own blur, as in the reference recipes; torchvision's goes through a tensor and is slower.
        view = view.filter(ImageFilter.GaussianBlur(float(drawn.sigma[i])))
    if drawn.solarize[i]:
        view = tv.solarize(view, 128)
    if drawn.flip[i]:
        view = tv.horizontal_flip(view)
    return np.asarray(view)


_SIGNALS = {signal.SIGINT, signal.SIGTERM} | {
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
}
"""What a terminal or a batch system sends to every process of a group."""


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Processes started in this block begin with these signals blocked: before they ignore them, one would end them.

    The signals that arrive for this process meanwhile are delivered at the end of the block.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int) -> None:
    """Signals reach every process of the group; the main process decides, and workers go when it does."""
    for number in _SIGNALS:
        # This also drops one that has waited since the process began.
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
