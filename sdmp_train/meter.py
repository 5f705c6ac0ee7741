"""Numbers of the last few steps, summed on the device: the host waits for it only when it writes a line."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .distributed import World, reduce_mean
from .methods.method import Step


class Meter:
    """Means over the steps since the last reading, and how the time went."""

    def __init__(self, world: World, batch_size: int) -> None:
        self.world = world
        self.batch_size = batch_size
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._waited_seconds = 0.0
        self._began = time.perf_counter()

    def add(self, step: Step) -> None:
        """Add one step's numbers: loss, loss_<term>, the method's facts, grad_norm."""
        self._steps += 1
        terms = {f"loss_{name}": value for name, value in step.loss.terms.items()}
        shown = step.loss.total if step.loss.shown is None else step.loss.shown
        values = {"loss": shown, **terms, **step.loss.facts, "grad_norm": step.grad_norm}
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.detach().clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_seconds += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here does not count."""
        start = time.perf_counter()
        yield
        self._began += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Means over steps and ranks, seconds per step, images per second of all ranks, the fraction spent waiting;
        the most memory held in GiB and the time of day in seconds since 1970, both of this rank."""
        means = reduce_mean(torch.stack([self._sums[name] / self._counts[name] for name in self._sums]), self.world)
        values = dict(zip(self._sums, means.tolist(), strict=True))
        seconds = max(time.perf_counter() - self._began, 1e-9)
        values["step_seconds"] = seconds / max(self._steps, 1)
        values["images_per_second"] = self._steps * self.batch_size / seconds
        values["data_wait_fraction"] = min(self._waited_seconds / seconds, 1.0)
        values["memory_gib"] = memory_gib(self.world.device)
        values["time"] = time.time()
        self._clear()
        return values


def memory_gib(device: torch.device) -> float:
    """The most memory held so far, in GiB: of a GPU by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def line_of(values: Mapping[str, float]) -> str:
    """What of a reading people want to see: the loss and its terms, the spread of the features, the speed."""
    terms = ", ".join(f"{name[5:]} {value:.2f}" for name, value in values.items() if name.startswith("loss_"))
    spread = ""
    if {"feature_std", "effective_rank"} <= set(values):
        spread = f"features std {values['feature_std']:.2f}, rank {values['effective_rank']:.1f}  "
    return (
        f"loss {values['loss']:.3f}  {f'({terms})  ' if terms else ''}{spread}"
        f"{values['images_per_second']:.3g} img/s  waiting for data {values['data_wait_fraction']:.0%}"
    )
