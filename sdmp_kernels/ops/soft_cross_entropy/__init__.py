"""Cross-entropy of given logits with two-hot targets; no dense target exists."""

from __future__ import annotations

import torch
from torch import Tensor

from sdmp_kernels._checks import check_integer, check_number, check_same_device, check_tensor, readable
from sdmp_kernels.ops.losses import FLOATS
from sdmp_kernels.ops.soft_cross_entropy import op as _op
from sdmp_kernels.ops.target import check_options, looked_at
from sdmp_kernels.plan import TwoHot


def soft_cross_entropy(
    logits: Tensor,
    target: TwoHot,
    *,
    label_smoothing: float = 0.0,
    form: str = "ce",
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    inplace_backward: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of `logits` with a two-hot target (paper Eq. 3 on given logits).

    With z = logits, p_i = softmax(z_i), w_i = weight[i], first_i and second_i the target's, and s = label_smoothing:

        "ce" (the paper's):                l_i = -(w_i log p_i[first_i] + (1 - w_i) log p_i[second_i])
        "log_mixture" (the released code): l_i = -log(w_i p_i[first_i] + (1 - w_i) p_i[second_i])
        loss_i = (1 - s) l_i + s (log(sum_k exp z_ik) - mean_k z_ik)

    Accumulated in float32 (float64 for float64 logits), in log space throughout. Where a gradient is wanted it is
    computed with the value, in one sweep (by C++ and Triton; float16 in the backward pass, where its scale is known).

    Left out: a row counts a_i = w_i [first_i is kept] + (1 - w_i) [second_i is kept], and with class weights
    c_i = w_i class_weight[first_i] + (1 - w_i) class_weight[second_i] over what is kept, whose shares of c_i are then
    the weights of l_i. As `torch.nn.functional.cross_entropy` has it for labels:

        loss_i = (1 - s) c_i l_i + s a_i mean_k class_weight[k] (log(sum_j exp z_ij) - z_ik),
        and the mean is the sum over the sum of c_i.

    Args:
        logits: (N, K) float16, bfloat16, float32 or float64, any strides, K >= 1. Differentiable.
        target: a TwoHot of first, second (N,) int64 in [0, K) and weight (N,) in [0, 1], on the device of `logits`:
            `MixPlan.label_target` makes it of labels.
        label_smoothing: s in [0, 1].
        form: "ce" or "log_mixture".
        ignore_index: a column that is left out, in range or not. Any integer.
        class_weight: (K,) non-negative weights of the classes, any float dtype, a constant. Together with
            label_smoothing it is served by torch's own operators.
        inplace_backward: the backward pass writes the gradient over the logits, so that no second matrix exists. They
            must not be a leaf; nothing else may need their values in its backward pass (autograd raises if it does),
            and a second backward pass raises. Until then they are what they were.
        reduction: "mean" (NaN for N = 0, as torch, and where nothing counts), "sum", or "none" for (N,).

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument. Columns on a GPU are not read back: one out of range is never
            read, and left out.
    """
    check_tensor("logits", logits, dtypes=FLOATS, ndim=2, shape="(N, K)")
    if logits.shape[1] == 0:
        raise ValueError("logits must have at least one column, got shape (N, 0)")
    check_options(form, reduction)
    smoothing = check_number("label_smoothing", label_smoothing, low=0.0, high=1.0, what="a number in [0, 1]")
    ignored = check_integer("ignore_index", ignore_index, low=-(2**63), high=2**63 - 1, what="an integer")
    target, whole = looked_at("target", target, logits.shape[0], logits.shape[1], logits, ignored)
    if class_weight is not None:
        _check_class_weight(class_weight, logits)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    if inplace_backward and wanted and logits.is_leaf:
        raise ValueError("inplace_backward=True writes over the logits, which must not be a leaf that wants a gradient")
    skipped = None if whole else ignored
    options = (class_weight, smoothing, form, skipped, reduction, wanted and not inplace_backward, inplace_backward)
    loss, _, _ = _op.soft_cross_entropy_op(logits, *target, *options)
    return loss


def _check_class_weight(class_weight: Tensor, logits: Tensor) -> None:
    check_tensor("class_weight", class_weight, dtypes=FLOATS, ndim=1, shape="(K,)")
    if class_weight.shape[0] != logits.shape[1]:
        raise ValueError(f"class_weight must have K = {logits.shape[1]} numbers, got {class_weight.shape[0]}")
    if class_weight.requires_grad:
        raise ValueError("class_weight requires a gradient, but class weights are constants; use .detach()")
    check_same_device(class_weight=class_weight, logits=logits)
    if readable(class_weight) and not (class_weight >= 0).all():
        raise ValueError(f"class_weight must not be negative, got {float(class_weight.min()):g} among them")
