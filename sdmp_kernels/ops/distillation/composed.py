"""`distillation` from PyTorch's own operators: the CPU form, and what serves a GPU without Triton.

A few rows of a few crops at a time go through buffers that stay in the cache and are used again. Nothing of the size of
the inputs is allocated but the gradient, whose softmax is computed anew: fresh pages cost more than exponentials.

Shapes as in `reference.py`; R rows of a chunk, G crops of a group, P probabilities per row: T, or
2T with the partner's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sdmp_kernels._memory import new_empty
from sdmp_kernels.ops.distillation.reference import SCALE, partner_rows
from sdmp_kernels.ops.losses import full_precision, work_dtype

# Elements of a buffer: on a CPU about what its cache holds, on a GPU enough to be worth the launches.
_CHUNK = {"cpu": 2**20, "cuda": 2**26}


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
    weights = _weights(own, other, partner, work_dtype(student))
    student_stats = weights.new_empty(2, views, n)
    teacher_stats = weights.new_empty(2, teacher.shape[0], n)
    crossed = torch.empty_like(weights)
    mean = weights.new_zeros(k if mean_of else 0)
    chunks = _Chunks(student, teacher, other is not None, partner)
    room = weights.new_empty(chunks.elements)
    probabilities = _Probabilities(chunks, teacher, center, teacher_temperature, weights)
    with full_precision(weights):
        for rows in chunks:
            targets = probabilities.of(rows, teacher_stats, known=False)
            for t in mean_of:
                share = _view(room, *targets.shape[::2])  # divided before it is summed, so that no sum overflows
                mean += torch.add(mean.new_zeros(1), teacher[t, rows], alpha=1 / (len(mean_of) * n), out=share).sum(0)
            for crops in chunks.crops:
                z = _take(student[crops], rows)
                top = z.amax(-1).to(weights.dtype) * SCALE
                z = torch.add(-top[..., None], z, alpha=SCALE, out=_view(room, *z.shape))
                # Before the division by the temperature, in which a distance may overflow where its target is zero.
                crossed[rows, crops] = z @ targets.mT
                student_stats[0, crops, rows] = top.T
                student_stats[1, crops, rows] = _sums(_softmax_(z, student_temperature)).T
    entropy = weights.sum(-1) * student_stats[1].log().T
    loss = entropy.sum(1) - (weights * crossed).sum((1, 2)) / (SCALE * student_temperature)
    return loss, student_stats, teacher_stats, mean


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
    weights = _weights(own, other, partner, work_dtype(student)) * (grad[:, None, None] / student_temperature)
    total = weights.sum(-1, keepdim=True)
    weights.neg_()
    gradient = new_empty(student)
    chunks = _Chunks(student, teacher, other is not None, partner)
    first, second = weights.new_empty(2, chunks.elements)
    probabilities = _Probabilities(chunks, teacher, center, teacher_temperature, weights)
    with full_precision(weights):
        for rows in chunks:
            targets = probabilities.of(rows, teacher_stats, known=True)
            for crops in chunks.crops:
                z, top = _take(student[crops], rows), student_stats[0, crops, rows].T
                z = torch.add(-top[..., None], z, alpha=SCALE, out=_view(first, *z.shape))
                _softmax_(z, student_temperature)
                target = torch.bmm(weights[rows, crops], targets, out=_view(second, *z.shape))
                if isinstance(rows, slice):
                    torch.addcmul(target, z, total[rows, crops], out=gradient[crops, rows].transpose(0, 1))
                else:
                    result = target.addcmul_(z, total[rows, crops]).transpose(0, 1)
                    gradient[crops].index_copy_(1, rows, result.to(gradient.dtype))
    return gradient


class _Chunks:
    """How rows are cut into chunks, each a slice or (R,) indices, and crops into groups.

    Where the partner is the flip, a chunk is closed under it: row r of R has its partner in row R - 1 - r, so that a
    teacher's probabilities are computed once for both rows of a pair.
    """

    def __init__(self, student: Tensor, teacher: Tensor, mixed: bool, partner: Tensor | None) -> None:
        views, self.n, self.k = student.shape
        self.device = student.device
        self.mixed, self.partner = mixed, partner
        self.pairs = mixed and partner is None
        room = _CHUNK.get(self.device.type, _CHUNK["cuda"]) // self.k
        # Even where rows come in pairs, and room for one row more than there are, where that is odd.
        self.size = (
            max(2, min(room // views, self.n + 1) // 2 * 2) if self.pairs else max(1, min(room // views, self.n))
        )
        groups = -(-views * self.size // max(room, 1))
        group = -(-views // min(groups, views))
        self.crops = [slice(v, min(v + group, views)) for v in range(0, views, group)]
        self.elements = max(group, teacher.shape[0]) * self.size * self.k

    def __iter__(self) -> Iterator[slice | Tensor]:
        if not self.pairs:
            yield from (slice(start, min(start + self.size, self.n)) for start in range(0, self.n, self.size))
            return
        half = self.size // 2
        for start in range(0, (self.n + 1) // 2, half):
            if 2 * (start + half) >= self.n:
                yield slice(start, self.n - start)
            elif half == 1:
                yield slice(start, self.n - start, self.n - 1 - 2 * start)
            else:
                rows = torch.arange(start, start + half, device=self.device)
                yield torch.cat([rows, self.n - 1 - rows.flip(0)])


class _Probabilities:
    """The teachers' probabilities of one chunk of rows after the other, in one buffer."""

    def __init__(
        self, chunks: _Chunks, teacher: Tensor, center: Tensor | None, temperature: float, like: Tensor
    ) -> None:
        self.chunks, self.teacher, self.temperature = chunks, teacher, temperature
        self.shift = like.new_zeros(1) if center is None else center.to(like.dtype) * -SCALE
        self.buffer = like.new_empty(chunks.size * like.shape[2] * chunks.k)
        if chunks.mixed and chunks.partner is not None:
            self.partner, _ = partner_rows(chunks.partner, chunks.n, like.device)

    def of(self, rows: slice | Tensor, stats: Tensor, *, known: bool) -> Tensor:
        """(R, P, K): per row those of every teacher, then those of every teacher for the row's partner.

        stats (2, T, N) are read where they are `known`, otherwise written.
        """
        crops = len(self.teacher)
        z = _take(self.teacher, rows)
        both = _view(self.buffer, len(z), crops * (2 if self.chunks.mixed else 1), self.chunks.k)
        found = stats[:, :, rows]  # of a slice a view, of indices a copy
        self._softmax(z, found, known, both[:, :crops])
        if not known:
            stats[:, :, rows] = found
        if self.chunks.pairs:
            both[:, crops:] = both[:, :crops].flip(0)
        elif self.chunks.mixed:
            partners = self.partner[rows]
            spare = stats[:, :, partners] if known else stats.new_empty(2, crops, len(z))
            self._softmax(_take(self.teacher, partners), spare, known, both[:, crops:])
        return both

    def _softmax(self, z: Tensor, stats: Tensor, known: bool, out: Tensor) -> None:
        torch.add(self.shift, z, alpha=SCALE, out=out)
        if not known:
            stats[0] = out.amax(-1).T
        out.sub_(stats[0].T[..., None])
        _softmax_(out, self.temperature)
        if not known:
            stats[1] = _sums(out).T


def _take(crops: Tensor, rows: slice | Tensor) -> Tensor:
    """(R, G, K) of (G, N, K)."""
    return (crops[:, rows] if isinstance(rows, slice) else crops.index_select(1, rows)).transpose(0, 1)


def _view(buffer: Tensor, *shape: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return buffer[:count].view(shape)


def _softmax_(z: Tensor, temperature: float) -> Tensor:
    """Logits times SCALE, relative to their maximum, become probabilities in place.

    By PyTorch's softmax, since its exp takes twenty times as long where the result underflows.
    """
    return torch.softmax(z.mul_(1 / (SCALE * temperature)), -1, out=z)


def _sums(probabilities: Tensor) -> Tensor:
    """The sums of exponentials relative to the largest, whose own is 1."""
    return probabilities.amax(-1).reciprocal_()


def _weights(own: Tensor, other: Tensor | None, partner: Tensor | None, work: torch.dtype) -> Tensor:
    """(N, V, P): the weights of the row's own probabilities, then those of its partner's."""
    weights = own.to(work)
    if other is not None:
        _, known = partner_rows(partner, own.shape[2], own.device)
        weights = torch.cat([weights, other.to(work) * known], 1)
    return weights.permute(2, 0, 1).contiguous()
