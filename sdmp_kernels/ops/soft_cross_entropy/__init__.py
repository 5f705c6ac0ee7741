"""Cross-entropy of given logits with two-hot targets; no dense target exists."""

from __future__ import annotations

import torch
from torch import Tensor

from sdmp_kernels._checks import check_number, check_tensor
from sdmp_kernels.ops.soft_cross_entropy import op as _op  # noqa: F401  registers the operators
from sdmp_kernels.ops.target import check_options, check_target, reduce
from sdmp_kernels.plan import TwoHot

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def soft_cross_entropy(
    logits: Tensor, target: TwoHot, *, label_smoothing: float = 0.0, form: str = "ce", reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of `logits` with a two-hot target (paper Eq. 3 on given logits).

    With w = target.weight, z = logits and p = softmax(z): form "ce" is
    -(w log p_first + (1 - w) log p_second), the paper's; "log_mixture" is -log(w p_first + (1 - w) p_second), that
    of the released code. Accumulated in float32 (float64 for float64 logits), in log space throughout.

    Args:
        logits: (N, K) float16, bfloat16, float32 or float64, any strides, K >= 1. Differentiable.
        target: columns in [0, K) and weights in [0, 1], each (N,), on the device of `logits`.
        label_smoothing: s in [0, 1]: (1 - s) * loss + s * (lse - mean logit).
        form: "ce" or "log_mixture".
        reduction: "mean" (NaN for N = 0, as torch), "sum", or "none" for (N,).

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument. Columns on a GPU are not read back: one out of range is never
            read, and its term of the loss is left out.
    """
    check_tensor("logits", logits, dtypes=_FLOATS, ndim=2, shape="(N, K)")
    if logits.shape[1] == 0:
        raise ValueError("logits must have at least one column, got shape (N, 0)")
    check_options(form, reduction)
    smoothing = check_number("label_smoothing", label_smoothing, low=0.0, high=1.0, what="a number in [0, 1]")
    target = check_target("target", target, logits.shape[0], logits.shape[1], logits)
    losses, _ = torch.ops.sdmp.soft_cross_entropy(logits, target.first, target.second, target.weight, smoothing, form)
    return reduce(losses, reduction)
