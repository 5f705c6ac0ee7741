"""Which rows of the index a step sees, and the numbers drawn for its views: everything a loader has to carry out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdmp_kernels.views import EvalView, ViewDraws, ViewRecipe, draw_views

from .host import HostTransform, host_seeds
from .images import DataError
from .source import Source

_STREAM = 0x4F524452
"""Highest counter word of the epoch permutations: another stream than those of the views and the mixing plans."""


Colour = tuple[int, ...]
"""A number for each channel, 0 to 255."""


class Schedule(Protocol):
    """What a loader needs to know. `position` counts from 0 to `len(schedule) - 1`."""

    source: Source
    recipes: tuple[ViewRecipe | EvalView, ...]
    batch_size: int
    fill: Colour | None
    """What stands in every view for a file that cannot be decoded; None: such a file is an error."""

    def __len__(self) -> int: ...

    def rows(self, position: int) -> NDArray[np.int64]:
        """(N,) rows of the source, N at most `batch_size`."""

    def draws(self, position: int, rows: NDArray[np.int64]) -> list[ViewDraws]:
        """One entry per recipe, on the CPU."""


def steps_per_epoch(images: int, global_batch_size: int) -> int:
    """Steps in which every image is seen at most once; the `images % global_batch_size` left over sit the epoch out.

    Raises :class:`DataError` when the images do not fill one batch.
    """
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be 1 or more, but is {global_batch_size}")
    if images < global_batch_size:
        raise DataError(
            f"the folder holds {images} images, fewer than the batch size of {global_batch_size} over all ranks; "
            f"use a batch size of at most {images}, or more images"
        )
    return images // global_batch_size


def epoch_order(images: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """(images,) the order of an epoch, a function of its arguments alone."""
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, _STREAM]).random_raw(images)
    return np.argsort(bits, kind="stable")


@dataclass
class TrainSchedule:
    """Steps `start_step` to `steps - 1` as seen by one rank."""

    source: Source
    recipes: tuple[ViewRecipe | EvalView, ...]
    batch_size: int
    steps: int
    start_step: int
    seed: int
    rank: int
    world_size: int
    repeats: int = 1
    """How often an image comes in a row, each time in another view; an epoch has as many steps, and fewer images."""
    host: HostTransform | None = None
    """What is done to the first view on the host."""
    fill: Colour | None = None
    """What stands for a file that cannot be decoded."""
    _order: tuple[int, NDArray[np.int64]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_batch(self.batch_size, self.rank, self.world_size)
        if not self.recipes:
            raise ValueError("recipes must name at least one view, but is empty")
        if self.repeats < 1:
            raise ValueError(f"repeats must be 1 or more, but is {self.repeats}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, but is {self.seed}")
        if not 0 <= self.start_step <= self.steps:
            raise ValueError(f"start_step must be between 0 and steps ({self.steps}), but is {self.start_step}")
        self.steps_per_epoch = steps_per_epoch(len(self.source), self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.steps - self.start_step

    def rows(self, position: int) -> NDArray[np.int64]:
        epoch, within = divmod(self.start_step + position, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(len(self.source), seed=self.seed, epoch=epoch)
            self._order = epoch, np.repeat(order, self.repeats)[: len(order)]
        first = (within * self.world_size + self.rank) * self.batch_size
        return self._order[1][first : first + self.batch_size]

    def draws(self, position: int, rows: NDArray[np.int64]) -> list[ViewDraws]:
        heights, widths = self.source.heights[rows], self.source.widths[rows]
        step, first_row = self.start_step + position, self.rank * self.batch_size
        return [
            draw_views(recipe, heights, widths, step=step, seed=self.seed, view=view, first_row=first_row)
            for view, recipe in enumerate(self.recipes)
        ]

    def host_seeds(self, position: int, rows: int) -> NDArray[np.uint32]:
        """For `host`, one per row."""
        step, first_row = self.start_step + position, self.rank * self.batch_size
        return host_seeds(seed=self.seed, step=step, first_row=first_row, rows=rows)


@dataclass
class EvalSchedule:
    """Every row once, in order, as one rank's contiguous part; the last batch may be short."""

    source: Source
    recipes: tuple[ViewRecipe | EvalView, ...]
    batch_size: int
    rank: int
    world_size: int
    fill: Colour | None = None

    def __post_init__(self) -> None:
        _check_batch(self.batch_size, self.rank, self.world_size)
        bounds = np.linspace(0, len(self.source), self.world_size + 1).astype(np.int64)
        self._first, self._end = int(bounds[self.rank]), int(bounds[self.rank + 1])

    def __len__(self) -> int:
        return -(-(self._end - self._first) // self.batch_size)

    def rows(self, position: int) -> NDArray[np.int64]:
        first = self._first + position * self.batch_size
        return np.arange(first, min(first + self.batch_size, self._end))

    def draws(self, position: int, rows: NDArray[np.int64]) -> list[ViewDraws]:
        sizes = self.source.heights[rows], self.source.widths[rows]
        return [draw_views(recipe, *sizes, step=0) for recipe in self.recipes]


def as_recipes(recipes: Sequence[ViewRecipe | EvalView]) -> tuple[ViewRecipe | EvalView, ...]:
    for recipe in recipes:
        if not isinstance(recipe, (ViewRecipe, EvalView)):
            raise TypeError(f"recipes must hold ViewRecipe or EvalView, but one is {type(recipe).__name__}")
    return tuple(recipes)


def _check_batch(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more images per rank, but is {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and world_size - 1, but is {rank} of {world_size}")
