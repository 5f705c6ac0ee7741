"""Per-sample Mixup, CutMix and ResizeMix of a batch in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sdmp_kernels._checks import check_channels_first, check_number, check_same_device, check_tensor, readable
from sdmp_kernels.ops.mix import op
from sdmp_kernels.ops.mix.arguments import Erasure, PlanRows
from sdmp_kernels.plan import MixPlan

_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


SMALLEST_STD = 1e-30
"""Of `std`: 1 / std is then still a number, in float32."""


def mix(
    images: Tensor,
    plan: MixPlan,
    *,
    partners: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
    erase: Erasure | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix every image with its partner as `plan` says, and normalise and erase in the same pass.

    MIXUP: lam * x_i + (1 - lam) * x_partner (paper Eq. 1). CUTMIX: inside the box the partner's pixels at the same
    place. RESIZEMIX: inside the box the partner's whole image resized to the box, bilinear without antialias, as
    `torch.nn.functional.interpolate(align_corners=False)` (paper Eq. 2). Arithmetic is float32, rounded once at the
    store (uint8: to nearest, ties to even). Copied pixels, and rows with KEEP, lam = 1, an empty box or themselves as
    Mixup partner, come out bit for bit, whatever the other source holds.

    Args:
        images: (N, C, H, W) uint8, float16, bfloat16 or float32, any strides (the reference also float64), with
            (H, W) = `plan.size`. Differentiable where floating.
        plan: what is mixed with what; on the device of `images`.
        partners: (M, C, H, W) of the dtype of `images`: the images that `plan.partner` indexes; default `images`.
        mean, std: C values each, on the 0 to 1 scale, given together: the result is (x - mean) / std, where uint8
            is divided by 255 first and float input is taken as 0 to 1.
        dtype: of the result; default that of `images`, or float32 for uint8 with mean and std. Without mean and std
            values are only cast.
        clean: also return the unmixed images (normalised alike), from the same read.
        erase: boxes of the mixed images that are filled at the end, as random erasing does (`Erasure`; on the device
            of `images`). No gradient comes through them. The unmixed images of `clean` are not erased.
        out: an existing tensor for the result, or with `clean=True` a pair (clean, mixed). `out=images` works in
            place. Not differentiable.

    Returns:
        The mixed images, in the memory layout of `images`; with `clean=True` the pair (clean, mixed).

    Raises:
        TypeError, ValueError: before anything is launched, naming the argument, what came and what was expected.
            Row numbers on a GPU are not read back: one out of range is clamped, never read out of bounds.
    """
    if partners is mean is std is dtype is erase is None and clean is False:
        mixed = op.mix_plain(images, plan, out)
        if mixed is not None:
            return mixed
    check_tensor("images", images, dtypes=_DTYPES, ndim=4, shape="(N, C, H, W)")
    check_channels_first("images", images)
    if not isinstance(clean, bool):
        raise TypeError(f"clean must be True or False, got {type(clean).__name__}")
    _check_plan(images, plan, partners)
    scale = _check_normalisation(images, mean, std)
    result = _result_dtype(images, scale is not None, dtype, out, clean)
    mean_, std_ = scale if scale is not None else (None, None)
    args = (*PlanRows.of(plan), mean_, std_)
    erased = (None, None, False) if erase is None else _check_erasure(images, erase)
    if out is None:
        mixed, kept = torch.ops.sdmp.mix(images, partners, *args, result, clean, *erased)
        return (kept, mixed) if clean else mixed
    kept_out, mixed_out = _check_out(images, partners, out, clean, result)
    if mixed_out is images or (_is_real(images) and op.same_memory(mixed_out, images)):
        torch.ops.sdmp.mix_(images, partners, *args, kept_out, *erased)
    else:
        torch.ops.sdmp.mix_out(images, partners, *args, mixed_out, kept_out, *erased)
    return (kept_out, mixed_out) if kept_out is not None else mixed_out


def _is_real(tensor: Tensor) -> bool:
    """Whether the tensor has an address to compare: not a fake one, and not while compiling."""
    return not torch.compiler.is_compiling() and not torch._subclasses.fake_tensor.is_fake(tensor)


def _check_plan(images: Tensor, plan: MixPlan, partners: Tensor | None) -> None:
    """Raise where plan, images (N, C, H, W) and partners (M, C, H, W) do not fit together."""
    if not isinstance(plan, MixPlan):
        raise TypeError(f"plan must be a MixPlan, got {type(plan).__name__}; draw one with draw_plan")
    if len(plan) != images.shape[0]:
        raise ValueError(
            f"plan has {len(plan)} rows but images {images.shape[0]}; draw the plan with n={images.shape[0]}"
        )
    if plan.size != tuple(images.shape[2:]):
        check_channels_first("images", images, plan.size)
        raise ValueError(
            f"plan.size is {plan.size} but images are {tuple(images.shape[2:])}; draw the plan with "
            f"size={tuple(images.shape[2:])}"
        )
    if plan.device != images.device:
        raise ValueError(f"plan is on {plan.device} but images are on {images.device}; use plan.to(images.device)")
    if partners is not None:
        check_tensor("partners", partners, dtypes=(images.dtype,), ndim=4, shape="(M, C, H, W)")
        if partners.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"partners must have shape (M, {', '.join(map(str, images.shape[1:]))}), got {tuple(partners.shape)}"
            )
        check_same_device(images=images, partners=partners)
        if plan.mirrored and partners.shape[0] != images.shape[0]:
            raise ValueError(f"plan is mirrored, so partners must have {images.shape[0]} rows, got {partners.shape[0]}")
    rows = (images if partners is None else partners).shape[0]
    if not plan.mirrored and len(plan) and readable(plan.partner) and int(plan.partner.max()) >= rows:
        raise ValueError(f"plan.partner holds row {int(plan.partner.max())}, but there are only {rows} partners")


def _check_erasure(images: Tensor, erase: Erasure) -> Erasure:
    """`erase`; raises where it does not fit the images."""
    if not isinstance(erase, Erasure):
        raise TypeError(f"erase must be an Erasure, got {type(erase).__name__}")
    boxes = check_tensor("erase.boxes", erase.boxes, dtypes=(torch.int32,), ndim=3, shape="(N, R, 5)")
    fill = check_tensor("erase.fill", erase.fill, dtypes=(torch.float32,), ndim=2, shape="(F, C)")
    rows, channels, height, width = images.shape
    if boxes.shape[0] != rows or boxes.shape[2] != 5:
        raise ValueError(f"erase.boxes must have shape ({rows}, R, 5), got {tuple(boxes.shape)}")
    if fill.shape[0] < 1 or fill.shape[1] != channels:
        raise ValueError(f"erase.fill must have shape (F, {channels}) and a row or more, got {tuple(fill.shape)}")
    if fill.requires_grad:
        raise ValueError("erase.fill requires a gradient, which none comes to; give erase.fill.detach()")
    check_same_device(images=images, **{"erase.boxes": boxes, "erase.fill": fill})
    if readable(boxes) and boxes.numel():
        top, left, tall, wide, first = boxes.long().unbind(2)
        if int(boxes.min()) < 0 or int((top + tall).max()) > height or int((left + wide).max()) > width:
            raise ValueError(f"erase.boxes must lie within the images, {(height, width)}, but one does not")
        used = tall * wide if erase.per_pixel else (tall * wide).clamp(max=1)
        if int((first + used).max()) > len(fill):
            raise ValueError(f"erase.boxes need {int((first + used).max())} rows of erase.fill, which has {len(fill)}")
    return erase


def _check_normalisation(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]] | None:
    """(mean, std) as C floats each, or None where neither is given; raises where they are anything else."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"mean and std go together, but only {'std' if mean is None else 'mean'} was given")
    channels, values = images.shape[1], []
    for name, given in (("mean", mean), ("std", std)):
        vector = isinstance(given, (np.ndarray, Tensor)) and given.ndim == 1
        if not vector and (isinstance(given, (str, bytes)) or not isinstance(given, Sequence)):
            raise TypeError(f"{name} must be a sequence of {channels} numbers, got {given!r}")
        what = "a finite number" if name == "mean" else "a finite number above 0"
        numbers = [check_number(f"{name}[{c}]", value, what=what) for c, value in enumerate(given)]
        if len(numbers) != channels:
            raise ValueError(f"{name} must have {channels} values, one per channel, got {len(numbers)}")
        if not all(math.isfinite(v) and (name == "mean" or v > 0) for v in numbers):
            raise ValueError(f"{name} must hold finite numbers{'' if name == 'mean' else ' above 0'}, got {numbers}")
        values.append(numbers)
    if min(values[1], default=1.0) < SMALLEST_STD:
        raise ValueError(f"std must be at least {SMALLEST_STD:g}, below which results overflow, got {values[1]}")
    if max(values[0], default=0.0) > 1:
        raise ValueError(
            f"mean must be on the 0 to 1 scale, also for uint8 images, got {values[0]}; divide mean and std by 255"
        )
    return values[0], values[1]


def _result_dtype(
    images: Tensor,
    normalised: bool,
    dtype: torch.dtype | None,
    out: Tensor | tuple[Tensor, Tensor] | None,
    clean: bool,
) -> torch.dtype:
    """The dtype of the result: as asked for, that of `out`, or the default; raises where none can hold it."""
    given = out[1] if isinstance(out, (tuple, list)) and len(out) == 2 else out
    if dtype is None and isinstance(given, Tensor):
        dtype = given.dtype
    if dtype is None:
        dtype = torch.float32 if normalised and images.dtype == torch.uint8 else images.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be uint8, float16, bfloat16, float32 or float64, got {dtype}")
    if dtype == torch.uint8 and normalised:
        raise ValueError("dtype uint8 cannot hold normalised values; ask for a float dtype, or leave out mean and std")
    return dtype


def _check_out(
    images: Tensor, partners: Tensor | None, out: object, clean: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """(clean, mixed) outputs, checked: shape, dtype, device, and that nothing needed is overwritten."""
    if clean != (isinstance(out, (tuple, list)) and len(out) == 2):
        expected = "a pair (clean, mixed) of tensors" if clean else "one tensor"
        raise TypeError(f"out must be {expected} with clean={clean}, got {type(out).__name__}")
    kept: Tensor | None
    mixed: Tensor
    kept, mixed = out if clean else (None, out)  # type: ignore[misc, assignment]
    for name, given in (("out[0]", kept), ("out[1]", mixed)) if clean else (("out", mixed),):
        tensor = check_tensor(name, given, dtypes=(dtype,), ndim=4, shape="(N, C, H, W)")
        if tensor.shape != images.shape:
            raise ValueError(f"{name} must have shape {tuple(images.shape)}, got {tuple(tensor.shape)}")
        if tensor is not images:
            check_same_device(**{"images": images, name: tensor})
        if torch.is_grad_enabled() and (
            images.requires_grad or tensor.requires_grad or (partners is not None and partners.requires_grad)
        ):
            raise ValueError(f"{name} cannot be given where gradients are wanted; leave it out, or use torch.no_grad()")
        if 0 in tensor.stride() and any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name} is an expanded tensor whose elements share memory; give one of its own")
    if (mixed is not images or kept is not None) and _is_real(images):
        for name, written in (("out[0]", kept), ("out[1]", mixed)) if clean else (("out", mixed),):
            if written is not None and op.overlaps_itself(written):
                raise ValueError(f"{name} has elements that share memory; give a tensor of its own")
        if op.overlaps(images, mixed) and not op.same_memory(images, mixed):
            name = "out[1]" if clean else "out"
            raise ValueError(f"{name} overlaps images without being images; give images itself or a tensor of its own")
        if kept is not None and (op.overlaps(kept, images) or op.overlaps(kept, mixed)):
            raise ValueError("out[0], the clean images, must not share memory with images or out[1]")
    return kept, mixed
