"""`mix` on a GPU: which kernel of `triton_kernels.py` serves a call, how it is launched, and what is compiled ahead of
time.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdmp_kernels import _launch
from sdmp_kernels._launch import Call, Compile
from sdmp_kernels.ops.mix.arguments import Erasure, Gradients, Norm, Outputs, PlanRows, Upstream
from sdmp_kernels.ops.mix.triton_kernels import (
    mix_backward_gather_kernel,
    mix_backward_pair_kernel,
    mix_gather_kernel,
    mix_pair_kernel,
)
from sdmp_kernels.plan import Rule

KERNELS = ("mix_pair_kernel", "mix_gather_kernel", "mix_backward_pair_kernel", "mix_backward_gather_kernel")

# ---- launching ----


class _Layout(NamedTuple):
    """How the tensors of a call lie in memory, and the constants of the kernels that follow from it.

    Attributes:
        strides: image, plane, row, column and channel stride of one tensor after the other; the first two in units.
        units: elements of a plane, in units.
        constants: C, PER, FLAT, WIDE, UNIT and GROUP.
    """

    strides: list[int]
    units: int
    constants: dict[str, Any]


def _layout(tensors: list[Tensor], result: Tensor) -> _Layout:
    """The layout that serves all `tensors`; where they differ, that of `result`, which is written."""
    _, channels, height, width = result.shape
    dense = [pixels for pixels in (False, True) if all(_dense(t, pixels) for t in tensors)]
    pixels = dense[0] if dense else channels > 1 and result.stride(1) < result.stride(3)
    per = channels if pixels else 1
    count = height * width * per
    steps = [t.stride(0) if len(t) > 1 else 0 for t in tensors]
    planes = [0 if pixels or channels == 1 else t.stride(1) for t in tensors]
    unit = math.gcd(16, count, *steps, *planes)
    group = math.gcd(16, width * per)
    if dense and group < 8:
        group = 1  # a vector may then run on into the next row
    strides = []
    for tensor, step, plane in zip(tensors, steps, planes, strict=True):
        strides += [step // unit, plane // unit, *tensor.stride()[2:], tensor.stride(1) if pixels else 0]
    reach = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    constants = {
        "C": channels,
        "PER": per,
        "FLAT": bool(dense),
        # An index runs past the plane by less than one block before it is masked.
        "WIDE": max(count, reach) > 2**31 - 2**16,
        "UNIT": unit,
        "GROUP": group,
    }
    return _Layout(strides, count // unit, constants)


def _dense(tensor: Tensor, pixels: bool) -> bool:
    """Whether each image is one dense run of memory: planes of rows, or (`pixels`) rows of pixels of channels."""
    _, channels, height, width = tensor.shape
    expected = (1, width * channels, channels) if pixels else (height * width, width, 1)
    return all(n == 1 or s == e for n, s, e in zip(tensor.shape[1:], tensor.stride()[1:], expected, strict=True))


def _allowed(rules: list[int]) -> dict[str, bool]:
    return {rule.name: int(rule) in rules for rule in (Rule.MIXUP, Rule.CUTMIX, Rule.RESIZEMIX)}


class _Scaling(NamedTuple):
    """(x - centre) * scale per channel: as scalars for up to four channels, else as a (2 C,) table: centres, scales."""

    centres: list[float]
    scales: list[float]
    table: Tensor | None


def _scaling(mean: list[float] | None, std: list[float] | None, images: Tensor) -> _Scaling:
    if std is None:
        return _Scaling([0.0] * 4, [1.0] * 4, None)
    # uint8 is taken to the 0 to 1 scale by the same two constants.
    factor = 255.0 if images.dtype == torch.uint8 else 1.0
    centres = [m * factor for m in mean or [0.0] * len(std)]
    scales = [1.0 / (s * factor) for s in std]
    if len(std) <= 4:
        return _Scaling((centres + [0.0] * 4)[:4], (scales + [1.0] * 4)[:4], None)
    # Filled on the device, not copied to it: a copy would make the host wait, and fail in the capture of a graph.
    table = torch.stack([torch.full((), v, dtype=torch.float32, device=images.device) for v in centres + scales])
    return _Scaling([0.0] * 4, [1.0] * 4, table)


def _shape(
    arch: str, kernel: str, rows: int, images: Tensor, constants: dict[str, Any]
) -> tuple[dict[str, int], int, int]:
    """(BLOCK and the other constants, num_warps, programs) from the launch table: by what a plane is and the bits of an
    element, and less for small images and for those that are not read 16 bytes at a time.

    `rows`: how many programs own each chunk of a plane, one row or one pair each.
    """
    planes = constants.get("PLANES", 1)
    bits = 8 * images.element_size()
    found = _launch.constants(arch, f"mix.{kernel}.{'planes' if planes > 1 else 'plane'}.{bits}bit")
    count = images.shape[2] * images.shape[3] * constants["PER"]
    if not constants["FLAT"] or constants["UNIT"] * bits < 128:
        found = _launch.constants(arch, f"mix.{kernel}.narrow")
    elif count < found["block"]:
        found = _launch.constants(arch, f"mix.{kernel}.small")
    shares = images.shape[1] // (constants["PER"] * planes)
    chosen = {name.upper(): value for name, value in found.items() if name != "num_warps"}
    return chosen, found["num_warps"], -(-count // found["block"]) * shares * rows


def mix(
    images: Tensor,
    partners: Tensor | None,
    plan: PlanRows,
    norm: Norm | None,
    outputs: Outputs,
    erasure: Erasure | None = None,
) -> None:
    """Write the mixed images, erased where that is asked for, and, where they are wanted, the unmixed ones: one launch."""
    arch = _launch.architecture(images.device)
    _mix_call(arch, images, partners, plan, norm, outputs, erasure).launch(images.device)


def _mix_call(
    arch: str,
    images: Tensor,
    partners: Tensor | None,
    plan: PlanRows,
    norm: Norm | None,
    outputs: Outputs,
    erasure: Erasure | None,
) -> Call:
    pair = plan.mirrored and partners is None
    others = images if partners is None else partners
    mixed, clean = outputs.mixed, outputs.mixed if outputs.clean is None else outputs.clean
    rule, partner, lam, box = (tensor.contiguous() for tensor in plan[:4])
    scaling = _scaling(*(norm or (None, None)), images)
    table = lam if scaling.table is None else scaling.table
    layout = _layout([images, mixed, clean] if pair else [images, others, mixed, clean], mixed)
    constants = layout.constants | _allowed(plan.rules)
    constants |= {"NORMALISE": norm is not None, "CLEAN": outputs.clean is not None, "ERASE": erasure is not None}
    constants["PER_PIXEL"] = erasure is not None and erasure.per_pixel
    # Nothing is read of these where nothing is erased.
    boxes, fill = (box, lam) if erasure is None else (erasure.boxes.contiguous(), erasure.fill.contiguous())
    erased = [boxes.shape[1], len(fill)]
    constants["PLANES"] = images.shape[1] if constants["PER"] == 1 and images.shape[1] <= 4 else 1
    rows = -(-len(images) // 2) if pair else len(images)
    chosen, num_warps, programs = _shape(arch, "pair" if pair else "gather", rows, images, constants)
    constants |= chosen
    scalars = [layout.units, *images.shape[2:], *layout.strides, *scaling.centres, *scaling.scales]
    if pair:
        args = [images, mixed, clean, rule, lam, box, table, boxes, fill, len(images), *erased, *scalars]
        return Call(mix_pair_kernel, (programs,), tuple(args), num_warps, 1, constants)
    args = [images, others, mixed, clean, rule, partner, lam, box, table, boxes, fill, len(others), *erased, *scalars]
    constants["SELF"] = partners is None
    return Call(mix_gather_kernel, (programs,), tuple(args), num_warps, 1, constants)


def mix_backward(upstream: Upstream, plan: PlanRows, std: list[float] | None, gradients: Gradients) -> None:
    """Write the gradients of float images, and of `partners` where they were given: a launch for each of the two."""
    device = gradients.images.device
    for call in _backward_calls(_launch.architecture(device), upstream, plan, std, gradients):
        call.launch(device)


def _backward_calls(
    arch: str, upstream: Upstream, plan: PlanRows, std: list[float] | None, gradients: Gradients
) -> list[Call]:
    given = [t for t in upstream if t is not None]
    grads = (given[0], given[-1])
    scaling = _scaling(None, std, gradients.images)
    rule, partner, lam, box = (tensor.contiguous() for tensor in plan[:4])
    table = lam if scaling.table is None else scaling.table
    constants = _allowed(plan.rules) | {"NORMALISE": std is not None}
    constants |= {"MIXED": upstream.mixed is not None, "CLEAN": upstream.clean is not None}

    def call(kernel: Any, name: str, result: Tensor, tensors: list[Tensor], **more: Any) -> Call:
        layout = _layout([*grads, result], result)
        pair = kernel is mix_backward_pair_kernel
        rows = -(-len(result) // 2) if pair else len(result)
        chosen, num_warps, programs = _shape(arch, name, rows, result, layout.constants)
        numbers = [len(result)] if pair else []
        args = [*grads, result, *tensors, *numbers, layout.units, *result.shape[2:], *layout.strides, *scaling.scales]
        return Call(kernel, (programs,), tuple(args), num_warps, 1, layout.constants | constants | more | chosen)

    images, partners = gradients
    if plan.mirrored and partners is None:
        return [call(mix_backward_pair_kernel, "backward_pair", images, [rule, lam, box, table])]
    tensors = [rule, partner, lam, box, *_users(partner, len(images if partners is None else partners)), table]
    kernel, name = mix_backward_gather_kernel, "backward_gather"
    own = call(kernel, name, images, tensors, OWN=True, OTHER=partners is None)
    if partners is None:
        return [own]
    return [own, call(kernel, name, partners, tensors, OWN=False, OTHER=True)]


def _users(partner: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    """The mixed rows in the order of their partners, and where those of each source row start, (sources + 1,)."""
    ordered, users = torch.sort(partner.clamp(0, max(sources - 1, 0)), stable=True)
    return users, torch.searchsorted(ordered, torch.arange(sources + 1, device=partner.device))


# ---- what is compiled ahead of time ----

_ALL = [int(Rule.MIXUP), int(Rule.CUTMIX), int(Rule.RESIZEMIX)]
_WIDE = ("no_spills", "wide_loads", "wide_stores")
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def compiles(arch: str) -> list[Compile]:
    """Every kind of launch: kernel, dtypes, layout, normalisation, and both sizes of block."""
    u8, f16, bf16, f32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
    # Four programs of 256 threads on a multiprocessor, and no waiting for each other while a box is filled.
    free = (*_WIDE, "barriers<=1", *(("registers<=64",) if arch == "sm_90" else ()))
    return [
        _forward(arch, "pair bf16", bf16, facts=free),
        _forward(arch, "pair bf16 channels_last", bf16, pixels=True, facts=free),
        _forward(arch, "pair bf16 without resizemix", bf16, rules=_ALL[:2]),
        _forward(arch, "pair fp16", f16),
        _forward(arch, "pair fp32", f32),
        _forward(arch, "pair uint8", u8),
        _forward(arch, "pair bf16 small", bf16, size=(32, 32)),
        _forward(arch, "pair bf16 rows of 100", bf16, size=(100, 100)),
        _forward(arch, "pair uint8 to bf16 clean", u8, bf16, normalise=True, clean=True),
        _forward(arch, "pair uint8 to bf16 channels_last clean", u8, bf16, pixels=True, normalise=True, clean=True),
        _forward(arch, "pair uint8 to fp32 channels_last", u8, f32, pixels=True, normalise=True),
        _forward(arch, "pair bf16 normalised, 13 channels", bf16, channels=13, normalise=True),
        _forward(arch, "pair bf16 odd", bf16, size=(31, 37), facts=("no_spills",)),
        _forward(arch, "pair bf16 strided", bf16, strided=True, facts=("no_spills",)),
        _forward(arch, "pair uint8 to bf16 erased", u8, bf16, normalise=True, erase=True),
        _forward(arch, "pair uint8 to fp32 channels_last erased", u8, f32, pixels=True, normalise=True, erase=True),
        _forward(arch, "gather bf16 erased", bf16, mirrored=False, erase=True),
        # The taps of a pixel's three channels.
        _forward(arch, "gather bf16", bf16, mirrored=False, facts=(*_WIDE, "barriers<=1", "in_flight>=12")),
        _forward(arch, "gather fp32", f32, mirrored=False),
        _forward(arch, "gather uint8 to bf16 channels_last clean", u8, bf16, pixels=True, mirrored=False,
                 normalise=True, clean=True),
        _forward(arch, "gather bf16 strided", bf16, mirrored=False, strided=True, facts=("no_spills",)),
        _backward(arch, "backward pair bf16", bf16),
        _backward(arch, "backward pair fp32", f32),
        _backward(arch, "backward gather bf16", bf16, mirrored=False),
        _backward(arch, "backward gather fp32", f32, mirrored=False),
    ]  # fmt: skip


def _meta_plan(rows: int, mirrored: bool, rules: list[int]) -> PlanRows:
    shapes = (((rows,), torch.uint8), ((rows,), torch.int64), ((rows,), torch.float32), ((rows, 4), torch.int32))
    rule, partner, lam, box = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
    return PlanRows(rule, partner, lam, box, mirrored, rules)


def _meta_images(dtype: torch.dtype, channels: int, size: tuple[int, int], pixels: bool, strided: bool) -> Tensor:
    # A strided one is a crop of a larger image.
    height, width = (s + 2 for s in size) if strided else size
    images = torch.empty((64, channels, height, width), dtype=dtype, device="meta")
    images = images.to(memory_format=torch.channels_last) if pixels else images
    return images[:, :, 1:-1, 1:-1] if strided else images


def _forward(
    arch: str,
    name: str,
    source: torch.dtype,
    target: torch.dtype | None = None,
    *,
    channels: int = 3,
    size: tuple[int, int] = (224, 224),
    pixels: bool = False,
    strided: bool = False,
    mirrored: bool = True,
    rules: list[int] = _ALL,
    normalise: bool = False,
    clean: bool = False,
    erase: bool = False,
    facts: tuple[str, ...] = _WIDE,
) -> Compile:
    images = _meta_images(source, channels, size, pixels, strided)
    mixed = torch.empty_like(images, dtype=target or source)
    norm = Norm((_MEAN * channels)[:channels], (_STD * channels)[:channels]) if normalise else None
    outputs = Outputs(mixed, torch.empty_like(mixed) if clean else None)
    rows = len(images)
    boxes = torch.empty((rows, 1, 5), dtype=torch.int32, device="meta")
    erasure = Erasure(boxes, torch.empty((4096, channels), device="meta"), True) if erase else None
    call = _mix_call(arch, images, None, _meta_plan(rows, mirrored, rules), norm, outputs, erasure)
    return call.compilation(f"mix {name}", facts)


def _backward(arch: str, name: str, dtype: torch.dtype, *, mirrored: bool = True) -> Compile:
    grad = _meta_images(dtype, 3, (224, 224), pixels=False, strided=False)
    plan, gradients = _meta_plan(len(grad), mirrored, _ALL), Gradients(torch.empty_like(grad), None)
    (call,) = _backward_calls(arch, Upstream(grad, grad), plan, _STD, gradients)
    return call.compilation(f"mix {name}", _WIDE)
