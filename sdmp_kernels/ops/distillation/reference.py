"""The definition of `distillation`, in plain PyTorch.

Shapes: student (V, N, K), teacher (T, N, K), own, other (V, T, N), partner (N,), center (K,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdmp_kernels.ops.losses import work_dtype

# Logits are multiplied by this power of two before they are subtracted and summed, which rounds nothing and keeps
# differences, and sums of up to 2**40 of them, from overflowing however large the logits are.
SCALE = 2.0**-40


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
    """(loss (N,), student_stats (2, V, N), teacher_stats (2, T, N), mean (K,)), float32 (float64 for float64 students).

    The stats are what the backward pass needs to recompute a softmax: a row's largest logit times SCALE (of the teacher
    the largest centred one) and the row's sum of exponentials relative to it. `mean` is the mean of the raw rows of the
    teachers in `mean_of`, empty where that is empty.
    """
    work = work_dtype(student)
    z, exponentials, student_stats = _softmax_parts(student, None, student_temperature, work)
    _, teacher_exponentials, teacher_stats = _softmax_parts(teacher, center, teacher_temperature, work)
    target, total = _combined(teacher_exponentials / teacher_stats[1, ..., None], own, other, partner)
    # H(P, S) = -sum P log S with log S = z / temperature - log(sum of exponentials), z relative to its maximum.
    # The unit of z is divided out last: where a target is zero, a distance that overflows must not count.
    distance = -(target * z).sum((0, 2)) / (SCALE * student_temperature)
    loss = (total * exponentials.sum(-1).log()).sum(0) + distance
    return loss, student_stats, teacher_stats, mean_row(teacher, mean_of, work)


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
    """(V, N, K) gradient of sum_i grad_i * loss_i, in the dtype of the student: total * softmax - target per crop."""
    work = work_dtype(student)
    _, exponentials, _ = _softmax_parts(student, None, student_temperature, work)
    _, teacher_exponentials, _ = _softmax_parts(teacher, center, teacher_temperature, work)
    target, total = _combined(teacher_exponentials / teacher_stats[1, ..., None], own, other, partner)
    softmax = exponentials / student_stats[1, ..., None]
    return (grad[:, None] * (total[..., None] * softmax - target) / student_temperature).to(student.dtype)


def partner_rows(partner: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N,) rows to read as partners, the flip for None, and whether each may count: one out of range reads row 0."""
    if partner is None:
        return torch.arange(n - 1, -1, -1, device=device), torch.ones(n, dtype=torch.bool, device=device)
    known = (partner >= 0) & (partner < n)
    return torch.where(known, partner, 0), known


def mean_row(teacher: Tensor, mean_of: Sequence[int], work: torch.dtype) -> Tensor:
    """(K,) mean over the rows of the named teachers; divided before it is summed, so that no sum overflows."""
    if not mean_of:
        return teacher.new_empty(0, dtype=work)
    count = len(mean_of) * teacher.shape[1]
    return torch.stack([(teacher[t].to(work) / count).sum(0) for t in mean_of]).sum(0)


def _softmax_parts(
    logits: Tensor, center: Tensor | None, temperature: float, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: centred logits times SCALE relative to their maximum, the exponentials, and (maximum, sum)."""
    # In one layout: the order of the sums to come, and with it their rounding, is not to depend on the strides.
    z = logits.to(work).contiguous() * SCALE
    if center is not None:
        z = z - center.to(work) * SCALE
    top = z.amax(-1)
    z = z - top[..., None]
    exponentials = torch.exp(z / (SCALE * temperature))
    return z, exponentials, torch.stack([top, exponentials.sum(-1)])


def _combined(
    probabilities: Tensor, own: Tensor, other: Tensor | None, partner: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All terms of a crop in one, by linearity: (target (V, N, K), total weight (V, N)), where the target is the sum
    over t of own * P_t[i] + other * P_t[partner_i].
    """
    own = own.to(probabilities.dtype)
    target = torch.stack([own[:, t, :, None] * probability for t, probability in enumerate(probabilities)]).sum(0)
    if other is None:
        return target, own.sum(1)
    rows, known = partner_rows(partner, probabilities.shape[1], probabilities.device)
    more, more_total = _combined(probabilities[:, rows], other.to(probabilities.dtype) * known, None, None)
    return target + more, own.sum(1) + more_total
