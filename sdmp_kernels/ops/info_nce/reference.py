"""The definition of `info_nce`, in plain PyTorch and float64: logits = q k^T / temperature, then a two-hot
cross-entropy.

Shapes: q (N, D); for every key set t of T: keys[t] (M_t, D), first[t], second[t], weight[t] (N,).
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.losses import dense_target, pulls, safe_target, two_hot_loss, work_dtype


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
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (T, N), stats (T, 4, N), dq (T, N, D)); loss and dq in float32 (float64 for float64 q), stats in float64.

    loss[t, i] is `scale` times the cross-entropy of row i with key set t, and dq[t, i] its gradient to q[i] with the
    keys held fixed, empty unless `need_dq`. stats[t], empty unless `need_stats`, are for the gradient of the keys: the
    row's largest product q k^T, log(sum of exp(logit - largest logit)), and what the target draws to `first` and to
    `second`.
    """
    losses, stats, dqs = [], [], []
    for k, u, v, w in zip(keys, first, second, weight, strict=True):
        log_p, peak = _log_softmax(q, k, temperature)
        target = safe_target(u, v, w, len(k), log_p.dtype)
        losses.append(scale * two_hot_loss(log_p, target, form))
        stats.append(torch.stack((peak[:, 0], -log_p.amax(dim=1), *pulls(log_p, target, form))))
        if need_dq:
            dense = dense_target(log_p, target, form)
            d_logits = dense.sum(dim=1, keepdim=True) * log_p.exp() - dense
            dqs.append(scale * (d_logits @ k.double()) / temperature)
    work = work_dtype(q)
    dq = torch.stack(dqs).to(work) if need_dq else q.new_empty(0, dtype=work)
    saved = torch.stack(stats) if need_stats else q.new_empty(0, dtype=torch.float64)
    return torch.stack(losses).to(work), saved, dq


def backward(
    grad: Tensor,
    q: Tensor,
    keys: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    weight: list[Tensor],
    stats: Tensor,
    dq: Tensor,
    temperature: float,
    form: str,
    scale: float,
    need_q: bool,
    need_k: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of sum_ti grad[t, i] * loss[t, i]: (dq (N, D), [dk_t (M_t, D)]), in the dtypes of q and the keys.

    Empty where not needed. `stats` and `dq` are what `forward` returned.
    """
    total = (grad.double()[:, :, None] * dq.double()).sum(dim=0).to(q.dtype) if need_q else q.new_empty(0)
    dks = []
    for t, (k, u, v, w) in enumerate(zip(keys, first, second, weight, strict=True)):
        if not need_k[t]:
            dks.append(k.new_empty(0))
            continue
        log_p, _ = _log_softmax(q, k, temperature)
        dense = dense_target(log_p, safe_target(u, v, w, len(k), log_p.dtype), form)
        d_logits = grad[t].double()[:, None] * (dense.sum(dim=1, keepdim=True) * log_p.exp() - dense)
        dks.append((scale * (d_logits.T @ q.double()) / temperature).to(k.dtype))
    return total, dks


def _log_softmax(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities (N, M), largest product of each row (N, 1)).

    The largest is taken off before the division, which changes no probability and cannot overflow.
    """
    products = q.double() @ k.double().T
    peak = products.amax(dim=1, keepdim=True)
    return torch.log_softmax((products - peak) / temperature, dim=1), peak
