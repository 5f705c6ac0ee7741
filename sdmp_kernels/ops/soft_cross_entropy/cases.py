"""Cases of `soft_cross_entropy`, and what plain PyTorch would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdmp_kernels.ops.case import Case, dense_cross_entropy, two_hot
from sdmp_kernels.plan import TwoHot


def call(logits: Tensor, target: TwoHot, **options: Any) -> Tensor:
    """The op."""
    from sdmp_kernels.ops.soft_cross_entropy import soft_cross_entropy

    return soft_cross_entropy(logits, target, **options)


def eager(logits: Tensor, target: TwoHot, **options: Any) -> Tensor:
    """What a user of plain PyTorch writes: a dense target and `F.cross_entropy`."""
    return dense_cross_entropy(logits, target, **options)


def largest_term(logits: Tensor, target: TwoHot, reduction: str = "mean", **_: Any) -> float:
    """The largest logit's magnitude; for a sum over rows, that of all of them."""
    if logits.numel() == 0:
        return 0.0
    return float(logits.abs().max()) * (len(logits) if reduction == "sum" else 1)


def largest_grad_term(logits: Tensor, target: TwoHot, **_: Any) -> float:
    """Twice the largest upstream gradient of the tests: the gradient adds a probability and a target to it."""
    return 4.0


def floor_bytes(logits: Tensor, target: TwoHot, **_: Any) -> int:
    """Logits read once; where they want a gradient, it is written once."""
    return logits.nbytes * (2 if logits.requires_grad else 1)


def kernel_bytes(logits: Tensor, target: TwoHot, **_: Any) -> int:
    """What today's kernels move: the loss reads the logits, the gradient reads them again and is written."""
    return logits.nbytes * (3 if logits.requires_grad else 1)


def flops(logits: Tensor, target: TwoHot, **_: Any) -> int:
    """About four per logit and direction: subtract, exponentiate, add, compare."""
    return 4 * logits.numel() * (2 if logits.requires_grad else 1)


def _case(
    n: int, columns: int, scale: float = 3.0, layout: Callable[[Tensor], Tensor] = lambda t: t, **options: Any
) -> Callable[[torch.Generator], dict[str, Any]]:
    def inputs(generator: torch.Generator) -> dict[str, Any]:
        logits = scale * torch.randn(n, columns, generator=generator, dtype=torch.float64)
        return {"logits": layout(logits), "target": two_hot(generator, n, columns), **options}

    return inputs


def _tied(generator: torch.Generator) -> dict[str, Any]:
    return {"logits": torch.full((4, 9), 2.5, dtype=torch.float64), "target": two_hot(generator, 4, 9)}


_IN: dict[str, Any] = {"cast": ("logits",), "grads": ("logits",)}

CASES = [
    Case("rows", _case(6, 10, reduction="none"), **_IN),
    Case("mean", _case(8, 33), **_IN),
    Case("few_rows", _case(8, 16), **_IN),
    Case("sum", _case(5, 7, reduction="sum"), **_IN),
    Case("smoothed", _case(5, 12, label_smoothing=0.1, reduction="none"), **_IN),
    Case("log_mixture", _case(6, 10, form="log_mixture", reduction="none"), **_IN),
    Case("log_mixture_smoothed", _case(6, 10, form="log_mixture", label_smoothing=0.1), **_IN),
    Case("one_column", _case(3, 1, reduction="none"), **_IN),
    Case("one_row", _case(1, 17), **_IN),
    Case("no_rows", _case(0, 5, reduction="sum"), **_IN),
    Case("primes", _case(7, 131, reduction="none"), **_IN),
    Case("many_columns", _case(2, 5003, reduction="none"), **_IN),
    Case("peaked", _case(4, 19, scale=300.0, reduction="none"), **_IN),
    Case("ties", _tied, **_IN),
    Case("transposed", _case(6, 10, layout=lambda t: t.T.contiguous().T, reduction="none"), **_IN),
    Case("every_second_column", _case(6, 20, layout=lambda t: t.repeat_interleave(2, 1)[:, ::2]), **_IN),
]
