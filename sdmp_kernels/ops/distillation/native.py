"""`distillation` by the compiled kernel of csrc/: backend `cpp`, value and gradient in one sweep over the student.

`_backends.native_library` has loaded the library before any of these is called. Shapes as in `reference.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdmp_kernels._memory import new_empty
from sdmp_kernels.ops.losses import full_precision


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
    """(loss, mean): (N,) or reduced to (), float32, and the mean row of the teachers in `mean_of`, empty where that is;
    `gradient` (V, N, K), where it is given, is filled with the gradient of the sum of the loss.
    """
    rows = student.shape[1]
    loss = student.new_empty((rows,) if reduction == "none" else (), dtype=torch.float32)
    scale = 1 / rows if reduction == "mean" else 1.0
    constants = _constants(own, other, partner, center)
    _run()(student, teacher, *constants, student_temperature, teacher_temperature, scale, None, loss, gradient)
    return loss, mean_row(teacher, mean_of)


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
    """(V, N, K) gradient of sum_i grad_i * loss_i, in the dtype of the student, from the logits alone; in `out` if
    given, which may be they.
    """
    # Chunk by chunk the kernel has read what it overwrites.
    gradient = new_empty(student) if out is None or not out.is_contiguous() else out
    constants = _constants(own, other, partner, center)
    _run()(student, teacher, *constants, student_temperature, teacher_temperature, 1.0, grad, None, gradient)
    return gradient if out is None or out is gradient else out.copy_(gradient)


def mean_row(teacher: Tensor, mean_of: Sequence[int]) -> Tensor:
    """(K,) float32 mean over the rows of the named teachers, empty where none is named."""
    if not mean_of:
        return teacher.new_empty(0, dtype=torch.float32)
    rows = teacher.shape[1]
    # Shares are added up, not divided afterwards, so that no sum overflows.
    share = torch.full((1, rows), 1 / (len(mean_of) * rows))
    mean = teacher.new_zeros((1, teacher.shape[2]), dtype=torch.float32)
    with full_precision(mean):
        for t in mean_of:
            mean.addmm_(share, teacher[t].float())
    return mean[0]


def _constants(
    own: Tensor, other: Tensor | None, partner: Tensor | None, center: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What the kernel takes them as."""
    return (
        own.float(),
        None if other is None else other.float(),
        None if partner is None else partner.contiguous(),
        None if center is None else center.float().contiguous(),
    )


def _run():
    return torch.ops.sdmp.distillation_cpu.default
