"""Which loader carries out a schedule: the one asked for, or the faster one, by a measurement of about a second."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from sdmp_kernels import backends

from ..advice import install
from .batch import Loader
from .images import DataError
from .schedule import Schedule, TrainSchedule
from .source import channels_of

LoaderName = Literal["auto", "dali", "torchvision", "resident"]
LOADERS = ("dali", "torchvision", "resident")

MEASURED_FROM_IMAGES = 20_000
"""A run that loads fewer is over before a measurement has paid for itself."""
_SECONDS = 0.5
"""For each loader, once it runs."""
_BATCH = 32
"""Images per batch while measuring: many batches in that time, whatever the run's own batch size."""


class Choice(NamedTuple):
    """A loader, and why it."""

    name: Literal["dali", "torchvision", "resident"]
    why: str
    """As a sentence to print."""


def choose_loader(loader: LoaderName, device: torch.device, channels: int = 3) -> Choice:
    """The loader of this name; for "auto", unmeasured, DALI where it is. `DataError` where the one asked for is not."""
    if loader not in ("auto", *LOADERS):
        raise ValueError(f"loader must be 'auto', 'dali', 'torchvision' or 'resident', but is {loader!r}")
    if loader == "resident":
        return Choice("resident", f"resident was asked for; Pillow decodes once, and the images stay on {device}")
    if loader == "torchvision":
        return Choice("torchvision", "torchvision was asked for; Pillow decodes on the CPU")
    missing = dali_missing(device, channels)
    if missing and loader == "dali":
        raise DataError(f"loader='dali' cannot be used: {missing}; use loader='torchvision'")
    if missing:
        return Choice("torchvision", f"{missing}; Pillow decodes on the CPU")
    where = f"decodes and cuts on {device}" if device.type == "cuda" else "decodes on the CPU"
    asked = "was asked for" if loader == "dali" else "is installed"
    backend = backends()["augment"][device.type].partition(" (")[0]  # why no faster one: the line `kernels`
    views = f"augment ({backend}) makes the views"
    return Choice("dali", f"DALI {asked}; it {where}, and {views}")


def dali_missing(device: torch.device, channels: int = 3) -> str:
    """Why DALI cannot serve this device, or an empty text. Looks for it without importing it."""
    if channels != 3:
        return f"DALI reads images of 3 channels here, and these have {channels}"
    if device.type not in ("cpu", "cuda"):
        return f"DALI does not serve {device.type} devices"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return f"DALI is not installed ({install('dali')} on Linux)"
    return ""


def faster_loader(schedule: TrainSchedule, device: torch.device, workers: int) -> Choice:
    """The loader that makes these views of these images in less time here, measured where both can and it pays.

    On a CPU both give the same bytes. On a GPU they do not, so that a run keeps the one it began with.
    """
    unmeasured = choose_loader("auto", device, channels_of(schedule.source))
    if unmeasured.name == "torchvision" or len(schedule) * schedule.batch_size < MEASURED_FROM_IMAGES:
        return unmeasured
    few = replace(
        schedule, batch_size=min(schedule.batch_size, _BATCH), steps=10**6, start_step=0, rank=0, world_size=1
    )
    rates: dict[Literal["dali", "torchvision"], float] = {}
    try:
        # Pillow's processes first: they are forked before DALI starts threads.
        for name in ("torchvision", "dali"):
            with open_loader(Choice(name, "measured"), few, device, workers) as loader:
                rates[name] = images_per_second(loader, device, skip=workers + 2)
    except DataError:  # a damaged file: the run meets it where it stands, or not at all
        return unmeasured
    best = max(rates, key=lambda name: rates[name])
    said = ", ".join(f"{name} {rates[name]:.0f}" for name in ("dali", "torchvision"))
    how = unmeasured.why if best == "dali" else "Pillow decodes on the CPU"
    return Choice(best, f"the faster of two here (images/s: {said}); {how}")


def images_per_second(loader: Loader, device: torch.device, *, skip: int) -> float:
    """Once `skip` batches, which pay for starting, have come."""
    batches = iter(loader)
    for _ in range(skip):
        next(batches)
    begin, images, spent = _now(device), 0, 0.0
    while spent < _SECONDS:
        images += len(next(batches).ids)
        spent = _now(device) - begin
    return images / spent


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def open_loader(choice: Choice, schedule: Schedule, device: torch.device, workers: int) -> Loader:
    """The chosen loader, carrying out the schedule."""
    if choice.name == "dali":
        from .dali import DaliLoader

        return DaliLoader(schedule, device=device, workers=max(1, workers), why=choice.why)
    if choice.name == "resident":
        from .resident import ResidentLoader

        return ResidentLoader(schedule, device=device, workers=workers, why=choice.why)
    from .torchvision import TorchvisionLoader

    return TorchvisionLoader(schedule, device=device, workers=workers, why=choice.why)
