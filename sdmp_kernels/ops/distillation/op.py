"""The registered operators of `distillation`: schemas, fakes, autograd, backends.

The C++ kernel computes value and gradient in one sweep, so that the gradient exists before the backward pass, which
multiplies it by the upstream factor where that is not 1. Every other backend computes it in the backward pass.
"""

from typing import List, Optional

import torch
from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._checks import readable
from sdmp_kernels._memory import new_empty
from sdmp_kernels._operators import operator
from sdmp_kernels.ops.losses import owned_gradient, reduced, refuse_native, refuse_triton, scaled, upstream, work_dtype

OP = _backends.register("distillation", cpu=("cpp", "torch", "reference"), cuda=("triton", "torch", "reference"))
# The probabilities of a pair stay in registers: so many rows of them fit.
MOST_ROWS = 16


def _refuse(backend: str, student: Tensor, teacher: Tensor, mixed: bool) -> str | None:
    if backend != "triton":
        return refuse_native(student, teacher)
    if teacher.shape[0] * (2 if mixed else 1) > MOST_ROWS:
        return f"triton serves up to {MOST_ROWS} teacher crops, {MOST_ROWS // 2} with `other`, got {teacher.shape[0]}"
    if 2 * max(student.shape[0], teacher.shape[0]) * student.shape[1] >= 2**31:
        return "triton counts the rows of all crops, and their two statistics each, in 32 bits"
    return refuse_triton(student, teacher)


def _backend(student: Tensor, teacher: Tensor, mixed: bool) -> str:
    return _backends.choose(OP, student.device, lambda name: _refuse(name, student, teacher, mixed))


def _sweeps(backend: str, student: Tensor) -> bool:
    """Whether the gradient comes along with the value; not in float16, see `soft_cross_entropy`."""
    return backend == "cpp" and student.dtype != torch.float16


def _outputs(
    student: Tensor, teacher: Tensor, mixed: bool, mean_of: List[int], need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend, dtype = _backend(student, teacher, mixed), work_dtype(student)
    views, n, k = student.shape
    known = 0 if backend == "cpp" else n
    shapes = ((n,), (2, views, known), (2, teacher.shape[0], known), (k if mean_of else 0,))
    loss, student_stats, teacher_stats, mean = (student.new_empty(shape, dtype=dtype) for shape in shapes)
    gradient = student.new_empty((views, n if need_grad and _sweeps(backend, student) else 0, k))
    return loss, student_stats, teacher_stats, mean, gradient


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
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, (N,) or reduced to (), student_stats (2, V, N), teacher_stats (2, T, N), mean (K,), gradient (V, N, K)):
    see `reference.forward`. The C++ kernel makes stats of no rows; of no rows is a gradient that is left to the
    backward pass.
    """
    mixed = other is not None
    if student.shape[1] == 0:
        losses, student_stats, teacher_stats, mean, gradient = _outputs(student, teacher, mixed, mean_of, need_grad)
        return reduced(losses, reduction), student_stats, teacher_stats, mean.fill_(float("nan")), gradient
    backend = _backend(student, teacher, mixed)
    module, views, columns = OP.module(backend), student.shape[0], student.shape[2]
    constants = (own, other, partner, center, student_temperature, teacher_temperature)
    if backend == "cpp":
        made = new_empty(student) if need_grad and _sweeps(backend, student) else None
        loss = module.sweep(student, teacher, *constants, reduction, made)
        stats = (loss.new_empty((2, views, 0)), loss.new_empty((2, teacher.shape[0], 0)))
        mean = module.mean_row(teacher, mean_of)
        return loss, *stats, mean, student.new_empty((views, 0, columns)) if made is None else made
    losses, student_stats, teacher_stats, mean = module.forward(student, teacher, *constants, mean_of)
    return reduced(losses, reduction), student_stats, teacher_stats, mean, student.new_empty((views, 0, columns))


@distillation_op.register_fake
def _(
    student,
    teacher,
    own,
    other,
    partner,
    center,
    student_temperature,
    teacher_temperature,
    mean_of,
    reduction,
    need_grad,
):
    losses, *rest = _outputs(student, teacher, other is not None, mean_of, need_grad)
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
    gradient: Optional[Tensor] = None,
) -> Tensor:
    """(V, N, K) gradient of the student's logits; `gradient` is what the forward pass made."""
    if student.shape[1] == 0:
        return student.new_empty(student.shape)
    if gradient is not None and gradient.numel():
        return _scaled(gradient, grad, new_empty(gradient))
    grad, backend = upstream(grad, student.shape[1], reduction), _backend(student, teacher, other is not None)
    run, constants = OP.module(backend), (own, other, partner, center)
    temperatures = (student_temperature, teacher_temperature)
    if backend == "cpp":
        return run.backward(grad, student, teacher, *constants, *temperatures)
    if student_stats.shape[2] == 0:
        # Computed by another backend, which needs no stats.
        _, student_stats, teacher_stats, _ = run.forward(student, teacher, *constants, *temperatures, [])
    return run.backward(grad, student, teacher, *constants, student_stats, teacher_stats, *temperatures)


def _scaled(gradient: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    """`losses.scaled` of (V, N, K), whose rows are in the second dimension."""
    if grad.ndim == 0:
        return scaled(gradient, grad, out)
    return torch.mul(gradient, grad[:, None], out=out)


@distillation_backward_op.register_fake
def _(grad, student, *rest):
    return student.new_empty(student.shape)


def _save(ctx, inputs, output):
    student, teacher, own, other, partner, center, *temperatures, _, reduction, _ = inputs
    _, student_stats, teacher_stats, mean, gradient = output
    ctx.save_for_backward(student, teacher, own, other, partner, center, student_stats, teacher_stats, gradient)
    ctx.options = (*temperatures, reduction)
    ctx.mark_non_differentiable(student_stats, teacher_stats, mean, gradient)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_constants):
    constants = (None,) * 4
    _, _, student_wanted, *_ = ctx.needs_input_grad
    if grad is None or not student_wanted:
        return None, *constants
    *saved, gradient = ctx.saved_tensors
    if gradient.shape[1] and readable(grad, gradient) and owned_gradient():
        return _scaled(gradient, grad, gradient), *constants
    return distillation_backward_op.overload(grad, *saved, *ctx.options, gradient), *constants


distillation_op.register_autograd(_backward, setup_context=_save, of=("student", "teacher", "own", "other", "center"))
