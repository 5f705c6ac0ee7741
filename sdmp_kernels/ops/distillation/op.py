"""The registered operators of `distillation`: schemas, fakes, autograd, backends.

C++ and Triton compute value and gradient in one sweep, so that the gradient exists before the backward pass, which
multiplies it by the upstream factor where that is not 1. The others compute it in the backward pass; so do all of them
where it is to be written over the logits, whose values stay what they are until then.
"""

from typing import Any, List, Optional

import torch
from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._checks import readable
from sdmp_kernels._memory import new_empty
from sdmp_kernels._operators import operator
from sdmp_kernels.ops.losses import owned_gradient, reduced, refuse_native, refuse_triton, scaled, upstream, work_dtype

OP = _backends.register("distillation", cpu=("cpp", "torch", "reference"), cuda=("triton", "torch", "reference"))
_SWEEPS = ("cpp", "triton")
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


def _early(backend: str, student: Tensor) -> bool:
    """Whether the gradient comes along with the value; not in float16, see `soft_cross_entropy`."""
    return backend in _SWEEPS and student.dtype != torch.float16


def _outputs(
    student: Tensor, teacher: Tensor, mixed: bool, mean_of: List[int], need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend, dtype = _backend(student, teacher, mixed), work_dtype(student)
    views, n, k = student.shape
    known = 0 if backend in _SWEEPS else n
    shapes = ((n,), (2, views, known), (2, teacher.shape[0], known), (k if mean_of else 0,))
    loss, student_stats, teacher_stats, mean = (student.new_empty(shape, dtype=dtype) for shape in shapes)
    gradient = student.new_empty((views, n if need_grad and _early(backend, student) else 0, k))
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
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, (N,) or reduced to (), student_stats (2, V, N), teacher_stats (2, T, N), mean (K,), gradient (V, N, K)):
    see `reference.forward`. What sweeps makes stats of no rows; of no rows is a gradient that is left to the backward
    pass. `in_place`: that writes it over the student's logits.
    """
    mixed = other is not None
    if student.shape[1] == 0:
        losses, student_stats, teacher_stats, mean, gradient = _outputs(student, teacher, mixed, mean_of, need_grad)
        return reduced(losses, reduction), student_stats, teacher_stats, mean.fill_(float("nan")), gradient
    backend = _backend(student, teacher, mixed)
    module, views, columns = OP.module(backend), student.shape[0], student.shape[2]
    constants = (own, other, partner, center, student_temperature, teacher_temperature)
    if backend in _SWEEPS:
        made = new_empty(student) if need_grad and _early(backend, student) else None
        loss, mean = module.sweep(student, teacher, *constants, reduction, made, mean_of)
        stats = (loss.new_empty((2, views, 0)), loss.new_empty((2, teacher.shape[0], 0)))
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
    in_place,
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
    constants = (own, other, partner, center, student_temperature, teacher_temperature)
    return _gradient(
        upstream(grad, student.shape[1], reduction), student, teacher, constants, student_stats, teacher_stats, None
    )


def _gradient(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    constants: tuple[Any, ...],
    student_stats: Tensor,
    teacher_stats: Tensor,
    out: Tensor | None,
) -> Tensor:
    """The gradient from the logits, for one upstream factor per row; in `out` where that is given."""
    *tensors, student_temperature, teacher_temperature = constants
    backend = _backend(student, teacher, tensors[1] is not None)
    module = OP.module(backend)
    if backend in _SWEEPS:
        return module.backward(grad, student, teacher, *constants, out)
    if student_stats.shape[2] == 0:
        # Computed by another backend, which needs no stats.
        _, student_stats, teacher_stats, _ = module.forward(student, teacher, *constants, [])
    stats = (student_stats, teacher_stats, student_temperature, teacher_temperature)
    result = module.backward(grad, student, teacher, *tensors, *stats)
    return result if out is None else out.copy_(result)


@operator("distillation_inplace_backward", mutates=("student",))
def distillation_inplace_backward_op(
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
) -> None:
    """Writes the gradient over the student's logits."""
    if student.shape[1]:
        constants = (own, other, partner, center, student_temperature, teacher_temperature)
        grad = upstream(grad, student.shape[1], reduction)
        _gradient(grad, student, teacher, constants, student_stats, teacher_stats, student)


@distillation_inplace_backward_op.register_fake
def _(*_arguments):
    return None


def _scaled(gradient: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    """`gradient` (V, N, K) times `grad`, () or (N,), in `out`."""
    if gradient.is_cuda:
        from sdmp_kernels.ops.loss_launches import multiplied

        return multiplied(gradient, grad, None, out)
    if grad.ndim == 0:
        return scaled(gradient, grad, out)
    return torch.mul(gradient, grad[:, None], out=out)


@distillation_backward_op.register_fake
def _(grad, student, *rest):
    return student.new_empty(student.shape)


def _save(ctx, inputs, output):
    student, teacher, own, other, partner, center, *temperatures, _, reduction, _, in_place = inputs
    _, student_stats, teacher_stats, mean, gradient = output
    ctx.save_for_backward(student, teacher, own, other, partner, center, student_stats, teacher_stats, gradient)
    ctx.options, ctx.in_place = (*temperatures, reduction), in_place
    ctx.mark_non_differentiable(student_stats, teacher_stats, mean, gradient)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_constants):
    constants = (None,) * 4
    _, _, student_wanted, *_ = ctx.needs_input_grad
    if grad is None or not student_wanted:
        return None, *constants
    *saved, gradient = ctx.saved_tensors
    if ctx.in_place:
        distillation_inplace_backward_op.overload(grad, *saved, *ctx.options)
        return saved[0].detach(), *constants
    if gradient.shape[1] and owned_gradient() and (gradient.is_cuda or readable(grad, gradient)):
        return _scaled(gradient, grad, gradient), *constants
    return distillation_backward_op.overload(grad, *saved, *ctx.options, gradient), *constants


distillation_op.register_autograd(_backward, setup_context=_save, of=("student", "teacher", "own", "other", "center"))
