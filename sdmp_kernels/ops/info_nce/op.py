"""The registered operators of `info_nce`: schemas, fakes, autograd, backends."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._operators import operator

OP = _backends.register("info_nce", cpu=("torch", "reference"), cuda=("triton", "torch", "reference"))
LARGEST_TRITON_D = 256


def _refuse(backend: str, q: Tensor, temperature: float) -> str | None:
    if backend != "triton":
        return None
    if q.dtype == torch.float64:
        return "float64 is computed by the torch and reference backends"
    if q.shape[1] > LARGEST_TRITON_D:
        return f"D = {q.shape[1]} is above {LARGEST_TRITON_D}, beyond which torch serves"
    if not 1e-30 < temperature < 1e30:
        return f"temperature = {temperature:g} is out of float32's reach"
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return "triton's interpreter rounds bfloat16 wrongly"
    return None


def _module(q: Tensor, temperature: float):
    return OP.module(_backends.choose(OP, q.device, lambda name: _refuse(name, q, temperature)))


@contextlib.contextmanager
def _full_precision(q: Tensor) -> Iterator[None]:
    """Products in full precision, whatever autocast and the tf32 switches say outside.

    On a GPU half inputs go through tf32, which holds them exactly and adds up in float32.
    """
    setting = torch.backends.cuda.matmul if q.is_cuda else torch.backends.mkldnn.matmul
    wanted = "tf32" if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else "ieee"
    outside = setting.fp32_precision
    switch = outside != wanted and not (outside == "none" and wanted == "ieee")
    if switch:
        setting.fp32_precision = wanted
    try:
        with torch.autocast(q.device.type, enabled=False):
            yield
    finally:
        if switch:
            setting.fp32_precision = outside


def _scale(q: Tensor, mean: bool) -> float:
    """What every row's loss is multiplied by. A mean is divided before its rows are added up: then no sum overflows,
    and its gradient needs no pass of its own.
    """
    return 1 / q.shape[0] if mean else 1.0


def _outputs(q: Tensor, terms: int, need_dq: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    loss = q.new_empty((terms, q.shape[0]), dtype=dtype)
    rows = q.new_empty((terms, 4, q.shape[0]), dtype=torch.float64)
    return loss, rows, q.new_empty((terms, *q.shape) if need_dq else (0,), dtype=dtype)


@operator("info_nce")
def info_nce_op(
    q: Tensor,
    keys: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    weight: list[Tensor],
    temperature: float,
    form: str,
    mean: bool,
    need_dq: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (T, N), rows (T, 4, N), dq (T, N, D) or empty), see `reference.forward`; `mean` divides all by N."""
    if q.shape[0] == 0:
        return _outputs(q, len(keys), need_dq)
    with _full_precision(q):
        options = (temperature, form, _scale(q, mean))
        return _module(q, temperature).forward(q, keys, first, second, weight, *options, need_dq)


@info_nce_op.register_fake
def _(q, keys, first, second, weight, temperature, form, mean, need_dq):
    return _outputs(q, len(keys), need_dq)


@operator("info_nce_backward")
def info_nce_backward_op(
    grad: Tensor,
    q: Tensor,
    keys: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    weight: list[Tensor],
    rows: Tensor,
    dq: Tensor,
    temperature: float,
    form: str,
    mean: bool,
    need_q: bool,
    need_k: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """(dq (N, D), [dk_t (M_t, D)]), each empty where it is not needed."""
    if q.shape[0] == 0:
        total, dks = _gradients(q, keys, need_q, need_k)
        return total, [dk.zero_() for dk in dks]
    module = _module(q, temperature)
    options = (temperature, form, _scale(q, mean))
    with _full_precision(q):
        if need_q and dq.numel() == 0:
            _, rows, dq = module.forward(q, keys, first, second, weight, *options, True)
        return module.backward(grad, q, keys, first, second, weight, rows, dq, *options, need_q, need_k)


def _gradients(q: Tensor, keys: list[Tensor], need_q: bool, need_k: list[bool]) -> tuple[Tensor, list[Tensor]]:
    dks = [k.new_empty(k.shape if needed else 0) for k, needed in zip(keys, need_k, strict=True)]
    return q.new_empty(q.shape if need_q else 0), dks


@info_nce_backward_op.register_fake
def _(grad, q, keys, first, second, weight, rows, dq, temperature, form, mean, need_q, need_k):
    return _gradients(q, keys, need_q, need_k)


def _save(ctx, inputs, output):
    q, keys, first, second, weight, temperature, form, mean, _ = inputs
    _, rows, dq = output
    # The keys are kept only where they are read again: a queue of keys may change before the backward pass.
    again = dq.numel() == 0 or any(k.requires_grad for k in keys)
    # q is kept in any case: a second derivative must raise, not be silently zero.
    ctx.save_for_backward(q, rows, dq, *((*keys, *first, *second, *weight) if again else ()))
    ctx.terms, ctx.again, ctx.options = len(keys), again, (temperature, form, mean)
    ctx.mark_non_differentiable(rows, dq)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_rows, _grad_dq):
    if grad is None:
        return None, *[None] * ctx.terms
    _, _, need_q, *need_k = ctx.needs_input_grad
    q, rows, dq, *rest = ctx.saved_tensors
    count = ctx.terms if ctx.again else 0
    keys, first, second, weight = (rest[i * count : (i + 1) * count] for i in range(4))
    args = (grad, q, keys, first, second, weight, rows, dq, *ctx.options, need_q, need_k[:count])
    d_q, d_k = info_nce_backward_op.overload(*args)
    d_k = [d if needed else None for d, needed in zip(d_k, need_k, strict=True)] if ctx.again else [None] * ctx.terms
    return d_q if need_q else None, *d_k


info_nce_op.register_autograd(_backward, setup_context=_save, of=("q", "keys"))
