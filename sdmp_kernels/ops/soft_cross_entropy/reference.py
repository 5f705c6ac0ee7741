"""The definition of `soft_cross_entropy`, in plain PyTorch and float64.

Shapes: logits (N, K); first, second, weight (N,).
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.target import Shares, shares


def forward(
    logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, label_smoothing: float, form: str
) -> tuple[Tensor, Tensor]:
    """(loss (N,), rows (2, N)): rows are the largest logit and the sum of exp(logit - largest).

    float32 (float64 for float64 logits).
    """
    z = logits.double()
    log_p = torch.log_softmax(z, dim=1)
    loss = two_hot_loss(log_p, first, second, weight, form)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=1)
    rows = torch.stack((z.amax(dim=1), torch.exp(-log_p.amax(dim=1))))
    return loss.to(work_dtype(logits)), rows.to(work_dtype(logits))


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
    """(N, K) gradient of sum_i grad_i * loss_i, in the dtype of the logits."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    target = dense_target(log_p, first, second, weight, form)
    target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1]
    total = target.sum(dim=1, keepdim=True)
    return (grad.double()[:, None] * (total * log_p.exp() - target)).to(logits.dtype)


def work_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half and single inputs, float64 for double."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def two_hot_loss(log_p: Tensor, first: Tensor, second: Tensor, weight: Tensor, form: str) -> Tensor:
    """(N,) losses from the log-probabilities (N, K)."""
    target = shares(first, second, weight, log_p.shape[1], log_p.dtype)
    a, b = column(log_p, target.first), column(log_p, target.second)
    if form == "log_mixture":
        return -torch.logaddexp(target.own.log() + a, target.other.log() + b)
    # A column of weight 0 has no say, whatever its logit: not even minus infinity.
    return -torch.where(target.own > 0, target.own * a, 0) - torch.where(target.other > 0, target.other * b, 0)


def pulls(log_p: Tensor, target: Shares, form: str) -> tuple[Tensor, Tensor]:
    """(N,) what the target draws to `first` and to `second`: for "log_mixture" the posterior of each, given both."""
    if form != "log_mixture":
        return target.own, target.other
    # The log-probabilities are subtracted first: beside a very large one a logarithm of a weight leaves no trace.
    apart = column(log_p, target.first) - column(log_p, target.second)
    both = (target.own > 0) & (target.other > 0)
    odds = torch.where(both, target.own.log() - target.other.log(), 0) + apart
    first = torch.where(both, torch.sigmoid(odds), (target.own > 0).to(odds.dtype))
    second = torch.where(both, torch.sigmoid(-odds), (target.other > 0).to(odds.dtype))
    return first, second


def dense_target(log_p: Tensor, first: Tensor, second: Tensor, weight: Tensor, form: str) -> Tensor:
    """(N, K) what the gradient subtracts from the softmax."""
    target = shares(first, second, weight, log_p.shape[1], log_p.dtype)
    at_first, at_second = pulls(log_p, target, form)
    dense = torch.zeros_like(log_p)
    dense.scatter_add_(1, target.first[:, None], at_first[:, None])
    return dense.scatter_add_(1, target.second[:, None], at_second[:, None])


def column(z: Tensor, index: Tensor) -> Tensor:
    """(N,) z[i, index[i]]."""
    return z.gather(1, index[:, None])[:, 0]
