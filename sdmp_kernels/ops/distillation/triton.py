"""`distillation` on a GPU: two small sweeps' worth of bytes more than one read of all logits, and no probabilities.

teacher   one chunk of columns of some rows of a teacher: their maxima and sums of exponentials over the chunk, and the
          chunk's column sums for the teacher's mean, from the same read.
merge     the chunks of a teacher's row put together. The rows' statistics are then known, so that a probability costs
          one exponential, and all terms of a student crop are one combined target.
mean      the column sums put together.
student   one chunk of columns of a pair of rows (i, N-1-i): the teachers' probabilities of both rows stay in registers,
          each is own target of one row and the partner's target of the other, and the student's crops pass by.
loss      the chunks of a row of all crops put together.
gradient  as student, with the statistics known: one read, one write.

A program has one warp: its sums are then a few shuffles, and no barrier stands between a load and the next. Chunks are
merged in a fixed order. Where the partner is not the flip, a program serves one row and gathers the partner's.

Logits are multiplied by SCALE before they are subtracted (see `reference.py`), exponentials are of base 2. The gradient
walks the pairs backwards: the last ones that the forward pass read are the ones still in the L2 cache.

Bytes and floors (64 rows, 10 + 2 crops, 65,536 columns, bf16, an H200 copying 4.3 TB/s): loss 100.7 MB, of which the
teachers' 16.8 MB are read again from L2, 23 us; gradient 184.5 MB, 43 us.
"""

import math
from collections.abc import Sequence

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

KERNELS = (
    "distillation_teacher_kernel",
    "distillation_merge_kernel",
    "distillation_mean_kernel",
    "distillation_student_kernel",
    "distillation_loss_kernel",
    "distillation_gradient_kernel",
)


def forward(
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    other: Tensor | None,
    partner: Tensor | None,
    center: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    mean_of: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    views, n, k = student.shape
    loss = student.new_empty(n, dtype=torch.float32)
    student_stats = student.new_empty((2, views, n), dtype=torch.float32)
    teacher_stats = student.new_empty((2, teacher.shape[0], n), dtype=torch.float32)
    mean = student.new_empty(k if mean_of else 0, dtype=torch.float32)
    given = _Given(student, teacher, own, other, partner, center, student_temperature, teacher_temperature)
    out = (loss, student_stats, teacher_stats, mean)
    for call in forward_calls(_launch.architecture(student.device), given, mean_of, *out):
        call.launch(student.device)
    return out


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    other: Tensor | None,
    partner: Tensor | None,
    center: Tensor | None,
    student_stats: Tensor,
    teacher_stats: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """As `reference.backward`."""
    out = student.new_empty(student.shape)
    given = _Given(student, teacher, own, other, partner, center, student_temperature, teacher_temperature)
    arch = _launch.architecture(student.device)
    gradient_call(arch, given, grad, student_stats, teacher_stats, out).launch(student.device)
    return out


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

    def chunk(self, arch: str, key: str) -> tuple[int, int, dict[str, int], dict[str, object]]:
        """(how many chunks a row has, programs per chunk, table entry, constants) of one of the three large kernels."""
        if key != "teacher":
            rows = self.crops * (1 if self.form == OWN else 2)
            key += f".{next(most for most in (4, 8, 16) if rows <= most)}"
        entry = _launch.constants(arch, f"distillation.{key}")
        block = min(entry["block"], max(32, triton.next_power_of_2(self.k)))
        constants = {"ALIGN": self.align, "CENTERED": self.centered, "EVEN": self.k % block == 0, "BLOCK": block}
        units = (self.n + 1) // 2 if self.form == PAIR else self.n
        return triton.cdiv(self.k, block), units, entry, constants


def forward_calls(
    arch: str,
    given: _Given,
    mean_of: Sequence[int],
    loss: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    mean: Tensor,
) -> list[Call]:
    """The launches of the forward pass, in order."""
    calls = _teacher_calls(arch, given, mean_of, teacher_stats, mean)
    chunks, units, entry, constants = given.chunk(arch, "student")
    partial = loss.new_empty((4, given.views, given.n, chunks))
    sizes = (given.views, given.n, given.k // given.align, chunks, given.to_exp2, given.teacher_to_exp2)
    args = (*given.inputs, teacher_stats, partial, *sizes, *given.strides)
    constants |= {"T": given.crops, "FORM": given.form.value}
    calls.append(Call(distillation_student_kernel, (units * chunks,), args, entry["num_warps"], 1, constants))
    entry = _launch.constants(arch, "distillation.loss")
    args = (partial, loss, student_stats, given.views, given.n, chunks, given.to_exp2, 1 / (SCALE * given.temperature))
    views = triton.next_power_of_2(given.views)
    tile = max(1, min(triton.next_power_of_2(chunks), entry["elements"] // views))
    constants = {"VIEWS": views, "TILE": tile}
    return [*calls, Call(distillation_loss_kernel, (given.n,), args, entry["num_warps"], 1, constants)]


def _teacher_calls(arch: str, given: _Given, mean_of: Sequence[int], stats: Tensor, mean: Tensor) -> list[Call]:
    chunks, _, entry, constants = given.chunk(arch, "teacher")
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


def gradient_call(
    arch: str, given: _Given, grad: Tensor, student_stats: Tensor, teacher_stats: Tensor, out: Tensor
) -> Call:
    """The launch of the backward pass."""
    chunks, units, entry, constants = given.chunk(arch, "gradient")
    sizes = (
        given.views,
        given.n,
        given.k // given.align,
        chunks,
        given.to_exp2,
        given.teacher_to_exp2,
        1 / given.temperature,
    )
    args = (grad, *given.inputs, student_stats, teacher_stats, out, *sizes, grad.stride(0), *given.strides)
    constants |= {"T": given.crops, "FORM": given.form.value}
    return Call(distillation_gradient_kernel, (units * chunks,), args, entry["num_warps"], 1, constants)


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
    return list(found.values())


def _compilations(arch: str, dtype: torch.dtype, form: int, crops: int, k: int) -> list[Compile]:
    views, n = 10, 64
    student, teacher = (torch.empty((v, n, k), dtype=dtype, device="meta") for v in (views, crops))
    weight = torch.empty((views, crops, n), device="meta")
    partner = torch.empty(n, dtype=torch.int64, device="meta") if form == GATHER.value else None
    other = None if form == OWN.value else weight
    row = torch.empty(n, device="meta")
    stats = [torch.empty((2, v, n), device="meta") for v in (views, crops)]
    mean = torch.empty(k, device="meta")
    given = _Given(student, teacher, weight, other, partner, mean, 0.1, 0.04)
    calls = [
        *forward_calls(arch, given, [0], row, *stats, mean), gradient_call(arch, given, row, *stats, student)
    ]  # fmt: skip
    wide = ("wide_loads",) if given.align * dtype.itemsize >= 16 else ()
    both = (*wide, "wide_stores") if wide else ()
    kind = str(dtype)[6:]
    large = f"{kind} {('own', 'pair', 'gather')[form]} of {crops}, {k}"
    along = "wide" if wide else "narrow"
    names = [f"teacher {kind} {along}", "merge", f"mean {along}", f"student {large}", "loss", f"gradient {large}"]
    facts = [both, (), ("wide_loads",) if wide else (), wide, (), both]
    return [
        call.compilation(f"distillation {name}", ("no_spills", *more))
        for call, name, more in zip(calls, names, facts, strict=True)
    ]
