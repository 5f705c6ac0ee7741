"""`soft_cross_entropy` on a GPU: the logits read from memory once and the gradient written once, in one sweep.

sweep     a program owns a tile of rows and walks along their columns with a running maximum and sum, then, where a
          gradient is wanted, once more: the second time it finds them in the L2 cache, since no more programs run than
          rows fit into half of it. Rows of few columns share a program.
reduce    one program: the losses added up, and what corrects the gradient of a mean where rows were left out.
multiply  of `loss_launches.py`: the gradient times the upstream factor, in the backward pass: one launch that leaves at once where it is 1.

Bytes and floors (8,192 x 65,536 bf16, an H200 copying 4.3 TB/s): loss 1.07 GB, 250 us; with gradient 2.15 GB, 500 us.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sdmp_kernels import _launch
from sdmp_kernels._launch import Call, Compile
from sdmp_kernels.ops.loss_launches import Chip, chip_of, multiply_call, tile_of
from sdmp_kernels.ops.soft_cross_entropy.arguments import Given
from sdmp_kernels.ops.soft_cross_entropy.triton_kernels import (
    soft_cross_entropy_reduce_kernel,
    soft_cross_entropy_sweep_kernel,
)

KERNELS = (
    "soft_cross_entropy_sweep_kernel",
    "soft_cross_entropy_reduce_kernel",
    "loss_multiply_kernel",
)


def sweep(
    logits: Tensor, given: Given, label_smoothing: float, form: str, reduction: str, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `native.sweep`, but the correction is (1,), and written where a mean is taken."""
    n = logits.shape[0]
    losses, factors = logits.new_empty((2, n), dtype=torch.float32).unbind()
    correction = losses.new_empty(1)
    scale = 1 / n if reduction == "mean" else 1.0
    options = (label_smoothing, form, scale)
    out = (losses, factors, gradient)
    sweep_call(chip_of(logits.device), logits, given, *options, None, correction, *out).launch(logits.device)
    if reduction == "none":
        return losses, correction
    loss = losses.new_empty(())
    arch = _launch.architecture(logits.device)
    reduce_call(arch, losses, factors, loss, correction, reduction).launch(logits.device)
    return loss, correction


def backward(
    grad: Tensor,
    logits: Tensor,
    given: Given,
    label_smoothing: float,
    form: str,
    reduction: str,
    correction: Tensor,
    out: Tensor | None,
) -> Tensor:
    """As `native.backward`."""
    n, mean = logits.shape[0], reduction == "mean"
    if mean and not correction.numel():
        # Called by hand, without what the forward pass found.
        _, correction = sweep(logits, given, label_smoothing, form, reduction, None)
    elif not mean:
        correction = logits.new_ones(1, dtype=torch.float32)
    whole = logits.new_empty(logits.shape) if out is None or not out.is_contiguous() else out
    options = (label_smoothing, form, 1 / n if mean else 1.0)
    call = sweep_call(chip_of(logits.device), logits, given, *options, grad.expand(n), correction, None, None, whole)
    call.launch(logits.device)
    return whole if out is None or out is whole else out.copy_(whole)


def sweep_call(
    chip: Chip,
    logits: Tensor,
    given: Given,
    label_smoothing: float,
    form: str,
    scale: float,
    upstream: Tensor | None,
    correction: Tensor,
    losses: Tensor | None,
    factors: Tensor | None,
    gradient: Tensor | None,
) -> Call:
    """The launch of sweep."""
    n, k = logits.shape
    stride_n, stride_k = logits.stride()
    unit = stride_k == 1 or k == 1
    align = math.gcd(k, stride_n, 16) if unit else math.gcd(k, 16)
    strides = (stride_n // align if unit else stride_n, stride_k)
    classes = given.class_weight
    constants: dict[str, Any] = {"ALIGN": align, "UNIT": unit, "MIXTURE": form == "log_mixture"}
    constants |= {"SMOOTH": label_smoothing != 0, "CLASSES": classes is not None, "LOSS": losses is not None}
    constants |= {"GRAD": gradient is not None, "UPSTREAM": upstream is not None}
    warps = tile_of(chip.arch, "soft_cross_entropy.sweep", k, constants)
    tiles = triton.cdiv(n, constants["BLOCK_N"])
    programs = tiles
    if gradient is not None:
        programs = min(tiles, max(chip.slots, chip.cache // 2 // (k * logits.element_size() * constants["BLOCK_N"])))
    # What is absent is never touched; something of a fixed type stands in for it.
    target = (given.first.contiguous(), given.second.contiguous(), given.weight.contiguous())
    absent = correction
    pointers = (
        logits,
        *target,
        absent if classes is None else classes.contiguous(),
        absent if upstream is None else upstream,
        correction,
        absent if losses is None else losses,
        absent if factors is None else factors,
        logits if gradient is None else gradient,
    )
    step = 0 if upstream is None else upstream.stride(0)
    sizes = (
        n,
        k // align,
        *strides,
        step,
        -1 if given.ignored is None else max(-1, min(given.ignored, 2**31 - 1)),
        tiles,
    )
    args = (*pointers, *sizes, label_smoothing, 1 / k, scale)
    return Call(soft_cross_entropy_sweep_kernel, (programs,), args, warps, 1, constants)


def reduce_call(arch: str, losses: Tensor, factors: Tensor, out: Tensor, correction: Tensor, reduction: str) -> Call:
    """The launch of reduce."""
    n, given = len(losses), _launch.constants(arch, "soft_cross_entropy.reduce")
    constants = {"MEAN": reduction == "mean", "BLOCK": given["block"]}
    args = (losses, factors, out, correction, n, 1 / n if reduction == "mean" else 1.0)
    return Call(soft_cross_entropy_reduce_kernel, (1,), args, given["num_warps"], 1, constants)


def compiles(arch: str) -> list[Compile]:
    """The kernels for every dtype, width, form and way the logits may lie, and what they may be asked for."""
    f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    shapes = [(f"{str(t)[6:]} 65536", t, 65536, "ce", 0.0, True) for t in (f16, bf16, f32)]
    shapes += [
        ("bfloat16 65536 log_mixture smoothed", bf16, 65536, "log_mixture", 0.1, True),
        ("bfloat16 1000 smoothed", bf16, 1000, "ce", 0.1, True),
        ("float32 1000 log_mixture", f32, 1000, "log_mixture", 0.0, True),
        ("float32 10", f32, 10, "ce", 0.1, True),
        ("bfloat16 1000 transposed", bf16, 1000, "ce", 0.0, False),
        ("float32 65537", f32, 65537, "ce", 0.0, True),
    ]
    found = []
    row, one = torch.empty(64, device="meta"), torch.empty(1, device="meta")
    for name, dtype, k, form, smoothing, unit in shapes:
        made = _Meta(arch, dtype, k, form, smoothing, unit)
        wide = ("no_spills", "wide_loads", "wide_stores") if k % 8 == 0 and unit else ("no_spills",)
        # The loss alone stores one number a row.
        found.append(made.sweep(row, None).compilation(f"soft_cross_entropy loss {name}", wide[:2]))
        found.append(made.sweep(row, made.logits).compilation(f"soft_cross_entropy both {name}", wide))
    for name, dtype, k in (("bfloat16 65536", bf16, 65536), ("float16 1000", f16, 1000)):
        made = _Meta(arch, dtype, k)
        wide = ("no_spills", "wide_loads", "wide_stores")
        found.append(made.sweep(None, made.logits).compilation(f"soft_cross_entropy gradient {name}", wide))
        for which, grad in (("all", row[0]), ("rows", row)):
            call = multiply_call(made.chip, made.logits, grad, one, made.logits)
            found.append(call.compilation(f"soft_cross_entropy multiply {which} {name}", wide))
    made = _Meta(arch, bf16, 1000, classes=torch.empty(1000, device="meta"))
    found.append(made.sweep(row, made.logits).compilation("soft_cross_entropy both bfloat16 1000 classes", wide))
    for reduction in ("mean", "sum"):
        call = reduce_call(arch, row, row, row[0], one, reduction)
        found.append(call.compilation(f"soft_cross_entropy reduce {reduction}", ("no_spills",)))
    return found


class _Meta:
    """Launches for tensors that have shapes and no memory."""

    def __init__(
        self,
        arch: str,
        dtype: torch.dtype,
        k: int,
        form: str = "ce",
        smoothing: float = 0.0,
        unit: bool = True,
        classes: Tensor | None = None,
    ) -> None:
        self.logits = torch.empty((64, k), dtype=dtype, device="meta")
        strided = self.logits if unit else self.logits.t().contiguous().t()
        column = torch.empty(64, dtype=torch.int64, device="meta")
        weight = torch.empty(64, device="meta")
        self.chip = Chip(arch, 108, 40 * 2**20)
        self.head = (self.chip, strided, Given(column, column, weight, classes, -100), smoothing, form, 1.0)

    def sweep(self, row: Tensor | None, out: Tensor | None) -> Call:
        """The losses in `row`, the gradient in `out`, where they are; without losses, of a given upstream gradient."""
        upstream = torch.empty(64, device="meta") if row is None else None
        return sweep_call(*self.head, upstream, torch.empty(1, device="meta"), row, row, out)
