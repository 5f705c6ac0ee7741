"""`mix` as a composition of PyTorch's own operators, for machines without a compiler and GPUs without Triton.

On a CPU the plan can be read, and each row takes what its rule needs: rows that are treated alike go together, as many
as stay in the cache between one operator and the next. On a GPU reading would make the host wait, so there all rows go
through every rule that may occur, and a mask chooses; and so do gradients, on either.

It computes in float32, in float64 where images are float64.
Letters: N rows, M partners, H W pixels of an image, (top, left, height, width) a row's box.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdmp_kernels.ops.mix.arguments import Erasure, Gradients, Norm, Outputs, PlanRows, Upstream
from sdmp_kernels.ops.mix.reference import store
from sdmp_kernels.plan import MixPlan, Rule

# A source pixel lies between at most this many pixels of a box that is not larger than the image: two in exact
# arithmetic, and one more on either side for the rounding of the float32 tap positions.
_CANDIDATES = 4
# Elements that a thread works on at once: with what is made of them on the way, they stay in its second-level cache.
_AT_ONCE = 2**17
# Elements of a batch whose parts are not worth calls of their own.
_FEW = 2**19
# Elements of an image that is sooner copied beside others than resized by a call of its own.
_SMALL = 2**14
# Elements that a pass of masks goes over in the time that a box takes besides its pixels.
_WORTH_CALLS = 2**12
_ALL = slice(None)
# Plain numbers, which are compared for every row of a plan.
_KEEP, _MIXUP, _CUTMIX, _RESIZEMIX = map(int, (Rule.KEEP, Rule.MIXUP, Rule.CUTMIX, Rule.RESIZEMIX))
_KEPT, _BLENDED = (_KEEP,), (_MIXUP,)


class _Rows:
    """The plan as (N, 1, 1, 1) columns, each made when first asked for; rows that copy their pixels have no mark."""

    def __init__(self, plan: PlanRows, images: Tensor, own_partners: bool) -> None:
        self._plan, self._images, self._own_partners = plan, images, own_partners

    @functools.cached_property
    def own_share(self) -> Tensor:
        return _column(self._plan.lam.to(self._images.dtype))

    @functools.cached_property
    def partner_share(self) -> Tensor:
        return 1 - self.own_share

    @functools.cached_property
    def blended(self) -> Tensor:
        """MIXUP rows that are not another's equal."""
        plan = self._plan
        blended = (plan.rule == Rule.MIXUP) & (plan.lam != 1)
        if self._own_partners:
            blended &= plan.partner != torch.arange(len(plan.rule), device=plan.rule.device)
        return _column(blended)

    @functools.cached_property
    def cut(self) -> Tensor:
        """CUTMIX rows."""
        return _column(self._plan.rule == Rule.CUTMIX)

    @functools.cached_property
    def resized(self) -> Tensor:
        """RESIZEMIX rows."""
        return _column(self._plan.rule == Rule.RESIZEMIX)

    @functools.cached_property
    def inside(self) -> Tensor:
        """(N, 1, H, W): in the box, of either kind."""
        top, left, height, width = (side.unsqueeze(1) for side in self._plan.box.unbind(1))
        y, x = (torch.arange(extent, device=top.device) for extent in self._images.shape[2:])
        down, across = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
        return (down[:, :, None] & across[:, None, :])[:, None]


class _Taps(NamedTuple):
    """Where each of an axis' positions looks in the source: two neighbours and their weights, all (N, extent)."""

    first: Tensor
    second: Tensor
    w0: Tensor
    w1: Tensor


def mix(
    images: Tensor,
    partners: Tensor | None,
    plan: PlanRows,
    norm: Norm | None,
    outputs: Outputs,
    erasure: Erasure | None = None,
) -> None:
    """Write the mixed images, erased where that is asked for, and, where they are wanted, the unmixed ones.
    `outputs.mixed` may be `images` itself.
    """
    treatments = _treatments(plan, partners is None) if images.device.type == "cpu" else []
    converts = norm is not None or images.dtype != outputs.mixed.dtype
    if not treatments or (converts and _worth_masks(treatments, plan.rules, images.numel())):
        _mix_masked(images, partners, plan, norm, outputs)
    else:
        _mix_rows(images, partners, plan, norm, outputs, treatments)
    if erasure is not None:
        (_erase_rows if treatments else _erase_masked)(outputs.mixed, erasure)


def mix_plain(images: Tensor, plan: MixPlan, out: Tensor) -> bool:
    """Mix packed images on a CPU by mirrored partners and say so, or do nothing and say that.

    `out` is `images` or has none of its memory; wherever anything is wrong, this says no.
    """
    shape, dtype = images.shape, images.dtype
    if shape != out.shape or dtype != out.dtype or dtype not in _PLAIN or not plan.mirrored or images.ndim != 4:
        return False
    if shape[0] != len(plan) or shape[2:] != plan.size or not images.numel() or images.is_neg() or out.is_neg():
        return False
    begin, other = images.data_ptr(), out.data_ptr()
    if begin != other and abs(begin - other) < images.nbytes:
        return False
    if not images.is_contiguous() or not out.is_contiguous() or (dtype == torch.uint8 and shape[3] <= 4):
        return False
    if plan.rules == (Rule.MIXUP,):
        return _blend_flipped(images, plan.lam, out)
    rows = PlanRows.of(plan)
    _mix_rows(images, None, rows, None, Outputs(out, None), _treatments(rows, True))
    return True


# Where copies are bits, and what `mix` takes.
_PLAIN = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


def _blend_flipped(images: Tensor, lam: Tensor, out: Tensor) -> bool:
    """Every row blended with that of the flip, or false where that is not what is to be done.

    numpy multiplies the flip where it lies, which torch would first copy.
    """
    n = images.shape[0]
    rest = 1 - lam.numpy()
    if images.dtype != torch.float32 or n % 2 or images.numel() > _FEW or np.count_nonzero(rest) != n:
        return False
    given = torch.empty_like(images) if out.data_ptr() == images.data_ptr() else out
    np.multiply(images.numpy().reshape(n, -1)[::-1], rest[:, None], out=given.numpy().reshape(n, -1))
    _blend(given, images, _column(lam), out)
    return True


def _blend(given: Tensor, own: Tensor, share: Tensor, out: Tensor | None = None) -> Tensor:
    """The partner's part plus `share` of one's own: one pass, and where the processor has it, one rounding less.

    torch.lerp, as fast, makes NaN of two infinities, and infinity of two values whose difference is too large.
    """
    return torch.addcmul(given, own, share, out=out)


def _worth_masks(treatments: list[tuple[int, ...]], rules: list[int], elements: int) -> bool:
    """Masks cost a few passes over all pixels, a box by itself the calls of a few operators; they resize slowly."""
    if Rule.CUTMIX not in rules or Rule.RESIZEMIX in rules:
        return False
    return sum(one != other for one, other in itertools.pairwise(treatments)) * _WORTH_CALLS > elements


def _erase_rows(mixed: Tensor, erasure: Erasure) -> None:
    fill = store(erasure.fill, mixed.dtype)
    for i, boxes in enumerate(erasure.boxes.tolist()):
        for top, left, height, width, first in boxes:
            patch = mixed[i, :, top : top + height, left : left + width].permute(1, 2, 0)
            if erasure.per_pixel:
                patch.copy_(fill[first : first + height * width].view(patch.shape))
            elif height * width > 0:
                patch.copy_(fill[first])


def _erase_masked(mixed: Tensor, erasure: Erasure) -> None:
    fill, device = store(erasure.fill, mixed.dtype), mixed.device
    y, x = (torch.arange(extent, device=device) for extent in mixed.shape[2:])
    pixels = mixed.permute(0, 2, 3, 1)
    for box in erasure.boxes.long().unbind(1):
        top, left, height, width, first = (numbers[:, None, None] for numbers in box.unbind(1))
        down, across = y[:, None] - top, x - left
        inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
        row = first + (down * width + across if erasure.per_pixel else 0)
        colours = fill[row.clamp(0, len(fill) - 1)]
        pixels.copy_(torch.where(inside[..., None], colours, pixels))


def _mix_rows(
    images: Tensor,
    partners: Tensor | None,
    plan: PlanRows,
    norm: Norm | None,
    outputs: Outputs,
    treatments: list[tuple[int, ...]],
) -> None:
    work, (mixed, clean) = _work_dtype(images), outputs
    in_place = mixed.data_ptr() == images.data_ptr() and mixed.stride() == images.stride()
    own = images.clone() if in_place else images
    sources = own if partners is None else partners
    share = _column(plan.lam.to(work))
    partner_share = 1 - share

    def finished(pixels: Tensor) -> Tensor:
        if norm is None and pixels.dtype == mixed.dtype:
            return pixels
        return store(_normalise(pixels.to(work), images.dtype, norm), mixed.dtype)

    small = images[0].numel() <= _SMALL

    def called_with(row: int) -> tuple[int, ...]:
        return treatments[row][3:] if small else (row,)

    count = images.shape[0]
    partner = range(count - 1, -1, -1) if plan.mirrored else plan.partner.tolist()
    blended = [treatment == _BLENDED for treatment in treatments]
    most = max(_AT_ONCE * torch.get_num_threads() // own[0].numel(), _FEW // own[0].numel())
    # Of an array a slice costs a tenth of what it does of a tensor.
    copied = _arrays(mixed, sources) if norm is None and mixed.dtype == images.dtype else None
    to: Any = mixed if copied is None else copied[0]
    for rows, blend in _runs(blended, range(count), most):
        if clean is not None:
            clean[rows].copy_(finished(own[rows]))
        if blend:
            given = _partners_of(sources, partner, rows).to(work)
            # Of several rows it is a copy.
            given = torch.mul(given, partner_share[rows], out=given if rows.stop - rows.start > 1 else None)
            target = mixed[rows] if norm is None and mixed.dtype == images.dtype == work else None
            result = _blend(given, own[rows].to(work), share[rows], target)
            if target is None:
                mixed[rows].copy_(finished(result))
            continue
        if not (in_place and norm is None):
            mixed[rows].copy_(finished(own[rows]) if clean is None else clean[rows])
        if Rule.CUTMIX in plan.rules:
            for some, (rule, *box) in _runs(treatments, range(rows.start, rows.stop), count):
                if rule != _CUTMIX:
                    continue
                top, left, height, width = box
                down, across = slice(top, top + height), slice(left, left + width)
                if copied is not None and some.stop - some.start == 1:
                    i = some.start
                    to[i, :, down, across] = copied[1][partner[i], :, down, across]
                else:
                    mixed[some, :, down, across] = finished(_partners_of(sources, partner, some, down, across))
        if Rule.RESIZEMIX in plan.rules:
            resized = sorted(
                (i for i in range(rows.start, rows.stop) if treatments[i][0] == _RESIZEMIX), key=called_with
            )
            for _, some_rows in itertools.groupby(resized, key=called_with):
                alike = list(some_rows)  # whose boxes have one size: they are resized by one call
                size = treatments[alike[0]][3:]
                patches: Any = finished(_resized(sources, copied, [partner[i] for i in alike], size, work))
                for i, patch in zip(alike, patches if copied is None else patches.numpy(), strict=True):
                    _, top, left, height, width = treatments[i]
                    to[i, :, top : top + height, left : left + width] = patch
                del patches, patch  # so that the next ones take the memory that is in the cache


def _resized(
    sources: Tensor, copied: list[np.ndarray] | None, rows: list[int], size: tuple[int, ...], work: torch.dtype
) -> Tensor:
    """(R, C, height, width): some images, which one alone is not copied for, resized to boxes of one size."""
    if len(rows) == 1:
        others = sources[rows[0] : rows[0] + 1]
    else:
        others = sources[rows] if copied is None else torch.from_numpy(copied[1][rows])
    return torch._C._nn.upsample_bilinear2d(others.to(work), size, False, None, None)


def _arrays(*tensors: Tensor) -> list[np.ndarray] | None:
    """The tensors as arrays over their memory; None where numpy knows no such numbers, or memory has others."""
    if any(tensor.is_neg() or tensor.dtype == torch.bfloat16 for tensor in tensors):
        return None
    return [tensor.detach().numpy() for tensor in tensors]


def _treatments(plan: PlanRows, own_partners: bool) -> list[tuple[int, ...]]:
    """For every row its rule, KEEP where that leaves nothing to do, and of CUTMIX and RESIZEMIX the box."""
    # What most batches are, without a look at every row.
    pairs = plan.mirrored and not (own_partners and len(plan.rule) % 2)
    if pairs and plan.rules == [_MIXUP] and len(plan.lam) and float(plan.lam.max()) < 1:
        return [_BLENDED] * len(plan.rule)
    found: list[tuple[int, ...]] = []
    for i, (rule, j, lam, box) in enumerate(zip(*(column.tolist() for column in plan[:4]), strict=True)):
        if rule == _MIXUP:
            copied = lam == 1 or (own_partners and i == j)
            found.append(_KEPT if copied else _BLENDED)
        elif rule == _KEEP or box[2] * box[3] == 0:
            found.append(_KEPT)
        else:
            found.append((rule, *box))
    return found


def _runs(keys: list[Any], rows: range, most: int) -> Iterator[tuple[slice, Any]]:
    """The rows cut into runs of equal keys, of at most `most` rows or of one, with their keys."""
    if keys.count(keys[rows.start]) == len(keys):
        for start in range(rows.start, rows.stop, max(most, 1)):
            yield slice(start, min(start + max(most, 1), rows.stop)), keys[start]
        return
    start = rows.start
    for row in rows:
        if row + 1 == rows.stop or keys[row + 1] != keys[start] or row + 1 - start >= most:
            yield slice(start, row + 1), keys[start]
            start = row + 1


def _partners_of(
    sources: Tensor, partner: Sequence[int], rows: slice, down: slice = _ALL, across: slice = _ALL
) -> Tensor:
    """A part of the images of the rows' partners; without a copy for a row alone."""
    j = partner[rows]
    if len(j) == 1:
        return sources[j[0] : j[0] + 1, :, down, across]
    if isinstance(j, range):
        return sources[j[-1] : j[0] + 1, :, down, across].flip(0)
    return sources[:, :, down, across][j]


def _mix_masked(images: Tensor, partners: Tensor | None, plan: PlanRows, norm: Norm | None, outputs: Outputs) -> None:
    own = images.to(_work_dtype(images))
    others = _taken(own if partners is None else partners, plan).to(own.dtype)
    rows = _Rows(plan, own, partners is None)
    if outputs.clean is not None:
        outputs.clean.copy_(store(_normalise(own, images.dtype, norm), outputs.clean.dtype))
    rules = [rule for rule in (Rule.MIXUP, Rule.CUTMIX, Rule.RESIZEMIX) if rule in plan.rules]
    finished = bool(rules) and norm is None and outputs.mixed.dtype == images.dtype == own.dtype
    pixels = own
    for rule in rules:
        out = outputs.mixed if finished and rule == rules[-1] else None
        if rule == Rule.MIXUP:
            blend = _blend(rows.partner_share * others, own, rows.own_share)
            pixels = torch.where(rows.blended, blend, pixels, out=out)
        elif rule == Rule.CUTMIX:
            pixels = torch.where(rows.cut & rows.inside, others, pixels, out=out)
        else:
            pixels = torch.where(rows.resized & rows.inside, _resize(others, plan.box), pixels, out=out)
    if not finished:
        outputs.mixed.copy_(store(_normalise(pixels, images.dtype, norm), outputs.mixed.dtype))


def mix_backward(upstream: Upstream, plan: PlanRows, std: list[float] | None, gradients: Gradients) -> None:
    """Write the gradients of float images, and of `partners` where they were given: the transpose of `mix`."""
    work = _work_dtype(gradients.images)
    own = torch.zeros_like(gradients.images, dtype=work)
    others = None if gradients.partners is None else torch.zeros_like(gradients.partners, dtype=work)
    if upstream.clean is not None:
        own = own + _denormalise(upstream.clean.to(work), std)
    if upstream.mixed is not None:
        grads = _denormalise(upstream.mixed.to(work), std)
        rows = _Rows(plan, grads, gradients.partners is None)
        to_own, to_others = _split(grads, rows, plan)
        own = own + to_own
        if others is None:
            own = _give(own, to_others, plan)
        else:
            others = _give(others, to_others, plan)
    gradients.images.copy_(own)
    if gradients.partners is not None and others is not None:
        gradients.partners.copy_(others)


def _work_dtype(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def _normalise(pixels: Tensor, source: torch.dtype, norm: Norm | None) -> Tensor:
    if norm is None:
        return pixels
    unit = pixels / 255 if source == torch.uint8 else pixels
    return (unit - _channels(norm.mean, pixels)).div_(_channels(norm.std, pixels))


def _denormalise(grads: Tensor, std: list[float] | None) -> Tensor:
    return grads if std is None else grads / _channels(std, grads)


def _channels(values: list[float], like: Tensor) -> Tensor:
    """(C, 1, 1), filled on the device: copying a list to a GPU would wait for it."""
    filled = [torch.full((1, 1, 1), value, dtype=like.dtype, device=like.device) for value in values]
    return torch.cat(filled)


def _taken(images: Tensor, plan: PlanRows) -> Tensor:
    """(N, C, H, W): every row's partner."""
    return images.flip(0) if plan.mirrored else images[plan.partner.clamp(0, images.shape[0] - 1)]


def _give(images: Tensor, grads: Tensor, plan: PlanRows) -> Tensor:
    """`images` plus the gradients of the rows that took each of them; deterministic on every device."""
    if plan.mirrored:
        return images + grads.flip(0)
    index = plan.partner.clamp(0, images.shape[0] - 1)
    if images.is_cuda:  # sorts the index; index_add_ would use atomics there
        return images.index_put((index,), grads, accumulate=True)
    return images.index_add(0, index, grads)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _taps(start: Tensor, target: Tensor, extent: int, dtype: torch.dtype) -> _Taps:
    """The taps of an axis of boxes: bilinear, align_corners=False, as `torch.nn.functional.interpolate` has them.

    Positions are those of the image; outside the box the taps mean nothing but lie within the image.
    """
    start, target = start.unsqueeze(1), target.unsqueeze(1).clamp(min=1)
    position = torch.arange(extent, device=start.device) - start
    # A quotient of tensors: a number over a tensor would be computed by way of its reciprocal.
    scale = torch.full((), extent, dtype=dtype, device=start.device) / target.to(dtype)
    # torch's kernels round this once (fused multiply-add); in float64 the product of two float32 is exact.
    source = (scale.to(torch.float64) * (position + 0.5) - 0.5).to(dtype).clamp(min=0)
    first = source.floor().clamp(max=extent - 1)
    w1 = (source - first).clamp(max=1)
    second = (first + 1).clamp(max=extent - 1)
    same = target == extent
    here = position.clamp(0, extent - 1)
    first = torch.where(same, here, first.to(torch.int64))
    second = torch.where(same, here, second.to(torch.int64))
    w1 = torch.where(same, 0.0, w1)
    return _Taps(first, second, 1 - w1, w1)


def _resize(images: Tensor, box: Tensor) -> Tensor:
    """(N, C, H, W): at the positions of a row's box, its image resized to the box: rows first, then columns."""
    top, left, height, width = box.unbind(1)
    y = _taps(top, height, images.shape[2], images.dtype)
    x = _taps(left, width, images.shape[3], images.dtype)
    down = y.w0[:, None, :, None] * _pick(images, y.first, 2) + y.w1[:, None, :, None] * _pick(images, y.second, 2)
    return x.w0[:, None, None, :] * _pick(down, x.first, 3) + x.w1[:, None, None, :] * _pick(down, x.second, 3)


def _pick(images: Tensor, index: Tensor, axis: int) -> Tensor:
    """(N, C, H, W): along `axis`, every row's own choice of positions, (N, extent of the axis)."""
    shape = (index.shape[0], 1, -1, 1) if axis == 2 else (index.shape[0], 1, 1, -1)
    return images.gather(axis, index.view(shape).expand(images.shape))


def _split(grads: Tensor, rows: _Rows, plan: PlanRows) -> tuple[Tensor, Tensor]:
    """The gradient of every mixed image to its own pixels and to its partner's."""
    to_own, to_others = grads, torch.zeros_like(grads)
    if Rule.MIXUP in plan.rules:
        to_own = torch.where(rows.blended, rows.own_share * grads, to_own)
        to_others = torch.where(rows.blended, rows.partner_share * grads, to_others)
    if Rule.CUTMIX in plan.rules or Rule.RESIZEMIX in plan.rules:
        to_own = torch.where((rows.cut | rows.resized) & rows.inside, 0.0, to_own)
    if Rule.CUTMIX in plan.rules:
        to_others = torch.where(rows.cut & rows.inside, grads, to_others)
    if Rule.RESIZEMIX in plan.rules:
        pasted = torch.where(rows.resized & rows.inside, grads, 0.0)
        to_others = torch.where(rows.resized, _spread(pasted, plan.box), to_others)
    return to_own, to_others


def _spread(grads: Tensor, box: Tensor) -> Tensor:
    """The transpose of `_resize`, gathered: every source pixel adds up what the few box pixels around it give."""
    top, left, height, width = box.unbind(1)
    across = _collect(grads, _taps(left, width, grads.shape[3], grads.dtype), left, width, 3)
    return _collect(across, _taps(top, height, grads.shape[2], grads.dtype), top, height, 2)


def _collect(grads: Tensor, taps: _Taps, start: Tensor, target: Tensor, axis: int) -> Tensor:
    extent = grads.shape[axis]
    start, end = start.unsqueeze(1), (start + target).unsqueeze(1)
    here = torch.arange(extent, device=grads.device).expand(len(start), -1).contiguous()
    # Taps ascend within the box. With those before it below, and those behind it above every pixel, all ascend.
    first = torch.where(here < start, -2, torch.where(here >= end, extent, taps.first))
    begin = torch.searchsorted(first, here - 1)
    total = torch.zeros_like(grads)
    for k in range(_CANDIDATES):
        at = (begin + k).clamp(max=extent - 1)
        within = (begin + k < extent) & (at >= start) & (at < end)
        for tap, weight in ((taps.first, taps.w0), (taps.second, taps.w1)):
            hit = within & (tap.gather(1, at) == here)
            shape = (len(start), 1, -1, 1) if axis == 2 else (len(start), 1, 1, -1)
            given = weight.gather(1, at).view(shape) * _pick(grads, at, axis)
            total = total + torch.where(hit.view(shape), given, 0.0)
    return total
