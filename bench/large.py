"""What the trials of tensors with more than 2^31 elements share; each op's own is `large` in the file of its name."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness import Absent, largest_error
from sdmp_kernels import TwoHot

BEYOND = 2**31 + 8


def some_rows(n: int, device: torch.device) -> Tensor:
    """First, middle and last rows, with the partners that the flip gives them."""
    some = {i for i in (0, 1, n // 2 - 1, n // 2, n - 2, n - 1) if 0 <= i < n}
    return torch.tensor(sorted(some | {n - 1 - i for i in some}), device=device)


def fits(device: torch.device, nbytes: int) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < nbytes:
        raise Absent(f"needs {nbytes / 1e9:.0f} GB of free GPU memory")


def within(results: list[Tensor], truths: list[Tensor], dtype: torch.dtype) -> float:
    """The largest error as a share of what is allowed: four ulps of the largest value."""
    shares = [
        largest_error(result, truth) / (4 * torch.finfo(dtype).eps * max(float(truth.detach().abs().max()), 1e-30))
        for result, truth in zip(results, truths, strict=True)
    ]
    return max(shares)


def two_hot(n: int, columns: int, device: torch.device) -> TwoHot:
    generator = torch.Generator(device).manual_seed(0)
    first, second = (torch.randint(0, columns, (n,), device=device, generator=generator) for _ in range(2))
    return TwoHot(first, second, torch.rand(n, device=device, generator=generator))


def dtype_of(tiny: bool) -> torch.dtype:
    # The interpreter is wrong for bfloat16.
    return torch.float32 if tiny else torch.bfloat16
