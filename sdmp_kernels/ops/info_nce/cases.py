"""Cases of `info_nce`, and what plain PyTorch would do: the literal Algorithm 1 of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdmp_kernels.ops.case import Case, dense, dense_cross_entropy, two_hot
from sdmp_kernels.plan import TwoHot, draw_plan


def call(q: Tensor, k: Any, target: Any, **options: Any) -> Any:
    """The op."""
    from sdmp_kernels.ops.info_nce import info_nce

    return info_nce(q, k, target, **options)


def eager(
    q: Tensor,
    k: Any,
    target: Any,
    temperature: float | Tensor,
    form: str = "ce",
    reduction: str = "mean",
    term_weight: Any = None,
    exclude: Any = None,
    with_terms: bool = False,
) -> Any:
    """What a user of plain PyTorch writes: all logits, a dense target, `F.cross_entropy`."""
    if not isinstance(k, Tensor):
        hidden = [None] * len(k) if exclude is None else exclude
        losses = [
            eager(q, keys, wanted, temperature, form, reduction, exclude=some)
            for keys, wanted, some in zip(k, target, hidden, strict=True)
        ]
        if term_weight is None:
            return losses
        total = sum(weight * loss for weight, loss in zip(term_weight, losses, strict=True))
        return (total, torch.stack(losses).detach()) if with_terms else total
    if term_weight is not None:
        return term_weight[0] * eager(q, k, target, temperature, form, reduction, exclude=exclude)
    logits = q @ k.T / temperature
    if exclude is None:
        return dense_cross_entropy(logits, target, form=form, reduction=reduction)
    mask = exclude if exclude.dtype == torch.bool else exclude[:, None] == torch.arange(len(k), device=k.device)
    mask = mask.expand(logits.shape)
    log_p = logits.masked_fill(mask, float("-inf")).log_softmax(1)
    shares = dense(target, len(k), logits.dtype).masked_fill(mask, 0)
    if form == "ce":
        rows = -(shares * log_p.masked_fill(mask, 0)).sum(1)
    else:
        rows = -torch.logsumexp(log_p + shares.log(), dim=1).masked_fill(shares.sum(1) == 0, 0)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


def _sets(k: Any) -> list[Tensor]:
    return [k] if isinstance(k, Tensor) else list(k)


def largest_term(
    q: Tensor, k: Any, target: Any, temperature: float, reduction: str = "mean", term_weight: Any = None, **_: Any
) -> float:
    """The largest product summed for a logit, |q| |k| / temperature; for a sum over rows, that of all of them."""
    if q.numel() == 0:
        return 0.0
    top = max(float(q.norm(dim=1).max()) * float(keys.norm(dim=1).max()) for keys in _sets(k)) / float(temperature)
    return top * (len(q) if reduction == "sum" else 1) * max(1.0, *map(abs, term_weight or [1.0]))


def largest_grad_term(q: Tensor, k: Any, target: Any, temperature: float, term_weight: Any = None, **_: Any) -> float:
    """A probability of at most one times the largest key or query over the temperature, upstream gradients up to 2.

    Of a temperature that wants a gradient: all rows' products with the gradient of their query.
    """
    if q.numel() == 0:
        return 0.0
    weights = term_weight or [1.0] * len(_sets(k))
    largest = 4 * max(float(t.abs().max()) for t in (q, *_sets(k))) / float(temperature) * sum(map(abs, weights))
    if isinstance(temperature, Tensor):
        largest *= max(1.0, float(q.norm(dim=1).sum()) / float(temperature))
    return largest


def floor_bytes(q: Tensor, k: Any, target: Any, **_: Any) -> int:
    """Queries and keys read once; where they want gradients, those are written once."""
    return sum(t.nbytes * (2 if t.requires_grad else 1) for t in (q, *_sets(k)))


def kernel_bytes(q: Tensor, k: Any, target: Any, term_weight: Any = None, **_: Any) -> int:
    """What today's kernels move, tiles found in L2 and the partial results of splits left out: every key set reads
    the queries and writes their gradient in float32 (one for all where their losses are added up), the backward pass
    reads that and writes it added up; where keys want a gradient, all products are computed anew from queries and keys.
    """
    forward = sum(q.nbytes + keys.nbytes for keys in _sets(k))
    stored = 4 * q.numel() * (1 if term_weight is not None else len(_sets(k)))
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


def _excluding(n: int, m: int, d: int, bools: bool, **options: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    """Keys that are none, targets among them; of the last row nothing of the target is left."""

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        made = _case(n, m, d, **options)(generator)
        target = made["target"]
        if bools:
            exclude = torch.rand(m, generator=generator) < 0.3
            exclude[target.first[-1]], exclude[target.first[2]], exclude[target.second[2]] = True, True, False
        else:
            exclude = torch.randint(-1, m, (n,), generator=generator)
            exclude[-1], exclude[2], exclude[3] = target.first[-1], target.first[2], target.second[3]
        return {**made, "exclude": exclude}

    return inputs


def _learnt(n: int, m: int, d: int, **options: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    """A temperature that is learnt."""

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        return {**_case(n, m, d, **options)(generator), "temperature": torch.tensor(0.3125, dtype=torch.float64)}

    return inputs


_IN: dict[str, Any] = {"cast": ("q", "k"), "grads": ("q",)}
_LEARNT: dict[str, Any] = {"cast": ("q", "k", "temperature"), "grads": ("q", "k", "temperature")}
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
    Case("both_terms_weighted", _both_terms(7, term_weight=[0.5, 0.25], with_terms=True), **_IN),
    Case("weighted_keys_with_gradient", _both_terms(5, term_weight=[2.0, -0.5], reduction="none"), **_BOTH),
    Case("one_term_weighted", _case(6, 9, 16, term_weight=[0.4], reduction="mean"), **_IN),
    Case("no_rows_weighted", _both_terms(0, 4, term_weight=[0.5, 0.25], reduction="sum"), **_IN),
    Case("a_column_excluded", _excluding(7, 12, 16, False), **_BOTH),
    Case("keys_excluded", _excluding(7, 12, 16, True, form="log_mixture"), **_BOTH),
    Case("keys_excluded_of_the_mean", _excluding(6, 11, 16, True, reduction="mean"), **_IN),
    Case("learnt_temperature", _learnt(6, 9, 16, reduction="mean"), **_LEARNT),
    Case("learnt_temperature_log_mixture", _learnt(6, 9, 16, form="log_mixture"), **_LEARNT),
    Case("d_1024", _case(3, 5, 1024), **_BOTH),
    Case("d_256", _case(4, 8, 256), **_IN),
    Case("d_above_256", _case(3, 5, 300), **_IN),
]
