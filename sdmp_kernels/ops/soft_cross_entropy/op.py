"""The registered operators of `soft_cross_entropy`: schemas, fakes, autograd, backends.

The C++ kernel computes value and gradient in one sweep, so that the gradient exists before the backward pass, which
multiplies it by the upstream factor where that is not 1. Every other backend computes it in the backward pass.
"""

from typing import Optional

import torch
from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._checks import readable
from sdmp_kernels._memory import new_empty
from sdmp_kernels._operators import operator
from sdmp_kernels.ops.losses import owned_gradient, reduced, refuse_native, refuse_triton, scaled, upstream, work_dtype

OP = _backends.register("soft_cross_entropy", cpu=("cpp", "torch", "reference"), cuda=("triton", "torch", "reference"))


def _refuse(backend: str, logits: Tensor) -> str | None:
    return refuse_triton(logits) if backend == "triton" else refuse_native(logits)


def _backend(logits: Tensor) -> str:
    return _backends.choose(OP, logits.device, lambda name: _refuse(name, logits))


def _sweeps(backend: str, logits: Tensor) -> bool:
    """Whether the gradient comes along with the value.

    Not in float16: it ends at 6e-8, and a mean's gradient is smaller than that until the upstream factor of a loss
    scale is in it.
    """
    return backend == "cpp" and logits.dtype != torch.float16


def _outputs(logits: Tensor, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    backend, (n, k) = _backend(logits), logits.shape
    dtype = work_dtype(logits)
    stats = logits.new_empty((2, 0 if backend == "cpp" else n), dtype=dtype)
    gradient = logits.new_empty((n if need_grad and _sweeps(backend, logits) else 0, k))
    return logits.new_empty(n, dtype=dtype), stats, gradient


@operator("soft_cross_entropy")
def soft_cross_entropy_op(
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats, gradient): (N,) or reduced to (); what the backward pass needs to know of each row, see
    `reference.forward`, (2, 0) for the C++ kernel; (N, K) gradient of the sum of the loss, or (0, K) where it is left
    to the backward pass.
    """
    if logits.shape[0] == 0:
        losses, stats, gradient = _outputs(logits, need_grad)
        return reduced(losses, reduction), stats, gradient
    backend = _backend(logits)
    module = OP.module(backend)
    if backend == "cpp":
        gradient = new_empty(logits) if need_grad and _sweeps(backend, logits) else None
        loss = module.sweep(logits, first, second, weight, label_smoothing, form, reduction, gradient)
        nothing = logits.new_empty((0, logits.shape[1])) if gradient is None else gradient
        return loss, loss.new_empty((2, 0)), nothing
    losses, stats = module.forward(logits, first, second, weight, label_smoothing, form)
    return reduced(losses, reduction), stats, logits.new_empty((0, logits.shape[1]))


@soft_cross_entropy_op.register_fake
def _(logits, first, second, weight, label_smoothing, form, reduction, need_grad):
    losses, stats, gradient = _outputs(logits, need_grad)
    return reduced(losses, reduction), stats, gradient


@operator("soft_cross_entropy_backward")
def soft_cross_entropy_backward_op(
    grad: Tensor,
    logits: Tensor,
    stats: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
    reduction: str,
    gradient: Optional[Tensor] = None,
) -> Tensor:
    """(N, K) gradient of the logits; `gradient` is what the forward pass made."""
    if logits.numel() == 0:
        return logits.new_empty(logits.shape)
    if gradient is not None and gradient.numel():
        return scaled(gradient, grad, new_empty(gradient))
    grad, backend = upstream(grad, logits.shape[0], reduction), _backend(logits)
    module = OP.module(backend)
    if backend == "cpp":
        return module.backward(grad, logits, first, second, weight, label_smoothing, form)
    if stats.shape[1] == 0:
        # Computed by another backend, which needs no stats.
        _, stats = module.forward(logits, first, second, weight, label_smoothing, form)
    return module.backward(grad, logits, stats, first, second, weight, label_smoothing, form)


@soft_cross_entropy_backward_op.register_fake
def _(grad, logits, stats, first, second, weight, label_smoothing, form, reduction, gradient=None):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, first, second, weight, *options, _ = inputs
    _, stats, gradient = output
    ctx.save_for_backward(logits, stats, first, second, weight, gradient)
    ctx.options = options
    ctx.mark_non_differentiable(stats, gradient)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_stats, _grad_gradient):
    if grad is None:
        return (None,)
    *saved, gradient = ctx.saved_tensors
    if gradient.shape[0] and readable(grad, gradient) and owned_gradient():
        return (scaled(gradient, grad, gradient),)
    return (soft_cross_entropy_backward_op.overload(grad, *saved, *ctx.options, gradient),)


soft_cross_entropy_op.register_autograd(_backward, setup_context=_save, of=("logits",))
