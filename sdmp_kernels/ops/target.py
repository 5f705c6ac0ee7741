"""Two-hot targets: their checks, and the arithmetic that the losses share.

Shapes: everything is (N,), one number per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdmp_kernels._checks import check_choice, check_same_device, check_tensor, readable
from sdmp_kernels.plan import TwoHot

FORMS = ("ce", "log_mixture")
REDUCTIONS = ("mean", "sum", "none")


def check_target(argument: str, target: object, rows: int, columns: int, like: Tensor) -> TwoHot:
    """`target` as a TwoHot of `rows` rows over `columns` columns, on the device of `like`."""
    if not isinstance(target, (tuple, list)) or len(target) != 3:
        raise TypeError(f"{argument} must be a TwoHot(first, second, weight), got {type(target).__name__}")
    target = TwoHot(*target)
    for name in ("first", "second"):
        check_tensor(f"{argument}.{name}", getattr(target, name), dtypes=(torch.int64,), ndim=1, shape="(N,)")
    check_tensor(f"{argument}.weight", target.weight, dtypes=(torch.float32, torch.float64), ndim=1, shape="(N,)")
    if target.weight.requires_grad:
        raise ValueError(f"{argument}.weight requires a gradient, but targets are constants; use .detach()")
    for name, tensor in target._asdict().items():
        if len(tensor) != rows:
            raise ValueError(f"{argument}.{name} has {len(tensor)} rows but there are {rows} rows of logits")
        check_same_device(**{f"{argument}.{name}": tensor, "the logits": like})
    if rows and all(readable(t) for t in target):
        for name in ("first", "second"):
            low, high = getattr(target, name).aminmax()
            if low < 0 or high >= columns:
                raise ValueError(
                    f"{argument}.{name} must hold columns in [0, {columns}), got {int(low)} to {int(high)}; "
                    "check the offset the target was made with"
                )
        if not bool(((target.weight >= 0) & (target.weight <= 1)).all()):
            raise ValueError(
                f"{argument}.weight must hold shares in [0, 1], got {float(target.weight.min()):.6g} to "
                f"{float(target.weight.max()):.6g}; give the share of `first`, the rest goes to `second`"
            )
    return target


def check_options(form: str, reduction: str) -> None:
    """Raise ValueError for an unknown form or reduction."""
    check_choice("form", form, FORMS)
    check_choice("reduction", reduction, REDUCTIONS)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """(N,) losses as they are, their sum, or their mean (NaN for N = 0, as torch)."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # Divided before they are added up: the mean of large losses is finite where their sum is not.
    return (losses / len(losses)).sum() if len(losses) else losses.mean()


class Shares(NamedTuple):
    """A target that may be read without looking: columns within range, and the weight of each.

    Attributes:
        first, second: int64 in [0, columns).
        own, other: the weights of the two; 0 where the column given was out of range, so that they may add up to less
            than 1 there.
    """

    first: Tensor
    second: Tensor
    own: Tensor
    other: Tensor


def shares(first: Tensor, second: Tensor, weight: Tensor, columns: int, dtype: torch.dtype) -> Shares:
    """The target's columns, safe to read, and their weights in `dtype`."""
    weight = weight.to(dtype)
    return Shares(
        first.clamp(0, columns - 1),
        second.clamp(0, columns - 1),
        torch.where((first >= 0) & (first < columns), weight, 0),
        torch.where((second >= 0) & (second < columns), 1 - weight, 0),
    )


def half_gap(peak: Tensor, logit: Tensor) -> Tensor:
    """Half of how far a logit is below the row's largest: two finite logits can be further apart than the largest
    finite number, half of that cannot overflow.
    """
    return 0.5 * peak - 0.5 * logit


def loss_of(
    log_sum: Tensor, half_first: Tensor, half_second: Tensor, target: Shares, form: str, factor: float = 1.0
) -> Tensor:
    """`factor` times the loss of each row, from log(sum of exp(logit - peak)) and the half gaps of its target logits.

    "ce": own * (lse - z_first) + other * (lse - z_second). "log_mixture": -log(own p_first + other p_second) in log
    space. Nothing is subtracted that shares leading digits, a column of weight 0 has no say, whatever its logit, and
    the factor goes in before the halves are doubled: what overflows is not representable.
    """
    own, other = target.own, target.other
    if form == "log_mixture":
        near, far = half_first - 0.5 * own.log(), half_second - 0.5 * other.log()
        apart = torch.where(torch.isinf(torch.maximum(near, far)), torch.inf, (near - far).abs())
        half = 0.5 * log_sum + torch.minimum(near, far) - 0.5 * torch.log1p(torch.exp(-2 * apart))
        loss = half * (2 * factor)
    else:
        first = torch.where(own > 0, half_first * (2 * factor * own), 0)
        second = torch.where(other > 0, half_second * (2 * factor * other), 0)
        loss = log_sum * (factor * (own + other)) + first + second
    return loss.clamp_min(0)


def pulls_of(
    half_first: Tensor, half_second: Tensor, target: Shares, form: str, gain: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """What the gradient subtracts from the softmax, times their sum, at `first` and at `second`.

    "ce": the weights. "log_mixture": the posterior of each column given the mixture. `gain` times the half gaps may be
    more than can be represented.
    """
    own, other = target.own, target.other
    if form != "log_mixture":
        return own, other
    # The gaps are subtracted first: each may be so large that a logarithm added to it leaves no trace.
    both = (own > 0) & (other > 0)
    odds = torch.where(both, own.log() - other.log(), 0) + 2 * (half_second - half_first) * gain
    first = torch.where(both, torch.sigmoid(odds), (own > 0).to(odds.dtype))
    second = torch.where(both, torch.sigmoid(-odds), (other > 0).to(odds.dtype))
    return first, second
