"""`info_nce` by the compiled kernels of csrc/: backend `cpp`.

A chunk of rows of the products q k^T is made in one reused buffer by PyTorch's matrix product; the kernel turns it into
losses and, in place, into the gradient of the products; a second matrix product makes the gradient of the queries of
it. Where the lengths of the rows bound the products, exponentials need no row's largest product: a chunk then has some
of the columns only and stays in the cache nearest to a core, as in fused attention. Problems of a few rows are one call
that does everything.

`_backends.native_library` has loaded the library before any of these is called. Shapes as in `reference.py`.
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.info_nce.arguments import KeySet, Problem, empty_rows
from sdmp_kernels.ops.info_nce.composed import Operands, added_up, operands_of, products_of
from sdmp_kernels.ops.losses import full_precision

# Multiplications of a product, and logits, up to which one call on one thread beats two matrix products.
_FEW_PRODUCTS = 2**16
_FEW_LOGITS = 2**12

# Rows of every thread, and columns, of a block of products: 2 MiB a thread. From twice the columns on, blocks are worth
# their calls.
_BLOCK = (512, 1024)
# Logits that no row may exceed, either way, for exponentials below a bound: the least is e^-80, a normal number.
_BOUND = 40.0


def forward(problem: Problem, need_dq: bool, need_k: list[bool], reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dq, dk) as `reference.forward`, but the loss, where it is `reduced`, is summed over the rows: (T,), of one
    key set (); otherwise (T, N), of one key set (N,).

    dk: the gradients of the key sets that `need_k` names, float32, one below the other; empty unless `reduced`, since
    rows may else count differently in the backward pass.
    """
    q, terms = problem.q, len(problem.sets)
    n, d = q.shape
    loss = q.new_empty((*((terms,) if terms > 1 else ()), *(() if reduced else (n,))), dtype=torch.float32)
    dq = q.new_empty((terms, n, d), dtype=torch.float32) if need_dq else None
    rows = [len(keys.k) if need and reduced else 0 for keys, need in zip(problem.sets, need_k, strict=True)]
    dk = q.new_empty((sum(rows), d) if any(rows) else 0, dtype=torch.float32)
    for t, (keys, part) in enumerate(zip(problem.sets, dk.split(rows) if any(rows) else [None] * terms, strict=True)):
        to_keys = part if rows[t] else None
        if keys.excluded is None and _few(q, keys.k):
            options = (problem.temperature, problem.form == "log_mixture", problem.scale)
            target = (keys.first, keys.second, keys.weight)
            results = (loss, dq, to_keys)
            torch.ops.sdmp.info_nce_few_cpu.default(q, keys.k, *target, *options, None, t, reduced, *results)
            for made in (None if dq is None else dq[t], to_keys) if keys.factor != 1 else ():
                if made is not None:
                    made.mul_(keys.factor)
            continue
        losses = q.new_empty(n, dtype=torch.float64)
        _rows(problem, keys, losses, None if dq is None else dq[t], to_keys)
        none = empty_rows(keys)
        losses = (losses if none is None else losses.masked_fill_(none, 0)).mul_(problem.scale)
        (loss if terms == 1 else loss[t]).copy_(losses.sum() if reduced else losses)
    if dq is None:
        return loss, q.new_empty(0, dtype=torch.float32), dk
    return loss, dq.sum(dim=0, keepdim=True) if problem.summed and terms > 1 else dq, dk


def _rows(problem: Problem, keys: KeySet, losses: Tensor, dq: Tensor | None, dk: Tensor | None) -> None:
    """Fills losses (N,), dq (N, D) and dk (M, D) of one key set, chunk by chunk."""
    q = problem.q
    with full_precision(q):
        operands = operands_of(q, keys.k, problem.temperature)
        gain, slope, to_q = float(operands.gain), problem.scale * keys.factor, float(operands.k_factor)
        if dq is not None and dk is None and keys.excluded is None and len(operands.k) >= 2 * _BLOCK[1]:
            shift = _largest_product(operands.q, operands.k)
            if shift * gain <= _BOUND:
                _blocks(problem, keys, operands, shift, _representable(slope * to_q), losses, dq)
                return
        if dk is None:
            slope, to_q = _representable(slope * to_q), 1.0
        else:
            dk.zero_()
        for start, stop, z in products_of(operands.q, operands.k, keys.excluded):
            torch.ops.sdmp.info_nce_rows_cpu.default(
                z,
                *(tensor[start:stop] for tensor in (keys.first, keys.second, keys.weight)),
                gain,
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


def _largest_product(q: Tensor, k: Tensor) -> float:
    """What no product of a row of q and a row of k exceeds, either way; NaN where something is not finite."""
    return float(torch.linalg.vector_norm(q, dim=1).amax()) * float(torch.linalg.vector_norm(k, dim=1).amax())


def _blocks(
    problem: Problem, keys: KeySet, operands: Operands, shift: float, slope: float, losses: Tensor, dq: Tensor
) -> None:
    """As `_rows`, block of columns by block of columns."""
    q, k = operands.q, operands.k
    gain, count = float(operands.gain), len(k)
    rows, columns = min(len(q), _BLOCK[0] * torch.get_num_threads()), _BLOCK[1]
    buffer = q.new_empty(rows * columns)
    for start in range(0, len(q), rows):
        chosen = slice(start, min(start + rows, len(q)))
        target = tuple(tensor[chosen] for tensor in (keys.first, keys.second, keys.weight))
        queries, gradient = q[chosen], dq[chosen]
        sums = torch.zeros(len(queries), dtype=torch.float64)
        picked = torch.empty(len(queries), 2)
        for begin in range(0, count, columns):
            block = k[begin : begin + columns]
            z = buffer[: len(queries) * len(block)].view(len(queries), len(block))
            torch.mm(queries, block.T, out=z)
            torch.ops.sdmp.info_nce_block_cpu.default(z, *target, begin, count, shift, gain, sums, picked)
            if begin:
                gradient.addmm_(z, block)
            else:
                torch.mm(z, block, out=gradient)
        mixture = problem.form == "log_mixture"
        torch.ops.sdmp.info_nce_end_cpu.default(
            gradient, k, *target, shift, gain, mixture, sums, picked, slope, losses[chosen]
        )


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
