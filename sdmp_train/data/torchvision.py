"""The portable loader: Pillow decodes and `augment` makes the views, in the worker processes of a torch DataLoader.

It gives what the DALI loader gives. A worker builds whole batches, so the number of workers changes nothing but the
speed.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sdmp_kernels import augment
from sdmp_kernels._backends import announce
from sdmp_kernels.views import view_size

from .batch import Batch, Loader, Lost, made_batch, paint
from .host import HostTransform, seeded
from .images import DECODE_ERRORS, BadFile, DataError, bad_file
from .index import bad_files_error, open_row
from .schedule import Schedule, TrainSchedule
from .source import at_once, channels_of

_PREFETCH_BATCHES = 2
_DECODED_AT_ONCE = 16
"""Images of a batch that are held decoded: large photographs take tens of megabytes each."""


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
        announce("augment", "cpu")  # or each of the processes would
        loader = DataLoader(
            PillowBatches(self._schedule),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=_PREFETCH_BATCHES if self._workers else None,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_ignore_signals,
            # Or torch would take a number from the global generator for seeds that no worker uses.
            generator=torch.Generator(),
        )
        with _signals_wait(), _garbage_stays(), _deaths_wait():
            self._batches = iter(loader)
        mine = self._iteration
        for position in range(len(self)):
            if self._iteration != mine:
                return
            views, lost = self._next()
            if lost and self._schedule.fill is None:
                raise bad_files_error([lost[place] for place in sorted(lost)], len(self._schedule.source))
            moved = [view.to(self._device, non_blocking=True) for view in views]
            yield made_batch(moved, self._schedule.rows(position), self._schedule.source.labels, lost)

    def _next(self) -> tuple[list[Tensor], Lost]:
        try:
            batch: tuple[list[Tensor], Lost] = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            if "unable to allocate shared memory" in str(error):
                raise DataError(
                    "decoding processes hand batches on in shared memory, and /dev/shm has no room for another one; "
                    "give fewer --workers (0 decodes in this process), or more of it (docker run --shm-size=8g)"
                ) from error
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            if ": Caught " in said or (isinstance(error, RuntimeError) and "DataLoader worker" not in said):
                raise  # the process lives, and hands on an error of its own
            raise DataError(
                f"a decoding process has died ({said}). Where memory ran out (see the kernel's "
                "log), give fewer --workers; where a file makes the decoder crash, `sdmp_train verify` finds it"
            ) from error
        return batch

    def ready(self) -> int | None:
        queue = getattr(self._batches, "_data_queue", None)  # torch's own, of its processes
        try:
            return None if queue is None else int(queue.qsize())
        except NotImplementedError:  # macOS
            return None

    def close(self) -> None:
        # An iteration still under way sees the new number and ends.
        self._iteration += 1
        batches, self._batches = self._batches, None
        # Deleting torch's iterator would end its workers too, but where an error's traceback holds it nobody does; and
        # the exit of the program would wait for processes that ignore its signals.
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


@dataclass
class PillowBatches(Dataset[tuple[list[Tensor], Lost]]):
    """Item `position` is the whole batch, decoded by Pillow; damaged files come back as values, not as tracebacks."""

    schedule: Schedule

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, position: int) -> tuple[list[Tensor], Lost]:
        schedule = self.schedule
        rows = schedule.rows(position)
        draws = schedule.draws(position, rows)
        shape = len(rows), channels_of(schedule.source)
        views = [_room_for(*shape, *view_size(recipe.size_px)) for recipe in schedule.recipes]
        lost: dict[int, BadFile] = {}
        for first in range(0, len(rows), _DECODED_AT_ONCE):
            some = slice(first, first + _DECODED_AT_ONCE)
            images = self._decoded(range(first, first + len(rows[some])), rows[some], lost)
            if lost and schedule.fill is None:
                continue  # the batch is lost, but the other damaged files of it are named too
            for view, recipe, drawn in zip(views, schedule.recipes, draws, strict=True):
                augment(images, drawn[some], recipe.size_px, interpolation=recipe.interpolation, out=view[some])
        if isinstance(schedule, TrainSchedule) and schedule.host is not None and not (lost and schedule.fill is None):
            transform(views[0], schedule.host, schedule.host_seeds(position, len(rows)))
        if schedule.fill is not None:
            paint(views, lost, schedule.fill)
        return views, lost

    def _decoded(self, places: Iterable[int], rows: NDArray[np.int64], lost: dict[int, BadFile]) -> list[Tensor]:
        """Some images, in threads where their source waits for a network."""
        threads, decode = at_once(self.schedule.source), partial(self._decode, lost=lost)
        if threads == 1:
            return list(map(decode, places, rows.tolist()))
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(decode, places, rows.tolist()))

    def _decode(self, place: int, row: int, lost: dict[int, BadFile]) -> Tensor:
        """(H, W, 3) uint8; black where the file is damaged, which is noted in `lost`."""
        source = self.schedule.source
        try:
            return torch.from_numpy(np.array(open_row(source, row)))
        except DECODE_ERRORS as error:
            lost[place] = bad_file(source.name(row), error)
            size = (int(source.heights[row]), int(source.widths[row])) if self.schedule.fill is not None else (0, 0)
            return torch.zeros(*size, channels_of(source), dtype=torch.uint8)


def _room_for(n: int, channels: int, height: int, width: int) -> Tensor:
    """(n, channels, height, width) uint8, channels_last; of a decoding process in the memory that it shares.

    Torch would move it there while it hands it on, in a thread whose error nobody hears: the run would wait for ever.
    """
    if get_worker_info() is None:
        return torch.empty(n, channels, height, width, dtype=torch.uint8, memory_format=torch.channels_last)
    shared = torch.UntypedStorage._new_shared(n * height * width * channels)
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(n, height, width, channels).permute(0, 3, 1, 2)


def transform(view: Tensor, host: HostTransform, seeds: NDArray[np.uint32]) -> None:
    """Change (N, 3, H, W) uint8 views in place, each image with numbers of its own."""
    for image, seed in zip(view.permute(0, 2, 3, 1), seeds.tolist(), strict=True):
        with seeded(seed):
            image.copy_(torch.from_numpy(np.array(host(image.numpy()))))


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


@contextmanager
def _deaths_wait() -> Iterator[None]:
    """After this block a worker's death is an error of `next` alone, which torch also notices there.

    Torch's handler of SIGCHLD raises in the middle of whatever runs. It is set by the first `DataLoader` with workers
    in a process, which may have been somebody else's, long ago.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if _is_torchs(signal.getsignal(signal.SIGCHLD)):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None or _is_torchs(before) else before)


def _is_torchs(handler: object) -> bool:
    return getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"


@contextmanager
def _garbage_stays() -> Iterator[None]:
    """Processes forked in this block never collect what was garbage before it.

    A DALI pipeline among it would wait for threads that a forked process does not have.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _ignore_signals(worker: int) -> None:
    """Signals reach every process of the group; the main process decides, and workers go when it does."""
    for number in _SIGNALS:
        # This also drops one that has waited since the process began.
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
