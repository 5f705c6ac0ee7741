"""The definition of `soft_cross_entropy`, in plain PyTorch and float64.

Shapes: logits (N, K); rows (N,) each; class_weight (K,) or None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdmp_kernels.ops.losses import dense_target, safe_target, two_hot_loss, work_dtype
from sdmp_kernels.ops.soft_cross_entropy.arguments import Rows, counted


def forward(logits: Tensor, rows: Rows, class_weight: Tensor | None, label_smoothing: float, form: str) -> Tensor:
    """(N,) losses, float32 (float64 for float64 logits): of each row

    factor * (1 - s) * l + smooth * s * mean over k of class_weight_k * -log p_k, with s = label_smoothing.
    """
    log_p = torch.log_softmax(logits.double(), dim=1)
    target = safe_target(rows.first, rows.second, rows.weight, logits.shape[1], log_p.dtype)
    loss = (1 - label_smoothing) * counted(two_hot_loss(log_p, target, form), rows.factor)
    if label_smoothing:
        uniform = log_p if class_weight is None else log_p * class_weight.double()
        loss = loss + label_smoothing * counted(-uniform.mean(dim=1), rows.smooth)
    return loss.to(work_dtype(logits))


def backward(
    grad: Tensor,
    logits: Tensor,
    rows: Rows,
    class_weight: Tensor | None,
    label_smoothing: float,
    form: str,
    out: Tensor | None = None,
) -> Tensor:
    """(N, K) gradient of sum_i grad_i * loss_i, in the dtype of the logits, in `out` if given, which may be they.

    grad * (total * softmax - target), where the target has the smoothing's share in every column.
    """
    log_p = torch.log_softmax(logits.double(), dim=1)
    target = dense_target(log_p, safe_target(rows.first, rows.second, rows.weight, logits.shape[1], log_p.dtype), form)
    target = (1 - label_smoothing) * (target if rows.factor is None else target * rows.factor.double()[:, None])
    share = torch.full_like(log_p, label_smoothing / logits.shape[1])
    share = share if class_weight is None else share * class_weight.double()
    target = target + (share if rows.smooth is None else share * rows.smooth.double()[:, None])
    total = target.sum(dim=1, keepdim=True)
    result = (grad.double()[:, None] * (total * log_p.exp() - target)).to(logits.dtype)
    return result if out is None else out.copy_(result)
