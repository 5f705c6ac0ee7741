"""Self-distillation with mixed targets (DINO with SDMP); no probability tensor exists."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdmp_kernels._checks import check_choice, check_integer, check_number, check_same_device, check_tensor, readable
from sdmp_kernels.ops.distillation import op as _op
from sdmp_kernels.ops.losses import FLOATS
from sdmp_kernels.ops.target import REDUCTIONS


def distillation(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    own: Tensor,
    other: Tensor | None = None,
    partner: Tensor | None = None,
    center: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    teacher_mean: bool | Sequence[int] = False,
    inplace_backward: bool = False,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropies of student crops with the teacher's, of the same row and of its partner (paper Eq. 7 to 9).

    With P_t = softmax((teacher_t - center) / teacher_temperature), a constant, S_v = softmax(student_v /
    student_temperature) and H(P, S) = -sum_k P_k log S_k:

        loss_i = sum over v, t of own[v, t, i] H(P_t[i], S_v[i]) + other[v, t, i] H(P_t[partner_i], S_v[i])

    DINO's loss is own = 1/18 except for own[v, v] = 0 (10 student crops, of which the first two are the teacher's;
    Caron et al. 2021, Eq. 3). H is linear in P, so all terms of a crop are one cross-entropy with one combined
    target: the cost does not grow with the number of terms. Where a gradient is wanted it is computed with the value,
    in one sweep (by C++ and Triton; float16 in the backward pass, where its scale is known).

    Args:
        student: (V, N, K) raw logits of V crops, float16, bfloat16, float32 or float64, any strides. Differentiable. Or
            a sequence of V crops of (N, K): parts of one tensor at even distances, as `chunk` makes them, are read
            where they lie, others are copied together.
        teacher: (T, N, K) raw logits, float64 if and only if the student is. A constant: it gets no gradient. Or a
            sequence of T crops.
        own: (V, T) or (V, T, N) weights of the row's own terms, any float dtype, a constant.
        other: the same for the terms with the partner's probabilities; default none of them.
        partner: (N,) int64 in [0, N), default the flip N-1-i, which is the fast form: leave it out where
            `MixPlan.mirrored` is True. Only together with `other`.
        center: (K,) what is subtracted from the teacher's logits, any float dtype; default nothing.
        student_temperature, teacher_temperature: numbers in [1e-20, 1e20].
        teacher_mean: True for the mean over all teachers and rows of the raw logits as well, or the indices of the
            teachers to average over (those of clean crops). It comes out of the same pass over the teacher's logits.
        inplace_backward: the backward pass writes the gradient over the student's logits (one tensor, not a sequence),
            as in `soft_cross_entropy`.
        reduction: over i: "mean" (NaN for N = 0, as torch), "sum", or "none" for (N,).

    Returns:
        The loss, float32 (float64 for float64 logits); with `teacher_mean`, (loss, (K,) mean of that dtype, without
        gradient; NaN for N = 0). Never NaN for finite logits, whatever their size. A teacher's logit of -inf has
        probability 0; one of the student's gives what the formula gives, inf or NaN.

    Raises:
        TypeError, ValueError: naming the argument. Partners on a GPU are not read back: a term whose partner is out of
            range is left out.
    """
    if inplace_backward and not isinstance(student, Tensor):
        raise ValueError("inplace_backward=True writes over one tensor of student logits, got a sequence of crops")
    student, teacher = _together("student", student), _together("teacher", teacher)
    _check_logits(student, teacher)
    weights = {"own": own} if other is None else {"own": own, "other": other}
    for name, weight in weights.items():
        weights[name] = _check_weights(name, weight, student, teacher)
    if partner is not None:
        _check_partner(partner, other, student)
    if center is not None:
        check_tensor("center", center, dtypes=FLOATS, ndim=1, shape="(K,)")
        if len(center) != student.shape[2]:
            raise ValueError(f"center has {len(center)} columns but student has {student.shape[2]}; give it shape (K,)")
        check_same_device(center=center, student=student)
    temperatures = [
        check_number(name, value, low=1e-20, high=1e20, what="a temperature in [1e-20, 1e20]")
        for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature))
    ]
    mean_of = _check_mean(teacher_mean, teacher.shape[0])
    check_choice("reduction", reduction, REDUCTIONS)
    constants = (weights["own"], weights.get("other"), partner, center)
    wanted = student.requires_grad and torch.is_grad_enabled()
    if inplace_backward and wanted and student.is_leaf:
        raise ValueError(
            "inplace_backward=True writes over the student, which must not be a leaf that wants a gradient"
        )
    options = (mean_of, reduction, wanted and not inplace_backward, inplace_backward)
    loss, _, _, mean, _ = _op.distillation_op(student, teacher, *constants, *temperatures, *options)
    return (loss, mean) if mean_of else loss


def _together(name: str, crops: Tensor | Sequence[Tensor]) -> Tensor:
    """(V, N, K) of V crops of (N, K), without a copy where they are parts of one tensor at even distances."""
    if isinstance(crops, Tensor):
        return crops
    if not isinstance(crops, Sequence) or not crops:
        raise TypeError(f"{name} must be a tensor or a non-empty list of crops, got {type(crops).__name__}")
    for v, crop in enumerate(crops):
        check_tensor(f"{name}[{v}]", crop, dtypes=FLOATS, ndim=2, shape="(N, K)")
        if (crop.shape, crop.dtype, crop.device) != (crops[0].shape, crops[0].dtype, crops[0].device):
            raise ValueError(
                f"{name}[{v}] is {tuple(crop.shape)} of {crop.dtype} on {crop.device}, but {name}[0] is "
                f"{tuple(crops[0].shape)} of {crops[0].dtype} on {crops[0].device}; crops must be alike"
            )
    if torch.compiler.is_compiling() or len(crops) == 1 or _distance(crops) is None:
        return torch.stack(tuple(crops))
    return _Together.apply(*crops)


def _distance(crops: Sequence[Tensor]) -> int | None:
    """How many elements of one storage lie between the beginnings of neighbouring crops; None where that differs."""
    first = crops[0]
    if any(type(crop) is not Tensor for crop in crops):
        return None
    offsets = [int(crop.storage_offset()) for crop in crops]
    step = offsets[1] - offsets[0]
    for crop in crops:
        if crop.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or crop.stride() != first.stride():
            return None
    even = all(after - before == step for before, after in pairwise(offsets))
    return step if even and step > 0 else None


class _Together(torch.autograd.Function):
    """Parts of one tensor as the tensor they are parts of; its gradient in parts."""

    @staticmethod
    def forward(ctx: Any, *crops: Tensor) -> Tensor:
        step = _distance(crops)
        assert step is not None
        shape, strides = (len(crops), *crops[0].shape), (step, *crops[0].stride())
        return crops[0].detach().as_strided(shape, strides, crops[0].storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad.unbind(0)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    check_tensor("student", student, dtypes=FLOATS, ndim=3, shape="(V, N, K)")
    check_tensor("teacher", teacher, dtypes=FLOATS, ndim=3, shape="(T, N, K)")
    for name, logits in (("student", student), ("teacher", teacher)):
        if 0 in (logits.shape[0], logits.shape[2]):
            raise ValueError(f"{name} must have at least one crop and one column, got shape {tuple(logits.shape)}")
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"student and teacher must have the same N rows and K columns, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; stack the crops in the first dimension"
        )
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        raise TypeError(
            f"student and teacher must both be float64 or neither, got {student.dtype} and {teacher.dtype}; "
            "convert one of them"
        )
    check_same_device(teacher=teacher, student=student)


def _check_weights(name: str, weight: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """(V, T, N), expanded from (V, T)."""
    per_row = not (isinstance(weight, Tensor) and weight.ndim == 2)
    check_tensor(name, weight, dtypes=FLOATS, ndim=3 if per_row else 2, shape="(V, T) or (V, T, N)")
    expected = (student.shape[0], teacher.shape[0], student.shape[1])
    if tuple(weight.shape) != expected[: weight.ndim]:
        raise ValueError(
            f"{name} must have shape (V, T) = {expected[:2]} or (V, T, N) = {expected}, got {tuple(weight.shape)}"
        )
    check_same_device(**{name: weight, "student": student})
    return weight if per_row else weight[..., None].expand(expected)


def _check_partner(partner: Tensor, other: Tensor | None, student: Tensor) -> None:
    if other is None:
        raise ValueError(
            "partner is given but other is not, so it has no use; give the weights `other` or leave it out"
        )
    n = student.shape[1]
    check_tensor("partner", partner, dtypes=(torch.int64,), ndim=1, shape="(N,)")
    if len(partner) != n:
        raise ValueError(f"partner has {len(partner)} rows but student has {n}; give one partner per row")
    check_same_device(partner=partner, student=student)
    if n and readable(partner):
        low, high = partner.aminmax()
        if low < 0 or high >= n:
            raise ValueError(f"partner must hold rows in [0, {n}), got {int(low)} to {int(high)}")


def _check_mean(teacher_mean: bool | Sequence[int], crops: int) -> list[int]:
    """The indices of the teachers to average over, none for False."""
    if isinstance(teacher_mean, bool):
        return list(range(crops)) if teacher_mean else []
    if isinstance(teacher_mean, (str, bytes)) or not isinstance(teacher_mean, Sequence):
        raise TypeError(f"teacher_mean must be True, False or teacher indices, got {type(teacher_mean).__name__}")
    what = f"the index of a teacher, in [0, {crops})"
    found = [check_integer("teacher_mean", t, low=0, high=crops - 1, what=what) for t in teacher_mean]
    if not found or len(set(found)) != len(found):
        raise ValueError(f"teacher_mean must name at least one teacher, each once, got {list(teacher_mean)}")
    return found
