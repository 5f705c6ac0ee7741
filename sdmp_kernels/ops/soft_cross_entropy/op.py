"""The registered operators of `soft_cross_entropy`: schemas, fakes, autograd, backends."""

import torch
from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._operators import operator

OP = _backends.register("soft_cross_entropy", cpu=("torch", "reference"), cuda=("triton", "torch", "reference"))


def _refuse(backend: str, logits: Tensor) -> str | None:
    if backend == "triton" and logits.dtype == torch.float64:
        return "float64 logits are computed by the torch and reference backends"
    if backend == "triton" and logits.device.type == "cpu" and logits.dtype == torch.bfloat16:
        return "triton's interpreter rounds bfloat16 wrongly"
    return None


def _module(logits: Tensor):
    return OP.module(_backends.choose(OP, logits.device, lambda name: _refuse(name, logits)))


def _empty(logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty((2, logits.shape[0]), dtype=dtype)


@operator("soft_cross_entropy")
def soft_cross_entropy_op(
    logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, label_smoothing: float, form: str
) -> tuple[Tensor, Tensor]:
    """(loss (N,), rows (2, N)): what the backward pass needs to know of each row, see `reference.forward`."""
    if logits.shape[0] == 0:
        return _empty(logits)
    return _module(logits).forward(logits, first, second, weight, label_smoothing, form)


@soft_cross_entropy_op.register_fake
def _(logits, first, second, weight, label_smoothing, form):
    return _empty(logits)


@operator("soft_cross_entropy_backward")
def soft_cross_entropy_backward_op(
    grad: Tensor,
    logits: Tensor,
    rows: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    label_smoothing: float,
    form: str,
) -> Tensor:
    """(N, K) gradient of the logits."""
    if logits.numel() == 0:
        return logits.new_empty(logits.shape)
    return _module(logits).backward(grad, logits, rows, first, second, weight, label_smoothing, form)


@soft_cross_entropy_backward_op.register_fake
def _(grad, logits, rows, first, second, weight, label_smoothing, form):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, first, second, weight, label_smoothing, form = inputs
    _, rows = output
    ctx.save_for_backward(logits, rows, first, second, weight)
    ctx.options = (label_smoothing, form)
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_rows):
    if grad is None:
        return (None,)
    logits, rows, first, second, weight = ctx.saved_tensors
    return (soft_cross_entropy_backward_op.overload(grad, logits, rows, first, second, weight, *ctx.options),)


soft_cross_entropy_op.register_autograd(_backward, setup_context=_save, of=("logits",))
