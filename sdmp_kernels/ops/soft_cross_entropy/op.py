"""The registered operators of `soft_cross_entropy`: schemas, fakes, autograd, backends."""

from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._operators import operator
from sdmp_kernels.ops.losses import reduced, refuse_triton, upstream, work_dtype

OP = _backends.register("soft_cross_entropy", cpu=("torch", "reference"), cuda=("triton", "torch", "reference"))


def _refuse(backend: str, logits: Tensor) -> str | None:
    return refuse_triton(logits) if backend == "triton" else None


def _module(logits: Tensor):
    return OP.module(_backends.choose(OP, logits.device, lambda name: _refuse(name, logits)))


def _empty(logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = work_dtype(logits)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty((2, logits.shape[0]), dtype=dtype)


@operator("soft_cross_entropy")
def soft_cross_entropy_op(
    logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, label_smoothing: float, form: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """(loss, (N,) or reduced to (), stats (2, N)): what the backward pass needs to know of each row, see
    `reference.forward`.
    """
    if logits.shape[0] == 0:
        losses, stats = _empty(logits)
    else:
        losses, stats = _module(logits).forward(logits, first, second, weight, label_smoothing, form)
    return reduced(losses, reduction), stats


@soft_cross_entropy_op.register_fake
def _(logits, first, second, weight, label_smoothing, form, reduction):
    losses, stats = _empty(logits)
    return reduced(losses, reduction), stats


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
) -> Tensor:
    """(N, K) gradient of the logits."""
    if logits.numel() == 0:
        return logits.new_empty(logits.shape)
    grad = upstream(grad, logits.shape[0], reduction)
    return _module(logits).backward(grad, logits, stats, first, second, weight, label_smoothing, form)


@soft_cross_entropy_backward_op.register_fake
def _(grad, logits, stats, first, second, weight, label_smoothing, form, reduction):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, first, second, weight, *options = inputs
    _, stats = output
    ctx.save_for_backward(logits, stats, first, second, weight)
    ctx.options = options
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_stats):
    if grad is None:
        return (None,)
    return (soft_cross_entropy_backward_op.overload(grad, *ctx.saved_tensors, *ctx.options),)


soft_cross_entropy_op.register_autograd(_backward, setup_context=_save, of=("logits",))
