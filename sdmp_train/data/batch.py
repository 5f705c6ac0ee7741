"""What a loader hands to the training loop, and the base class of the loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .images import BadFile, unreachable_error

Lost = Mapping[int, BadFile]
"""Place in a batch -> the file that cannot be decoded."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step."""

    views: tuple[Tensor, ...]
    """Per recipe: (N, 3, S, S) uint8 with channels_last strides, on the loader's device. Safe to keep."""
    ids: Tensor
    """(N,) int64 on the CPU: rows of the source."""
    labels: Tensor
    """(N,) int64 on the CPU: class number, -1 where the folder has no classes."""
    valid: Tensor = None  # type: ignore[assignment]  # filled in at once
    """(N,) bool on the CPU: False where a file could not be decoded and its row is one colour in every view."""
    bad: tuple[BadFile, ...] = ()
    """Those files, in the order of their rows."""
    all_valid: Tensor | None = None
    """(N * ranks,) bool on the CPU: `valid` of all ranks in rank order; None where all of it is True, and until the
    loop has asked the others."""

    def __post_init__(self) -> None:
        if self.valid is None:
            object.__setattr__(self, "valid", torch.ones(len(self.ids), dtype=torch.bool))


class Loader(ABC):
    """Iterable of :class:`Batch`; a second iteration starts over with the same batches.

    Use it as a context manager, or call `close()` when done: it ends worker threads or processes.
    """

    name: Literal["dali", "torchvision", "resident"]
    why: str
    """Why this loader was chosen, as a sentence to print."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches an iteration yields."""

    def ready(self) -> int | None:
        """Batches that wait to be taken; None where that is not known, or none is made ahead."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Release threads, processes and buffers. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def made_batch(views: Sequence[Tensor], rows: NDArray[np.int64], labels: NDArray[np.int64], lost: Lost) -> Batch:
    """A batch of these views; `labels` are those of the whole source.

    Raises:
        DataError: a store does not answer, which makes no file damaged.
    """
    if unreachable := [lost[place] for place in sorted(lost) if lost[place].unreachable]:
        raise unreachable_error(unreachable)
    valid = torch.ones(len(rows), dtype=torch.bool)
    valid[list(lost)] = False
    return Batch(
        views=tuple(views),
        ids=torch.from_numpy(rows.astype(np.int64)),
        labels=torch.from_numpy(labels[rows]),
        valid=valid,
        bad=tuple(lost[place] for place in sorted(lost)),
    )


def paint(views: Sequence[Tensor], places: Iterable[int], colour: Sequence[int]) -> None:
    """Give rows of (N, 3, H, W) uint8 views one colour, in place."""
    for place in places:
        for view in views:
            for channel, value in enumerate(colour):
                view[place, channel] = value
