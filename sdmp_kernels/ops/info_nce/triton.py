"""`info_nce` on a GPU: flash attention whose output is the loss's own gradient.

For logits z = q k^T / T, d lse / dq = softmax(z) k / T: with keys held fixed, loss and gradient come out of one pass
over the keys, in 4 N M D operations, and no logit is stored. Six kernels:

attend  one tile of queries against one split of one key set: running maximum and sum, and softmax-weighted keys. The
        key axis is split so that small batches fill the chip; several key sets are further splits of one launch.
        Where a program takes many keys, weights are relative to the largest logit of the first few of them, not to a
        running maximum: nothing is scaled down on the way. A second launch does again the tiles whose sums that
        takes out of reach, and is over at once where there are none.
merge   one row: its splits put together in a fixed order, the dot products with its two target keys, loss and dq;
        where one weighted sum of the losses is wanted, of all key sets.
scale   dq times the upstream gradients, added over the key sets.
slopes  where keys need their gradient: what of each query it takes, a few numbers.
keys    one tile of keys against one split of the queries, logits recomputed.
sum     the splits of the kernel above put together.

Exponentials are of base 2, with log2(e) / T folded into one factor. Half inputs are multiplied by tensor cores and
added up in float32; float32 inputs are multiplied in full precision. Where a product of finite inputs is out of
float32's reach, merge and sum compute that row anew in float64; no other row pays for it.

Floors (N = M = 32,768, D = 256, bf16, an H200 multiplying at 790 TFLOP/s): loss and dq 1.10 TFLOP, 1.39 ms; with the
gradient of the keys 2.20 TFLOP, 2.78 ms.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from sdmp_kernels import _launch
from sdmp_kernels._launch import Call, Compile
from sdmp_kernels.ops.info_nce.arguments import KeySet, Problem
from sdmp_kernels.ops.info_nce.triton_kernels import (
    info_nce_attend_kernel,
    info_nce_keys_kernel,
    info_nce_merge_kernel,
    info_nce_scale_kernel,
    info_nce_slopes_kernel,
    info_nce_sum_kernel,
)

KERNELS = (
    "info_nce_attend_kernel",
    "info_nce_merge_kernel",
    "info_nce_scale_kernel",
    "info_nce_slopes_kernel",
    "info_nce_keys_kernel",
    "info_nce_sum_kernel",
)
# Key sets of one launch; longer lists take several.
_TERMS = 4
_MOST_SPLITS = 64
# Where no GPU says how many programs it runs at once (the interpreter).
_INTERPRETED_SLOTS = 6


def forward(problem: Problem, need_dq: bool, need_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (T, N), stats (T, 4, N), dq) as `reference.forward`: two or three launches for up to four key sets."""
    q, terms = problem.q, len(problem.sets)
    arch, slots = _launch.architecture(q.device), _slots(q.device)
    sets = [KeySet(*(t.contiguous() for t in keys[:4]), *keys[4:]) for keys in problem.sets]
    problem = problem._replace(q=q.contiguous(), sets=sets)
    groups = range(0, terms, _TERMS)
    loss = q.new_empty((terms, len(q)), dtype=torch.float32)
    stats = q.new_empty((terms, 4, len(q)), dtype=torch.float64)
    # Where the gradients are added up, each launch adds up its own.
    count = len(groups) if problem.summed else terms
    dq = q.new_empty((count, *q.shape) if need_dq else (0,), dtype=torch.float32)
    for g, t in enumerate(groups):
        group = slice(t, t + _TERMS)
        out = (loss[group], stats[group], dq[slice(g, g + 1) if problem.summed else group] if need_dq else dq)
        for call in forward_calls(arch, slots, problem._replace(sets=sets[group]), need_dq, *out):
            call.launch(q.device)
    if need_dq and problem.summed and count > 1:
        dq = dq.sum(dim=0, keepdim=True)
    return loss, stats if need_stats else stats.new_empty(0), dq


def backward(
    problem: Problem, grad: Tensor, stats: Tensor, dq: Tensor, need_q: bool, need_k: list[bool]
) -> tuple[Tensor, list[Tensor]]:
    """(dq (N, D), [dk_t (M_t, D)]) as `reference.backward`."""
    q = problem.q
    arch, slots = _launch.architecture(q.device), _slots(q.device)
    total = q.new_empty(q.shape if need_q else 0)
    if need_q:
        scale_call(arch, grad, dq, total).launch(q.device)
    q = q.contiguous()
    dks = []
    for t, (keys, slope) in enumerate(zip(problem.sets, problem.slopes, strict=True)):
        k = keys.k
        dks.append(k.new_empty(k.shape if need_k[t] else 0))
        if need_k[t]:
            target = (keys.first.contiguous(), keys.second.contiguous())
            options = (stats[t], problem.temperature, slope, dks[t])
            given = grad[0 if problem.summed else t]
            for call in keys_calls(arch, slots, given, q, k.contiguous(), *target, *options):
                call.launch(q.device)
    return total, dks


def forward_calls(
    arch: str, slots: int, problem: Problem, need_dq: bool, loss: Tensor, stats: Tensor, dq: Tensor
) -> tuple[Call, ...]:
    """The launches of attend (a second one where the first is anchored) and merge for up to four key sets."""
    q, keys, temperature = problem.q, [keys.k for keys in problem.sets], problem.temperature
    n, width = q.shape
    terms, sizes = len(keys), tuple(len(k) for k in keys)
    given = _constants(arch, "attend" if need_dq else "lse", q)
    tiles = triton.cdiv(n, given["block_m"])
    chunk = _chunk(tiles, sizes, given["block_n"], slots * given["programs"])
    splits = sum(triton.cdiv(m, chunk) for m in sizes)
    peak, total = q.new_empty((2, splits, n), dtype=torch.float32)
    acc = q.new_empty((splits, *q.shape), dtype=torch.float32) if need_dq and splits > len(dq) else dq
    # Float16 has no room for weights above one.
    anchored = 0 < given["anchor"] <= chunk and _lift(q) == 0
    shapes = {"TERMS": terms, "D": width, "LIFT": _lift(q), "WITH_DQ": need_dq, "BLOCK_D": _padded(width)}
    blocks = {"PEEL": given["peel"], "BLOCK_M": given["block_m"], "BLOCK_N": given["block_n"]}
    blocks |= {"SLICE": given["slice"]}
    numbers = (n, *_four(sizes), chunk)
    args = (q, *_four(keys), peak, total, acc, *numbers, _factor(temperature))
    warps = (given["num_warps"], given["num_stages"])
    passes = [(True, False), (False, True)] if anchored else [(False, False)]
    attends = [
        Call(
            info_nce_attend_kernel,
            (tiles, splits),
            args,
            *warps,
            {**shapes, "ANCHORED": relative, "ONLY_LOST": again, **blocks},
        )
        for relative, again in passes
    ]
    targets = [t for i in (1, 2, 3) for t in _four([keys[i] for keys in problem.sets])]
    args = (q, *_four(keys), *targets, peak, total, acc, loss, stats, dq, *numbers, _factor(temperature))
    most = triton.next_power_of_2(max(triton.cdiv(m, chunk) for m in sizes))
    exact = {"ANCHORED": anchored, "MIXTURE": problem.form == "log_mixture", "SUMMED": problem.summed}
    exact |= {"SPLITS": most, "BLOCK_K": 2}
    args = (*args, 1 / temperature, problem.scale, *_four(problem.slopes))
    grid = (n, 1 if problem.summed else terms)
    merge = Call(info_nce_merge_kernel, grid, args, 1, 1, {**shapes, **exact})
    return *attends, merge


def scale_call(arch: str, grad: Tensor, dq: Tensor, out: Tensor) -> Call:
    """The launch of scale."""
    n, width = out.shape
    block_d = _padded(width)
    given = _launch.constants(arch, "info_nce.scale.any")
    block_n = max(1, given["elements"] // block_d)
    constants = {"TERMS": len(dq), "D": width, "BLOCK_N": block_n, "BLOCK_D": block_d}
    args = (grad, dq, out, n, grad.stride(0), grad.stride(1))
    return Call(info_nce_scale_kernel, (triton.cdiv(n, block_n),), args, given["num_warps"], 1, constants)


def keys_calls(
    arch: str,
    slots: int,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    first: Tensor,
    second: Tensor,
    stats: Tensor,
    temperature: float,
    scale: float,
    out: Tensor,
) -> tuple[Call, Call, Call]:
    """The launches of slopes, keys and sum for one key set."""
    (n, width), m = q.shape, len(k)
    given = _constants(arch, "keys", q)
    tiles = triton.cdiv(m, given["block_n"])
    chunk = _chunk(tiles, (n,), given["block_m"], slots * given["programs"])
    splits = triton.cdiv(n, chunk)
    parts = q.new_empty((splits, m, width), dtype=torch.float32)
    # Only float16 is too narrow for the gradients as they come.
    top = grad.abs().amax().clamp_min(1e-38) if q.dtype == torch.float16 else torch.ones_like(grad[0])
    worst = stats[0].abs().amax()
    slopes = q.new_empty((n, 4), dtype=torch.float32)
    lift, factor = {"LIFT": _lift(q)}, _factor(temperature)
    args = (grad, stats, top, slopes, n, grad.stride(0), factor)
    prepare = Call(info_nce_slopes_kernel, (triton.cdiv(n, 256),), args, 4, 1, {**lift, "BLOCK": 256})
    shapes = {"D": width, "BLOCK_D": _padded(width)}
    blocks = {
        "BLOCK_M": given["block_m"],
        "BLOCK_N": given["block_n"],
        "BLOCK_T": 32,
        "SCAN": 1024,
        "SLICE": given["slice"],
        "TOGETHER": given["together"],
    }
    args = (q, k, first, second, slopes, parts, n, m, chunk, factor)
    warps = (given["num_warps"], given["num_stages"])
    keys = Call(info_nce_keys_kernel, (tiles, splits), args, *warps, {**shapes, **blocks})
    args = (q, k, first, second, grad, stats, top, worst, parts, out, n, m, splits, grad.stride(0))
    args = (*args, factor, 1 / temperature, scale)
    return prepare, keys, Call(info_nce_sum_kernel, (m,), args, 1, 1, {**shapes, **lift})


def _constants(arch: str, kernel: str, q: Tensor) -> dict[str, Any]:
    kind = "single" if q.dtype == torch.float32 else "half"
    return _launch.constants(arch, f"info_nce.{kernel}.{kind}.{max(64, _padded(q.shape[1]))}")


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _lift(q: Tensor) -> float:
    return 15.0 if q.dtype == torch.float16 else 0.0


def _factor(temperature: float) -> float:
    return math.log2(math.e) / temperature


def _four(items: Sequence[Any]) -> tuple[Any, ...]:
    """Up to four arguments, filled up with the last."""
    return (*items, *[items[-1]] * (_TERMS - len(items)))


@functools.cache
def _slots(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return _INTERPRETED_SLOTS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(4096)
def _chunk(tiles: int, sizes: tuple[int, ...], block: int, slots: int) -> int:
    """How many columns a program takes, a multiple of `block`: as many splits as make the last wave of programs end
    soonest when `slots` run at a time.
    """
    blocks = [triton.cdiv(m, block) for m in sizes]
    best = (math.inf, 0)
    for splits in range(1, min(_MOST_SPLITS, max(blocks)) + 1):
        each = triton.cdiv(max(blocks), splits)
        programs = tiles * sum(triton.cdiv(b, each) for b in blocks)
        # A program's start and end cost about two blocks; more splits are more to merge.
        cost = triton.cdiv(programs, slots) * (each + 2) + 0.05 * splits
        best = min(best, (cost, each))
    return best[1] * block


def alternatives(arch: str) -> dict[str, list[dict[str, Any]]]:
    """Constants that differ from the launch table's in several at once, for `python -m bench tune` to try."""
    if arch != "sm_90":
        return {}
    # A program's softmax and its products take turns: of two programs on a multiprocessor, one can do the other.
    return {"info_nce.attend.half.256": [{"block_m": 64, "num_warps": 4, "num_stages": 2, "programs": 2}]}


def compiles(arch: str) -> list[Compile]:
    """Every tile of the launch tables; the small kernels once for each of the things that change them."""
    f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    found = []
    for dtype, width in [*((t, d) for t in (bf16, f32) for d in (64, 128, 256)), (f16, 256)]:
        made = _Meta(arch, dtype, width)
        found += [*made.attend(), *made.attend(need_dq=False), made.keys()]
    found += [*_Meta(arch, bf16, 256, terms=2).attend(), *_Meta(arch, bf16, 192, terms=4).attend()]
    table = {**_launch.table(_launch.DEFAULT_ARCH), **_launch.table(arch)}
    for key, others in alternatives(arch).items():
        for other in others:
            with _launch.table_in_force({**table, key: {**table[key], **other}}):
                found += _Meta(arch, bf16, int(key.rsplit(".", 1)[1])).attend(words=" otherwise")
    found.append(_Meta(arch, bf16, 256, terms=3, summed=True).merge())
    small = (_Meta(arch, bf16, 256), _Meta(arch, f32, 64), _Meta(arch, f16, 192, terms=4, form="log_mixture"))
    for made in small:
        found += [made.merge(), made.scale()]
    for made in small[:2]:
        found += [made.slopes(), made.sum()]
    return [*found, small[0].merge(need_dq=False), small[0].merge(rows=_MANY)]


# Rows and keys of what is compiled ahead of time: few, and so many that each program takes thousands.
_ROWS, _MANY = 4096, 65536


class _Meta:
    """Launches for tensors that have shapes and no memory."""

    def __init__(
        self, arch: str, dtype: torch.dtype, width: int, terms: int = 1, form: str = "ce", summed: bool = False
    ) -> None:
        self.arch, self.terms, self.form, self.summed = arch, terms, form, summed
        self.name = f"{str(dtype)[6:]} {width}" + (f" of {terms}" if terms > 1 else "") + (" summed" if summed else "")
        self.dtype, self.width = dtype, width
        self.cores = ("tensor_cores", "warpgroup_mma") if dtype != torch.float32 else ()

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def _forward(self, need_dq: bool, rows: int = _ROWS) -> tuple[Call, ...]:
        q, column = self._empty(rows, self.width, dtype=self.dtype), self._empty(rows, dtype=torch.int64)
        loss, stats = self._empty(self.terms, rows), self._empty(self.terms, 4, rows, dtype=torch.float64)
        dq = self._empty(1 if self.summed else self.terms, rows, self.width)
        sets = [KeySet(q, column, column, loss[0], None, 1.0)] * self.terms
        problem = Problem(q, sets, 0.2, self.form, 1.0, self.summed)
        return forward_calls(self.arch, 108, problem, need_dq, loss, stats, dq)

    def _keys(self) -> tuple[Call, Call, Call]:
        q, column = self._empty(_ROWS, self.width, dtype=self.dtype), self._empty(_ROWS, dtype=torch.int64)
        stats = self._empty(4, _ROWS, dtype=torch.float64)
        return keys_calls(self.arch, 108, self._empty(_ROWS), q, q, column, column, stats, 0.2, 1.0, q)

    def attend(self, need_dq: bool = True, words: str = "") -> list[Compile]:
        """What few keys are launched with; and many, where that differs."""
        name = f"info_nce {'attend' if need_dq else 'lse'} {self.name}{words}"
        # Without dq there is one number per row to store.
        facts = ("no_spills", "wide_loads", *self.cores, *(("wide_stores",) if need_dq else ()))
        few, many = self._forward(need_dq)[:-1], self._forward(need_dq, _MANY)[:-1]
        made = [few[0].compilation(name, facts)]
        if len(many) > len(few):
            # With what scales down on the way, its loop is one of 450.
            short = ("loop<=300",) if (self.arch, self.width, need_dq) == ("sm_90", 256, True) else ()
            made.append(many[0].compilation(f"{name} anchored", (*facts, *short)))
        if len(many) > len(few) and self.width == 256 and self.terms == 1:
            made.append(many[1].compilation(f"{name} lost", facts))
        return made

    def merge(self, need_dq: bool = True, rows: int = _ROWS) -> Compile:
        name = f"info_nce merge {self.name} {self.form}" + ("" if need_dq else " lse")
        name += " many" if rows == _MANY else ""
        return self._forward(need_dq, rows)[-1].compilation(name, ("no_spills",))

    def scale(self) -> Compile:
        dq = self._empty(self.terms, _ROWS, self.width)
        out = self._empty(_ROWS, self.width, dtype=self.dtype)
        call = scale_call(self.arch, self._empty(self.terms, _ROWS), dq, out)
        return call.compilation(f"info_nce scale {self.name}", ("no_spills", "wide_loads", "wide_stores"))

    def slopes(self) -> Compile:
        return self._keys()[0].compilation(f"info_nce slopes {self.name}", ("no_spills",))

    def keys(self) -> Compile:
        facts = ("no_spills", "wide_loads", "wide_stores", *self.cores)
        # Where each thread copied the numbers of its rows one by one, loops of 506, 427 and 726.
        short = {256: 400, 128: 360, 64: 500} if self.arch == "sm_90" and self.dtype == torch.bfloat16 else {}
        facts += (f"loop<={short[self.width]}",) if self.width in short else ()
        return self._keys()[1].compilation(f"info_nce keys {self.name}", facts)

    def sum(self) -> Compile:
        return self._keys()[2].compilation(f"info_nce sum {self.name}", ("no_spills",))
