"""How long a run will take and what memory it needs: two steps of a training that is thrown away.

Nothing of the run is touched: the steps are of a model of their own, on noise, and draw from generators of their own.
"""

from __future__ import annotations

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
from .text import duration
from .training import Training, assemble, memory_bytes

FEW, FEW_GFLOP = 8, 50.0
"""On a CPU, whose time grows with the number of images, a measured step has so many, or so many more as are worth this
much work; on a GPU it is the whole batch."""
LONG_GFLOP = 250.0
"""Work of a step from which on a run on a CPU is measured before it begins: some seconds of a few cores."""


class Pace(NamedTuple):
    """What a step takes."""

    seconds: float
    memory_gib: float
    images: int
    """Of this process in the measured step."""
    rows: int
    """Of this process in a step of the run."""

    def line(self, steps: int) -> str:
        """For people."""
        scaled = f", scaled from {self.images} to {self.rows} images" if self.images < self.rows else ""
        return (
            f"time     {duration(self.seconds)} a step (the second of two, on noise{scaled}), without loading: "
            f"{steps:,} steps take {duration(self.seconds * steps)}; memory {self.memory_gib:.1f} GiB"
        )


def is_long(config: Config, world: World) -> bool:
    """Whether the first line of numbers is so far away that a run should say beforehand how long it takes."""
    if world.device.type != "cpu":
        return False
    return image_gflop(config) * config.optim.batch_size / world.size > LONG_GFLOP


def measure_pace(config: Config, world: World, classes: int) -> Pace | None:
    """Take two steps of a training like this one's; None where so few images are too few for its method."""
    rows = config.optim.batch_size // world.size
    images = rows
    if world.device.type == "cpu":
        images = min(rows, max(FEW, int(FEW_GFLOP / image_gflop(config))))
    small = replace(config, optim=replace(config.optim, batch_size=images * world.size))
    before = memory_gib(world.device)
    try:
        training = assemble(small, world, steps_per_epoch=1000, classes=classes)
        batch = noise(training, images, classes)
        seconds = 0.0
        for _ in range(2):
            began = time.perf_counter()
            step(training, [batch], StopRequest())
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            seconds = time.perf_counter() - began
    except ValueError:
        return None
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
