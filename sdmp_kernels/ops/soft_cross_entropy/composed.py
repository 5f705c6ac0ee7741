"""`soft_cross_entropy` from PyTorch's own operators: chunks of rows pass through one reused buffer.

Nothing of the size of the logits is made in the forward pass, and only the gradient itself in the backward pass. On a
CPU that matters more than arithmetic: a fresh page costs more than the exponentials that go into it.

Shapes: logits (N, K); first, second, weight (N,); rows (2, N).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sdmp_kernels._memory import new_empty
from sdmp_kernels.ops.soft_cross_entropy.reference import column, work_dtype
from sdmp_kernels.ops.target import Shares, half_gap, loss_of, pulls_of, shares

# Elements of a chunk: on a CPU as many as stay in its cache, on a GPU enough to be worth the launches.
_CHUNK = {"cpu": 2**21, "cuda": 2**26}


def forward(
    logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, label_smoothing: float, form: str
) -> tuple[Tensor, Tensor]:
    """(loss, rows) as `reference.forward`."""
    n, k = logits.shape
    work = work_dtype(logits)
    rows = logits.new_empty((2, n), dtype=work)
    # Half of how far the mean logit is below the largest: only label smoothing asks.
    depth = logits.new_empty(n, dtype=work) if label_smoothing else None
    buffer = logits.new_empty((_chunk_rows(logits), k), dtype=work)
    for start, stop in _chunks(logits):
        chunk, room = logits[start:stop], buffer[: stop - start]
        peak = rows[0, start:stop]
        torch.amax(_as(work, chunk, room), dim=1, out=peak)
        if depth is not None:
            # Halves, and a share of the mean each, so that no sum of finite logits overflows.
            torch.add(-0.5 * peak[:, None], chunk, alpha=0.5, out=room)
            torch.sum(room.mul_(-1.0 / k), dim=1, out=depth[start:stop])
        torch.sub(chunk, peak[:, None], out=room)
        torch.sum(room.exp_(), dim=1, out=rows[1, start:stop])
    log_sum = rows[1].log()
    target, half_first, half_second = _target(logits, rows[0], first, second, weight)
    loss = loss_of(log_sum, half_first, half_second, target, form, 1 - label_smoothing)
    if depth is not None:
        loss += label_smoothing * log_sum + (2 * label_smoothing) * depth
    return loss, rows


def backward(
    grad: Tensor,
    logits: Tensor,
    rows: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
) -> Tensor:
    """(N, K) gradient of sum_i grad_i * loss_i, in the dtype of the logits.

    Each chunk's softmax is computed anew, straight into the gradient: PyTorch's fused one finds the row's
    log-sum-exp in less time than it takes to subtract a saved one.
    """
    k = logits.shape[1]
    work = work_dtype(logits)
    target, half_first, half_second = _target(logits, rows[0], first, second, weight)
    at_first, at_second = pulls_of(half_first, half_second, target, form)
    grad = grad.to(work)
    kept = grad * (1 - label_smoothing)
    total = kept * (at_first + at_second) + grad * label_smoothing
    at_first, at_second = kept * at_first, kept * at_second
    out = new_empty(logits)
    buffer = out.new_empty((0 if logits.dtype == work else _chunk_rows(logits), k), dtype=work)
    for start, stop in _chunks(logits):
        result = out[start:stop]
        room = result if logits.dtype == work else buffer[: stop - start]
        torch.softmax(_as(work, logits[start:stop], room), dim=1, out=room)
        room.mul_(total[start:stop, None])
        if label_smoothing:
            room.sub_((grad * (label_smoothing / k))[start:stop, None])
        take(room, target.first[start:stop], at_first[start:stop])
        take(room, target.second[start:stop], at_second[start:stop])
        if room is not result:
            result.copy_(room)
    return out


def take(matrix: Tensor, index: Tensor, amount: Tensor) -> None:
    """Subtract `amount[i]` from `matrix[i, index[i]]`: one element a row, so no order of additions to depend on."""
    matrix.scatter_(1, index[:, None], matrix.gather(1, index[:, None]).sub_(amount[:, None]))


def _as(dtype: torch.dtype, chunk: Tensor, room: Tensor) -> Tensor:
    """The chunk in `dtype`: itself, or a copy in `room`."""
    return chunk if chunk.dtype == dtype else room.copy_(chunk)


def _target(
    logits: Tensor, peak: Tensor, first: Tensor, second: Tensor, weight: Tensor
) -> tuple[Shares, Tensor, Tensor]:
    """The target, and half of how far each of its two logits is below the row's largest."""
    target = shares(first, second, weight, logits.shape[1], peak.dtype)
    a, b = column(logits, target.first).to(peak.dtype), column(logits, target.second).to(peak.dtype)
    return target, half_gap(peak, a), half_gap(peak, b)


def _chunk_rows(logits: Tensor) -> int:
    n, k = logits.shape
    return max(1, min(n, _CHUNK.get(logits.device.type, 2**21) // k))


def _chunks(logits: Tensor) -> Iterator[tuple[int, int]]:
    step = _chunk_rows(logits)
    for start in range(0, logits.shape[0], step):
        yield start, min(start + step, logits.shape[0])
