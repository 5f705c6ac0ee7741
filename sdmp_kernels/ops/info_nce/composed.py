"""`info_nce` from PyTorch's own operators; nothing of N x M elements exists.

With detached keys, loss and gradient are one attention: the gradient of the log-sum-exp is softmax(q k^T / T) k / T.
On a CPU, PyTorch's fused attention returns both it and the log-sum-exp. What that cannot serve (a GPU, float64, no
gradient of q wanted, products that could overflow) passes through one reused buffer, a chunk of rows at a time.

Shapes: q (N, D); for every key set t of T: keys[t] (M_t, D), first[t], second[t], weight[t] (N,).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sdmp_kernels.ops.soft_cross_entropy.composed import take
from sdmp_kernels.ops.soft_cross_entropy.reference import column, work_dtype
from sdmp_kernels.ops.target import Shares, half_gap, loss_of, pulls_of, shares

# Logits of a chunk: on a CPU about what its cache holds, on a GPU enough to be worth the launches; but never fewer
# rows than a matrix product needs to be fast.
_CHUNK = {"cpu": 2**21, "cuda": 2**26}
_FEWEST_ROWS = 64


class Operands(NamedTuple):
    """q and k for products that cannot overflow.

    Attributes:
        q, k: in the dtype of the arithmetic; by powers of two smaller than given where those are very large.
        gain: logits per product of these. 1 where q has been multiplied by it.
        q_factor, k_factor: what multiplies these q and k to give q / temperature and k / temperature.
        unit: product of q and k as given, per product of these.
    """

    q: Tensor
    k: Tensor
    gain: Tensor | float
    q_factor: Tensor | float
    k_factor: Tensor | float
    unit: Tensor | float


def forward(
    q: Tensor,
    keys: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    weight: list[Tensor],
    temperature: float,
    form: str,
    scale: float,
    need_dq: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (T, N), rows (T, 4, N), dq (T, N, D)) as `reference.forward`."""
    work = work_dtype(q)
    loss = q.new_empty((len(keys), q.shape[0]), dtype=work)
    rows = q.new_empty((len(keys), 4, q.shape[0]), dtype=torch.float64)
    dq = q.new_empty((len(keys), *q.shape) if need_dq else (0,), dtype=work)
    for t, k in enumerate(keys):
        operands = _operands(q, k, temperature)
        target = shares(first[t], second[t], weight[t], len(k), work)
        small = q.device.type == "cpu" and work == torch.float32 and operands.gain == 1
        if need_dq and small:
            attended, stats = _by_attention(operands, target)
        else:
            attended, stats = _by_chunks(operands, target, need_dq)
        peak, log_sum, half_first, half_second = stats
        loss[t] = loss_of(log_sum, half_first, half_second, target, form, scale)
        at_first, at_second = pulls_of(half_first, half_second, target, form)
        torch.stack((peak * operands.unit, log_sum.double(), at_first.double(), at_second.double()), out=rows[t])
        if attended is not None:
            drawn = operands.k[target.first].mul_(at_first[:, None])
            drawn.addcmul_(operands.k[target.second], at_second[:, None])
            attended.mul_((at_first + at_second)[:, None])
            torch.sub(attended, drawn, out=dq[t]).mul_(operands.k_factor).mul_(scale)
    return loss, rows, dq


def backward(
    grad: Tensor,
    q: Tensor,
    keys: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    weight: list[Tensor],
    rows: Tensor,
    dq: Tensor,
    temperature: float,
    form: str,
    scale: float,
    need_q: bool,
    need_k: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """(dq (N, D), [dk_t (M_t, D)]) as `reference.backward`."""
    total = q.new_empty(0)
    if need_q:
        total = torch.mul(dq[0], grad[0][:, None])
        for t in range(1, len(dq)):
            total.addcmul_(dq[t], grad[t][:, None])
    dks = [
        _key_gradient(grad[t], _operands(q, k, temperature), shares(first[t], second[t], weight[t], len(k), dq.dtype),
                      rows[t], scale).to(k.dtype)
        if need_k[t]
        else k.new_empty(0)
        for t, k in enumerate(keys)
    ]  # fmt: skip
    return total.to(q.dtype), dks


def _operands(q: Tensor, k: Tensor, temperature: float) -> Operands:
    q, k = q.contiguous(), k.contiguous()  # the fused attention of the CPU reads columns of stride one only
    half = q.dtype == torch.float16
    work = work_dtype(q)
    q, k = q.to(work), k.to(work)
    per_logit = min(1 / temperature, torch.finfo(work).max)
    if q.device.type == "cpu" and _largest(q) * _largest(k) * q.shape[1] * max(1.0, per_logit) < 1e30:
        # Also false where the largest is not finite.
        return Operands(q * per_logit, k, 1.0, 1.0, per_logit, temperature)
    if half:
        return Operands(q, k, per_logit, per_logit, per_logit, 1.0)
    q, q_unit = _shrunk(q)
    k, k_unit = _shrunk(k)
    limit = torch.finfo(work).max
    factors = [(unit / temperature).clamp_max(limit).to(work) for unit in (q_unit * k_unit, q_unit, k_unit)]
    return Operands(q, k, *factors, q_unit * k_unit)


def _largest(x: Tensor) -> float:
    low, high = x.aminmax()
    return max(-float(low), float(high))


def _shrunk(x: Tensor) -> tuple[Tensor, Tensor]:
    """x divided by a power of two that leaves sums of products far from overflow, and that power (1 for usual x).

    Without a host synchronisation.
    """
    safe = 40 if x.dtype == torch.float32 else 400
    _, exponent = torch.frexp(x.abs().amax())
    excess = (exponent - safe).clamp_min(0).double()
    return x * torch.exp2(-excess).to(x.dtype), torch.exp2(excess)


def _by_attention(operands: Operands, target: Shares) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(softmax(q k^T) k (N, D), (peak, log_sum, half gaps)) from the fused attention of the CPU.

    It returns the log-sum-exp itself, which then is the peak, with nothing left for log_sum.
    """
    q, k = operands.q[None, None], operands.k[None, None]
    attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, False, scale=1.0)
    lse = lse.reshape(-1)
    halves = (half_gap(lse, _dot(operands.q, operands.k[column])) for column in (target.first, target.second))
    return attended[0, 0], (lse, torch.zeros_like(lse), *halves)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(N,) sums of products of rows, rounded once."""
    return (a.double() * b).sum(dim=1).to(a.dtype)


def _by_chunks(
    operands: Operands, target: Shares, need_dq: bool
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """As `_by_attention`; the first is None unless `need_dq`. peak is in products of the operands."""
    q, k = operands.q, operands.k
    attended = torch.empty_like(q) if need_dq else None
    stats = q.new_empty((4, q.shape[0]))
    for start, stop, z in _products(q, k):
        peak = z.amax(dim=1)
        stats[0, start:stop] = peak
        for row, index in ((2, target.first), (3, target.second)):
            stats[row, start:stop] = half_gap(peak, column(z, index[start:stop]))
        _below(z, peak, operands.gain).exp_()
        total = torch.sum(z, dim=1, out=stats[1, start:stop])
        if attended is not None:
            torch.mm(z, k, out=attended[start:stop]).div_(total[:, None])
    stats[1].log_()
    stats[2:].mul_(operands.gain)
    peak, log_sum, half_first, half_second = stats
    return attended, (peak, log_sum, half_first, half_second)


def _key_gradient(grad: Tensor, operands: Operands, target: Shares, rows: Tensor, scale: float) -> Tensor:
    """(M, D) sum over i of grad_i * scale * d loss_i / dk, in the dtype of the arithmetic."""
    q, k = operands.q, operands.k
    grad = grad.to(q.dtype)
    at_first, at_second = (grad * pull.to(q.dtype) for pull in (rows[2], rows[3]))
    total = (at_first + at_second)[:, None]
    dk = torch.zeros_like(k)
    for start, stop, z in _products(q, k):
        _below(z, z.amax(dim=1), operands.gain)
        torch.softmax(z, dim=1, out=z).mul_(total[start:stop])
        take(z, target.first[start:stop], at_first[start:stop])
        take(z, target.second[start:stop], at_second[start:stop])
        dk.addmm_(z.T, q[start:stop])
    return dk.mul_(operands.q_factor).mul_(scale)


def _products(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, q[start:stop] k^T), each in the same memory as the one before."""
    n, m = len(q), len(k)
    step = min(n, max(_FEWEST_ROWS, _CHUNK.get(q.device.type, 2**21) // m))
    buffer = q.new_empty((step, m))
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield start, stop, torch.mm(q[start:stop], k.T, out=buffer[: stop - start])


def _below(z: Tensor, peak: Tensor, gain: Tensor | float) -> Tensor:
    """Products turned into logits less the row's largest, in place: first the difference, which cannot overflow."""
    z.sub_(peak[:, None])
    return z if isinstance(gain, float) and gain == 1 else z.mul_(gain)
