"""`soft_cross_entropy` from PyTorch's own operators: chunks of rows pass through one reused buffer.

Nothing of the size of the logits is made in the forward pass, and only the gradient itself in the backward pass. On a
CPU that matters more than arithmetic: a fresh page costs more than the exponentials that go into it.

Shapes: logits (N, K); rows (N,) each; class_weight (K,) or None.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sdmp_kernels._memory import new_empty
from sdmp_kernels.ops.losses import at_columns, half_gaps, loss_of, pulls_of, safe_target, take, work_dtype
from sdmp_kernels.ops.soft_cross_entropy.arguments import Rows, counted

# Elements of a chunk: on a CPU as many as stay in its cache, on a GPU enough to be worth the launches.
_CHUNK = {"cpu": 2**21, "cuda": 2**26}


def forward(logits: Tensor, rows: Rows, class_weight: Tensor | None, label_smoothing: float, form: str) -> Tensor:
    """(N,) losses as `reference.forward`."""
    n, k = logits.shape
    work = work_dtype(logits)
    peaks, sums = logits.new_empty((2, n), dtype=work).unbind()
    # Half of how far the mean logit is below the largest: only label smoothing asks.
    depth = logits.new_empty(n, dtype=work) if label_smoothing else None
    shares = -1.0 / k if class_weight is None else class_weight.to(work) * (-1.0 / k)
    buffer = logits.new_empty((_chunk_rows(logits), k), dtype=work)
    for start, stop in _chunks(logits):
        chunk, room = _cut(logits, start, stop), _cut(buffer, 0, stop - start)
        peak = _cut(peaks, start, stop)
        torch.amax(_as(work, chunk, room), dim=1, out=peak)
        peak = peak.unsqueeze(1)
        if depth is not None:
            # Halves, and a share of the mean each, so that no sum of finite logits overflows.
            torch.add(-0.5 * peak, chunk, alpha=0.5, out=room)
            torch.sum(room.mul_(shares), dim=1, out=_cut(depth, start, stop))
        torch.sub(chunk, peak, out=room)
        torch.sum(room.exp_(), dim=1, out=_cut(sums, start, stop))
    log_sum = sums.log()
    target = safe_target(rows.first, rows.second, rows.weight, k, work)
    halves = half_gaps(peaks, _in(work, at_columns(logits, target.columns)))
    loss = counted(loss_of(log_sum, halves, target, form, 1 - label_smoothing), rows.factor)
    if depth is not None:
        mean = 1.0 if class_weight is None else class_weight.to(work).mean()
        loss = loss + counted(label_smoothing * mean * log_sum + (2 * label_smoothing) * depth, rows.smooth)
    return loss


def backward(
    grad: Tensor,
    logits: Tensor,
    rows: Rows,
    class_weight: Tensor | None,
    label_smoothing: float,
    form: str,
    out: Tensor | None = None,
) -> Tensor:
    """As `reference.backward`.

    Each chunk's softmax is computed anew, straight into the gradient: PyTorch's fused one finds the row's
    log-sum-exp in less time than it takes to subtract a saved one.
    """
    k = logits.shape[1]
    work = work_dtype(logits)
    target = safe_target(rows.first, rows.second, rows.weight, k, work)
    pulls = target.weights
    if form == "log_mixture":
        peaks, at = _in(work, logits.amax(dim=1)), _in(work, at_columns(logits, target.columns))
        pulls = pulls_of(half_gaps(peaks, at), target, form)
    grad = _in(work, grad)
    unsmoothed = grad if rows.factor is None else grad * rows.factor
    unsmoothed = unsmoothed * (1 - label_smoothing) if label_smoothing else unsmoothed
    total = unsmoothed * pulls.sum(dim=0)
    pulls = unsmoothed * pulls
    smoothed = (grad if rows.smooth is None else grad * rows.smooth) * label_smoothing if label_smoothing else None
    uniform = None if class_weight is None else class_weight.to(work)
    if smoothed is not None:
        total += smoothed if uniform is None else smoothed * uniform.mean()
        smoothed = (smoothed / k)[:, None]
    in_place, out = out is not None, new_empty(logits) if out is None else out
    buffer = out.new_empty((_chunk_rows(logits), k), dtype=work) if in_place or logits.dtype != work else None
    for start, stop in _chunks(logits):
        result = _cut(out, start, stop)
        room = result if buffer is None else _cut(buffer, 0, stop - start)
        torch.softmax(_as(work, _cut(logits, start, stop), room), dim=1, out=room)
        room.mul_(_cut(total, start, stop).unsqueeze(1))
        if smoothed is not None:
            share = _cut(smoothed, start, stop)
            room.sub_(share) if uniform is None else room.addcmul_(share, uniform, value=-1)
        take(room, _cut(target.columns, start, stop, 1), _cut(pulls, start, stop, 1))
        if room is not result:
            result.copy_(room)
    return out


def _as(dtype: torch.dtype, chunk: Tensor, room: Tensor) -> Tensor:
    """The chunk in `dtype`: itself, or a copy in `room`."""
    return chunk if chunk.dtype == dtype else room.copy_(chunk)


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """The tensor in `dtype`, itself where it is."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _cut(tensor: Tensor, start: int, stop: int, dim: int = 0) -> Tensor:
    """A part of a tensor; where that is all of it, the tensor itself, since a view costs as much as a small sum."""
    return tensor if stop - start == tensor.shape[dim] else tensor.narrow(dim, start, stop - start)


def _chunk_rows(logits: Tensor) -> int:
    n, k = logits.shape
    return max(1, min(n, _CHUNK.get(logits.device.type, 2**21) // k))


def _chunks(logits: Tensor) -> Iterator[tuple[int, int]]:
    step = _chunk_rows(logits)
    for start in range(0, logits.shape[0], step):
        yield start, min(start + step, logits.shape[0])
