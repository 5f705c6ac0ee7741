"""What the backends of `info_nce` take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeySet(NamedTuple):
    """The keys of one term, and the targets among them.

    Attributes:
        k: (M, D).
        first, second: (N,) int64 columns; one out of range has no say.
        weight: (N,) of `first`; that of `second` is the rest.
        excluded: what is no key: (M,) bool for every row, (N,) int64 one column for each row (-1 none), or None.
        factor: what multiplies the gradients of this term.
    """

    k: Tensor
    first: Tensor
    second: Tensor
    weight: Tensor
    excluded: Tensor | None
    factor: float


class Problem(NamedTuple):
    """Queries, the key sets they are compared with, and how.

    Attributes:
        q: (N, D).
        sets: T of them.
        temperature: above 0.
        form: "ce" or "log_mixture".
        scale: what multiplies every loss and every gradient.
        summed: whether the gradients of q are added up over the key sets.
    """

    q: Tensor
    sets: list[KeySet]
    temperature: float
    form: str
    scale: float
    summed: bool

    @property
    def slopes(self) -> list[float]:
        """What multiplies the gradients of each term."""
        return [self.scale * keys.factor for keys in self.sets]


def hide(products: Tensor, excluded: Tensor | None, start: int = 0) -> Tensor:
    """Products (R, M) of the rows from `start` on, in place: the lowest number where there is no key.

    Finite, so that a row without any key has a softmax all the same.
    """
    if excluded is None:
        return products
    lowest = torch.finfo(products.dtype).min
    if excluded.dtype == torch.bool:
        return products.masked_fill_(excluded, lowest)
    column = excluded[start : start + len(products), None]
    known = (column >= 0) & (column < products.shape[1])
    place = torch.where(known, column, 0)
    return products.scatter_(1, place, torch.where(known, lowest, products.gather(1, place)))


def kept_columns(column: Tensor, excluded: Tensor | None, count: int) -> Tensor:
    """(N,) the target's columns, -1 where that is excluded."""
    if excluded is None:
        return column
    gone = excluded[column.clamp(0, count - 1)] if excluded.dtype == torch.bool else column == excluded
    return torch.where(gone, -1, column)


def empty_rows(keys: KeySet) -> Tensor | None:
    """(N,) the rows whose whole target is excluded, which have no loss and no gradient; None where nothing is."""
    if keys.excluded is None:
        return None
    return ((keys.first < 0) | (keys.weight <= 0)) & ((keys.second < 0) | (keys.weight >= 1))
