"""`soft_cross_entropy` by the compiled kernel of csrc/: backend `cpp`, value and gradient in one sweep over the logits.

`_backends.native_library` has loaded the library before any of these is called.
Shapes: logits (N, K) float16, bfloat16 or float32; given (N,) each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdmp_kernels._memory import new_empty
from sdmp_kernels.ops.losses import reduced
from sdmp_kernels.ops.soft_cross_entropy.arguments import Given, counted, rows_of


def sweep(
    logits: Tensor, given: Given, label_smoothing: float, form: str, reduction: str, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss, correction): (N,) or reduced to (), float32; `gradient` (N, K), where it is given, is filled with the
    gradient of the sum of the loss, once it is multiplied by the correction: () on a GPU, of no elements here.
    """
    n = logits.shape[0]
    rows = rows_of(given, logits.shape[1], torch.float32)
    target, options = rows[:3], (label_smoothing, form == "log_mixture")
    nothing = logits.new_empty(0, dtype=torch.float32)
    if rows.factor is None:
        loss = logits.new_empty((n,) if reduction == "none" else (), dtype=torch.float32)
        scale = 1 / n if reduction == "mean" and n else 1.0
        _run()(logits, *target, *options, scale, None, loss, gradient)
        return loss, nothing
    share = rows.factor / rows.divisor() if reduction == "mean" else rows.factor
    loss = logits.new_empty(n, dtype=torch.float32)
    _run()(logits, *target, *options, 1.0, share, loss, gradient)
    return reduced(counted(loss, share), "none" if reduction == "none" else "sum"), nothing


def backward(
    grad: Tensor,
    logits: Tensor,
    given: Given,
    label_smoothing: float,
    form: str,
    reduction: str,
    correction: Tensor,
    out: Tensor | None,
) -> Tensor:
    """(N, K) gradient of the logits from them alone, for the gradient `grad` of the loss as `sweep` returns it; in
    `out` if given, which may be they.
    """
    rows = rows_of(given, logits.shape[1], torch.float32)
    if reduction == "mean":
        grad = grad / rows.divisor()
    grad = grad.expand(logits.shape[0]) if rows.factor is None else grad * rows.factor
    # Row by row the kernel has read what it overwrites.
    whole = new_empty(logits) if out is None or not out.is_contiguous() else out
    _run()(logits, *rows[:3], label_smoothing, form == "log_mixture", 1.0, grad, None, whole)
    return whole if out is None or out is whole else out.copy_(whole)


def _run():
    return torch.ops.sdmp.soft_cross_entropy_cpu.default
