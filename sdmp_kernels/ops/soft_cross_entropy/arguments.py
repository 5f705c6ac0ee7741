"""What the backends of `soft_cross_entropy` take: rows of a target in which nothing is left that does not count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdmp_kernels.ops.losses import within


class Given(NamedTuple):
    """A target as the caller gives it.

    Attributes:
        first, second: (N,) int64. A column out of [0, K), or `ignored`, is left out.
        weight: (N,) of `first`; that of `second` is the rest.
        class_weight: (K,) what multiplies the weights of each column, or None.
        ignored: a column that is left out, in range or not; None where all are known to be in range and to count.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    class_weight: Tensor | None
    ignored: int | None


class Rows(NamedTuple):
    """The same with columns in range and weights of what is left, so that those of a row add up to 1.

    Attributes:
        first, second: (N,) int64 in [0, K).
        weight: (N,) of `first`; that of `second` is the rest.
        factor: (N,) what was left of the weights, times those of the classes: what the row's cross-entropy counts.
            None where that is 1 for every row.
        smooth: (N,) what was left of the weights: what the row's smoothing counts. None likewise.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    factor: Tensor | None
    smooth: Tensor | None

    def divisor(self) -> Tensor | float:
        """What a mean is divided by: the factors added up."""
        return len(self.first) if self.factor is None else self.factor.sum()


def rows_of(given: Given, columns: int, dtype: torch.dtype) -> Rows:
    """The rows of a target over `columns` columns, factors in `dtype`. On the CPU usual targets are what they are."""
    first, second, weight, class_weight, ignored = given
    if class_weight is None and first.is_cpu:
        if ignored is None:
            return Rows(first, second, weight, None, None)
        if not 0 <= ignored < columns and within(first, columns) and within(second, columns):
            return Rows(first, second, weight, None, None)
    ignored = -1 if ignored is None else ignored
    kept_first, kept_second = ((column >= 0) & (column < columns) & (column != ignored) for column in (first, second))
    first, second = torch.where(kept_first, first, 0), torch.where(kept_second, second, 0)
    weight = weight.to(dtype)
    at_first, at_second = torch.where(kept_first, weight, 0), torch.where(kept_second, 1 - weight, 0)
    # Not their sum where both are left: that may be 1 but for its last bit.
    smooth = torch.where(kept_first & kept_second, 1, at_first + at_second)
    if class_weight is None:
        left = torch.where(kept_first, torch.where(kept_second, weight, 1), 0)
        return Rows(first, second, left, smooth, smooth)
    class_weight = class_weight.to(dtype)
    at_first, at_second = at_first * class_weight[first], at_second * class_weight[second]
    factor = at_first + at_second
    return Rows(first, second, torch.where(factor > 0, at_first / factor, 0), factor, smooth)


def counted(losses: Tensor, factor: Tensor | None) -> Tensor:
    """(N,) losses times what they count; 0 where that is nothing, whatever the loss."""
    return losses if factor is None else torch.where(factor == 0, 0, losses * factor)
