"""`info_nce` by the compiled kernels of csrc/: backend `cpp`.

A chunk of rows of the products q k^T is made in one reused buffer by PyTorch's matrix product; the kernel turns it into
losses and, in place, into the gradient of the products; a second matrix product makes the gradient of the queries of
it. Problems of a few rows are one call that does everything.

`_backends.native_library` has loaded the library before any of these is called. Shapes as in `reference.py`.
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.info_nce.composed import Operands, operands_of, products_of
from sdmp_kernels.ops.losses import full_precision

# Multiplications of a product, and logits, up to which one call on one thread beats two matrix products.
_FEW_PRODUCTS = 2**16
_FEW_LOGITS = 2**12


def forward(
    q: Tensor,
    keys: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    weight: list[Tensor],
    temperature: float,
    form: str,
    scale: float,
    need_dq: bool,
    need_stats: bool,
    reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`, but the loss, where it is `reduced`, is summed over the rows: (T,), of one key set ();
    otherwise (T, N), of one key set (N,).
    """
    (n, d), terms = q.shape, len(keys)
    loss = q.new_empty((*((terms,) if terms > 1 else ()), *(() if reduced else (n,))), dtype=torch.float32)
    stats = q.new_empty((terms, 4, n), dtype=torch.float64) if need_stats else None
    dq = q.new_empty((terms, n, d), dtype=torch.float32) if need_dq else None
    for t, (k, u, v, w) in enumerate(zip(keys, first, second, weight, strict=True)):
        mixture = form == "log_mixture"
        if _few(q, k):
            torch.ops.sdmp.info_nce_few_cpu.default(
                q, k, u, v, w, temperature, mixture, scale, None, t, reduced, loss, stats, dq, None
            )
            continue
        rows = q.new_empty(n, dtype=torch.float64)
        with full_precision(q):
            operands = operands_of(q, k, temperature)
            gain, unit, factor = float(operands.gain), float(operands.unit), float(operands.k_factor)
            for start, stop, z in products_of(operands.q, operands.k):
                torch.ops.sdmp.info_nce_rows_cpu.default(
                    z,
                    *(tensor[start:stop] for tensor in (u, v, w)),
                    gain,
                    mixture,
                    unit,
                    _representable(scale * factor),
                    None,
                    need_dq,
                    rows[start:stop],
                    None if stats is None else stats[t, :, start:stop],
                )
                if dq is not None:
                    torch.mm(z, operands.k, out=dq[t, start:stop])
        losses = rows.mul_(scale)
        (loss if terms == 1 else loss[t]).copy_(losses.sum() if reduced else losses)
    if stats is None:
        stats = q.new_empty(0, dtype=torch.float64)
    return loss, stats, q.new_empty(0, dtype=torch.float32) if dq is None else dq


def backward(
    grad: Tensor,
    q: Tensor,
    keys: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    weight: list[Tensor],
    stats: Tensor,
    dq: Tensor,
    temperature: float,
    form: str,
    scale: float,
    need_q: bool,
    need_k: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """As `reference.backward`; the products are made anew for the gradient of keys."""
    total = q.new_empty(0)
    if need_q:
        total = torch.mul(dq[0], grad[0].unsqueeze(1))
        for t in range(1, len(dq)):
            total.addcmul_(dq[t], grad[t][:, None])
    dks = [k.new_empty(0) for k in keys]
    for t, (k, u, v, w) in enumerate(zip(keys, first, second, weight, strict=True)):
        if not (need_k and need_k[t]):
            continue
        mixture = form == "log_mixture"
        if _few(q, k):
            dk = k.new_empty(k.shape, dtype=torch.float32)
            torch.ops.sdmp.info_nce_few_cpu.default(
                q, k, u, v, w, temperature, mixture, scale, grad[t], 0, False, None, None, None, dk
            )
        else:
            with full_precision(q):
                dk = _key_gradient(grad[t], operands_of(q, k, temperature), u, v, w, mixture).mul_(scale)
        dks[t] = dk.to(k.dtype)
    return total.to(q.dtype), dks


def _few(q: Tensor, k: Tensor) -> bool:
    (n, d), m = q.shape, k.shape[0]
    return n * m <= _FEW_LOGITS and n * m * d <= _FEW_PRODUCTS


def _key_gradient(
    grad: Tensor, operands: Operands, first: Tensor, second: Tensor, weight: Tensor, mixture: bool
) -> Tensor:
    """(M, D) sum over i of grad_i * d loss_i / dk, float32."""
    dk = torch.zeros_like(operands.k)
    for start, stop, z in products_of(operands.q, operands.k):
        target = (tensor[start:stop] for tensor in (first, second, weight))
        torch.ops.sdmp.info_nce_rows_cpu.default(
            z, *target, float(operands.gain), mixture, 1.0, 1.0, grad[start:stop], True, None, None
        )
        dk.addmm_(z.T, operands.q[start:stop])
    return dk.mul_(operands.q_factor)


def _representable(value: float) -> float:
    """Within float32."""
    limit = torch.finfo(torch.float32).max
    return max(-limit, min(limit, value))
