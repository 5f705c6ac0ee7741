"""Cases of `distillation`, and what plain PyTorch would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmp_kernels.ops.case import Case


def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The op."""
    from sdmp_kernels.ops.distillation import distillation

    return distillation(student, teacher, **options)


def eager(
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    other: Tensor | None = None,
    partner: Tensor | None = None,
    center: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    teacher_mean: bool | list[int] = False,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """What a user of plain PyTorch writes: the double loop over crops, a cross-entropy for every term."""
    student_out = student / student_temperature
    teacher_out = teacher if center is None else teacher - center
    teacher_out = F.softmax(teacher_out / teacher_temperature, dim=-1).detach()
    losses = torch.zeros(student.shape[1], dtype=own.dtype, device=student.device)
    for t, q in enumerate(teacher_out):
        for v, s in enumerate(student_out):
            losses = losses + own[v, t] * torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1)
            if other is not None:
                p = q.flip(0) if partner is None else q[partner]
                losses = losses + other[v, t] * torch.sum(-p * F.log_softmax(s, dim=-1), dim=-1)
    loss = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    if teacher_mean is False:
        return loss
    chosen = teacher if teacher_mean is True else teacher[list(teacher_mean)]
    return loss, chosen.float().mean((0, 1))


def _parts(
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    other: Tensor | None = None,
    partner: Tensor | None = None,
    center: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total weight (V, N), combined target (V, N, K), log-probabilities (V, N, K)) in float64."""
    views, n, _ = student.shape  # type: ignore[assignment]
    logits = teacher.double() if center is None else teacher.double() - center.double()
    p = F.softmax(logits / teacher_temperature, dim=-1)
    own = own.double() if own.ndim == 3 else own.double()[..., None].expand(views, len(teacher), n)
    target, total = torch.einsum("vtn,tnk->vnk", own, p), own.sum(1)
    if other is not None:
        other = other.double() if other.ndim == 3 else other.double()[..., None].expand_as(own)
        p = p.flip(1) if partner is None else p[:, partner]
        target, total = target + torch.einsum("vtn,tnk->vnk", other, p), total + other.sum(1)
    return total, target, F.log_softmax(student.detach().double() / student_temperature, dim=-1)


def largest_term(student: Tensor, teacher: Tensor, **options: Any) -> float:
    """A row's loss, of which the reduction sums many; without one, the cross-entropy of one crop with its combined
    target, or its total weight times the log-sum-exp; or a logit of the teacher's mean.
    """
    if student.numel() == 0:
        return 0.0
    total, target, log_p = _parts(student, teacher, **options)
    crops = -(target * log_p).sum(-1)
    if options.get("reduction", "mean") == "none":
        scaled = student.double() / options.get("student_temperature", 0.1)
        largest = max(float(crops.max()), float((total * torch.logsumexp(scaled, -1)).abs().max()))
    else:
        largest = float(crops.sum(0).max())
    return max(largest, float(teacher.abs().max())) if options.get("teacher_mean") else largest


def largest_grad_term(student: Tensor, teacher: Tensor, **options: Any) -> float:
    """Of total * softmax - target, times twice the largest upstream gradient of the tests over the temperature."""
    if student.numel() == 0:
        return 0.0
    total, target, log_p = _parts(student, teacher, **options)
    largest = max(float((total[..., None] * log_p.exp()).max()), float(target.max()))
    rows = student.shape[1] if options.get("reduction", "mean") == "mean" else 1
    return 2 * largest / options.get("student_temperature", 0.1) / rows


def floor_bytes(student: Tensor, teacher: Tensor, **_: Any) -> int:
    """All logits read once; where the student's want a gradient, it is written once."""
    return student.nbytes + teacher.nbytes + (student.nbytes if student.requires_grad else 0)


def kernel_bytes(student: Tensor, teacher: Tensor, inplace_backward: bool = False, **_: Any) -> int:
    """What today's kernels move: all logits come from memory once, the later looks at a pair find it in L2, and the
    gradient is written once. In float16, and where it goes over the logits, the backward pass reads them again.
    """
    read = student.nbytes + teacher.nbytes
    if not student.requires_grad:
        return read
    return read * (2 if inplace_backward or student.dtype == torch.float16 else 1) + student.nbytes


def flops(student: Tensor, teacher: Tensor, other: Tensor | None = None, **_: Any) -> int:
    """Per student logit and direction a difference, an exponential, a product or sum, and two per teacher's term."""
    terms, directions = len(teacher) * (1 if other is None else 2), 2 if student.requires_grad else 1
    return directions * (student.numel() * (4 + 2 * terms) + 4 * teacher.numel())


def dino_weights(views: int, crops: int) -> Tensor:
    """(V, T) DINO's: the mean over all pairs of different crops."""
    weights = 1 - torch.eye(views, crops)
    return weights / weights.sum()


def _case(
    views: int,
    crops: int,
    n: int,
    k: int,
    *,
    mixed: bool = True,
    anywhere: bool = False,
    centered: bool = True,
    scale: float = 1.0,
    offset: float = 0.0,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    **options: Any,
) -> Callable[[torch.Generator], dict[str, Any]]:
    """Random logits; `mixed`: weights of both kinds, the first of them 0; `anywhere`: partners are not the flip."""

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        def logits(count: int) -> Tensor:
            drawn = torch.randn(count, n, k, generator=generator, dtype=torch.float64)
            return layout((scale * drawn + offset).float().double())

        made: dict[str, Any] = {"student": logits(views), "teacher": logits(crops), **options}
        if not mixed:
            return {**made, "own": dino_weights(views, crops), "center": torch.randn(k, generator=generator) / 10}
        made["own"], made["other"] = torch.rand(2, views, crops, n, generator=generator).unbind(0)
        made["own"][0, 0], made["other"][-1, -1] = 0.0, 0.0
        if anywhere:
            made["partner"] = torch.randint(0, n, (n,), generator=generator)
        if centered:
            made["center"] = torch.randn(k, generator=generator) / 10
        return made

    return inputs


def _tied(generator: torch.Generator) -> dict[str, Any]:
    made = _case(2, 2, 3, 20)(generator)
    return {**made, "student": torch.full_like(made["student"], 2.5), "teacher": torch.full_like(made["teacher"], -1.0)}


_IN: dict[str, Any] = {"cast": ("student", "teacher"), "grads": ("student",)}

CASES = [
    Case("dino", _case(4, 2, 6, 40, mixed=False), **_IN),
    Case("few_rows", _case(4, 2, 8, 16), **_IN),
    Case("mixed", _case(3, 2, 5, 70, reduction="none", teacher_mean=True), **_IN),
    Case("even", _case(2, 2, 4, 64, reduction="sum", centered=False), **_IN),
    Case("gathered", _case(3, 2, 5, 33, anywhere=True, reduction="none", teacher_mean=[1]), **_IN),
    Case("one_of_each", _case(1, 1, 1, 9), **_IN),
    Case("one_column", _case(2, 2, 3, 1, reduction="none", teacher_mean=True), **_IN),
    Case("one_view", _case(1, 3, 4, 21, reduction="none"), **_IN),
    Case("no_rows", _case(2, 2, 0, 5, reduction="sum", teacher_mean=True), **_IN),
    Case("primes", _case(3, 3, 7, 131, reduction="none"), **_IN),
    Case("many_columns", _case(2, 2, 3, 1100, reduction="none", teacher_mean=[1]), **_IN),
    Case("peaked", _case(2, 2, 3, 19, scale=30.0, reduction="none"), **_IN),
    Case("far_from_zero", _case(2, 2, 3, 50, offset=1000.0, reduction="none"), **_IN, dtypes=(torch.float32,)),
    Case("warm", _case(2, 2, 3, 50, student_temperature=2.0, teacher_temperature=1.5, reduction="none"), **_IN),
    Case("ties", _tied, **_IN),
    Case("columns_first", _case(2, 2, 4, 24, layout=lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0)), **_IN),
    Case("crops_last", _case(2, 2, 4, 24, layout=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)), **_IN),
]
