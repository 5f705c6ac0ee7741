"""What the losses share: two-hot targets in arithmetic, dtypes, full precision, and what no Triton kernel serves.

No op imports from another op; what two of them need lives here. Letters: N rows, K columns.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# So few numbers are compared by Python in less time than PyTorch takes to begin.
_FEW = 32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Python makes a tensor of a number wherever one meets a tensor, which costs more than the arithmetic on a few rows.
_ZERO, _HALF, _ONE = (torch.tensor(number, device="cpu") for number in (0.0, 0.5, 1.0))


def work_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half and single inputs, float64 for double."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def refuse_triton(*inputs: Tensor) -> str | None:
    """Why Triton serves none of the losses for such inputs, or None."""
    dtypes = [tensor.dtype for tensor in inputs]
    if torch.float64 in dtypes:
        return "float64 is computed by the torch and reference backends"
    if torch.bfloat16 in dtypes and inputs[0].device.type == "cpu":
        return "triton's interpreter rounds bfloat16 wrongly"
    return None


def refuse_native(*inputs: Tensor) -> str | None:
    """Why the C++ kernels serve none of the losses for such inputs, or None."""
    if any(tensor.dtype == torch.float64 for tensor in inputs):
        return "float64 is computed by the torch and reference backends"
    return None


# ---- a gradient that exists before the backward pass ----


def owned_gradient() -> bool:
    """Within a backward pass: whether a saved gradient may be handed out as it is, since nobody will ask for it again
    and nobody differentiates it.
    """
    return not torch.is_grad_enabled() and not torch._C._autograd._get_current_graph_task_keep_graph()


def handed_out(gradient: Tensor, grad: Tensor) -> Tensor | None:
    """Within a backward pass: a saved `gradient` times `grad` of no dimension, in its own memory; None where that may
    not be, or there is more to it.
    """
    if type(grad) is not Tensor or grad.ndim or not grad.is_cpu or type(gradient) is not Tensor or not owned_gradient():
        return None
    factor = grad.item()
    return gradient if factor == 1 else gradient.mul_(factor)


def scaled(gradient: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    """`gradient` (N, ...) times `grad`, () for all or (N,) one per row, in `out`, which may be `gradient` itself.

    One number is looked at: a CPU has it at hand.
    """
    if grad.ndim == 0:
        factor = grad.item()
        if factor == 1:
            return out if out is gradient else out.copy_(gradient)
        return torch.mul(gradient, factor, out=out)
    return torch.mul(gradient, grad.view(-1, *[1] * (gradient.ndim - 1)), out=out)


# ---- a target that may be read without looking ----


class SafeTarget(NamedTuple):
    """A two-hot target whose columns are within range, with `first` and `second` in one tensor.

    Attributes:
        columns: (2, N) int64 in [0, K).
        weights: (2, N) of `first` and of `second`; 0 where the column given was out of range, so that the two may add
            up to less than 1 there.
    """

    columns: Tensor
    weights: Tensor


def safe_target(first: Tensor, second: Tensor, weight: Tensor, columns: int, dtype: torch.dtype) -> SafeTarget:
    """The target's columns, safe to read, and their weights in `dtype`."""
    given = torch.stack((first, second))
    weight = weight if weight.dtype == dtype else weight.to(dtype)
    weights = torch.stack((weight, _ONE - weight))
    if given.is_cpu and within(given, columns):
        return SafeTarget(given, weights)
    known = (given >= 0) & (given < columns)
    return SafeTarget(given.clamp(0, columns - 1), torch.where(known, weights, 0))


def within(columns: Tensor, count: int) -> bool:
    """Whether all columns, on the CPU, are in [0, count)."""
    if columns.ndim == 1 and columns.shape[0] <= _FEW:
        values = columns.tolist()
        return not values or (min(values) >= 0 and max(values) < count)
    if columns.numel() == 0:
        return True
    low, high = extremes(columns)
    return low >= 0 and high < count


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest of some numbers on the CPU; of NaN both are NaN."""
    if tensor.numel() <= _FEW:
        values = tensor.tolist() if tensor.ndim == 1 else tensor.view(-1).tolist()
        total = sum(values)
        return (min(values), max(values)) if total == total else (math.nan, math.nan)
    low, high = tensor.aminmax()
    return low.item(), high.item()


def at_columns(z: Tensor, columns: Tensor) -> Tensor:
    """(2, N): z[i, columns[0, i]] and z[i, columns[1, i]] of (N, K)."""
    return z.t().gather(0, columns)


def take(matrix: Tensor, columns: Tensor, amounts: Tensor) -> None:
    """Subtract `amounts[c, i]` from `matrix[i, columns[c, i]]`, both (2, N), c = 0 before c = 1.

    A CPU walks along a row in order. Elsewhere it is one element of a row at a time, so that there is no order of
    additions to depend on where the two are one.
    """
    columns, amounts = columns.t(), amounts.neg().t()
    if matrix.is_cpu:
        matrix.scatter_add_(1, columns, amounts)
        return
    for column, amount in zip(columns.split(1, 1), amounts.split(1, 1), strict=True):
        matrix.scatter_add_(1, column, amount)


# ---- the definition, from log-probabilities (N, K) ----


def two_hot_loss(log_p: Tensor, target: SafeTarget, form: str) -> Tensor:
    """(N,) losses, with w and v the weights of `first` and `second`.

    "ce": -(w log p_first + v log p_second). "log_mixture": -log(w p_first + v p_second).
    """
    a, b = at_columns(log_p, target.columns).unbind()
    w, v = target.weights.unbind()
    if form == "log_mixture":
        return -torch.logaddexp(w.log() + a, v.log() + b)
    # A column of weight 0 has no say, whatever its logit: not even minus infinity.
    return -torch.where(w > 0, w * a, 0) - torch.where(v > 0, v * b, 0)


def pulls(log_p: Tensor, target: SafeTarget, form: str) -> Tensor:
    """(2, N) what the target draws to `first` and to `second`.

    "ce": their weights w and v. "log_mixture": the posterior of each given the mixture, w p_first / (w p_first +
    v p_second) and v p_second / (w p_first + v p_second).
    """
    w, v = target.weights.unbind()
    if form != "log_mixture":
        return target.weights
    # The log-probabilities are subtracted first: beside a very large one a logarithm of a weight leaves no trace.
    a, b = at_columns(log_p, target.columns).unbind()
    both = (w > 0) & (v > 0)
    odds = torch.where(both, w.log() - v.log(), 0) + (a - b)
    first = torch.where(both, torch.sigmoid(odds), (w > 0).to(odds.dtype))
    second = torch.where(both, torch.sigmoid(-odds), (v > 0).to(odds.dtype))
    return torch.stack((first, second))


def dense_target(log_p: Tensor, target: SafeTarget, form: str) -> Tensor:
    """(N, K) what the gradient subtracts from the softmax: the pulls, each at its column."""
    dense = torch.zeros_like(log_p)
    for column, pull in zip(target.columns.unbind(), pulls(log_p, target, form).unbind(), strict=True):
        dense.scatter_add_(1, column[:, None], pull[:, None])
    return dense


# ---- the same from gaps, where no log-probabilities exist ----


def half_gaps(peak: Tensor, logits: Tensor) -> Tensor:
    """(2, N) half of how far two logits of each row are below its largest, `peak` (N,): (peak - logit) / 2.

    Two finite logits can be further apart than the largest finite number, half of that cannot overflow.
    """
    return torch.sub(_HALF * peak, logits, alpha=0.5)


def loss_of(log_sum: Tensor | None, halves: Tensor, target: SafeTarget, form: str, factor: float = 1.0) -> Tensor:
    """`factor` times the loss of each row, (N,).

    With s = log(sum of exp(logit - peak)), a and b the gaps of the two target logits, w and v their weights:
    "ce": w (s + a) + v (s + b). "log_mixture": s - log(w exp(-a) + v exp(-b)), in log space. Nothing is subtracted
    that shares leading digits, a column of weight 0 has no say, whatever its logit, and the factor goes in before
    the halves are doubled: what overflows is not representable.

    Args:
        log_sum: (N,) s; None for zeros, where `halves` are relative to the log-sum-exp itself.
        halves: (2, N) a / 2 and b / 2.
        target: columns and weights.
        form: "ce" or "log_mixture".
        factor: of the loss.
    """
    weights = target.weights
    if form == "log_mixture":
        w, v = weights.unbind()
        half_first, half_second = halves.unbind()
        near, far = half_first - 0.5 * w.log(), half_second - 0.5 * v.log()
        apart = torch.where(torch.isinf(torch.maximum(near, far)), torch.inf, (near - far).abs())
        half = torch.minimum(near, far) if log_sum is None else 0.5 * log_sum + torch.minimum(near, far)
        return ((half - 0.5 * torch.log1p(torch.exp(-2 * apart))) * (2 * factor)).clamp_min_(0)
    doubled = weights + weights if factor == 1 else 2 * factor * weights
    terms = (halves * doubled).masked_fill_(weights <= _ZERO, 0)
    if log_sum is None:
        return terms.sum(dim=0).clamp_min_(0)
    first, second = terms.unbind()
    total = weights.sum(dim=0) if factor == 1 else factor * weights.sum(dim=0)
    return (log_sum * total).add_(first).add_(second).clamp_min_(0)


def pulls_of(halves: Tensor, target: SafeTarget, form: str, gain: Tensor | float = 1.0) -> Tensor:
    """(2, N) `pulls` from half gaps, times the softmax's sum. `gain` times the half gaps may be more than can be
    represented.
    """
    weights = target.weights
    if form != "log_mixture":
        return weights
    w, v = weights.unbind()
    half_first, half_second = halves.unbind()
    # The gaps are subtracted first: each may be so large that a logarithm added to it leaves no trace.
    both = (w > 0) & (v > 0)
    odds = torch.where(both, w.log() - v.log(), 0) + 2 * (half_second - half_first) * gain
    return torch.where(both, torch.stack((torch.sigmoid(odds), torch.sigmoid(-odds))), (weights > 0).to(odds.dtype))


# ---- the reduction over the rows ----


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Losses (..., N) as they are, their sum, or their mean (NaN for N = 0, as torch)."""
    if reduction == "none":
        return losses
    rows = losses.shape[-1]
    if reduction == "mean":
        # Divided before they are added up: the mean of large losses is finite where their sum is not.
        losses = losses / rows if rows else losses.new_full((*losses.shape[:-1], 1), float("nan"))
    return losses.sum(dim=-1)


def upstream(grad: Tensor, rows: int, reduction: str) -> Tensor:
    """(..., N) the upstream gradient of every row, from that of `reduced`."""
    if reduction == "none":
        return grad
    if grad.is_cpu and grad.ndim == 0:
        # The quotient of two numbers of float32, rounded to float64 and then to float32, is the quotient in float32.
        return grad.new_full((rows,), grad.item() / rows if reduction == "mean" else grad.item())
    grad = grad / rows if reduction == "mean" else grad
    return grad.unsqueeze(-1).expand(*grad.shape, rows)


# ---- full precision ----


class _Switch:
    """One of torch's process-wide precision switches, held at "ieee" while any thread needs it there.

    Only the first to come turns it and only the last to go turns it back: two that overlap would otherwise leave it
    turned for good, or turn it back under the other.
    """

    def __init__(self, setting: Any) -> None:
        self.setting = setting
        self.lock = threading.Lock()
        self.holders = 0
        self.outside = ""

    def hold(self) -> bool:
        """Turn it unless products are exact as it is; whether `release` is owed."""
        with self.lock:
            if self.holders == 0:
                self.outside = self.setting.fp32_precision
                if self.outside in ("ieee", "none"):
                    return False
                self.setting.fp32_precision = "ieee"
            self.holders += 1
            return True

    def release(self) -> None:
        """The last holder puts back what was there before, unless someone else has turned it meanwhile."""
        with self.lock:
            self.holders -= 1
            if self.holders == 0 and self.setting.fp32_precision == "ieee":
                self.setting.fp32_precision = self.outside


_SWITCHES = {"cuda": _Switch(torch.backends.cuda.matmul), "cpu": _Switch(torch.backends.mkldnn.matmul)}


def full_precision(like: Tensor) -> AbstractContextManager[None]:
    """Matrix products of float32 in full precision, whatever autocast and the switches for tf32 and bf16 say outside.

    For what calls PyTorch's own matrix products alone: no other backend reads the switches. They are left as they are
    where products are exact already, which is the default, and on a GPU for half inputs, which tf32 holds exactly. They
    are read and turned by the names that PyTorch has for both (`fp32_precision`), never the older ones.
    """
    device = like.device.type
    switch = _SWITCHES.get(device)
    if switch is None or (device == "cuda" and like.dtype in (torch.float16, torch.bfloat16)) or not switch.hold():
        switch = None
    if switch is None and not torch.is_autocast_enabled(device):
        return _AS_IT_IS
    return _held(switch, device)


_AS_IT_IS = contextlib.nullcontext()


@contextlib.contextmanager
def _held(switch: _Switch | None, device: str) -> Iterator[None]:
    """A switch that is being held, let go at the end; no autocast within."""
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if switch is not None:
            switch.release()
