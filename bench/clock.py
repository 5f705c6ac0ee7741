"""How long a device works on some calls, and how long the host takes to ask for them: two numbers, kept apart.

A GPU is timed by two events of its own stream. Recorded on an idle device, the first of them passes at once, and the
time up to the second then holds whatever the host does before its first launch. So the device is first given something
to do, for as long as the host will take to ask for everything: the calls then wait in the queue when the first event
passes, and lie end to end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

# Queues are finite, and a call that waits for the device gains nothing by a longer lead.
LONGEST_LEAD_SECONDS = 0.05
SPARE_SECONDS = 50e-6


class Timing(NamedTuple):
    """One timing of some calls.

    Attributes:
        seconds: the device's, from the first call's work to the last's.
        queued: whether the host had asked for everything before the device began: `seconds` then holds no host time.
    """

    seconds: float
    queued: bool


class Stream(Protocol):
    """The stream of a device on which calls run in order."""

    def synchronize(self) -> None:
        """Wait until nothing is left to do."""

    def spin(self, seconds: float) -> None:
        """Keep the device busy for so long, at least about."""

    def mark(self) -> Any:
        """A place in the stream."""

    def passed(self, mark: Any) -> bool:
        """Whether the device has come past a mark."""

    def between(self, begin: Any, end: Any) -> float:
        """Seconds between two marks, waiting for the second."""


class CudaStream:
    """The current stream of the current CUDA device."""

    def __init__(self) -> None:
        cycles = 2_000_000
        torch.cuda._sleep(cycles)  # wakes the device up
        begin = self.mark()
        torch.cuda._sleep(cycles)
        self.cycles_per_second = cycles / max(self.between(begin, self.mark()), 1e-6)

    def synchronize(self) -> None:
        """See `Stream`."""
        torch.cuda.synchronize()

    def spin(self, seconds: float) -> None:
        """See `Stream`."""
        torch.cuda._sleep(round(seconds * self.cycles_per_second))

    def mark(self) -> torch.cuda.Event:
        """See `Stream`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """See `Stream`."""
        return mark.query()

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `Stream`."""
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class HostClock:
    """Times calls that the host itself carries out."""

    def wait(self) -> None:
        """There is nothing to wait for."""

    def time(self, runs: Sequence[Callable[[], object]], lead_seconds: float = 0.0) -> Timing:
        """All runs, one after the other."""
        start = time.perf_counter()
        for run in runs:
            run()
        return Timing(time.perf_counter() - start, True)


class DeviceClock:
    """Times calls that the host asks a device for. `now`: the host's clock, in seconds."""

    def __init__(self, stream: Stream, now: Callable[[], float] = time.perf_counter) -> None:
        self._stream, self._now = stream, now

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        self._stream.synchronize()

    def host_seconds(self, runs: Sequence[Callable[[], object]]) -> float:
        """How long the host takes to ask an idle device for all runs; with the device's time where they wait for it."""
        self._stream.synchronize()
        start = self._now()
        for run in runs:
            run()
        taken = self._now() - start
        self._stream.synchronize()
        return taken

    def time(self, runs: Sequence[Callable[[], object]], lead_seconds: float = 0.0) -> Timing:
        """All runs, asked for while the device is busy for `lead_seconds` with something else."""
        stream = self._stream
        stream.synchronize()
        if lead_seconds > 0:
            stream.spin(lead_seconds)
        begin = stream.mark()
        for run in runs:
            run()
        queued = not stream.passed(begin)
        return Timing(stream.between(begin, stream.mark()), queued)


Clock = HostClock | DeviceClock


@functools.cache
def clock_of(kind: str) -> Clock:
    """The clock of a kind of device, "cpu" or "cuda"."""
    return DeviceClock(CudaStream()) if kind == "cuda" else HostClock()


def lead(host_seconds: float) -> float:
    """How long to keep a device busy where the host takes so long to ask for everything: half as long again."""
    return min(1.5 * host_seconds + SPARE_SECONDS, LONGEST_LEAD_SECONDS)
