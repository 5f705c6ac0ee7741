"""The registered operators of `info_nce`: schemas, fakes, autograd, backends."""

from typing import List

import torch
from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._checks import readable
from sdmp_kernels._operators import operator
from sdmp_kernels.ops.info_nce.arguments import KeySet, Problem, kept_columns
from sdmp_kernels.ops.info_nce.composed import added_up
from sdmp_kernels.ops.losses import (
    handed_out,
    owned_gradient,
    reduced,
    refuse_native,
    refuse_triton,
    scaled,
    upstream,
    work_dtype,
)

OP = _backends.register("info_nce", cpu=("cpp", "torch", "reference"), cuda=("triton", "torch", "reference"))
LARGEST_TRITON_D = 256


def _refuse(backend: str, q: Tensor, temperature: float, excluded: List[Tensor]) -> str | None:
    if backend != "triton":
        return refuse_native(q)
    if q.shape[1] > LARGEST_TRITON_D:
        return f"D = {q.shape[1]} is above {LARGEST_TRITON_D}, beyond which torch serves"
    if excluded:
        return "triton knows of no keys that are excluded, torch does"
    if not 1e-30 < temperature < 1e30:
        return f"temperature = {temperature:g} is out of float32's reach"
    return refuse_triton(q)


def _backend(q: Tensor, temperature: float, excluded: List[Tensor]) -> str:
    return _backends.choose(OP, q.device, lambda name: _refuse(name, q, temperature, excluded))


def _problem(
    q: Tensor,
    keys: List[Tensor],
    first: List[Tensor],
    second: List[Tensor],
    weight: List[Tensor],
    excluded: List[Tensor],
    term_weight: List[float],
    temperature: float,
    form: str,
    reduction: str,
) -> Problem:
    """A mean is divided before its rows are added up: then no sum overflows, and its gradient needs no pass of its
    own.
    """
    sets = []
    for t, k in enumerate(keys):
        u, v, hidden = first[t], second[t], None
        if excluded and excluded[t].numel():
            hidden = excluded[t]
            u, v = kept_columns(u, hidden, k.shape[0]), kept_columns(v, hidden, k.shape[0])
        sets.append(KeySet(k, u, v, weight[t], hidden, term_weight[t] if term_weight else 1.0))
    rows = q.shape[0]
    scale = 1 / rows if reduction == "mean" and rows else 1.0
    return Problem(q, sets, temperature, form, scale, bool(term_weight))


def _sum(losses: Tensor, reduction: str) -> Tensor:
    """What comes out of (T, N) losses, already divided by N for a mean: (T, N), or (T,) sums of the rows; of one key
    set without the T.
    """
    losses = losses if len(losses) > 1 else losses.squeeze(0)
    return reduced(losses, "none" if reduction == "none" else "sum" if losses.shape[-1] else reduction)


def _results(losses: Tensor, term_weight: List[float]) -> tuple[Tensor, Tensor]:
    """(loss, terms): without `term_weight` the losses as they are, and nothing; else their weighted sum, and they."""
    if not term_weight:
        return losses, losses.new_empty(0)
    if len(term_weight) == 1:
        return losses * term_weight[0], losses.unsqueeze(0)
    total = losses[0] * term_weight[0]
    for loss, weight in zip(losses[1:], term_weight[1:], strict=True):
        total.add_(loss, alpha=weight)
    return total, losses


def _spread(grad: Tensor, sets: int, rows: int, reduction: str) -> Tensor:
    """(T, N) the upstream gradient of every row, from that of `_sum`; (1, N) of one weighted sum."""
    grad = upstream(grad, rows, "none" if reduction == "none" else "sum")
    return grad if sets > 1 else grad.unsqueeze(0)


def _outputs(
    q: Tensor, keys: List[Tensor], summed: bool, reduction: str, need_dq: bool, need_k: List[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, stats, dq, dk): keys have a gradient at once, or by what `stats` keep for the backward pass."""
    dtype, terms = work_dtype(q), len(keys)
    loss = q.new_empty((terms, q.shape[0]), dtype=dtype)
    need_stats = any(need_k) and backend != "cpp"
    stats = q.new_empty((terms, 4, q.shape[0]) if need_stats else (0,), dtype=torch.float64)
    dq = q.new_empty((1 if summed else terms, *q.shape) if need_dq else (0,), dtype=dtype)
    early = any(need_k) and backend == "cpp" and reduction != "none" and q.shape[0] > 0
    return loss, stats, dq, q.new_empty((sum(_rows_of(keys, need_k)), q.shape[1]) if early else (0,), dtype=dtype)


def _rows_of(keys: List[Tensor], needed: List[bool]) -> List[int]:
    """How many rows each key set has among those that get a gradient."""
    return [k.shape[0] if need else 0 for k, need in zip(keys, needed, strict=True)]


@operator("info_nce")
def info_nce_op(
    q: Tensor,
    keys: List[Tensor],
    first: List[Tensor],
    second: List[Tensor],
    weight: List[Tensor],
    excluded: List[Tensor],
    term_weight: List[float],
    temperature: float,
    form: str,
    reduction: str,
    need_dq: bool,
    need_k: List[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, terms, see `_results`, stats (T, 4, N), dq, see `reference.forward`, dk); the last three may be empty.

    `excluded` is empty, or has one entry for each key set, of no elements where none is excluded; so is `term_weight`.
    dk: the gradients of the key sets that `need_k` names, one below the other, where a backend makes them at once.
    """
    backend = _backend(q, temperature, excluded)
    if q.shape[0] == 0:
        losses, stats, dq, dk = _outputs(q, keys, bool(term_weight), reduction, need_dq, need_k, backend)
        return *_results(_sum(losses, reduction), term_weight), stats, dq, dk
    problem = _problem(q, keys, first, second, weight, excluded, term_weight, temperature, form, reduction)
    run = OP.module(backend).forward
    if backend == "cpp":
        losses, dq, dk = run(problem, need_dq, need_k, reduction != "none")
        return *_results(losses, term_weight), q.new_empty(0, dtype=torch.float64), dq, dk
    losses, stats, dq = run(problem, need_dq, any(need_k))
    return *_results(_sum(losses, reduction), term_weight), stats, dq, q.new_empty(0, dtype=work_dtype(q))


@info_nce_op.register_fake
def _(q, keys, first, second, weight, excluded, term_weight, temperature, form, reduction, need_dq, need_k):
    backend = _backend(q, temperature, excluded)
    losses, *rest = _outputs(q, keys, bool(term_weight), reduction, need_dq, need_k, backend)
    return *_results(_sum(losses, reduction), term_weight), *rest


@operator("info_nce_backward")
def info_nce_backward_op(
    grad: Tensor,
    q: Tensor,
    keys: List[Tensor],
    first: List[Tensor],
    second: List[Tensor],
    weight: List[Tensor],
    excluded: List[Tensor],
    term_weight: List[float],
    stats: Tensor,
    dq: Tensor,
    dk: Tensor,
    temperature: float,
    form: str,
    reduction: str,
    need_q: bool,
    need_k: List[bool],
) -> tuple[Tensor, List[Tensor]]:
    """(dq (N, D), [dk_t (M_t, D)]), each empty where it is not needed. `dk` is that of `info_nce`, with `need_k`."""
    if q.shape[0] == 0:
        total, dks = _gradients(q, keys, need_q, need_k)
        return total, [dk.zero_() for dk in dks]
    if dk.numel() and (dq.numel() or not need_q):
        return _multiplied(grad, q, keys, dq, dk, need_q, need_k)
    backend = _backend(q, temperature, excluded)
    module = OP.module(backend)
    problem = _problem(q, keys, first, second, weight, excluded, term_weight, temperature, form, reduction)
    grad = _spread(grad, 1 if term_weight else len(dq) or len(keys), q.shape[0], reduction)
    if backend == "cpp":
        if need_q and dq.numel() == 0:
            # An operator called by hand, without what its gradients need.
            _, dq, _ = module.forward(problem, True, [False] * len(keys), False)
        return module.backward(problem, grad, dq, need_q, need_k)
    if (need_q and dq.numel() == 0) or (any(need_k) and stats.numel() == 0):
        # Likewise, or the forward pass was another backend's.
        _, stats, dq = module.forward(problem, True, True)
    return module.backward(problem, grad, stats, dq, need_q, need_k)


def _multiplied(
    grad: Tensor, q: Tensor, keys: List[Tensor], dq: Tensor, dk: Tensor, need_q: bool, need_k: List[bool]
) -> tuple[Tensor, List[Tensor]]:
    """The gradients of the forward pass times the upstream one, () or (T,)."""
    total, _ = _gradients(q, keys, need_q, [False] * len(keys))
    factors = grad.expand(len(keys))
    if need_q:
        rows = grad.expand(1) if len(dq) == 1 else factors
        total = added_up(dq, rows[:, None].expand(-1, q.shape[0])).to(q.dtype)
    parts = dk.split(_rows_of(keys, need_k))
    return total, [
        (part * factor).to(k.dtype) if need else k.new_empty(0)
        for k, part, factor, need in zip(keys, parts, factors.unbind(), need_k, strict=True)
    ]


def _gradients(q: Tensor, keys: List[Tensor], need_q: bool, need_k: List[bool]) -> tuple[Tensor, List[Tensor]]:
    dks = [k.new_empty(k.shape if needed else 0) for k, needed in zip(keys, need_k, strict=True)]
    return q.new_empty(q.shape if need_q else 0), dks


@info_nce_backward_op.register_fake
def _(
    grad,
    q,
    keys,
    first,
    second,
    weight,
    excluded,
    term_weight,
    stats,
    dq,
    dk,
    temperature,
    form,
    reduction,
    need_q,
    need_k,
):
    return _gradients(q, keys, need_q, need_k)


def _save(ctx, inputs, output):
    q, keys, first, second, weight, excluded, *options, _, _ = inputs
    _, terms, stats, dq, dk = output
    # The keys are kept only where they are read again: a queue of keys may change before the backward pass.
    again = dq.numel() == 0 or any(k.requires_grad for k in keys)
    # All that there is to do is to hand dq out: of one set of fixed keys, or summed over them.
    ctx.ready = not again and dq.shape[0] == 1 and dq.dtype == q.dtype
    # q is kept in any case: a second derivative must raise, not be silently zero.
    if again:
        ctx.save_for_backward(q, dq, stats, dk, *keys, *first, *second, *weight, *excluded)
    else:
        ctx.save_for_backward(q, dq)
    ctx.terms, ctx.again, ctx.options = len(keys), again, options
    ctx.mark_non_differentiable(terms, stats, dq, dk)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_constants):
    if grad is None:
        return None, *[None] * ctx.terms
    q, dq, *rest = ctx.saved_tensors
    if ctx.ready and (d_q := handed_out(dq, grad)) is not None:
        return d_q.squeeze(0), *[None] * ctx.terms
    _, _, need_q, *need_k = ctx.needs_input_grad
    # Where keys are fixed, nothing was made for them.
    stats, dk, *rest = rest or (q.new_empty(0, dtype=torch.float64), q.new_empty(0, dtype=work_dtype(q)))
    count = ctx.terms if ctx.again else 0
    keys, first, second, weight = (rest[i * count : (i + 1) * count] for i in range(4))
    made = dq.shape[0] == 1 and dq.dtype == q.dtype and (dk.numel() > 0 or not ctx.again)
    if made and readable(grad, dq) and owned_gradient():
        parts = dk.split(_rows_of(keys, need_k)) if count else [None] * ctx.terms
        d_k = [scaled(part, grad, part) if needed else None for part, needed in zip(parts, need_k, strict=True)]
        return scaled(dq[0], grad, dq[0]) if need_q else None, *d_k
    term_weight, *options = ctx.options
    args = (grad, q, keys, first, second, weight, rest[4 * count :], term_weight)
    d_q, d_k = info_nce_backward_op.overload(*args, stats, dq, dk, *options, need_q, need_k[:count])
    d_k = [d if needed else None for d, needed in zip(d_k, need_k, strict=True)] if ctx.again else [None] * ctx.terms
    return d_q if need_q else None, *d_k


info_nce_op.register_autograd(_backward, setup_context=_save, of=("q", "keys"))
