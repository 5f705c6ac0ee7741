"""The registered operators of `distillation`: schemas, fakes, autograd, backends."""

from typing import List, Optional

from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._operators import operator
from sdmp_kernels.ops.losses import reduced, refuse_triton, upstream, work_dtype

OP = _backends.register("distillation", cpu=("torch", "reference"), cuda=("triton", "torch", "reference"))
# The probabilities of a pair stay in registers: so many rows of them fit.
MOST_ROWS = 16


def _refuse(backend: str, student: Tensor, teacher: Tensor, mixed: bool) -> str | None:
    if backend != "triton":
        return None
    if teacher.shape[0] * (2 if mixed else 1) > MOST_ROWS:
        return f"triton serves up to {MOST_ROWS} teacher crops, {MOST_ROWS // 2} with `other`, got {teacher.shape[0]}"
    if 2 * max(student.shape[0], teacher.shape[0]) * student.shape[1] >= 2**31:
        return "triton counts the rows of all crops, and their two statistics each, in 32 bits"
    return refuse_triton(student, teacher)


def _module(student: Tensor, teacher: Tensor, mixed: bool):
    return OP.module(_backends.choose(OP, student.device, lambda name: _refuse(name, student, teacher, mixed)))


def _empty(student: Tensor, teacher: Tensor, mean_of: List[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = work_dtype(student)
    views, n, k = student.shape
    shapes = ((n,), (2, views, n), (2, teacher.shape[0], n), (k if mean_of else 0,))
    loss, student_stats, teacher_stats, mean = (student.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, student_stats, teacher_stats, mean


@operator("distillation")
def distillation_op(
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    other: Optional[Tensor],
    partner: Optional[Tensor],
    center: Optional[Tensor],
    student_temperature: float,
    teacher_temperature: float,
    mean_of: List[int],
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, (N,) or reduced to (), student_stats (2, V, N), teacher_stats (2, T, N), mean (K,)): see
    `reference.forward`.
    """
    if student.shape[1] == 0:
        losses, student_stats, teacher_stats, mean = _empty(student, teacher, mean_of)
        return reduced(losses, reduction), student_stats, teacher_stats, mean.fill_(float("nan"))
    run = _module(student, teacher, other is not None).forward
    losses, *rest = run(
        student, teacher, own, other, partner, center, student_temperature, teacher_temperature, mean_of
    )
    return reduced(losses, reduction), *rest


@distillation_op.register_fake
def _(student, teacher, own, other, partner, center, student_temperature, teacher_temperature, mean_of, reduction):
    losses, *rest = _empty(student, teacher, mean_of)
    return reduced(losses, reduction), *rest


@operator("distillation_backward")
def distillation_backward_op(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    other: Optional[Tensor],
    partner: Optional[Tensor],
    center: Optional[Tensor],
    student_stats: Tensor,
    teacher_stats: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    reduction: str,
) -> Tensor:
    """(V, N, K) gradient of the student's logits."""
    if student.shape[1] == 0:
        return student.new_empty(student.shape)
    grad = upstream(grad, student.shape[1], reduction)
    run = _module(student, teacher, other is not None).backward
    return run(
        grad,
        student,
        teacher,
        own,
        other,
        partner,
        center,
        student_stats,
        teacher_stats,
        student_temperature,
        teacher_temperature,
    )


@distillation_backward_op.register_fake
def _(grad, student, *rest):
    return student.new_empty(student.shape)


def _save(ctx, inputs, output):
    student, teacher, own, other, partner, center, *temperatures, _, reduction = inputs
    _, student_stats, teacher_stats, mean = output
    ctx.save_for_backward(student, teacher, own, other, partner, center, student_stats, teacher_stats)
    ctx.options = (*temperatures, reduction)
    ctx.mark_non_differentiable(student_stats, teacher_stats, mean)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_constants):
    constants = (None,) * 4
    _, _, student_wanted, *_ = ctx.needs_input_grad
    if grad is None or not student_wanted:
        return None, *constants
    return distillation_backward_op.overload(grad, *ctx.saved_tensors, *ctx.options), *constants


distillation_op.register_autograd(_backward, setup_context=_save, of=("student", "teacher", "own", "other", "center"))
