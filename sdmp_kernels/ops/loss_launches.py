"""What the losses' launchers share: a GPU's size, and the gradient times its upstream factor.

multiply  one launch of the backward pass, which leaves at once where the factor is 1.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sdmp_kernels import _launch
from sdmp_kernels._launch import Call
from sdmp_kernels.ops.loss_kernels import loss_multiply_kernel

# Columns from which a row has programs of its own.
_WIDE = 2048


class Chip(NamedTuple):
    """What decides how much is in flight.

    Attributes:
        arch: as `_launch.architecture` names it.
        slots: multiprocessors.
        cache: bytes of the L2 cache.
    """

    arch: str
    slots: int
    cache: int


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """Of a GPU; in the interpreter so small that programs and groups come round."""
    if device.type != "cuda":
        return Chip(_launch.architecture(device), 2, 1024)
    properties = torch.cuda.get_device_properties(device)
    return Chip(_launch.architecture(device), properties.multi_processor_count, properties.L2_cache_size)


def tile_of(arch: str, key: str, k: int, constants: dict[str, Any]) -> int:
    """Put the size of the tile of rows of K columns into `constants`; the number of warps."""
    given = _launch.constants(arch, f"{key}.{'wide' if k >= _WIDE else 'narrow'}")
    width = min(max(16, triton.next_power_of_2(k)), given["elements"])
    constants |= {"BLOCK_N": given["elements"] // width, "BLOCK_K": width}
    return given["num_warps"]


def multiplied(gradient: Tensor, grad: Tensor, correction: Tensor | None, out: Tensor) -> Tensor:
    """`gradient` (..., N, K), contiguous, times `grad`, () or (N,), and the correction (1,), in `out`, maybe itself."""
    multiply_call(chip_of(gradient.device), gradient, grad, correction, out).launch(gradient.device)
    return out


def multiply_call(chip: Chip, gradient: Tensor, grad: Tensor, correction: Tensor | None, out: Tensor) -> Call:
    """The launch of multiply."""
    n, k = gradient.shape[-2:]
    rows = gradient.numel() // k
    per_row = grad.ndim > 0
    constants: dict[str, Any] = {"ALIGN": math.gcd(k, 16), "CORRECTED": correction is not None, "PER_ROW": per_row}
    constants |= {"IN_PLACE": out is gradient}
    warps = tile_of(chip.arch, "loss.multiply", k, constants)
    tiles = triton.cdiv(rows, constants["BLOCK_N"])
    pointers = (gradient, grad, grad if correction is None else correction, out)
    sizes = (rows, k // constants["ALIGN"], n, grad.stride(0) if per_row else 0, tiles)
    return Call(loss_multiply_kernel, (min(tiles, 8 * chip.slots),), (*pointers, *sizes), warps, 1, constants)
