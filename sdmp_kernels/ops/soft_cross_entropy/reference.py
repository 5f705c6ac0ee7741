"""The definition of `soft_cross_entropy`, in plain PyTorch and float64.

Shapes: logits (N, K); first, second, weight (N,); stats (2, N).
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.losses import dense_target, safe_target, two_hot_loss, work_dtype


def forward(
    logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, label_smoothing: float, form: str
) -> tuple[Tensor, Tensor]:
    """(loss (N,), stats (2, N)): of each row its largest logit and the sum of exp(logit - largest).

    float32 (float64 for float64 logits).
    """
    z = logits.double()
    log_p = torch.log_softmax(z, dim=1)
    target = safe_target(first, second, weight, logits.shape[1], log_p.dtype)
    loss = two_hot_loss(log_p, target, form)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=1)
    stats = torch.stack((z.amax(dim=1), torch.exp(-log_p.amax(dim=1))))
    return loss.to(work_dtype(logits)), stats.to(work_dtype(logits))


def backward(
    grad: Tensor,
    logits: Tensor,
    stats: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
) -> Tensor:
    """(N, K) gradient of sum_i grad_i * loss_i, in the dtype of the logits: grad * (total * softmax - target)."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    target = dense_target(log_p, safe_target(first, second, weight, logits.shape[1], log_p.dtype), form)
    target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1]
    total = target.sum(dim=1, keepdim=True)
    return (grad.double()[:, None] * (total * log_p.exp() - target)).to(logits.dtype)
