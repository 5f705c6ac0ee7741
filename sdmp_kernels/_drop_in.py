"""What the drop-in classes share: their streams of draws, class numbers, and dense targets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from sdmp_kernels._checks import check_integer, readable
from sdmp_kernels.plan import MixPlan, Rule, Stream, TwoHot, make_plan, picked

LABELS = ("dense", "two_hot")

# How many objects without a seed of their own this process has made, all classes together. A counter of itertools is
# advanced in one step, so that threads get different numbers, and has no lock that a fork could leave closed.
_MADE = itertools.count()


class Draws:
    """One random stream per call, a function of (seed, step, DataLoader worker) alone; no global state is touched.

    Attributes:
        seed: of the streams; by default one that no other object has: `fresh_seed`.
        given: whether the seed was given.
        step: number of streams handed out so far; set it to resume or to replay.
    """

    def __init__(self, seed: int | None) -> None:
        self.given = seed is not None
        seed = fresh_seed() if seed is None else seed
        self.seed = check_integer("seed", seed, low=0, high=2**64 - 1, what="an integer in [0, 2**64), or None")
        self.step = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Draws:
        """The same streams where a seed was given, others where not: a copy made for every epoch is made anew."""
        copied = Draws(self.seed if self.given else None)
        if self.given:
            copied.step = self.step
        return copied

    def next(self) -> np.random.Generator:
        """The stream of the next call."""
        seed, step, salt = self.words()
        self.step += 1
        return _STREAM.at(seed, step, last=salt, third=1)

    def words(self) -> tuple[int, int, int]:
        """(seed, step, salt): what the stream of the next call is keyed and counted by, its third counter word 1."""
        # Workers get copies of one object, anew every epoch: torch's seed of the worker tells them, and epochs, apart.
        # The third counter word keeps clear of the streams that `draw_plan` takes from the same key.
        worker = get_worker_info()
        salt = 0 if worker is None else worker.seed % 2**64
        return self.seed, self.step, salt


_STREAM = Stream()


class Drawing:
    """A drop-in with streams of its own in `_draws`, whose seed is read and whose step is read and set."""

    _draws: Draws

    @property
    def seed(self) -> int:
        """The seed of this object's draws."""
        return self._draws.seed

    @property
    def step(self) -> int:
        """Number of draws so far; set it to resume."""
        return self._draws.step

    @step.setter
    def step(self, step: int) -> None:
        self._draws.step = check_integer("step", step, low=0, what="a number of draws, 0 or more")


def fresh_seed() -> int:
    """A seed made of torch's seed and the number of seeds this process has asked for: another one at every call.

    In a DataLoader worker torch's seed is that worker's and that epoch's, so workers forked from one process, which
    all go on counting from the same number, get different seeds.
    """
    made = np.random.SeedSequence(torch.initial_seed() % 2**64, spawn_key=(next(_MADE),))
    return int(made.generate_state(1, np.uint64)[0])


def choose(rng: np.random.Generator, chances: Mapping[Rule, float], count: int) -> np.ndarray:
    """(count,) uint8: independent rules of the given chances, which add up to 1."""
    return picked(*law_of(chances), rng.random(count))


def law_of(chances: Mapping[Rule, float]) -> tuple[list[int], list[float]]:
    """The rules as plain numbers, and their cumulated chances, the last 1."""
    edges = list(itertools.accumulate(chances.values()))
    return [int(rule) for rule in chances], [edge / edges[-1] for edge in edges]


def keep_plan(n: int, size: tuple[int, int]) -> MixPlan:
    """The plan that mixes nothing."""
    return make_plan("keep", torch.ones(n), size)


def check_ignored(ignored: int | None) -> int | None:
    """`ignore_index` of a drop-in: any integer, or None."""
    if ignored is None:
        return None
    return check_integer("ignore_index", ignored, low=-(2**63), high=2**63 - 1, what="an integer, or None")


def class_numbers(
    argument: str, labels: Tensor, rows: int, num_classes: int | None, ignored: int | None = None
) -> Tensor:
    """`labels` as (N,) int64 class numbers, checked to be below `num_classes` where that needs no host sync.

    ignored: a number that stands for no class, in range or not.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{argument} must be a tensor of class numbers of shape (N,), got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{argument} must hold integer class numbers, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{argument} must have shape ({rows},), one class number per image, got {tuple(labels.shape)}")
    labels = labels.reshape(rows).long()
    known = labels if ignored is None or not readable(labels) else labels[labels != ignored]
    if len(known) and readable(known) and (int(known.min()) < 0 or (num_classes and int(known.max()) >= num_classes)):
        raise ValueError(
            f"{argument} must hold class numbers in [0, {num_classes or 'number of classes'}), "
            f"got {int(known.min())} to {int(known.max())}"
        )
    return labels


def soft_rows(labels: Tensor, target: TwoHot) -> Tensor:
    """(N, K): rows of shares mixed as their images are, float32, or float64 where they are.

    target: `label_target` of the row numbers, so that `second` is the row whose labels come in.
    """
    exact = labels.to(torch.float64 if labels.dtype == torch.float64 else torch.float32)
    weight = target.weight[:, None].to(exact.dtype)
    return exact * weight + exact[target.second] * (1 - weight)


def dense_target(target: TwoHot, num_classes: int, smoothing: float = 0.0, ignored: int | None = None) -> Tensor:
    """(N, K) float32: (1 - s) * (weight at `first` + (1 - weight) at `second`) + s / K.

    ignored: a column whose weight a row loses, with its part of the s / K, so that no loss and no gradient comes of it.
    """
    # As `TwoHot.dense`, without looking at the columns again.
    columns = [(target.first, target.weight), (target.second, 1 - target.weight)]
    dense = target.weight.new_full((len(target.weight), num_classes), smoothing / num_classes)
    if ignored is not None:
        columns = [(column, torch.where(column == ignored, 0.0, weight)) for column, weight in columns]
        dense *= (columns[0][1] + columns[1][1])[:, None]
        columns = [(torch.where(column == ignored, 0, column), weight) for column, weight in columns]
    for column, weight in columns:
        dense.scatter_add_(1, column[:, None], (1 - smoothing) * weight[:, None])
    return dense
