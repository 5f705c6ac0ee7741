"""Cross-entropy of given logits with two-hot targets; no dense target exists."""

from __future__ import annotations

import torch
from torch import Tensor

from sdmp_kernels._checks import check_number, check_tensor
from sdmp_kernels.ops.losses import FLOATS
from sdmp_kernels.ops.soft_cross_entropy import op as _op
from sdmp_kernels.ops.target import check_options, check_target
from sdmp_kernels.plan import TwoHot


def soft_cross_entropy(
    logits: Tensor, target: TwoHot, *, label_smoothing: float = 0.0, form: str = "ce", reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of `logits` with a two-hot target (paper Eq. 3 on given logits).

    With z = logits, p_i = softmax(z_i), w_i = weight[i], first_i and second_i the target's, and s = label_smoothing:

        "ce" (the paper's):                l_i = -(w_i log p_i[first_i] + (1 - w_i) log p_i[second_i])
        "log_mixture" (the released code): l_i = -log(w_i p_i[first_i] + (1 - w_i) p_i[second_i])
        loss_i = (1 - s) l_i + s (log(sum_k exp z_ik) - mean_k z_ik)

    Accumulated in float32 (float64 for float64 logits), in log space throughout.

    Args:
        logits: (N, K) float16, bfloat16, float32 or float64, any strides, K >= 1. Differentiable.
        target: a TwoHot of first, second (N,) int64 in [0, K) and weight (N,) in [0, 1], on the device of `logits`:
            `MixPlan.label_target` makes it of labels.
        label_smoothing: s in [0, 1].
        form: "ce" or "log_mixture".
        reduction: "mean" (NaN for N = 0, as torch), "sum", or "none" for (N,).

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument. Columns on a GPU are not read back: one out of range is never
            read, and its term of the loss is left out.
    """
    check_tensor("logits", logits, dtypes=FLOATS, ndim=2, shape="(N, K)")
    if logits.shape[1] == 0:
        raise ValueError("logits must have at least one column, got shape (N, 0)")
    check_options(form, reduction)
    smoothing = check_number("label_smoothing", label_smoothing, low=0.0, high=1.0, what="a number in [0, 1]")
    target = check_target("target", target, logits.shape[0], logits.shape[1], logits)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    loss, _, _ = _op.soft_cross_entropy_op.overload(logits, *target, smoothing, form, reduction, wanted)
    return loss
