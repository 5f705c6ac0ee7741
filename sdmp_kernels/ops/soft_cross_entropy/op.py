"""The registered operators of `soft_cross_entropy`: schemas, fakes, autograd, backends.

C++ and Triton compute value and gradient in one sweep, so that the gradient exists before the backward pass, which
multiplies it by the upstream factor where that is not 1. The others compute it in the backward pass; so do all of them
where it is to be written over the logits, whose values stay what they are until then.
"""

from typing import Optional

import torch
from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._checks import readable
from sdmp_kernels._memory import new_empty
from sdmp_kernels._operators import operator
from sdmp_kernels.ops.losses import (
    handed_out,
    owned_gradient,
    reduced,
    refuse_native,
    refuse_triton,
    scaled,
    work_dtype,
)
from sdmp_kernels.ops.soft_cross_entropy.arguments import Given, rows_of

OP = _backends.register("soft_cross_entropy", cpu=("cpp", "torch", "reference"), cuda=("triton", "torch", "reference"))
_SWEEPS = ("cpp", "triton")


def _refuse(backend: str, logits: Tensor, class_weight: Tensor | None, label_smoothing: float) -> str | None:
    if class_weight is not None and label_smoothing:
        return "class weights together with label smoothing are computed by torch"
    return refuse_triton(logits) if backend == "triton" else refuse_native(logits)


def _backend(logits: Tensor, class_weight: Tensor | None, label_smoothing: float) -> str:
    return _backends.choose(OP, logits.device, lambda name: _refuse(name, logits, class_weight, label_smoothing))


def _early(backend: str, logits: Tensor) -> bool:
    """Whether the gradient comes along with the value.

    Not in float16: it ends at 6e-8, and a mean's gradient is smaller than that until the upstream factor of a loss
    scale is in it.
    """
    return backend in _SWEEPS and logits.dtype != torch.float16


def _outputs(
    logits: Tensor, class_weight: Tensor | None, label_smoothing: float, reduction: str, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backend, (n, k) = _backend(logits, class_weight, label_smoothing), logits.shape
    losses = logits.new_empty(n, dtype=work_dtype(logits))
    gradient = logits.new_empty((n if need_grad and _early(backend, logits) else 0, k))
    return reduced(losses, reduction), gradient, losses.new_empty(1 if backend == "triton" else 0)


@operator("soft_cross_entropy")
def soft_cross_entropy_op(
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    class_weight: Optional[Tensor],
    label_smoothing: float,
    form: str,
    ignore_index: Optional[int],
    reduction: str,
    need_grad: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, correction): (N,) or reduced to (); (N, K) gradient of the sum of the loss once it is multiplied
    by the correction, or (0, K) where it is left to the backward pass; (1,), or of no elements for 1. `in_place`: the
    backward pass writes the gradient over the logits. `ignore_index` is None where every column is known to be in range
    and none is ignored.
    """
    if logits.shape[0] == 0:
        return _outputs(logits, class_weight, label_smoothing, reduction, need_grad)
    backend = _backend(logits, class_weight, label_smoothing)
    module, given = OP.module(backend), Given(first, second, weight, class_weight, ignore_index)
    if backend in _SWEEPS:
        gradient = new_empty(logits) if need_grad and _early(backend, logits) else None
        loss, correction = module.sweep(logits, given, label_smoothing, form, reduction, gradient)
        return loss, logits.new_empty((0, logits.shape[1])) if gradient is None else gradient, correction
    rows = rows_of(given, logits.shape[1], work_dtype(logits))
    losses = module.forward(logits, rows, class_weight, label_smoothing, form)
    if reduction == "mean" and rows.factor is not None:
        losses, reduction = losses / rows.divisor(), "sum"
    return reduced(losses, reduction), logits.new_empty((0, logits.shape[1])), losses.new_empty(0)


@soft_cross_entropy_op.register_fake
def _(logits, first, second, weight, class_weight, label_smoothing, form, ignore_index, reduction, need_grad, in_place):
    return _outputs(logits, class_weight, label_smoothing, reduction, need_grad)


def _gradient(
    grad: Tensor,
    logits: Tensor,
    given: Given,
    label_smoothing: float,
    form: str,
    reduction: str,
    correction: Tensor,
    out: Tensor | None,
) -> Tensor:
    """The gradient from the logits alone."""
    backend = _backend(logits, given.class_weight, label_smoothing)
    module = OP.module(backend)
    if backend in _SWEEPS:
        return module.backward(grad, logits, given, label_smoothing, form, reduction, correction, out)
    rows = rows_of(given, logits.shape[1], work_dtype(logits))
    if reduction == "mean":
        grad = grad / rows.divisor()
    grad = grad.expand(logits.shape[0])
    return module.backward(grad, logits, rows, given.class_weight, label_smoothing, form, out)


@operator("soft_cross_entropy_backward")
def soft_cross_entropy_backward_op(
    grad: Tensor,
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    class_weight: Optional[Tensor],
    label_smoothing: float,
    form: str,
    ignore_index: Optional[int],
    reduction: str,
    gradient: Optional[Tensor] = None,
    correction: Optional[Tensor] = None,
) -> Tensor:
    """(N, K) gradient of the logits; `gradient` and `correction` are what the forward pass made."""
    if logits.numel() == 0:
        return logits.new_empty(logits.shape)
    nothing = grad.new_empty(0)
    if gradient is not None and gradient.numel():
        return _multiplied(gradient, grad, reduction, correction, new_empty(gradient))
    given = Given(first, second, weight, class_weight, ignore_index)
    found = nothing if correction is None else correction
    return _gradient(grad, logits, given, label_smoothing, form, reduction, found, None)


@soft_cross_entropy_backward_op.register_fake
def _(grad, logits, *rest):
    return logits.new_empty(logits.shape)


@operator("soft_cross_entropy_inplace_backward", mutates=("logits",))
def soft_cross_entropy_inplace_backward_op(
    grad: Tensor,
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    class_weight: Optional[Tensor],
    label_smoothing: float,
    form: str,
    ignore_index: Optional[int],
    reduction: str,
    correction: Tensor,
) -> None:
    """Writes the gradient over the logits."""
    if logits.numel():
        given = Given(first, second, weight, class_weight, ignore_index)
        _gradient(grad, logits, given, label_smoothing, form, reduction, correction, logits)


@soft_cross_entropy_inplace_backward_op.register_fake
def _(*_arguments):
    return None


def _multiplied(gradient: Tensor, grad: Tensor, reduction: str, correction: Tensor | None, out: Tensor) -> Tensor:
    """`gradient` times `grad` and the correction, in `out`."""
    if correction is not None and correction.numel():
        from sdmp_kernels.ops.loss_launches import multiplied

        return multiplied(gradient, grad, correction if reduction == "mean" else None, out)
    return scaled(gradient, grad, out)


def _save(ctx, inputs, output):
    logits, first, second, weight, class_weight, *options, _, in_place = inputs
    _, gradient, correction = output
    ctx.save_for_backward(logits, first, second, weight, class_weight, gradient, correction)
    ctx.options, ctx.in_place = options, in_place
    ctx.mark_non_differentiable(gradient, correction)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_constants):
    if grad is None:
        return (None,)
    logits, *target, gradient, correction = ctx.saved_tensors
    if ctx.in_place:
        soft_cross_entropy_inplace_backward_op.overload(grad, logits, *target, *ctx.options, correction)
        return (logits.detach(),)
    if gradient.shape[0] and not correction.numel() and (d_logits := handed_out(gradient, grad)) is not None:
        return (d_logits,)
    if gradient.shape[0] and owned_gradient() and (correction.numel() or readable(grad, gradient)):
        return (_multiplied(gradient, grad, ctx.options[-1], correction, gradient),)
    return (soft_cross_entropy_backward_op.overload(grad, logits, *target, *ctx.options, gradient, correction),)


soft_cross_entropy_op.register_autograd(_backward, setup_context=_save, of=("logits",))
