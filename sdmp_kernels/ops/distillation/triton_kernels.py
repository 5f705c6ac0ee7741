"""The Triton kernels of `distillation`; `triton.py` says how they work together, and launches them.

Letters: V student crops, T teacher crops, N rows, K columns, which come in chunks of BLOCK.
"""

from typing import Any, NamedTuple

import torch
import triton
from triton import language as tl

from sdmp_kernels.ops.distillation.reference import SCALE

_SCALE = tl.constexpr(SCALE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# Whose probabilities a student's row is compared with: its own, its own and those of the mirrored row (a program then
# serves both rows), its own and those of any row.
OWN, PAIR, GATHER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Strides(NamedTuple):
    """Of logits, in elements."""

    crop: Any
    row: Any
    column: Any


class Center(NamedTuple):
    """What is taken off a chunk of a teacher's logits.

    Attributes:
        shift: what is added to scaled logits: minus the scaled centre.
        mask: which columns of the chunk exist.
        columns: how many a whole row has.
    """

    shift: Any
    mask: Any
    columns: Any


# Sizes and strides that kernels are not compiled anew for. K and the strides of rows and crops come in groups of ALIGN,
# which is how the compiler learns what they are multiples of.
_FREE = [
    "averaged", "begin", "chunks", "count", "grad_n", "groups", "n", "per_group", "plane", "rows", "student_n",
    "student_v", "teacher_n", "teacher_t", "units", "views",
]  # fmt: skip


@triton.jit
def _loaded(pointer, columns, mask, other, EVEN: tl.constexpr):
    """A chunk of a row in float32; EVEN: all of its columns exist."""
    if EVEN:
        return tl.load(pointer + columns).to(tl.float32)
    else:
        return tl.load(pointer + columns, mask=mask, other=other).to(tl.float32)


@triton.jit
def _loaded_next(pointer, columns, mask, more, EVEN: tl.constexpr):
    """A chunk of the next crop's row as it is stored, on its way while this crop's is worked on."""
    if EVEN:
        return tl.load(pointer + columns, mask=more, other=float("-inf"))
    else:
        return tl.load(pointer + columns, mask=mask & more, other=float("-inf"))


@triton.jit
def _chunk(chunk, K, stride, BLOCK: tl.constexpr):
    """(offset of its first column, offsets of all from there, which exist)."""
    start = chunk * BLOCK
    within = tl.arange(0, BLOCK)
    return start * stride, within.to(tl.int64) * stride, within < K - start


@triton.jit
def _shift(center_ptr, chunk, mask, CENTERED: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """What is added to a teacher's scaled logits: minus the scaled centre."""
    if CENTERED:
        columns = tl.arange(0, BLOCK)
        return _loaded(center_ptr + chunk * BLOCK, columns, mask, 0.0, EVEN) * -_SCALE
    else:
        return tl.zeros([BLOCK], tl.float32)


@triton.jit
def _finite(top):
    """A chunk may hold nothing but minus infinity, which cannot be subtracted from itself."""
    return tl.maximum(top, _LOWEST)


@triton.jit
def _exponentials(
    teacher_ptr, stats_ptr, row, n, chunk, center, to_exp2, strides, T: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one row and every teacher: (the chunk's exponentials, one over the row's sum of them), two tuples of T."""
    start, columns, _ = _chunk(chunk, center.columns, strides.column, BLOCK)
    found, inverses = (), ()
    row_ptr = teacher_ptr + row * strides.row + start
    for t in tl.static_range(T):
        logits = _loaded(row_ptr, columns, center.mask, float("-inf"), EVEN)
        row_ptr += strides.crop
        relative = tl.fma(logits, _SCALE, center.shift) - tl.load(stats_ptr + t * n + row)
        found = found + (tl.exp2(relative * to_exp2),)
        inverses = inverses + (1.0 / tl.load(stats_ptr + (T + t) * n + row),)
    return found, inverses


@triton.jit
def _weights(weight_ptr, stride, factor, inverses, T: tl.constexpr):
    """(what multiplies the exponentials of every teacher, a tuple of T, and the sum of the weights)."""
    found, total = (), 0.0
    for t in tl.static_range(T):
        weight = tl.load(weight_ptr).to(tl.float32) * factor
        weight_ptr += stride
        found = found + (weight * inverses[t],)
        total += weight
    return found, total


@triton.jit
def _combined(exponentials, weights, COUNT: tl.constexpr):
    """The chunk of the combined target."""
    target = exponentials[0] * weights[0]
    for s in tl.static_range(1, COUNT):
        target = tl.fma(exponentials[s], weights[s], target)
    return target


@triton.jit
def _sums(exponentials, COUNT: tl.constexpr):
    found = ()
    for s in tl.static_range(COUNT):
        found = found + (tl.sum(exponentials[s], 0),)
    return found


@triton.jit
def _partner(partner_ptr, i, n, FORM: tl.constexpr):
    """(the partner's row, 1 where it may count): a row out of range is never read."""
    if FORM == GATHER:
        j = tl.load(partner_ptr + i)
        known = (j >= 0) & (j < n)
        return tl.where(known, j, 0), known.to(tl.float32)
    else:
        return n - 1 - i, 1.0


@triton.jit(do_not_specialize=_FREE)
def distillation_teacher_kernel(
    teacher_ptr, center_ptr, partial_ptr, sums_ptr, n, units, chunks, groups, per_group, plane, averaged, to_exp2,
    teacher_t, teacher_n, teacher_k, ALIGN: tl.constexpr, CENTERED: tl.constexpr, MEAN: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of exponentials (2, T, N, chunks) of one chunk of `per_group` rows of one teacher.

    plane: T * N * chunks. MEAN: also the column sums (T * groups, K), times SCALE, for the teachers whose bit in
    `averaged` is set.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk, group = program % chunks, program // chunks
    t, first = group // groups, group % groups * per_group
    K = units * ALIGN
    start, columns, mask = _chunk(chunk, K, teacher_k, BLOCK)
    shift = _shift(center_ptr, chunk, mask, CENTERED, EVEN, BLOCK)
    step = teacher_n.to(tl.int64) * ALIGN
    row_ptr = teacher_ptr + t * (teacher_t.to(tl.int64) * ALIGN) + first * step + start
    out_ptr = partial_ptr + (t * n + first) * chunks + chunk
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(first, tl.minimum(first + per_group, n)):
        logits = _loaded(row_ptr, columns, mask, float("-inf"), EVEN)
        scaled = tl.fma(logits, _SCALE, shift)
        top = _finite(tl.max(scaled, 0))
        tl.store(out_ptr, top)
        tl.store(out_ptr + plane, tl.sum(tl.exp2((scaled - top) * to_exp2), 0))
        if MEAN:
            total += logits * _SCALE
        row_ptr += step
        out_ptr += chunks
    if MEAN:
        if ((averaged >> t) & 1) != 0:
            place = sums_ptr + group * K + chunk * BLOCK + tl.arange(0, BLOCK)
            tl.store(place, total, mask=mask)


@triton.jit(do_not_specialize=_FREE)
def distillation_merge_kernel(partial_ptr, stats_ptr, rows, chunks, to_exp2, TILE: tl.constexpr):
    """(2, rows): a row's maximum and sum of exponentials from those of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    tops_ptr = partial_ptr + row * chunks
    sums_ptr = tops_ptr + rows * chunks
    each = tl.arange(0, TILE)
    best = tl.full([TILE], _LOWEST, tl.float32)
    for start in range(0, chunks, TILE):
        tops = tl.load(tops_ptr + start + each, mask=start + each < chunks, other=_LOWEST)  # narrow: one per chunk
        best = tl.maximum(best, tops)
    top = tl.max(best, 0)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, chunks, TILE):
        inside = start + each < chunks
        tops = tl.load(tops_ptr + start + each, mask=inside, other=_LOWEST)  # narrow: one per chunk
        sums = tl.load(sums_ptr + start + each, mask=inside, other=0.0)  # narrow: one per chunk
        total += sums * tl.exp2((tops - top) * to_exp2)
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + rows + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=_FREE)
def distillation_mean_kernel(
    sums_ptr, mean_ptr, rows, groups, units, averaged, factor, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(K,) `factor` times the sum of the rows of `sums` (T * groups, K) whose teacher's bit in `averaged` is set."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    K = units * ALIGN
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        wanted = (row < rows) & (((averaged >> (row // groups)) & 1) != 0)
        place = sums_ptr + row.to(tl.int64)[:, None] * K + column[None, :]
        total += tl.load(place, mask=wanted[:, None] & (column < K)[None, :], other=0.0)
    tl.store(mean_ptr + column, tl.sum(total, 0) * factor, mask=column < K)  # narrow: one number per thread


@triton.jit
def _row_partial(
    logits, mask, exponentials, masses, weights, to_exp2, out_ptr, plane, keep, COUNT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Stores a chunk's maximum, sum of exponentials, target's distance from the maximum, and target's sum."""
    top = _finite(tl.max(logits, 0)) * _SCALE
    distance = tl.fma(logits, _SCALE, -top)
    total = tl.sum(tl.exp2(distance * to_exp2), 0)
    if not EVEN:
        distance = tl.where(mask, distance, 0.0)
    crossed = tl.sum(_combined(exponentials, weights, COUNT) * distance, 0)
    mass = masses[0] * weights[0]
    for s in tl.static_range(1, COUNT):
        mass += masses[s] * weights[s]
    tl.store(out_ptr, top, mask=keep)
    tl.store(out_ptr + plane, total, mask=keep)
    tl.store(out_ptr + 2 * plane, crossed, mask=keep)
    tl.store(out_ptr + 3 * plane, mass, mask=keep)


@triton.jit(do_not_specialize=_FREE)
def distillation_student_kernel(
    student_ptr, teacher_ptr, center_ptr, own_ptr, other_ptr, partner_ptr, stats_ptr, partial_ptr, begin, views, n,
    units, chunks, to_exp2, teacher_to_exp2, student_v, student_n, student_k, teacher_t, teacher_n, teacher_k, own_v, own_t, own_n,
    other_v, other_t, other_n, T: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr, CENTERED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial results (4, V, N, chunks) of one chunk of a row, or of both rows of a pair, of all student crops.

    begin: the first row or pair of this launch.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk, i = program % chunks, begin + program // chunks
    K = units * ALIGN
    start, columns, mask = _chunk(chunk, K, student_k, BLOCK)
    center = Center(_shift(center_ptr, chunk, mask, CENTERED, EVEN, BLOCK), mask, K)
    strides = Strides(teacher_t.to(tl.int64) * ALIGN, teacher_n.to(tl.int64) * ALIGN, teacher_k)
    view, row = student_v.to(tl.int64) * ALIGN, student_n.to(tl.int64) * ALIGN
    e_i, inverse_i = _exponentials(
        teacher_ptr, stats_ptr, i, n, chunk, center, teacher_to_exp2, strides, T, EVEN, BLOCK
    )  # fmt: skip
    sums_i = _sums(e_i, T)
    if FORM != OWN:
        j, known = _partner(partner_ptr, i, n, FORM)
        e_j, inverse_j = _exponentials(
            teacher_ptr, stats_ptr, j, n, chunk, center, teacher_to_exp2, strides, T, EVEN, BLOCK
        )  # fmt: skip
        sums_j = _sums(e_j, T)
    plane = views.to(tl.int64) * n * chunks
    ptr_i = student_ptr + i * row + start
    ahead_i = _loaded_next(ptr_i, columns, mask, True, EVEN)
    own_i, other_i = own_ptr + i * own_n, other_ptr + i * other_n
    if FORM == PAIR:
        own_j, other_j = own_ptr + j * own_n, other_ptr + j * other_n
        ptr_j = student_ptr + j * row + start
        ahead_j = _loaded_next(ptr_j, columns, mask, True, EVEN)
    for v in range(views):
        more = v + 1 < views
        logits = ahead_i.to(tl.float32)
        ptr_i += view
        ahead_i = _loaded_next(ptr_i, columns, mask, more, EVEN)
        weights, _ = _weights(own_i, own_t, 1.0, inverse_i, T)
        own_i += own_v
        out_ptr = partial_ptr + (v * n + i) * chunks + chunk
        if FORM == OWN:
            _row_partial(logits, mask, e_i, sums_i, weights, to_exp2, out_ptr, plane, True, T, EVEN)
        else:
            others, _ = _weights(other_i, other_t, known, inverse_j, T)
            other_i += other_v
            _row_partial(
                logits, mask, e_i + e_j, sums_i + sums_j, weights + others, to_exp2, out_ptr, plane, True, 2 * T, EVEN
            )  # fmt: skip
        if FORM == PAIR:
            logits = ahead_j.to(tl.float32)
            ptr_j += view
            ahead_j = _loaded_next(ptr_j, columns, mask, more, EVEN)
            weights, _ = _weights(own_j, own_t, 1.0, inverse_j, T)
            others, _ = _weights(other_j, other_t, 1.0, inverse_i, T)
            own_j += own_v
            other_j += other_v
            out_ptr = partial_ptr + (v * n + j) * chunks + chunk
            _row_partial(
                logits, mask, e_j + e_i, sums_j + sums_i, weights + others, to_exp2, out_ptr, plane, i != j, 2 * T, EVEN
            )  # fmt: skip


@triton.jit(do_not_specialize=_FREE)
def distillation_loss_kernel(
    partial_ptr, loss_ptr, stats_ptr, begin, count, views, n, chunks, to_exp2, to_natural, scale, VIEWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A row's loss times `scale`, and (2, V, N) its crops' maxima and sums of exponentials, from those of their chunks.

    Of the `count` rows from `begin` on, and behind them of their mirrored ones.
    """
    program = tl.program_id(0).to(tl.int64)
    row = tl.where(program < count, begin + program, n - 1 - begin - (program - count))
    v = tl.arange(0, VIEWS)
    plane = views.to(tl.int64) * n * chunks
    tops_ptr = partial_ptr + ((v * n.to(tl.int64) + row) * chunks)[:, None]
    each = tl.arange(0, TILE)
    best = tl.full([VIEWS, TILE], _LOWEST, tl.float32)
    for start in range(0, chunks, TILE):
        inside = (v < views)[:, None] & (start + each < chunks)[None, :]
        tops = tl.load(tops_ptr + (start + each)[None, :], mask=inside, other=_LOWEST)  # narrow: one per chunk
        best = tl.maximum(best, tops)
    top = tl.max(best, 1)
    total = tl.zeros([VIEWS, TILE], tl.float32)
    crossed = tl.zeros([VIEWS, TILE], tl.float32)
    mass = tl.zeros([VIEWS, TILE], tl.float32)
    for start in range(0, chunks, TILE):
        inside = (v < views)[:, None] & (start + each < chunks)[None, :]
        place = tops_ptr + (start + each)[None, :]
        tops = tl.load(place, mask=inside, other=_LOWEST)  # narrow: one per chunk
        below = tl.where(inside, tops - top[:, None], 0.0)
        sums = tl.load(place + plane, mask=inside, other=0.0)  # narrow: one per chunk
        distances = tl.load(place + 2 * plane, mask=inside, other=0.0)  # narrow: one per chunk
        shares = tl.load(place + 3 * plane, mask=inside, other=0.0)  # narrow: one per chunk
        total += sums * tl.exp2(below * to_exp2)
        # The chunk's distances are from its own maximum.
        crossed += distances + below * shares
        mass += shares
    sums = tl.sum(total, 1)
    tl.store(stats_ptr + v * n.to(tl.int64) + row, top, mask=v < views)  # narrow: one per crop
    tl.store(stats_ptr + (views + v) * n.to(tl.int64) + row, sums, mask=v < views)  # narrow: one per crop
    # In float64, which costs nothing here: each crop's share, and their sum, would else be rounded once more.
    logs = tl.log(tl.where(v < views, sums, 1.0)).to(tl.float64)
    terms = tl.sum(mass.to(tl.float64), 1) * logs - tl.sum(crossed.to(tl.float64), 1) * to_natural
    tl.store(loss_ptr + row, (tl.sum(terms, 0) * scale).to(tl.float32))


@triton.jit
def _upstream(grad_ptr, row, stride, factor, UPSTREAM: tl.constexpr):
    """What a row's gradient is multiplied by."""
    if UPSTREAM:
        return tl.load(grad_ptr + row * stride).to(tl.float32) * factor
    else:
        return factor


@triton.jit
def _row_gradient(
    logits, mask, exponentials, weights, top, height, to_exp2, columns, out_ptr, keep, COUNT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Stores `height` times the exponentials minus the combined target."""
    risen = tl.exp2(tl.fma(logits, _SCALE, -top) * to_exp2)
    result = tl.fma(risen, height, -_combined(exponentials, weights, COUNT)).to(out_ptr.dtype.element_ty)
    # Nobody reads it soon: logits that are to be read again stay in the cache.
    if EVEN:
        tl.store(out_ptr + columns, result, mask=keep, eviction_policy="evict_first")
    else:
        tl.store(out_ptr + columns, result, mask=mask & keep, eviction_policy="evict_first")


@triton.jit(do_not_specialize=_FREE)
def distillation_gradient_kernel(
    grad_ptr, student_ptr, teacher_ptr, center_ptr, own_ptr, other_ptr, partner_ptr, student_stats_ptr, stats_ptr,
    out_ptr, begin, views, n, units, chunks, to_exp2, teacher_to_exp2, factor, grad_n, student_v, student_n, student_k,
    teacher_t, teacher_n, teacher_k, own_v, own_t, own_n, other_v, other_t, other_n, T: tl.constexpr,
    FORM: tl.constexpr, UPSTREAM: tl.constexpr, ALIGN: tl.constexpr, CENTERED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`factor` times the gradient of one chunk of a row, or of both rows of a pair, of all student crops.

    begin: the first row or pair of this launch. UPSTREAM: each row has a factor of its own besides.
    """
    # From the last program to the first: what was read last is most surely still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    chunk, i = program % chunks, begin + program // chunks
    K = units * ALIGN
    start, columns, mask = _chunk(chunk, K, student_k, BLOCK)
    center = Center(_shift(center_ptr, chunk, mask, CENTERED, EVEN, BLOCK), mask, K)
    strides = Strides(teacher_t.to(tl.int64) * ALIGN, teacher_n.to(tl.int64) * ALIGN, teacher_k)
    view, row = student_v.to(tl.int64) * ALIGN, student_n.to(tl.int64) * ALIGN
    e_i, inverse_i = _exponentials(
        teacher_ptr, stats_ptr, i, n, chunk, center, teacher_to_exp2, strides, T, EVEN, BLOCK
    )  # fmt: skip
    grad_i = _upstream(grad_ptr, i, grad_n, factor, UPSTREAM)
    if FORM != OWN:
        j, known = _partner(partner_ptr, i, n, FORM)
        e_j, inverse_j = _exponentials(
            teacher_ptr, stats_ptr, j, n, chunk, center, teacher_to_exp2, strides, T, EVEN, BLOCK
        )  # fmt: skip
    out_columns = tl.arange(0, BLOCK)
    result_i = out_ptr + i * K + chunk * BLOCK
    ptr_i = student_ptr + i * row + start
    ahead_i = _loaded_next(ptr_i, columns, mask, True, EVEN)
    own_i, other_i = own_ptr + i * own_n, other_ptr + i * other_n
    if FORM == PAIR:
        own_j, other_j = own_ptr + j * own_n, other_ptr + j * other_n
        grad_j = _upstream(grad_ptr, j, grad_n, factor, UPSTREAM)
        result_j = out_ptr + j * K + chunk * BLOCK
        ptr_j = student_ptr + j * row + start
        ahead_j = _loaded_next(ptr_j, columns, mask, True, EVEN)
    step = n.to(tl.int64) * K
    for v in range(views):
        more = v + 1 < views
        logits = ahead_i.to(tl.float32)
        ptr_i += view
        ahead_i = _loaded_next(ptr_i, columns, mask, more, EVEN)
        weights, total = _weights(own_i, own_t, grad_i, inverse_i, T)
        own_i += own_v
        top = tl.load(student_stats_ptr + v * n + i)
        inverse = 1.0 / tl.load(student_stats_ptr + (views + v) * n + i)
        if FORM == OWN:
            _row_gradient(
                logits, mask, e_i, weights, top, total * inverse, to_exp2, out_columns, result_i, True, T, EVEN
            )  # fmt: skip
        else:
            others, more_total = _weights(other_i, other_t, grad_i * known, inverse_j, T)
            other_i += other_v
            height = (total + more_total) * inverse
            _row_gradient(
                logits, mask, e_i + e_j, weights + others, top, height, to_exp2, out_columns, result_i, True, 2 * T,
                EVEN,
            )  # fmt: skip
        result_i += step
        if FORM == PAIR:
            logits = ahead_j.to(tl.float32)
            ptr_j += view
            ahead_j = _loaded_next(ptr_j, columns, mask, more, EVEN)
            weights, total = _weights(own_j, own_t, grad_j, inverse_j, T)
            others, more_total = _weights(other_j, other_t, grad_j, inverse_i, T)
            own_j += own_v
            other_j += other_v
            top = tl.load(student_stats_ptr + v * n + j)
            height = (total + more_total) / tl.load(student_stats_ptr + (views + v) * n + j)
            _row_gradient(
                logits, mask, e_j + e_i, weights + others, top, height, to_exp2, out_columns, result_j, i != j, 2 * T,
                EVEN,
            )  # fmt: skip
            result_j += step
