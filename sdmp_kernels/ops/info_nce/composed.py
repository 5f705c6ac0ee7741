"""`info_nce` from PyTorch's own operators; nothing of N x M elements exists.

With detached keys, loss and gradient are one attention: the gradient of the log-sum-exp is softmax(q k^T / T) k / T.
On a CPU, PyTorch's fused attention returns both it and the log-sum-exp. What that cannot serve (a GPU, float64, no
gradient of q wanted, products that could overflow) passes through one reused buffer, a chunk of rows at a time.

Shapes: q (N, D); for every key set t of T: k (M_t, D), first, second, weight (N,).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sdmp_kernels.ops.info_nce.arguments import Problem, empty_rows, hide
from sdmp_kernels.ops.losses import (
    SafeTarget,
    at_columns,
    full_precision,
    half_gaps,
    loss_of,
    pulls_of,
    safe_target,
    take,
    work_dtype,
)

# Logits of a chunk: on a CPU about what its cache holds, on a GPU enough to be worth the launches; but never fewer
# rows than a matrix product needs to be fast.
_CHUNK = {"cpu": 2**21, "cuda": 2**26}
_FEWEST_ROWS = 64


class Found(NamedTuple):
    """What one pass over the keys knows of each query.

    Attributes:
        attended: (N, D) softmax(q k^T) k, or None where it was not asked for.
        peak: (N,) the largest product, in products of the operands.
        log_sum: (N,) log(sum of exp(logit - largest logit)); None where peak is the log-sum-exp itself.
        halves: (2, N) see `losses.half_gaps`.
    """

    attended: Tensor | None
    peak: Tensor
    log_sum: Tensor | None
    halves: Tensor


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


def forward(problem: Problem, need_dq: bool, need_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (T, N), stats (T, 4, N), dq) as `reference.forward`."""
    q, losses, stats, dqs = problem.q, [], [], []
    work = work_dtype(q)
    with full_precision(q):
        for keys, slope in zip(problem.sets, problem.slopes, strict=True):
            operands = operands_of(q, keys.k, problem.temperature)
            target = safe_target(keys.first, keys.second, keys.weight, len(keys.k), work)
            chosen = _rows_at(operands.k, target.columns) if need_dq else None
            # Small enough that no product can overflow.
            safe = q.is_cpu and work == torch.float32 and isinstance(operands.unit, float) and keys.excluded is None
            if chosen is not None and safe:
                found = _by_attention(operands, chosen)
            else:
                found = _by_chunks(operands, target, keys.excluded, need_dq)
            loss = loss_of(found.log_sum, found.halves, target, problem.form, problem.scale)
            none = empty_rows(keys)
            losses.append(loss if none is None else loss.masked_fill_(none, 0))
            pulls = pulls_of(found.halves, target, problem.form)
            if need_stats:
                log_sum = torch.zeros_like(found.peak) if found.log_sum is None else found.log_sum
                stats.append(torch.stack((found.peak * operands.unit, log_sum, *pulls.unbind())).double())
            if chosen is not None and found.attended is not None:
                dqs.append(_query_gradient(found.attended, chosen, pulls, operands.k_factor, slope))
    nothing = q.new_empty(0)
    for dq in dqs[1:] if problem.summed else ():
        dqs[0].add_(dq)
    return (
        _stacked(losses),
        _stacked(stats) if need_stats else nothing.double(),
        _stacked(dqs[:1] if problem.summed else dqs) if need_dq else nothing.to(work),
    )


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _query_gradient(attended: Tensor, chosen: Tensor, pulls: Tensor, factor: Tensor | float, scale: float) -> Tensor:
    """(N, D) scale * factor * (total pull * attended - what is drawn to the chosen keys), over the arguments."""
    (k_first, k_second), (at_first, at_second) = chosen.unbind(), pulls.unbind()
    drawn = k_first.mul_(at_first.unsqueeze(1)).addcmul_(k_second, at_second.unsqueeze(1))
    return attended.mul_(pulls.sum(dim=0).unsqueeze(1)).sub_(drawn).mul_(factor).mul_(scale)


def backward(
    problem: Problem, grad: Tensor, stats: Tensor, dq: Tensor, need_q: bool, need_k: list[bool]
) -> tuple[Tensor, list[Tensor]]:
    """(dq (N, D), [dk_t (M_t, D)]) as `reference.backward`."""
    q = problem.q
    total = added_up(dq, grad) if need_q else q.new_empty(0)
    dks = [keys.k.new_empty(0) for keys in problem.sets]
    if any(need_k):
        with full_precision(q):
            for t, (keys, slope) in enumerate(zip(problem.sets, problem.slopes, strict=True)):
                if need_k[t]:
                    operands = operands_of(q, keys.k, problem.temperature)
                    target = safe_target(keys.first, keys.second, keys.weight, len(keys.k), dq.dtype)
                    given = grad[0 if problem.summed else t]
                    dk = _key_gradient(given, operands, target, keys.excluded, stats[t, 2:], slope)
                    dks[t] = dk.to(keys.k.dtype)
    return total.to(q.dtype), dks


def added_up(dq: Tensor, grad: Tensor) -> Tensor:
    """(N, D) sum over t of grad[t, i] * dq[t, i]."""
    total = torch.mul(dq[0], grad[0].unsqueeze(1))
    for t in range(1, len(dq)):
        total.addcmul_(dq[t], grad[t][:, None])
    return total


def operands_of(q: Tensor, k: Tensor, temperature: float) -> Operands:
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


def _rows_at(k: Tensor, columns: Tensor) -> Tensor:
    """(2, N, D): the keys at the target's columns."""
    return k.index_select(0, columns.view(-1)).view(*columns.shape, k.shape[1])


def _by_attention(operands: Operands, chosen: Tensor) -> Found:
    """From the fused attention of the CPU. chosen (2, N, D): the keys at the target's columns.

    It returns the log-sum-exp itself, which then is the peak, with nothing left for log_sum.
    """
    q, k = operands.q, operands.k
    heads = (q.view(1, 1, *q.shape), k.view(1, 1, *k.shape))
    attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(*heads, heads[1], scale=1.0)
    lse = lse.view(-1)
    # Sums of products of rows, rounded once.
    logits = (q.double() * chosen).sum(dim=2).to(lse.dtype)
    return Found(attended.view(q.shape), lse, None, half_gaps(lse, logits))


def _by_chunks(operands: Operands, target: SafeTarget, excluded: Tensor | None, need_dq: bool) -> Found:
    """Through a buffer of some rows of the products."""
    q, k = operands.q, operands.k
    attended = torch.empty_like(q) if need_dq else None
    peaks, sums = q.new_empty((2, q.shape[0])).unbind()
    halves = q.new_empty((2, q.shape[0]))
    for start, stop, z in products_of(q, k, excluded):
        peak = torch.amax(z, dim=1, out=peaks[start:stop])
        halves[:, start:stop] = half_gaps(peak, at_columns(z, target.columns[:, start:stop]))
        _below(z, peak, operands.gain).exp_()
        total = torch.sum(z, dim=1, out=sums[start:stop])
        if attended is not None:
            torch.mm(z, k, out=attended[start:stop]).div_(total[:, None])
    return Found(attended, peaks, sums.log_(), halves.mul_(operands.gain))


def _key_gradient(
    grad: Tensor, operands: Operands, target: SafeTarget, excluded: Tensor | None, pulls: Tensor, scale: float
) -> Tensor:
    """(M, D) sum over i of grad_i * scale * d loss_i / dk, in the dtype of the arithmetic. pulls (2, N)."""
    q, k = operands.q, operands.k
    pulls = grad.to(q.dtype) * pulls.to(q.dtype)
    total = pulls.sum(dim=0).unsqueeze(1)
    dk = torch.zeros_like(k)
    for start, stop, z in products_of(q, k, excluded):
        _below(z, z.amax(dim=1), operands.gain)
        torch.softmax(z, dim=1, out=z).mul_(total[start:stop])
        take(z, target.columns[:, start:stop], pulls[:, start:stop])
        dk.addmm_(z.T, q[start:stop])
    return dk.mul_(operands.q_factor).mul_(scale)


def products_of(q: Tensor, k: Tensor, excluded: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, q[start:stop] k^T with what is excluded hidden), each in the same memory as the one before."""
    n, m = len(q), len(k)
    step = min(n, max(_FEWEST_ROWS, _CHUNK.get(q.device.type, 2**21) // m))
    buffer = q.new_empty((step, m))
    for start in range(0, n, step):
        stop = min(start + step, n)
        z = torch.mm(q[start:stop], k.T, out=buffer[: stop - start])
        yield start, stop, hide(z, excluded, start)


def _below(z: Tensor, peak: Tensor, gain: Tensor | float) -> Tensor:
    """Products turned into logits less the row's largest, in place: first the difference, which cannot overflow."""
    z.sub_(peak[:, None])
    return z if isinstance(gain, float) and gain == 1 else z.mul_(gain)
