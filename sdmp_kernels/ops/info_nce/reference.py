"""The definition of `info_nce`, in plain PyTorch and float64: logits = q k^T / temperature, then a two-hot
cross-entropy.

Shapes: q (N, D); for every key set t of T: k (M_t, D), first, second, weight (N,).
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.info_nce.arguments import KeySet, Problem, empty_rows, hide
from sdmp_kernels.ops.losses import dense_target, pulls, safe_target, two_hot_loss, work_dtype


def forward(problem: Problem, need_dq: bool, need_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (T, N), stats (T, 4, N), dq (T, N, D)); loss and dq in float32 (float64 for float64 q), stats in float64.

    loss[t, i] is `scale` times the cross-entropy of row i with key set t, and dq[t, i] its gradient to q[i] with the
    keys held fixed, times the term's factor: empty unless `need_dq`, added up to (1, N, D) where `problem.summed`.
    stats[t], empty unless `need_stats`, are for the gradient of the keys: the row's largest product q k^T, log(sum of
    exp(logit - largest logit)), and what the target draws to `first` and to `second`.
    """
    q, losses, stats, dqs = problem.q, [], [], []
    for keys, slope in zip(problem.sets, problem.slopes, strict=True):
        log_p, peak = _log_softmax(problem, keys)
        target = safe_target(keys.first, keys.second, keys.weight, len(keys.k), log_p.dtype)
        loss = problem.scale * two_hot_loss(log_p, target, problem.form)
        none = empty_rows(keys)
        losses.append(loss if none is None else loss.masked_fill(none, 0))
        stats.append(torch.stack((peak[:, 0], -log_p.amax(dim=1), *pulls(log_p, target, problem.form))))
        if need_dq:
            dense = dense_target(log_p, target, problem.form)
            d_logits = dense.sum(dim=1, keepdim=True) * log_p.exp() - dense
            dqs.append(slope * (d_logits @ keys.k.double()) / problem.temperature)
    work = work_dtype(q)
    saved = torch.stack(stats) if need_stats else q.new_empty(0, dtype=torch.float64)
    if not need_dq:
        return torch.stack(losses).to(work), saved, q.new_empty(0, dtype=work)
    dq = torch.stack(dqs)
    return torch.stack(losses).to(work), saved, (dq.sum(dim=0, keepdim=True) if problem.summed else dq).to(work)


def backward(
    problem: Problem, grad: Tensor, stats: Tensor, dq: Tensor, need_q: bool, need_k: list[bool]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of sum_ti grad[t, i] * loss[t, i]: (dq (N, D), [dk_t (M_t, D)]), in the dtypes of q and the keys.

    Empty where not needed. `grad` is (T, N), or (1, N) for all terms, times their factors, where `problem.summed`.
    `stats` and `dq` are what `forward` returned.
    """
    q = problem.q
    total = (grad.double()[:, :, None] * dq.double()).sum(dim=0).to(q.dtype) if need_q else q.new_empty(0)
    dks = []
    for t, (keys, slope) in enumerate(zip(problem.sets, problem.slopes, strict=True)):
        if not need_k[t]:
            dks.append(keys.k.new_empty(0))
            continue
        log_p, _ = _log_softmax(problem, keys)
        target = safe_target(keys.first, keys.second, keys.weight, len(keys.k), log_p.dtype)
        dense = dense_target(log_p, target, problem.form)
        given = grad[0 if problem.summed else t].double()[:, None]
        d_logits = given * (dense.sum(dim=1, keepdim=True) * log_p.exp() - dense)
        dks.append((slope * (d_logits.T @ q.double()) / problem.temperature).to(keys.k.dtype))
    return total, dks


def _log_softmax(problem: Problem, keys: KeySet) -> tuple[Tensor, Tensor]:
    """(log-probabilities (N, M), largest product of each row (N, 1)).

    The largest is taken off before the division, which changes no probability and cannot overflow.
    """
    products = hide(problem.q.double() @ keys.k.double().T, keys.excluded)
    peak = products.amax(dim=1, keepdim=True)
    return torch.log_softmax((products - peak) / problem.temperature, dim=1), peak
