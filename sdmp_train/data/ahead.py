"""Batches made ahead of the training loop, in a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from queue import Empty, Full, Queue

import torch

from .batch import Batch

_WAITING_BATCHES = 2
_LOOK_SECONDS = 0.1
"""How often a thread that has nothing to do looks whether it is still wanted."""


class Ahead:
    """Calls `make(0)`, `make(1)`, ... in a thread, at most two batches ahead of the caller; iterate once.

    What drawing, feeding and augmenting cost is then spent while a step runs, not when the next one needs its batch.
    On a GPU everything is queued on a stream of the thread's own, and the caller's stream waits for it, not the host.
    An error of `make` is raised where its batch would have come.
    """

    def __init__(self, make: Callable[[int], Batch], count: int, device: torch.device) -> None:
        self._make = make
        self._count = count
        self._device = device
        self._ready: Queue[tuple[Batch | BaseException, torch.cuda.Event | None]] = Queue(_WAITING_BATCHES)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batches ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._count):
            found = self._take()
            if found is None:
                return
            batch, made = found
            if isinstance(batch, BaseException):
                raise batch
            if made is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(made)
                for view in batch.views:
                    view.record_stream(stream)
            yield batch

    def ready(self) -> int:
        """Batches that wait to be taken."""
        return self._ready.qsize()

    def close(self) -> None:
        """End the thread; what it has made and nobody took is dropped. May be called twice."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _take(self) -> tuple[Batch | BaseException, torch.cuda.Event | None] | None:
        """The next batch; None once this has been closed."""
        while not self._ended.is_set():
            try:
                return self._ready.get(timeout=_LOOK_SECONDS)
            except Empty:
                pass
        return None

    def _put(self, item: tuple[Batch | BaseException, torch.cuda.Event | None]) -> None:
        while not self._ended.is_set():
            try:
                return self._ready.put(item, timeout=_LOOK_SECONDS)
            except Full:
                pass

    def _work(self) -> None:
        gpu = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if gpu else None
        with torch.cuda.stream(stream) if gpu else nullcontext():
            for position in range(self._count):
                if self._ended.is_set():
                    return
                made = None
                try:
                    batch: Batch | BaseException = self._make(position)
                    if stream is not None:
                        made = torch.cuda.Event()
                        made.record(stream)
                except BaseException as error:
                    batch = error
                self._put((batch, made))
                if isinstance(batch, BaseException):
                    return
