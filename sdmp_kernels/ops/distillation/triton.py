"""`distillation` on a GPU: the logits read from memory once and the gradient written once; no probabilities.

teacher   one chunk of columns of some rows of a teacher: their maxima and sums of exponentials over the chunk, and the
          chunk's column sums for the teacher's mean, from the same read.
merge     the chunks of a teacher's row put together. The rows' statistics are then known, so that a probability costs
          one exponential, and all terms of a student crop are one combined target.
mean      the column sums put together.
student   one chunk of columns of a pair of rows (i, N-1-i): the teachers' probabilities of both rows stay in registers,
          each is own target of one row and the partner's target of the other, and the student's crops pass by.
loss      the chunks of a row of all crops put together.
gradient  as student, with the statistics known.
multiply  of `loss_launches.py`: the gradient times the upstream factor, in the backward pass.

A program has one warp: its sums are then a few shuffles, and no barrier stands between a load and the next. Chunks are
merged in a fixed order. Where the partner is not the flip, a program serves one row and gathers the partner's.

A whole pair, with all its crops, is too much for one program and too little for a chip, and programs cannot wait for
each other. So where a gradient is wanted, student, loss and gradient follow each other for as many pairs as half of the
L2 cache holds, and the gradient's read is out of there; it walks them backwards, since the last that were read are
those still there most surely.

Logits are multiplied by SCALE before they are subtracted (see `reference.py`), exponentials are of base 2.

Bytes and floors (64 rows, 10 + 2 crops, 65,536 columns, bf16, an H200 copying 4.3 TB/s): loss 100.7 MB, of which the
teachers' 16.8 MB are read again from L2, 23 us; with gradient 184.5 MB, 43 us.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sdmp_kernels import _launch
from sdmp_kernels._launch import Call, Compile
from sdmp_kernels.ops.distillation.reference import SCALE
from sdmp_kernels.ops.distillation.triton_kernels import (
    GATHER,
    OWN,
    PAIR,
    distillation_gradient_kernel,
    distillation_loss_kernel,
    distillation_mean_kernel,
    distillation_merge_kernel,
    distillation_student_kernel,
    distillation_teacher_kernel,
)
from sdmp_kernels.ops.loss_launches import Chip, chip_of, multiply_call

KERNELS = (
    "distillation_teacher_kernel",
    "distillation_merge_kernel",
    "distillation_mean_kernel",
    "distillation_student_kernel",
    "distillation_loss_kernel",
    "distillation_gradient_kernel",
    "loss_multiply_kernel",
)


def sweep(
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    other: Tensor | None,
    partner: Tensor | None,
    center: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    reduction: str,
    gradient: Tensor | None,
    mean_of: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """As `native.sweep`, and the teacher's mean."""
    n, k = student.shape[1:]
    losses = student.new_empty(n, dtype=torch.float32)
    mean = student.new_empty(k if mean_of else 0, dtype=torch.float32)
    given = _Given(student, teacher, own, other, partner, center, student_temperature, teacher_temperature)
    wanted = Wanted(1 / n if reduction == "mean" else 1.0, None, losses, gradient, mean, mean_of)
    for call in calls_of(chip_of(student.device), given, wanted):
        call.launch(student.device)
    return (losses if reduction == "none" else losses.sum()), mean


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    other: Tensor | None,
    partner: Tensor | None,
    center: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    out: Tensor | None,
) -> Tensor:
    """As `native.backward`."""
    whole = student.new_empty(student.shape) if out is None or not out.is_contiguous() else out
    nothing = student.new_empty(0, dtype=torch.float32)
    losses = nothing.new_empty(student.shape[1])
    given = _Given(student, teacher, own, other, partner, center, student_temperature, teacher_temperature)
    for call in calls_of(chip_of(student.device), given, Wanted(1.0, grad, losses, whole, nothing, [])):
        call.launch(student.device)
    return whole if out is None or out is whole else out.copy_(whole)


class Wanted(NamedTuple):
    """What comes out of the launches.

    Attributes:
        scale: what losses and gradients are multiplied by.
        upstream: (N,) what the gradient of each row is multiplied by besides, or None.
        losses: (N,).
        gradient: (V, N, K), which may be the student's logits, or None.
        mean: (K,), of no elements where `mean_of` is empty.
        mean_of: the teachers that are averaged over.
    """

    scale: float
    upstream: Tensor | None
    losses: Tensor
    gradient: Tensor | None
    mean: Tensor
    mean_of: Sequence[int]


class _Given:
    """The arguments of a call, as the kernels take them."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        own: Tensor,
        other: Tensor | None,
        partner: Tensor | None,
        center: Tensor | None,
        student_temperature: float,
        teacher_temperature: float,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.views, self.n, self.k = student.shape
        self.crops = teacher.shape[0]
        self.form = OWN if other is None else PAIR if partner is None else GATHER
        # What is absent is never read; something of a fixed type stands in for it.
        other = own if other is None else other
        partner = own if partner is None else partner.contiguous()
        self.inputs = (student, teacher, own if center is None else center.contiguous(), own, other, partner)
        far = (*student.stride()[:2], *teacher.stride()[:2])
        near = student.stride(2), teacher.stride(2)
        self.align = math.gcd(self.k, *far, 16)
        self.student_strides = (*(stride // self.align for stride in far[:2]), near[0])
        self.teacher_strides = (*(stride // self.align for stride in far[2:]), near[1])
        self.strides = (*self.student_strides, *self.teacher_strides, *own.stride(), *other.stride())
        self.temperature = student_temperature
        self.to_exp2 = math.log2(math.e) / (SCALE * student_temperature)
        self.teacher_to_exp2 = math.log2(math.e) / (SCALE * teacher_temperature)
        self.centered = center is not None

    @property
    def units(self) -> int:
        """Pairs of rows, or rows."""
        return (self.n + 1) // 2 if self.form == PAIR else self.n

    def chunk(self, arch: str, key: str) -> tuple[int, dict[str, int], dict[str, object]]:
        """(how many chunks a row has, table entry, constants) of one of the three large kernels."""
        if key != "teacher":
            rows = self.crops * (1 if self.form == OWN else 2)
            key += f".{next(most for most in (4, 8, 16) if rows <= most)}"
        entry = _launch.constants(arch, f"distillation.{key}")
        block = min(entry["block"], max(32, triton.next_power_of_2(self.k)))
        constants = {"ALIGN": self.align, "CENTERED": self.centered, "EVEN": self.k % block == 0, "BLOCK": block}
        return triton.cdiv(self.k, block), entry, constants

    def per_group(self, cache: int) -> int:
        """How many units, all crops of student and teachers, fit into half of the L2 cache; groups of one size."""
        student, teacher, *_ = self.inputs
        row = self.k * (self.views * student.element_size() + self.crops * teacher.element_size())
        most = max(1, cache // 2 // (row * (2 if self.form == PAIR else 1)))
        return triton.cdiv(self.units, triton.cdiv(self.units, most))


def calls_of(chip: Chip, given: _Given, wanted: Wanted) -> list[Call]:
    """The launches, in order."""
    student_stats, teacher_stats = (wanted.losses.new_empty((2, v, given.n)) for v in (given.views, given.crops))
    calls = _teacher_calls(chip.arch, given, wanted.mean_of, teacher_stats, wanted.mean)
    chunks, entry, constants = given.chunk(chip.arch, "student")
    partial = wanted.losses.new_empty((4, given.views, given.n, chunks))
    step = given.units if wanted.gradient is None else given.per_group(chip.cache)
    constants |= {"T": given.crops, "FORM": given.form.value}
    for begin in range(0, given.units, step):
        count = min(step, given.units - begin)
        sizes = (begin, given.views, given.n, given.k // given.align, chunks, given.to_exp2, given.teacher_to_exp2)
        args = (*given.inputs, teacher_stats, partial, *sizes, *given.strides)
        calls.append(Call(distillation_student_kernel, (count * chunks,), args, entry["num_warps"], 1, constants))
        calls.append(_loss_call(chip.arch, given, begin, count, chunks, wanted, partial, student_stats))
        if wanted.gradient is not None:
            calls.append(_gradient_call(chip.arch, given, begin, count, wanted, student_stats, teacher_stats))
    return calls


def _loss_call(
    arch: str, given: _Given, begin: int, count: int, chunks: int, wanted: Wanted, partial: Tensor, stats: Tensor
) -> Call:
    entry = _launch.constants(arch, "distillation.loss")
    numbers = (given.to_exp2, 1 / (SCALE * given.temperature), wanted.scale)
    args = (partial, wanted.losses, stats, begin, count, given.views, given.n, chunks, *numbers)
    views = triton.next_power_of_2(given.views)
    tile = max(1, min(triton.next_power_of_2(chunks), entry["elements"] // views))
    rows = 2 * count if given.form == PAIR else count
    return Call(distillation_loss_kernel, (rows,), args, entry["num_warps"], 1, {"VIEWS": views, "TILE": tile})


def _gradient_call(
    arch: str, given: _Given, begin: int, count: int, wanted: Wanted, student_stats: Tensor, teacher_stats: Tensor
) -> Call:
    chunks, entry, constants = given.chunk(arch, "gradient")
    sizes = (begin, given.views, given.n, given.k // given.align, chunks, given.to_exp2, given.teacher_to_exp2)
    upstream = student_stats if wanted.upstream is None else wanted.upstream
    args = (upstream, *given.inputs, student_stats, teacher_stats, wanted.gradient, *sizes)
    args = (*args, wanted.scale / given.temperature, upstream.stride(0), *given.strides)
    constants |= {"T": given.crops, "FORM": given.form.value, "UPSTREAM": wanted.upstream is not None}
    return Call(distillation_gradient_kernel, (count * chunks,), args, entry["num_warps"], 1, constants)


def _teacher_calls(arch: str, given: _Given, mean_of: Sequence[int], stats: Tensor, mean: Tensor) -> list[Call]:
    chunks, entry, constants = given.chunk(arch, "teacher")
    n, crops = given.n, given.crops
    # Column sums are added up along rows, as few of them as still fill the chip; without them a row is a program.
    groups = max(1, min(n, entry["programs"] // (chunks * crops))) if mean_of else n
    per_group = triton.cdiv(n, groups)
    groups = triton.cdiv(n, per_group)
    averaged = sum(1 << t for t in mean_of)
    partial = stats.new_empty((2, crops, n, chunks))
    sums = stats.new_empty((crops * groups, given.k) if mean_of else (0,))
    _, teacher, center, *_ = given.inputs
    sizes = (n, given.k // given.align, chunks, groups, per_group, crops * n * chunks, averaged, given.teacher_to_exp2)
    args = (teacher, center, partial, sums, *sizes, *given.teacher_strides)
    constants["MEAN"] = bool(mean_of)
    calls = [Call(distillation_teacher_kernel, (crops * groups * chunks,), args, entry["num_warps"], 1, constants)]
    entry = _launch.constants(arch, "distillation.merge")
    tile = min(triton.next_power_of_2(chunks), entry["tile"])
    args = (partial, stats, crops * n, chunks, given.teacher_to_exp2)
    calls.append(Call(distillation_merge_kernel, (crops * n,), args, entry["num_warps"], 1, {"TILE": tile}))
    if mean_of:
        entry = _launch.constants(arch, "distillation.mean")
        block = entry["block"]
        args = (sums, mean, crops * groups, groups, given.k // given.align, averaged, 1 / (SCALE * len(mean_of) * n))
        constants = {"ALIGN": given.align, "ROWS": entry["rows"], "BLOCK": block}
        grid = (triton.cdiv(given.k, block),)
        calls.append(Call(distillation_mean_kernel, grid, args, entry["num_warps"], 1, constants))
    return calls


def compiles(arch: str) -> list[Compile]:
    """Every entry of the launch tables at its most registers, every form, and the ways the logits may lie."""
    f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    own, pair, gather = OWN.value, PAIR.value, GATHER.value
    shapes = [(dtype, pair, crops, 65536) for dtype in (bf16, f32) for crops in (2, 4, 8)]
    shapes += [(f16, own, 2, 65536), (bf16, gather, 2, 65528), (f32, own, 16, 10000), (bf16, pair, 1, 65537)]
    found: dict[str, Compile] = {}
    for dtype, form, crops, k in shapes:
        for item in _compilations(arch, dtype, form, crops, k):
            # The small kernels do not depend on all that the large ones do.
            found.setdefault(item.name, item)
    row = torch.empty(64, device="meta")
    for name, upstream in (("all", row[0]), ("rows", row)):
        crops = torch.empty((10, 64, 65536), dtype=bf16, device="meta")
        call = multiply_call(Chip(arch, 108, 0), crops, upstream, None, crops)
        item = call.compilation(f"distillation multiply {name}", ("no_spills", "wide_loads", "wide_stores"))
        found[item.name] = item
    return list(found.values())


def _compilations(arch: str, dtype: torch.dtype, form: int, crops: int, k: int) -> list[Compile]:
    views, n = 10, 64
    student, teacher = (torch.empty((v, n, k), dtype=dtype, device="meta") for v in (views, crops))
    weight = torch.empty((views, crops, n), device="meta")
    partner = torch.empty(n, dtype=torch.int64, device="meta") if form == GATHER.value else None
    other = None if form == OWN.value else weight
    row = torch.empty(n, device="meta")
    mean = torch.empty(k, device="meta")
    given = _Given(student, teacher, weight, other, partner, mean, 0.1, 0.04)
    chip = Chip(arch, 108, 2**40)
    calls = calls_of(chip, given, Wanted(1.0, None, row, student, mean, [0]))
    calls.append(calls_of(chip, given, Wanted(1.0, row, row, student, mean[:0], []))[-1])
    wide = ("wide_loads",) if given.align * dtype.itemsize >= 16 else ()
    both = (*wide, "wide_stores") if wide else ()
    kind = str(dtype)[6:]
    large = f"{kind} {('own', 'pair', 'gather')[form]} of {crops}, {k}"
    along = "wide" if wide else "narrow"
    names = [f"teacher {kind} {along}", "merge", f"mean {along}", f"student {large}", "loss"]
    names += [f"gradient {large}", f"gradient by rows {large}"]
    facts = [both, (), ("wide_loads",) if wide else (), wide, (), both, both]
    return [
        call.compilation(f"distillation {name}", ("no_spills", *more))
        for call, name, more in zip(calls, names, facts, strict=True)
    ]
