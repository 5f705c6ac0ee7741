"""What keeps a run safe from bad numbers and signals without the host ever waiting for the device in a step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .stop import StopRequest as StopRequest


class BufferGuard:
    """Batch-norm statistics that a forward pass has changed, and that a non-finite step must not keep.

    All buffers of one dtype become views of one storage, so that keeping and restoring them is one kernel each.
    """

    def __init__(self, *modules: nn.Module) -> None:
        places: dict[torch.dtype, list[tuple[nn.Module, str]]] = {}
        for module in modules:
            for part in module.modules():
                for name, buffer in part._buffers.items():
                    if buffer is not None:
                        places.setdefault(buffer.dtype, []).append((part, name))
        self._storages = [merge(found) for found in places.values()]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Remember the buffers as they are."""
        self._kept = [storage.clone() for storage in self._storages]

    def forget(self) -> None:
        """Let go of what `keep` remembered."""
        self._kept = []

    def restore(self, bad: Tensor) -> None:
        """Put back what `keep` remembered, where `bad` (0-dim bool on the device) is true."""
        for storage, kept in zip(self._storages, self._kept, strict=True):
            storage.copy_(torch.where(bad, kept, storage))


def merge(places: list[tuple[nn.Module, str]]) -> Tensor:
    """Move the buffers at `places` into one storage and make them views of it."""
    buffers = [part._buffers[name] for part, name in places]
    storage = torch.cat([buffer.reshape(-1) for buffer in buffers if buffer is not None])
    start = 0
    for (part, name), buffer in zip(places, buffers, strict=True):
        if buffer is not None:
            # .data: a view would share the storage's count of changes, and autograd would take every other buffer that
            # it saved (a table of relative positions) for changed as soon as a batch norm counts its batch.
            part._buffers[name] = storage[start : start + buffer.numel()].view(buffer.shape).data
            start += buffer.numel()
    return storage


ASKED, FAILED = 1.0, 2.0
"""The second flag of a step: a rank was asked to stop; a rank had no batch."""


def stop_flag(stop: StopRequest) -> float:
    """What this rank has to say about going on: 0, `ASKED` or `FAILED`."""
    return FAILED if stop.failure is not None else ASKED * stop.asked


@dataclass(frozen=True)
class StepReport:
    """What the host learns of a step: its number, which images it saw, whether it was bad or asked to stop."""

    step: int
    ids: Tensor
    bad: bool
    stop: bool
    failed: bool
    """Some rank had no batch for it: it changed nothing, and is to be made again."""


class LateFlags:
    """Carries a step's flags to the host one step late, so that the device always has the next step queued."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, step: int, ids: Tensor, flags: Tensor) -> None:
        """Start the copy of `flags` ([bad, stop], any device) to the host."""
        event = None
        if flags.is_cuda:
            flags = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, ids, flags, event))

    def pop(self, keep: int = 1) -> StepReport | None:
        """The report of the oldest step, once more than `keep` are waiting."""
        if len(self._waiting) <= keep:
            return None
        step, ids, flags, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        bad, stop = flags.tolist()
        return StepReport(step, ids, bad > 0, stop > 0, stop >= FAILED)
