"""`soft_cross_entropy` by the compiled kernel of csrc/: backend `cpp`, value and gradient in one sweep over the logits.

`_backends.native_library` has loaded the library before any of these is called.
Shapes: logits (N, K) float16, bfloat16 or float32; first, second, weight (N,).
"""

import torch
from torch import Tensor

from sdmp_kernels._memory import new_empty


def sweep(
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
    reduction: str,
    gradient: Tensor | None,
) -> Tensor:
    """The loss, (N,) or reduced to (), float32; `gradient` (N, K), where it is given, is filled with the gradient of
    the sum of what is returned.
    """
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=torch.float32)
    scale = 1 / rows if reduction == "mean" and rows else 1.0
    _run()(logits, first, second, weight, label_smoothing, form == "log_mixture", scale, None, loss, gradient)
    return loss


def backward(
    grad: Tensor, logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, label_smoothing: float, form: str
) -> Tensor:
    """(N, K) gradient of sum_i grad_i * loss_i, in the dtype of the logits, from the logits alone."""
    gradient = new_empty(logits)
    _run()(logits, first, second, weight, label_smoothing, form == "log_mixture", 1.0, grad, None, gradient)
    return gradient


def _run():
    return torch.ops.sdmp.soft_cross_entropy_cpu.default
