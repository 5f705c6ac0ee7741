"""What an op's `cases.py` hands to the tests, the ahead-of-time compile checks and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmp_kernels.plan import TwoHot

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALF)


@dataclass(frozen=True)
class Case:
    """One set of arguments of an op's public function.

    A `cases.py` holds `CASES` and functions of a case's arguments: `call(**inputs)` runs the op, `eager(**inputs)` is
    what a user of plain PyTorch would write at that dtype, and `largest_term(**inputs)` the magnitude of the largest
    term summed for any one element of the result. `floor_bytes(**inputs)` are the bytes that must move (each source
    read once, each result written once; a gradient where a tensor requires one; numbers per row left out),
    `kernel_bytes(**inputs)` those that today's GPU kernels move, `flops(**inputs)` the operations. All return or
    accept what `inputs` makes.

    Attributes:
        name: unique within the op.
        inputs: makes the arguments from a seeded generator, on the CPU; float tensors in float64.
        cast: the arguments that take the dtype under test (a tensor, or a list of tensors).
        grads: those of `cast` whose gradient is compared.
        dtypes: the dtypes it is run in.
        interpreter: small enough for Triton's interpreter.
    """

    name: str
    inputs: Callable[[torch.Generator], dict[str, Any]]
    cast: tuple[str, ...]
    grads: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    interpreter: bool = True


def dense(target: TwoHot, columns: int, dtype: torch.dtype) -> Tensor:
    """(N, K): the target as every library builds it."""
    weight = target.weight.to(dtype)
    rows = torch.zeros(len(weight), columns, dtype=dtype, device=weight.device)
    rows.scatter_add_(1, target.first[:, None], weight[:, None])
    return rows.scatter_add_(1, target.second[:, None], 1 - weight[:, None])


def dense_cross_entropy(
    logits: Tensor, target: TwoHot, label_smoothing: float = 0.0, form: str = "ce", reduction: str = "mean"
) -> Tensor:
    """Two-hot cross-entropy as a user of plain PyTorch writes it: a dense target and `F.cross_entropy`."""
    wanted = dense(target, logits.shape[1], logits.dtype)
    if form == "ce":
        return F.cross_entropy(logits, wanted, label_smoothing=label_smoothing, reduction=reduction)
    log_p = logits.log_softmax(1)
    losses = -torch.logsumexp(log_p + wanted.log(), dim=1)
    losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(1)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def two_hot(generator: torch.Generator, n: int, columns: int) -> TwoHot:
    """Random columns; the first weights are 0 and 1, and the last row's columns coincide."""
    first, second = torch.randint(0, columns, (2, n), generator=generator).unbind(0)
    weight = torch.rand(n, generator=generator)
    weight[:1], weight[1:2] = 0.0, 1.0
    second[-1:] = first[-1:]
    return TwoHot(first, second, weight)
