"""Cases of `soft_cross_entropy`, and what plain PyTorch would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmp_kernels.ops.case import Case, dense_cross_entropy, two_hot
from sdmp_kernels.plan import TwoHot


def call(logits: Tensor, target: TwoHot, **options: Any) -> Tensor:
    """The op."""
    from sdmp_kernels.ops.soft_cross_entropy import soft_cross_entropy

    return soft_cross_entropy(logits, target, **options)


def eager(
    logits: Tensor, target: TwoHot, ignore_index: int = -100, class_weight: Tensor | None = None, **options: Any
) -> Tensor:
    """What a user of plain PyTorch writes: a dense target and `F.cross_entropy`; with classes that are left out or
    weighted, two calls of it with labels, mixed by their weights.
    """
    labels = torch.stack(target[:2])
    if class_weight is None and not ((labels == ignore_index) | (labels < 0)).any():
        return dense_cross_entropy(logits, target, **options)
    return _mixed(logits, target, ignore_index, class_weight, **options)


def _mixed(
    logits: Tensor,
    target: TwoHot,
    ignored: int,
    class_weight: Tensor | None,
    label_smoothing: float = 0.0,
    form: str = "ce",
    reduction: str = "mean",
) -> Tensor:
    weights = torch.stack((target.weight, 1 - target.weight)).to(logits.dtype)
    classes = torch.ones(logits.shape[1], device=logits.device) if class_weight is None else class_weight
    classes = classes.to(logits.dtype)
    kept = torch.stack(target[:2]) != ignored
    columns = torch.where(kept, torch.stack(target[:2]), 0)
    shares = weights * kept
    counts = shares * classes[columns]
    if form == "ce":
        options: dict[str, Any] = {"weight": classes, "ignore_index": ignored, "label_smoothing": label_smoothing}
        first, second = (F.cross_entropy(logits, c, **options, reduction="none") for c in target[:2])
        rows = weights[0] * first + weights[1] * second
    else:
        log_p = logits.log_softmax(1)
        count = counts.sum(0)
        mixture = (counts / count * log_p.exp().gather(1, columns.T).T).sum(0).log()
        rows = -(1 - label_smoothing) * torch.where(count > 0, count * mixture, 0)
        rows = rows - label_smoothing * shares.sum(0) * (log_p * classes).mean(1)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / counts.sum()


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


def kernel_bytes(logits: Tensor, target: TwoHot, inplace_backward: bool = False, **_: Any) -> int:
    """What today's kernels move: each row comes from memory once, the second look at it finds it in L2, and its
    gradient is written once. In float16, and where the gradient goes over the logits, the backward pass reads them
    again.
    """
    if not logits.requires_grad:
        return logits.nbytes
    return logits.nbytes * (3 if inplace_backward or logits.dtype == torch.float16 else 2)


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


def _left_out(
    n: int, columns: int, ignored: int = -100, classes: bool = False, **options: Any
) -> Callable[[torch.Generator], dict[str, Any]]:
    """Of some rows a column is ignored, of one both; `classes`: weights of the classes, one of them 0."""

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        made = _case(n, columns, **options)(generator)
        first, second, weight = made["target"]
        first[[0, 3]], second[[2, 3]] = ignored, ignored
        weight[3:] = 0.25
        made |= {"target": TwoHot(first, second, weight), "ignore_index": ignored}
        if classes:
            class_weight = torch.rand(columns, generator=generator) + 0.25
            class_weight[first[1]] = 0.0
            made["class_weight"] = class_weight
        return made

    return inputs


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
    Case("ignored", _left_out(6, 10, reduction="none"), **_IN),
    Case("ignored_mean", _left_out(7, 12, label_smoothing=0.1), **_IN),
    Case("ignored_within", _left_out(5, 9, ignored=4, form="log_mixture"), **_IN),
    Case("classes", _left_out(6, 10, classes=True), **_IN),
    Case("classes_log_mixture", _left_out(6, 10, classes=True, form="log_mixture", reduction="none"), **_IN),
    Case("classes_smoothed", _left_out(6, 10, classes=True, label_smoothing=0.1), **_IN),
    Case("transposed", _case(6, 10, layout=lambda t: t.T.contiguous().T, reduction="none"), **_IN),
    Case("every_second_column", _case(6, 20, layout=lambda t: t.repeat_interleave(2, 1)[:, ::2]), **_IN),
]
