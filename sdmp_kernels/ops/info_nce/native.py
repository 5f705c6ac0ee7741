"""`info_nce` by the compiled kernels of csrc/: backend `cpp`.

Many rows are one call that makes its own products, some rows by some keys at a time, in the cache nearest to a core, as
in fused attention. What that does not serve goes through chunks of rows of the products q k^T, made in one reused
buffer by PyTorch's matrix product; the kernel turns them into losses and, in place, into the gradient of the products;
a second matrix product makes the gradient of the queries of it. Problems of a few rows are one call that does
everything.

`_backends.native_library` has loaded the library before any of these is called. Shapes as in `reference.py`.
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.info_nce.arguments import KeySet, Problem, empty_rows
from sdmp_kernels.ops.info_nce.composed import added_up, operands_of, products_of
from sdmp_kernels.ops.losses import full_precision

# Multiplications of a product, and logits, up to which one call on one thread beats two matrix products.
_FEW_PRODUCTS = 2**16
_FEW_LOGITS = 2**12

# Rows for every thread, and logits, from which the call that makes its own products beats PyTorch's.
_SWEEP_ROWS = 48
_SWEEP_LOGITS = 2**14


def forward(problem: Problem, need_dq: bool, need_k: list[bool], reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dq, dk) as `reference.forward`, but the loss, where it is `reduced`, is summed over the rows: (T,), of one
    key set (); otherwise (T, N), of one key set (N,).

    dk: the gradients of the key sets that `need_k` names, float32, one below the other; empty unless `reduced`, since
    rows may else count differently in the backward pass.
    """
    q, terms = problem.q, len(problem.sets)
    n, d = q.shape
    if terms == 1 and not need_k[0] and problem.sets[0].excluded is None and _few(q, problem.sets[0].k):
        # The same as below, in as few steps of the host's as there are.
        loss = q.new_empty(() if reduced else (n,), dtype=torch.float32)
        made = q.new_empty((1, n, d) if need_dq else 0, dtype=torch.float32)
        _at_once(problem, 0, reduced, loss, made if need_dq else None, None)
        return loss, made, q.new_empty(0, dtype=torch.float32)
    loss = q.new_empty((*((terms,) if terms > 1 else ()), *(() if reduced else (n,))), dtype=torch.float32)
    dq = q.new_empty((terms, n, d), dtype=torch.float32) if need_dq else None
    rows = [len(keys.k) if need and reduced else 0 for keys, need in zip(problem.sets, need_k, strict=True)]
    dk = q.new_empty((sum(rows), d) if any(rows) else 0, dtype=torch.float32)
    for t, (keys, part) in enumerate(zip(problem.sets, dk.split(rows) if any(rows) else [None] * terms, strict=True)):
        to_keys = part if rows[t] else None
        if keys.excluded is None and _few(q, keys.k):
            _at_once(problem, t, reduced, loss, dq, to_keys)
            continue
        losses = q.new_empty(n, dtype=torch.float64)
        to_q = None if dq is None else dq[t]
        # Of thousands of rows a gradient of keys that is added up block by block would be farther off than PyTorch's.
        if to_keys is not None or not (_many(q, keys) and _swept(problem, keys, losses, to_q)):
            _rows(problem, keys, losses, to_q, to_keys)
        none = empty_rows(keys)
        losses = (losses if none is None else losses.masked_fill_(none, 0)).mul_(problem.scale)
        (loss if terms == 1 else loss[t]).copy_(losses.sum() if reduced else losses)
    if dq is None:
        return loss, q.new_empty(0, dtype=torch.float32), dk
    return loss, dq.sum(dim=0, keepdim=True) if problem.summed and terms > 1 else dq, dk


def _at_once(problem: Problem, t: int, reduced: bool, loss: Tensor, dq: Tensor | None, dk: Tensor | None) -> None:
    """Fills what belongs to key set t of a few rows by one call."""
    keys = problem.sets[t]
    torch.ops.sdmp.info_nce_few_cpu.default(
        problem.q,
        keys.k,
        keys.first,
        keys.second,
        keys.weight,
        problem.temperature,
        problem.form == "log_mixture",
        problem.scale,
        None,
        t,
        reduced,
        loss,
        dq,
        dk,
    )
    if keys.factor != 1:
        for made in (None if dq is None else dq[t], dk):
            if made is not None:
                made.mul_(keys.factor)


def _rows(problem: Problem, keys: KeySet, losses: Tensor, dq: Tensor | None, dk: Tensor | None) -> None:
    """Fills losses (N,), dq (N, D) and dk (M, D) of one key set, chunk by chunk."""
    q = problem.q
    with full_precision(q):
        operands = operands_of(q, keys.k, problem.temperature)
        slope, to_q = problem.scale * keys.factor, float(operands.k_factor)
        if dk is None:
            slope, to_q = _representable(slope * to_q), 1.0
        else:
            dk.zero_()
        for start, stop, z in products_of(operands.q, operands.k, keys.excluded):
            torch.ops.sdmp.info_nce_rows_cpu.default(
                z,
                *(tensor[start:stop] for tensor in (keys.first, keys.second, keys.weight)),
                float(operands.gain),
                problem.form == "log_mixture",
                slope,
                None,
                dq is not None or dk is not None,
                losses[start:stop],
            )
            if dq is not None:
                torch.addmm(dq[start:stop], z, operands.k, beta=0, alpha=to_q, out=dq[start:stop])
            if dk is not None:
                dk.addmm_(z.T, operands.q[start:stop])
        if dk is not None and operands.q_factor != 1:
            dk.mul_(operands.q_factor)


def backward(
    problem: Problem, grad: Tensor, dq: Tensor, need_q: bool, need_k: list[bool]
) -> tuple[Tensor, list[Tensor]]:
    """As `reference.backward`; the products are made anew for the gradient of keys."""
    q = problem.q
    total = added_up(dq, grad) if need_q else q.new_empty(0)
    dks = [keys.k.new_empty(0) for keys in problem.sets]
    for t, keys in enumerate(problem.sets):
        if not (need_k and need_k[t]):
            continue
        given = grad[0 if problem.summed else t]
        if keys.excluded is None and _few(q, keys.k):
            dk = keys.k.new_empty(keys.k.shape, dtype=torch.float32)
            options = (problem.temperature, problem.form == "log_mixture", problem.scale)
            target = (keys.first, keys.second, keys.weight)
            torch.ops.sdmp.info_nce_few_cpu.default(q, keys.k, *target, *options, given, 0, False, None, None, dk)
        else:
            with full_precision(q):
                dk = _key_gradient(given, problem, keys).mul_(problem.scale)
        dks[t] = (dk if keys.factor == 1 else dk.mul_(keys.factor)).to(keys.k.dtype)
    return total.to(q.dtype), dks


def _few(q: Tensor, k: Tensor) -> bool:
    (n, d), m = q.shape, k.shape[0]
    return n * m <= _FEW_LOGITS and n * m * d <= _FEW_PRODUCTS


def _many(q: Tensor, keys: KeySet) -> bool:
    n, m = q.shape[0], keys.k.shape[0]
    return keys.excluded is None and n >= _SWEEP_ROWS * torch.get_num_threads() and n * m >= _SWEEP_LOGITS


def _swept(problem: Problem, keys: KeySet, losses: Tensor, dq: Tensor | None) -> bool:
    """As `_rows`, without dk, by one call; False, and nothing is right, where products may overflow or something is no
    finite number.
    """
    target = (keys.first, keys.second, keys.weight)
    options = (problem.temperature, problem.form == "log_mixture", problem.scale * keys.factor)
    return torch.ops.sdmp.info_nce_sweep_cpu.default(problem.q, keys.k, *target, *options, losses, dq)


def _key_gradient(grad: Tensor, problem: Problem, keys: KeySet) -> Tensor:
    """(M, D) sum over i of grad_i * d loss_i / dk, float32."""
    operands = operands_of(problem.q, keys.k, problem.temperature)
    dk = torch.zeros_like(operands.k)
    for start, stop, z in products_of(operands.q, operands.k, keys.excluded):
        target = (tensor[start:stop] for tensor in (keys.first, keys.second, keys.weight))
        torch.ops.sdmp.info_nce_rows_cpu.default(
            z,
            *target,
            float(operands.gain),
            problem.form == "log_mixture",
            1.0,
            grad[start:stop],
            True,
            None,
        )
        dk.addmm_(z.T, operands.q[start:stop])
    return dk.mul_(operands.q_factor)


def _representable(value: float) -> float:
    """Within float32."""
    limit = torch.finfo(torch.float32).max
    return max(-limit, min(limit, value))
