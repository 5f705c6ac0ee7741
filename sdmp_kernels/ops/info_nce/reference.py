"""The definition of `info_nce`, in plain PyTorch and float64: logits = q k^T / temperature, then a two-hot
cross-entropy.

Shapes: q (N, D); for every key set t of T: keys[t] (M_t, D), first[t], second[t], weight[t] (N,).
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.soft_cross_entropy.reference import dense_target, pulls, two_hot_loss, work_dtype
from sdmp_kernels.ops.target import shares


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
    """(loss (T, N), rows (T, 4, N), dq (T, N, D)); loss and dq in float32 (float64 for float64 q), rows in float64.

    loss[t, i] is `scale` times the cross-entropy of row i with key set t, and dq[t, i] its gradient to q[i] with the
    keys held fixed; empty unless `need_dq`. rows[t] are, for the gradient of the keys: the row's largest product
    q k^T, log(sum of exp(logit - largest logit)), and what the target draws to `first` and to `second`.
    """
    losses, rows, dqs = [], [], []
    for k, u, v, w in zip(keys, first, second, weight, strict=True):
        log_p, peak = _log_softmax(q, k, temperature)
        losses.append(scale * two_hot_loss(log_p, u, v, w, form))
        at_first, at_second = pulls(log_p, shares(u, v, w, len(k), log_p.dtype), form)
        rows.append(torch.stack((peak[:, 0], -log_p.amax(dim=1), at_first, at_second)))
        if need_dq:
            target = dense_target(log_p, u, v, w, form)
            d_logits = target.sum(dim=1, keepdim=True) * log_p.exp() - target
            dqs.append(scale * (d_logits @ k.double()) / temperature)
    work = work_dtype(q)
    dq = torch.stack(dqs).to(work) if need_dq else q.new_empty(0, dtype=work)
    return torch.stack(losses).to(work), torch.stack(rows), dq


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
    """Gradients of sum_ti grad[t, i] * loss[t, i]: (dq (N, D), [dk_t (M_t, D)]), in the dtypes of q and the keys.

    Empty where not needed. `rows` and `dq` are what `forward` returned.
    """
    total = (grad.double()[:, :, None] * dq.double()).sum(dim=0).to(q.dtype) if need_q else q.new_empty(0)
    dks = []
    for t, (k, u, v, w) in enumerate(zip(keys, first, second, weight, strict=True)):
        if not need_k[t]:
            dks.append(k.new_empty(0))
            continue
        log_p, _ = _log_softmax(q, k, temperature)
        target = dense_target(log_p, u, v, w, form)
        d_logits = grad[t].double()[:, None] * (target.sum(dim=1, keepdim=True) * log_p.exp() - target)
        dks.append((scale * (d_logits.T @ q.double()) / temperature).to(k.dtype))
    return total, dks


def _log_softmax(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities (N, M), largest product of each row (N, 1)).

    The largest is taken off before the division, which changes no probability and cannot overflow.
    """
    products = q.double() @ k.double().T
    peak = products.amax(dim=1, keepdim=True)
    return torch.log_softmax((products - peak) / temperature, dim=1), peak
