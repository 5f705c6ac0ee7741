"""What a loader hands to the training loop, and the base class of the loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor


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
    """(N,) bool on the CPU: whether the row is an image of the source; all of them today."""

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

    @abstractmethod
    def close(self) -> None:
        """Release threads, processes and buffers. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
