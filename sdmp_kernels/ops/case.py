"""What an op's `cases.py` hands to the tests, the ahead-of-time compile checks and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
