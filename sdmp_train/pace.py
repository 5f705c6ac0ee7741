"""How long a run will take and what memory it needs: a few steps of a training that is thrown away.

Nothing of the run is touched: the steps are of a model of their own, on noise, and draw from generators of their own.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import NamedTuple

import torch

from sdmp_kernels.views import view_size

from .config import Config
from .cost import image_gflop
from .data import Batch
from .distributed import World
from .guard import StopRequest
from .loop import step
from .meter import memory_gib
from .text import counted, duration
from .training import Training, assemble, memory_bytes

FEW, FEW_GFLOP = 8, 50.0
"""On a CPU, whose time grows with the number of images, a measured step has so many, or so many more as are worth this
much work; on a GPU it is the whole batch."""
LONG_GFLOP = 250.0
"""Work of a step from which on a run on a CPU is measured before it begins: some seconds of a few cores."""


STEPS = 4
"""Made to be timed. The first pays for what is set up once, and the next ones may still: the fastest of them counts."""


class Pace(NamedTuple):
    """What a step takes."""

    seconds: float
    memory_gib: float
    """At its peak: weights, what gradients need, activations, and what the process held before."""
    images: int
    """Of this process in the measured step."""
    rows: int
    """Of this process in a step of the run."""

    def line(self, steps: int) -> str:
        """For people."""
        scaled = f", scaled from {self.images} to {self.rows} images" if self.images < self.rows else ""
        return (
            f"time     {duration(self.seconds)} a step (fastest of {STEPS - 1}, on noise{scaled}), without loading: "
            f"{counted(steps, 'step')} {'takes' if steps == 1 else 'take'} {duration(self.seconds * steps)}; "
            f"peak memory {self.memory_gib:.1f} GiB"
        )


def too_much(pace: Pace, device: torch.device) -> str | None:
    """Where the peak is more than the device has, a line that says so."""
    has = machine_gib(device)
    if has is None or pace.memory_gib <= has:
        return None
    what = "this GPU" if device.type == "cuda" else "this machine"
    return f"warning  {pace.memory_gib:.1f} GiB are more than the {has:.1f} GiB of {what}: give a smaller --batch-size"


def machine_gib(device: torch.device) -> float | None:
    """All memory of a GPU, or of the machine, in GiB; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return None


def is_long(config: Config, world: World) -> bool:
    """Whether the first line of numbers is so far away that a run should say beforehand how long it takes."""
    if world.device.type != "cpu":
        return False
    return image_gflop(config) * config.optim.batch_size / world.size > LONG_GFLOP


def measure_pace(config: Config, world: World, classes: int) -> Pace | None:
    """Take a few steps of a training like this one's; None where so few images are too few for its method."""
    rows = config.optim.batch_size // world.size
    images = rows
    if world.device.type == "cpu":
        images = min(rows, max(FEW, int(FEW_GFLOP / image_gflop(config))))
    # From the first step on as in the later ones, which train the backbone too.
    small = replace(config, optim=replace(config.optim, batch_size=images * world.size, heads_only_epochs=0.0))
    before = memory_gib(world.device)
    try:
        training = assemble(small, world, steps_per_epoch=1000, classes=classes)
        batch = noise(training, images, classes)
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            step(training, [batch], StopRequest())
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            times.append(time.perf_counter() - began)
    except ValueError:
        return None
    seconds = min(times[1:])
    held = memory_bytes(training) / 2**30
    grown = max(memory_gib(world.device) - before - held, 0.0) if images < rows else 0.0
    return Pace(seconds * rows / images, memory_gib(world.device) + grown * (rows / images - 1), images, rows)


def noise(training: Training, rows: int, classes: int) -> Batch:
    """Views of the sizes that the method asks for, and labels."""
    generator, device = torch.Generator().manual_seed(0), training.world.device
    views = []
    for recipe in training.method.views(training.at):
        shape = (rows, *view_size(recipe.size_px), training.config.data.channels)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        views.append(pixels.permute(0, 3, 1, 2).to(device))
    ids = torch.arange(rows)
    return Batch(tuple(views), ids, ids % max(classes, 1))
