"""The Triton kernels of `info_nce`; `triton.py` says how they work together, and launches them.

Letters: N queries of D elements, M keys, T key sets (terms) of one launch.
"""

import math

import triton
from triton import language as tl

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
# Logits of base 2 from here on, and everything not finite, are left to float64. Less far with a lift, which has to be
# added to them.
_REACH = tl.constexpr(1e30)
_REACH_LIFTED = tl.constexpr(2.0**16)
# Keys whose largest logit is an anchor. How far that may be, so that a sum's logarithm can be added to it; and from where
# on sums relative to it are lost: short of where float32 ends by what is still to be added, other splits and long keys.
_ANCHOR_KEYS = tl.constexpr(32)
_ANCHOR_REACH = tl.constexpr(2.0**10)
_LOST = tl.constexpr(2.0**96)


# ---- which key set a program is for ----


@triton.jit
def _pick(term, a, b, c, d, TERMS: tl.constexpr):
    """The argument of this key set, out of up to four."""
    if TERMS > 1:
        a = tl.where(term == 1, b, a)
    if TERMS > 2:
        a = tl.where(term == 2, c, a)
    if TERMS > 3:
        a = tl.where(term == 3, d, a)
    return a


@triton.jit
def _splits_before(term, chunk, M0, M1, M2, TERMS: tl.constexpr):
    """How many splits the key sets before this one have."""
    before = tl.zeros([], tl.int32)
    if TERMS > 1:
        before += tl.where(term > 0, tl.cdiv(M0, chunk), 0)
    if TERMS > 2:
        before += tl.where(term > 1, tl.cdiv(M1, chunk), 0)
    if TERMS > 3:
        before += tl.where(term > 2, tl.cdiv(M2, chunk), 0)
    return before


@triton.jit
def _term_of(split, chunk, M0, M1, M2, TERMS: tl.constexpr):
    """The key set of a split."""
    term = tl.zeros([], tl.int32)
    if TERMS > 1:
        term += (split >= _splits_before(1, chunk, M0, M1, M2, TERMS)).to(tl.int32)
    if TERMS > 2:
        term += (split >= _splits_before(2, chunk, M0, M1, M2, TERMS)).to(tl.int32)
    if TERMS > 3:
        term += (split >= _splits_before(3, chunk, M0, M1, M2, TERMS)).to(tl.int32)
    return term


# ---- loss and gradient of the queries ----


@triton.jit
def _tile(pointer, d, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Rows of D elements, or BLOCK_D of them, padded with zeros; ROWS says that some rows are not `valid`."""
    if ROWS and D % BLOCK_D == 0:
        return tl.load(pointer, mask=valid[:, None], other=0)
    elif ROWS:
        return tl.load(pointer, mask=valid[:, None] & (d < D)[None, :], other=0)
    elif D % BLOCK_D == 0:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=(d < D)[None, :], other=0)


@triton.jit
def _products(
    a, b, a_ptr, a_valid, b_ptr, b_valid, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_A, BLOCK_B) products of rows. SLICE: that many elements at a time, read anew, where whole rows in full
    precision would not fit in registers; 0: of the tiles a and b as they are.
    """
    if SLICE == 0:
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        z = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        d = tl.arange(0, SLICE)
        a_row = tl.arange(0, BLOCK_A)[:, None] * D
        b_row = tl.arange(0, BLOCK_B)[:, None] * D
        for first in range(0, D, SLICE):
            x = _tile(a_ptr + a_row + (first + d)[None, :], first + d, a_valid, D, SLICE, True)
            y = _tile(b_ptr + b_row + (first + d)[None, :], first + d, b_valid, D, SLICE, True)
            z = tl.dot(x, tl.trans(y), z, input_precision="ieee")
        return z


@triton.jit
def _step(
    z, k, keep, acc, peak, total, factor, LIFT: tl.constexpr, WITH_DQ: tl.constexpr, TAIL: tl.constexpr,
    ANCHORED: tl.constexpr,
):  # fmt: skip
    """(acc, peak, total) with the products of one tile of keys taken in; ANCHORED: the peak stays where it is."""
    if TAIL:
        z = tl.where(keep[None, :], z, float("-inf"))
    if ANCHORED:
        weight = tl.exp2(tl.fma(z, factor, -peak[:, None]))
        total += tl.sum(weight, 1)
    else:
        higher = tl.maximum(peak, tl.max(z, 1) * factor)
        weight = tl.exp2(tl.fma(z, factor, (LIFT - higher)[:, None]))
        shrunk = tl.exp2(peak - higher)
        total = total * shrunk + tl.sum(weight, 1)
        acc *= shrunk[:, None]
        peak = higher
    if WITH_DQ:
        acc = tl.dot(weight.to(k.dtype), k, acc, input_precision="ieee")
    return acc, peak, total


@triton.jit
def _anchor(
    q, q_ptr, q_valid, k_ptr, count, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """The largest product of each query with the first few of `count` keys."""
    few = tl.arange(0, _ANCHOR_KEYS)
    d = tl.arange(0, BLOCK_D)
    k = _tile(k_ptr + few[:, None] * D + d[None, :], d, few < count, D, BLOCK_D, True)
    z = _products(q, k, q_ptr, q_valid, k_ptr, few < count, D, BLOCK_M, _ANCHOR_KEYS, SLICE)
    return tl.max(tl.where((few < count)[None, :], z, float("-inf")), 1)


@triton.jit(do_not_specialize=["N", "M0", "M1", "M2", "M3", "chunk"])
def info_nce_attend_kernel(
    q_ptr, k0_ptr, k1_ptr, k2_ptr, k3_ptr, peak_ptr, total_ptr, acc_ptr, N, M0, M1, M2, M3, chunk, factor,
    TERMS: tl.constexpr, D: tl.constexpr, LIFT: tl.constexpr, WITH_DQ: tl.constexpr, ANCHORED: tl.constexpr,
    ONLY_LOST: tl.constexpr, PEEL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries against `chunk` keys: a peak (of base 2), the sum of 2^(logit - peak + LIFT), and with WITH_DQ
    the keys added up with these weights.

    The peak is the largest logit, and what was added up is scaled down whenever a larger one comes. ANCHORED: it is that
    of the first few keys, so that nothing is scaled and nothing compared. Sums never vanish then, but grow out of reach
    where a logit is much larger: such tiles get NaN for peaks, and a second launch not anchored, ONLY_LOST.

    LIFT uses the upper half of float16's range for weights that would else be lost at its lower end. PEEL: only the
    last tile of keys looks where the keys end, which saves an instruction per logit and costs registers.
    """
    split = tl.program_id(1)
    if ONLY_LOST:
        before = tl.load(peak_ptr + split.to(tl.int64) * N + tl.program_id(0).to(tl.int64) * BLOCK_M)
        if before == before:
            return
    term = _term_of(split, chunk, M0, M1, M2, TERMS)
    M = _pick(term, M0, M1, M2, M3, TERMS)
    k_ptr = _pick(term, k0_ptr, k1_ptr, k2_ptr, k3_ptr, TERMS)
    start = (split - _splits_before(term, chunk, M0, M1, M2, TERMS)) * chunk
    count = tl.minimum(chunk, M - start)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q_ptr += tl.program_id(0).to(tl.int64) * BLOCK_M * D
    k_ptr += start.to(tl.int64) * D
    q = _tile(q_ptr + tl.arange(0, BLOCK_M)[:, None] * D + d[None, :], d, row < N, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if ANCHORED:
        peak = _anchor(q, q_ptr, row < N, k_ptr, count, D, BLOCK_M, BLOCK_D, SLICE) * factor
    k_tile = k_ptr + column[:, None] * D + d[None, :]
    if PEEL:
        whole = count // BLOCK_N * BLOCK_N
        for block in range(0, whole, BLOCK_N):
            k = _tile(k_tile, d, column < BLOCK_N, D, BLOCK_D, False)
            z = tl.dot(q, tl.trans(k), input_precision="ieee")
            acc, peak, total = _step(z, k, column < BLOCK_N, acc, peak, total, factor, LIFT, WITH_DQ, False, ANCHORED)
            k_tile += BLOCK_N * D
        # Not a second loop: the pointers carried through both would take registers that are needed.
        if whole < count:
            keep = whole + column < count
            k = _tile(k_tile, d, keep, D, BLOCK_D, True)
            z = tl.dot(q, tl.trans(k), input_precision="ieee")
            acc, peak, total = _step(z, k, keep, acc, peak, total, factor, LIFT, WITH_DQ, True, ANCHORED)
    else:
        for block in range(0, count, BLOCK_N):
            keep = block + column < count
            k = _tile(k_tile, d, keep, D, BLOCK_D, True)
            k_rows = k_ptr + tl.cast(block, tl.int64) * D
            z = _products(q, k, q_ptr, row < N, k_rows, keep, D, BLOCK_M, BLOCK_N, SLICE)
            acc, peak, total = _step(z, k, keep, acc, peak, total, factor, LIFT, WITH_DQ, True, ANCHORED)
            k_tile += BLOCK_N * D
    if ANCHORED:
        # Comparisons that NaN fails.
        kept = (total < _LOST) & (tl.abs(peak) < _ANCHOR_REACH)
        lost = tl.sum(kept.to(tl.int32), 0) < BLOCK_M
        peak = tl.where(lost, float("nan"), peak)
    place = split.to(tl.int64) * N + row
    tl.store(peak_ptr + place, peak, mask=row < N)  # narrow: one number per row
    tl.store(total_ptr + place, total, mask=row < N)  # narrow: one number per row
    if WITH_DQ:
        tl.store(acc_ptr + place[:, None] * D + d[None, :], acc, mask=(row < N)[:, None] & (d < D)[None, :])


@triton.jit
def _exact_products(q, k_ptr, start, M, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """(products with BLOCK_K keys, the keys, which of them exist) in float64."""
    d = tl.arange(0, BLOCK_D)
    column = start + tl.arange(0, BLOCK_K)
    place = k_ptr + column.to(tl.int64)[:, None] * D + d[None, :]
    mask = (column < M)[:, None] & (d < D)[None, :]
    k = tl.load(place, mask=mask, other=0).to(tl.float64)  # narrow: one row, in the rare case
    return tl.sum(q[None, :] * k, 1), k, column < M


@triton.jit
def _exact_row(q, k_ptr, M, factor, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """(largest product, sum of e^(logit - largest), softmax-weighted keys) of one query, in float64."""
    peak = tl.full([], float("-inf"), tl.float64)
    for start in range(0, M, BLOCK_K):
        z, k, valid = _exact_products(q, k_ptr, start, M, D, BLOCK_K, BLOCK_D)
        peak = tl.maximum(peak, tl.max(tl.where(valid, z, float("-inf")), 0))
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, M, BLOCK_K):
        z, k, valid = _exact_products(q, k_ptr, start, M, D, BLOCK_K, BLOCK_D)
        weight = tl.where(valid, tl.exp2(((z - peak) * factor).to(tl.float32)), 0.0)
        total += tl.sum(weight, 0)
        acc += tl.sum(weight.to(tl.float64)[:, None] * k, 0)
    return peak, total, acc / total.to(tl.float64)


@triton.jit
def _within_reach(logit, LIFT: tl.constexpr):
    """Whether float32 serves for a logit of base 2. A comparison that NaN fails."""
    return tl.abs(logit) < (_REACH_LIFTED if LIFT > 0 else _REACH)


@triton.jit
def _target_key(k_ptr, column_ptr, i, M, d, D: tl.constexpr):
    """(the key at row i's target column, in float32, whether the column exists); never read where it does not."""
    column = tl.load(column_ptr + i)
    valid = (column >= 0) & (column < M)
    k = tl.load(k_ptr + column * D + d, mask=(d < D) & valid, other=0).to(tl.float32)  # narrow: one row
    return k, valid


@triton.jit
def _loss(log_sum, gap_first, gap_second, w_first, w_second, MIXTURE: tl.constexpr):
    """(loss, draw to first, draw to second) of one row, gaps and results in float64; see `losses.loss_of`."""
    if MIXTURE:
        # The gaps are subtracted first: each may be so large that a logarithm added to it leaves no trace.
        both = (w_first > 0.0) & (w_second > 0.0)
        odds = tl.where(both, tl.log(w_first) - tl.log(w_second), 0.0).to(tl.float64) + (gap_second - gap_first)
        small = tl.where(both, tl.exp2(-tl.abs(odds).to(tl.float32) * _LOG2E), 0.0)
        larger, smaller = 1.0 / (1.0 + small), small / (1.0 + small)
        near = tl.minimum(gap_first - tl.log(w_first).to(tl.float64), gap_second - tl.log(w_second).to(tl.float64))
        loss = log_sum.to(tl.float64) + near - tl.log(1.0 + small).to(tl.float64)
        w_first = tl.where(both, tl.where(odds >= 0.0, larger, smaller), (w_first > 0.0).to(tl.float32))
        w_second = tl.where(both, tl.where(odds >= 0.0, smaller, larger), (w_second > 0.0).to(tl.float32))
    else:
        loss = log_sum.to(tl.float64) * (w_first + w_second).to(tl.float64)
        loss += w_first.to(tl.float64) * gap_first + w_second.to(tl.float64) * gap_second
    # No loss is negative; a comparison that keeps NaN.
    return tl.where(loss < 0.0, 0.0, loss), w_first, w_second


@triton.jit(do_not_specialize=["N", "M0", "M1", "M2", "M3", "chunk"])
def info_nce_merge_kernel(
    q_ptr, k0_ptr, k1_ptr, k2_ptr, k3_ptr, first0_ptr, first1_ptr, first2_ptr, first3_ptr, second0_ptr, second1_ptr,
    second2_ptr, second3_ptr, weight0_ptr, weight1_ptr, weight2_ptr, weight3_ptr, peak_ptr, total_ptr, acc_ptr,
    loss_ptr, stats_ptr, dq_ptr, N, M0, M1, M2, M3, chunk, factor, inverse, scale, slope0, slope1, slope2, slope3,
    TERMS: tl.constexpr, D: tl.constexpr, LIFT: tl.constexpr, WITH_DQ: tl.constexpr, ANCHORED: tl.constexpr,
    MIXTURE: tl.constexpr, SUMMED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Loss and dq of one row and key set from its splits; SUMMED: of all key sets, their dq added up.

    factor: log2(e) / temperature; inverse: 1 / temperature. scale: of the losses; slope0 to slope3: of dq.
    dq may be the memory of acc where no key set is split and nothing is added up.
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + i * D + d, mask=d < D, other=0).to(tl.float32)  # narrow: one row
    total_dq = tl.zeros([BLOCK_D], tl.float32)
    begin = 0 if SUMMED else tl.program_id(1)
    for term in range(begin, TERMS if SUMMED else begin + 1):
        M = _pick(term, M0, M1, M2, M3, TERMS)
        k_ptr = _pick(term, k0_ptr, k1_ptr, k2_ptr, k3_ptr, TERMS)
        before = _splits_before(term, chunk, M0, M1, M2, TERMS)
        count = tl.cdiv(M, chunk)
        first_ptr = _pick(term, first0_ptr, first1_ptr, first2_ptr, first3_ptr, TERMS)
        second_ptr = _pick(term, second0_ptr, second1_ptr, second2_ptr, second3_ptr, TERMS)
        k_first, first_valid = _target_key(k_ptr, first_ptr, i, M, d, D)
        k_second, second_valid = _target_key(k_ptr, second_ptr, i, M, d, D)
        weight = tl.load(_pick(term, weight0_ptr, weight1_ptr, weight2_ptr, weight3_ptr, TERMS) + i).to(tl.float32)
        w_first = tl.where(first_valid, weight, 0.0)
        w_second = tl.where(second_valid, 1.0 - weight, 0.0)

        split = tl.arange(0, SPLITS)
        place = (before + split).to(tl.int64) * N + i
        peaks = tl.load(peak_ptr + place, mask=split < count, other=float("-inf"))  # narrow: one number per split
        totals = tl.load(total_ptr + place, mask=split < count, other=0)  # narrow: one number per split
        peak = tl.max(peaks, 0)
        total = tl.sum(tl.where(split < count, totals * tl.exp2(peaks - peak), 0.0), 0)
        attended = tl.zeros([BLOCK_D], tl.float32)
        if WITH_DQ:
            for s in range(0, count):
                at = (before + s).to(tl.int64) * N + i
                share = tl.exp2(tl.load(peak_ptr + at) - peak) / total
                attended += share * tl.load(acc_ptr + at * D + d, mask=d < D, other=0)  # narrow: one row
        total *= 2.0**-LIFT
        top = peak.to(tl.float64)
        if ANCHORED:
            # At least the largest logit, as it is where that was sought: the sum is at most one then. Further out, where
            # a whole number added would leave no trace, it was sought in every split that counts.
            above = tl.where(tl.abs(peak) < 2 * _ANCHOR_REACH, tl.ceil(tl.log2(total)), 0.0)
            total *= tl.exp2(-above)
            top += above

        z_first = tl.sum(q * k_first, 0) * factor
        z_second = tl.sum(q * k_second, 0) * factor
        gap_first = (top - z_first) * _LN2
        gap_second = (top - z_second) * _LN2
        product = top / factor
        # Comparisons that NaN fails; a sum of zeros unless something is not finite.
        usual = _within_reach(peak, LIFT) & (total < _REACH) & (tl.abs(z_first) < _REACH) & (tl.abs(z_second) < _REACH)
        if not (usual & (tl.sum(attended * 0.0, 0) == 0.0)):
            wide = q.to(tl.float64)
            product, total, exact = _exact_row(wide, k_ptr, M, factor, D, BLOCK_K, BLOCK_D)
            attended = exact.to(tl.float32)
            gap_first = (product - tl.sum(wide * k_first.to(tl.float64), 0)) * inverse
            gap_second = (product - tl.sum(wide * k_second.to(tl.float64), 0)) * inverse

        log_sum = tl.log2(total) * _LN2
        loss, at_first, at_second = _loss(log_sum, gap_first, gap_second, w_first, w_second, MIXTURE)
        tl.store(loss_ptr + tl.cast(term, tl.int64) * N + i, (loss * scale).to(tl.float32))
        stat_ptr = stats_ptr + 4 * tl.cast(term, tl.int64) * N + i
        tl.store(stat_ptr, product)
        tl.store(stat_ptr + N, log_sum.to(tl.float64))
        tl.store(stat_ptr + 2 * N, at_first.to(tl.float64))
        tl.store(stat_ptr + 3 * N, at_second.to(tl.float64))
        if WITH_DQ:
            # Halves: two keys can be further apart than the largest finite number.
            drawn = at_first * (0.5 * k_first) + at_second * (0.5 * k_second)
            slope = _pick(term, slope0, slope1, slope2, slope3, TERMS)
            total_dq += (((at_first + at_second) * (0.5 * attended) - drawn) * (2.0 * inverse)) * slope
    if WITH_DQ:
        place = i if SUMMED else tl.cast(begin, tl.int64) * N + i
        tl.store(dq_ptr + place * D + d, total_dq, mask=d < D)  # narrow: one row


@triton.jit(do_not_specialize=["N", "stride_term", "stride_n"])
def info_nce_scale_kernel(
    grad_ptr, dq_ptr, out_ptr, N, stride_term, stride_n, TERMS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_i = sum over key sets of grad_ti * dq_ti."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (row < N)[:, None] & (d < D)[None, :]
    place = row[:, None] * D + d[None, :]
    out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for t in range(0, TERMS):
        grad = tl.load(grad_ptr + t * stride_term + row * stride_n, mask=row < N, other=0)  # narrow: one per row
        dq = tl.load(dq_ptr + place, mask=mask, other=0)
        out += grad[:, None] * dq
        place += N.to(tl.int64) * D
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


# ---- gradient of the keys ----


@triton.jit(do_not_specialize=["N", "stride_n"])
def info_nce_slopes_kernel(
    grad_ptr, stats_ptr, top_ptr, out_ptr, N, stride_n, factor, LIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(N, 4) for the kernel below: each query's largest logit of base 2, what exp2(logit - largest) is multiplied by,
    and what is taken off at its two targets. Gradients are divided by their largest, `top`, and lifted, so that
    float16 can hold them. Rows left to float64 get zeros.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = row < N
    product = tl.load(stats_ptr + row, mask=valid, other=0)
    log_sum = tl.load(stats_ptr + N + row, mask=valid, other=0).to(tl.float32)
    at_first = tl.load(stats_ptr + 2 * N + row, mask=valid, other=0).to(tl.float32)
    at_second = tl.load(stats_ptr + 3 * N + row, mask=valid, other=0).to(tl.float32)
    grad = tl.load(grad_ptr + row * stride_n, mask=valid, other=0).to(tl.float32)  # narrow: any stride
    peak = product * factor
    usual = _within_reach(peak, LIFT)
    grad = tl.where(usual, grad / tl.load(top_ptr) * 2.0**LIFT, 0.0)
    out_ptr += 4 * row
    tl.store(out_ptr, tl.where(usual, peak, 0.0).to(tl.float32), mask=valid)
    # The sum divides here: its logarithm added to a large logit would leave no trace.
    tl.store(out_ptr + 1, grad * (at_first + at_second) * tl.exp2(-log_sum * _LOG2E), mask=valid)
    tl.store(out_ptr + 2, grad * at_first, mask=valid)
    tl.store(out_ptr + 3, grad * at_second, mask=valid)


@triton.jit
def _here(target_ptr, row, count, low, BLOCK_N: tl.constexpr):
    """Each query's target among the keys from `low` on; -1 where it is not there."""
    target = tl.load(target_ptr + row, mask=row < count, other=-1) - low  # narrow: one number per row
    return tl.where((target >= 0) & (target < BLOCK_N), target, -1).to(tl.int32)


@triton.jit
def _any_here(first_ptr, second_ptr, row, count, low, BLOCK_N: tl.constexpr):
    first = _here(first_ptr, row, count, low, BLOCK_N)
    second = _here(second_ptr, row, count, low, BLOCK_N)
    return tl.max(tl.maximum(first, second), 0) >= 0


@triton.jit
def _take_targets(
    acc, q_ptr, first_ptr, second_ptr, slopes_ptr, row, count, low, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc less the queries of this tile, at their targets."""
    d = tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_N)
    valid = row < count
    q = _tile(q_ptr + row.to(tl.int64)[:, None] * D + d[None, :], d, valid, D, BLOCK_D, True)
    first = _here(first_ptr, row, count, low, BLOCK_N)
    second = _here(second_ptr, row, count, low, BLOCK_N)
    at_first = tl.load(slopes_ptr + 4 * row + 2, mask=valid, other=0)  # narrow: one number per row
    at_second = tl.load(slopes_ptr + 4 * row + 3, mask=valid, other=0)  # narrow: one number per row
    drawn = tl.where(place[:, None] == first[None, :], -at_first[None, :], 0.0)
    drawn += tl.where(place[:, None] == second[None, :], -at_second[None, :], 0.0)
    upper = drawn.to(q.dtype)
    acc = tl.dot(upper, q, acc, input_precision="ieee")
    if q.dtype != tl.float32:
        # In two parts, so that the target's share is not rounded to that of a half.
        acc = tl.dot((drawn - upper.to(tl.float32)).to(q.dtype), q, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["N", "M", "chunk"])
def info_nce_keys_kernel(
    q_ptr, k_ptr, first_ptr, second_ptr, slopes_ptr, out_ptr, N, M, chunk, factor, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, SCAN: tl.constexpr,
    SLICE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys against `chunk` queries: the queries added up with the gradients of their logits."""
    split = tl.program_id(1)
    low = tl.program_id(0).to(tl.int64) * BLOCK_N
    start = split.to(tl.int64) * chunk
    count = tl.minimum(chunk, N - start).to(tl.int32)
    q_ptr += start * D
    slopes_ptr += 4 * start
    first_ptr += start
    second_ptr += start
    d = tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_N)
    tile = tl.arange(0, BLOCK_M)
    part = tl.arange(0, 4)
    k_ptr += low * D
    k = _tile(k_ptr + place[:, None] * D + d[None, :], d, low + place < M, D, BLOCK_D, True)
    q_tile = q_ptr + tile[:, None] * D + d[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for block in range(0, count, BLOCK_M):
        row = block + tile
        valid = row < count
        q = _tile(q_tile, d, valid, D, BLOCK_D, True)
        if TOGETHER:
            # A number for each thread: of fewer, Triton 3.6 has every thread copy all that it needs itself, one by one.
            at = slopes_ptr + 4 * row[:, None] + part[None, :]
            four = tl.load(at, mask=valid[:, None], other=0)  # narrow: four numbers per row
            peak = tl.sum(tl.where(part[None, :] == 0, four, 0.0), 1)
            slope = tl.sum(tl.where(part[None, :] == 1, four, 0.0), 1)
        else:
            peak = tl.load(slopes_ptr + 4 * row, mask=valid, other=0)  # narrow: one number per row
            slope = tl.load(slopes_ptr + 4 * row + 1, mask=valid, other=0)  # narrow: one number per row
        q_rows = q_ptr + tl.cast(block, tl.int64) * D
        z = _products(k, q, k_ptr, low + place < M, q_rows, valid, D, BLOCK_N, BLOCK_M, SLICE)
        # Rounded otherwise than in the forward pass, a logit may come out above the largest of its row.
        p = tl.exp2(tl.minimum(tl.fma(z, factor, -peak[None, :]), 0.0)) * slope[None, :]
        acc = tl.dot(p.to(q.dtype), q, acc, input_precision="ieee")
        q_tile += BLOCK_M * D
    # The targets: of the many queries, few have theirs among these keys, mostly side by side.
    for wide in range(0, count, SCAN):
        if _any_here(first_ptr, second_ptr, wide + tl.arange(0, SCAN), count, low, BLOCK_N):
            for block in range(wide, tl.minimum(wide + SCAN, count), BLOCK_T):
                few = block + tl.arange(0, BLOCK_T)
                if _any_here(first_ptr, second_ptr, few, count, low, BLOCK_N):
                    acc = _take_targets(
                        acc, q_ptr, first_ptr, second_ptr, slopes_ptr, few, count, low, D, BLOCK_N, BLOCK_D
                    )
    column = low + place
    out = split.to(tl.int64) * M + column
    tl.store(out_ptr + out[:, None] * D + d[None, :], acc, mask=(column < M)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N", "M", "count", "stride_n"])
def info_nce_sum_kernel(
    q_ptr, k_ptr, first_ptr, second_ptr, grad_ptr, stats_ptr, top_ptr, worst_ptr, parts_ptr, out_ptr, N, M, count,
    stride_n, factor, inverse, scale, D: tl.constexpr, LIFT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one key: its splits added up, and rows out of float32's reach computed in float64."""
    j = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for s in range(0, count):
        place = parts_ptr + (tl.cast(s, tl.int64) * M + j) * D
        acc += tl.load(place + d, mask=d < D, other=0)  # narrow: one row
    out = acc * (tl.load(top_ptr) * 2.0**-LIFT)
    if not _within_reach(tl.load(worst_ptr) * factor, LIFT):
        k = tl.load(k_ptr + j * D + d, mask=d < D, other=0).to(tl.float64)  # narrow: one row
        exact = tl.zeros([BLOCK_D], tl.float64)
        for i in range(0, N):
            row = tl.cast(i, tl.int64)
            product = tl.load(stats_ptr + row)
            if not _within_reach(product * factor, LIFT):
                q = tl.load(q_ptr + row * D + d, mask=d < D, other=0).to(tl.float64)  # narrow: one row
                below = tl.minimum((tl.sum(q * k, 0) - product) * factor, 0.0).to(tl.float32)
                log_sum = tl.load(stats_ptr + N + row).to(tl.float32)
                at_first = tl.load(stats_ptr + 2 * N + row)
                at_second = tl.load(stats_ptr + 3 * N + row)
                slope = tl.exp2(below - log_sum * _LOG2E).to(tl.float64) * (at_first + at_second)
                slope -= tl.where(tl.load(first_ptr + row) == j, at_first, 0.0)
                slope -= tl.where(tl.load(second_ptr + row) == j, at_second, 0.0)
                exact += slope * tl.load(grad_ptr + row * stride_n).to(tl.float64) * q
        out += exact.to(tl.float32)
    out = out * inverse * scale
    tl.store(out_ptr + j * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)  # narrow: one row
