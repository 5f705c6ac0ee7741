"""Cases of `info_nce`, and what plain PyTorch would do: the literal Algorithm 1 of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdmp_kernels.ops.case import Case, dense_cross_entropy, two_hot
from sdmp_kernels.plan import TwoHot, draw_plan


def call(q: Tensor, k: Any, target: Any, **options: Any) -> Any:
    """The op."""
    from sdmp_kernels.ops.info_nce import info_nce

    return info_nce(q, k, target, **options)


def eager(q: Tensor, k: Any, target: Any, temperature: float, form: str = "ce", reduction: str = "mean") -> Any:
    """What a user of plain PyTorch writes: all logits, a dense target, `F.cross_entropy`."""
    if isinstance(k, Tensor):
        return dense_cross_entropy(q @ k.T / temperature, target, form=form, reduction=reduction)
    return [eager(q, keys, wanted, temperature, form, reduction) for keys, wanted in zip(k, target, strict=True)]


def _sets(k: Any) -> list[Tensor]:
    return [k] if isinstance(k, Tensor) else list(k)


def largest_term(q: Tensor, k: Any, target: Any, temperature: float, reduction: str = "mean", **_: Any) -> float:
    """The largest product summed for a logit, |q| |k| / temperature; for a sum over rows, that of all of them."""
    if q.numel() == 0:
        return 0.0
    top = max(float(q.norm(dim=1).max()) * float(keys.norm(dim=1).max()) for keys in _sets(k)) / temperature
    return top * (len(q) if reduction == "sum" else 1)


def largest_grad_term(q: Tensor, k: Any, target: Any, temperature: float, **_: Any) -> float:
    """A probability of at most one times the largest key or query over the temperature, upstream gradients up to 2."""
    if q.numel() == 0:
        return 0.0
    return 4 * max(float(t.abs().max()) for t in (q, *_sets(k))) / temperature * len(_sets(k))


def floor_bytes(q: Tensor, k: Any, target: Any, **_: Any) -> int:
    """Queries and keys read once; where they want gradients, those are written once."""
    return sum(t.nbytes * (2 if t.requires_grad else 1) for t in (q, *_sets(k)))


def kernel_bytes(q: Tensor, k: Any, target: Any, **_: Any) -> int:
    """What today's kernels move, tiles found in L2 and the partial results of splits left out: every key set reads
    the queries and writes their gradient in float32, the backward pass reads that and writes it added up; where keys
    want a gradient, all products are computed anew from queries and keys.
    """
    forward = sum(q.nbytes + keys.nbytes for keys in _sets(k))
    stored = 4 * q.numel() * len(_sets(k))
    gradient = 2 * stored + q.nbytes if q.requires_grad else 0
    again = sum(q.nbytes + 2 * keys.nbytes for keys in _sets(k) if keys.requires_grad)
    return forward + gradient + again


def flops(q: Tensor, k: Any, target: Any, **_: Any) -> int:
    """Of the matrix products. For every key set 2 N M D for the loss and as much for dq; where the keys want a
    gradient, 4 N M D more, since no logit is kept.
    """
    product, total = 2 * q.shape[0] * q.shape[1], 0
    for keys in _sets(k):
        passes = 1 + (1 if q.requires_grad else 0) + (2 if keys.requires_grad else 0)
        total += passes * product * keys.shape[0]
    return total


def _unit(generator: torch.Generator, n: int, d: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def _case(
    n: int, m: int, d: int, layout: Callable[[Tensor], Tensor] = lambda t: t, scale: float = 1.0, **options: Any
) -> Callable[[torch.Generator], dict[str, Any]]:
    options = {"temperature": 0.2, "reduction": "none", **options}

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        q, k = scale * layout(_unit(generator, n, d)), layout(_unit(generator, m, d))
        return {"q": q, "k": k, "target": two_hot(generator, n, m), **options}

    return inputs


def _both_terms(n: int, offset: int = 0, **options: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    """The source and the pair term of SDMP: one query set, two key sets of different lengths."""

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        plan = draw_plan(n, (32, 32), per="sample", seed=3, step=n)
        keys = [_unit(generator, offset + n, 24), _unit(generator, offset + n + 3, 24)]
        targets: list[TwoHot] = [plan.source_target(offset), plan.pair_target(offset)]
        return {"q": _unit(generator, n, 24), "k": keys, "target": targets, "temperature": 0.2, **options}

    return inputs


_IN: dict[str, Any] = {"cast": ("q", "k"), "grads": ("q",)}
_BOTH: dict[str, Any] = {"cast": ("q", "k"), "grads": ("q", "k")}

CASES = [
    Case("square", _case(16, 16, 32), **_IN),
    Case("mean", _case(16, 16, 32, reduction="mean"), **_IN),
    Case("few_rows", _case(8, 8, 16, reduction="mean"), **_IN),
    Case("sum", _case(5, 9, 16, reduction="sum"), **_IN),
    Case("primes", _case(7, 37, 19), **_IN),
    Case("one_of_each", _case(1, 1, 1), **_IN),
    Case("no_rows", _case(0, 4, 8, reduction="sum"), **_IN),
    Case("more_keys_than_a_tile", _case(5, 150, 16), **_IN),
    Case("sharp", _case(9, 12, 32, temperature=0.03), **_IN),
    Case("log_mixture", _case(8, 12, 16, form="log_mixture"), **_IN),
    Case("keys_with_gradient", _case(9, 14, 16), **_BOTH),
    Case("log_mixture_keys_with_gradient", _case(6, 10, 16, form="log_mixture"), **_BOTH),
    Case("transposed", _case(8, 12, 16, layout=lambda t: t.T.contiguous().T), **_BOTH),
    Case("both_terms", _both_terms(7), **_IN),
    Case("both_terms_offset", _both_terms(6, offset=6, reduction="none"), **_IN),
    Case("both_terms_keys_with_gradient", _both_terms(5), **_BOTH),
    Case("d_256", _case(4, 8, 256), **_IN),
    Case("d_above_256", _case(3, 5, 300), **_IN),
]
