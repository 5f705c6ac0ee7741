"""The registered operators of `mix`: schemas, fakes, autograd, and which backend serves which call.

`sdmp::mix` makes its outputs, `sdmp::mix_out` writes into given ones, `sdmp::mix_` works in place.
"""

from typing import Any, Optional, TypeGuard

import torch
from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._memory import empty_like
from sdmp_kernels._operators import operator, unwatched
from sdmp_kernels.ops.mix.arguments import Erasure, Gradients, Norm, Outputs, PlanRows, Upstream
from sdmp_kernels.plan import MixPlan, Rule

OP = _backends.register("mix", cpu=("cpp", "torch", "reference"), cuda=("triton", "cuda", "torch", "reference"))


def _refuse(backend: str, images: Tensor, out: torch.dtype, erases: bool = False) -> str | None:
    if erases and backend == "cuda":
        return "erasing is computed by triton, torch and reference only"
    if torch.float64 in (images.dtype, out) and backend not in ("torch", "reference"):
        return "float64 images are computed by torch and reference only"
    if backend == "triton" and images.device.type == "cpu" and torch.bfloat16 in (images.dtype, out):
        return "triton's interpreter rounds bfloat16 wrongly"
    return None


def mix_plain(images: Tensor, plan: MixPlan, out: Any) -> Tensor | None:
    """The mixed images, in `out` where that is given; None, and nothing is done, where anything is unusual or wrong.

    For the calls that most loops make, on small images, where checks and operators cost more than pixels: images and
    output packed one behind the other, of one dtype, on a CPU, without gradients.
    """
    if not unwatched() or type(plan) is not MixPlan or not plan.rule.is_cpu or not _plain(images):
        return None
    if out is not None and (not _plain(out) or out.is_inference()):
        return None
    mixed = empty_like(images) if out is None else out
    backend = _backends.choose(OP, images.device)
    if backend not in ("cpp", "torch") or not OP.module(backend).mix_plain(images, plan, mixed):
        return None
    if mixed is out:
        torch.autograd.graph.increment_version(out)
    return mixed


def _plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of values in memory of the CPU, without a gradient."""
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.layout is not torch.strided:
        return False
    return not tensor.requires_grad or not torch.is_grad_enabled()


def _run(
    images: Tensor,
    partners: Tensor | None,
    plan: PlanRows,
    norm: Norm | None,
    outputs: Outputs,
    erasure: Erasure | None,
) -> None:
    """Run the chosen backend; give it a scratch copy of whatever it would overwrite before the last read."""
    erases = erasure is not None
    backend = _backends.choose(OP, images.device, lambda name: _refuse(name, images, outputs.mixed.dtype, erases))
    if images.numel() == 0:
        return
    whole_pairs = plan.mirrored and partners is None and Rule.RESIZEMIX not in plan.rules
    in_place = backend == "torch" or (whole_pairs and backend != "reference")
    if same_memory(images, outputs.mixed) and not in_place:
        images = images.clone()
    if partners is not None and any(out is not None and overlaps(partners, out) for out in outputs):
        partners = partners.clone()
    OP.module(backend).mix(images, partners, plan, norm, outputs, erasure)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one and the same view of one storage."""
    return a.dtype == b.dtype and a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape


def overlaps(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors meet (says yes for interleaved views that share no element)."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    spans = []
    for t in (a, b):
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def overlaps_itself(t: Tensor) -> bool:
    """Whether elements of a tensor may share memory (says yes for dimensions that interleave without meeting, too)."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride <= reach:
            return t.numel() > 0
        reach += stride * (size - 1)
    return False


@operator("mix")
def mix_op(
    images: Tensor,
    partners: Optional[Tensor],
    rule: Tensor,
    partner: Tensor,
    lam: Tensor,
    box: Tensor,
    mirrored: bool,
    rules: list[int],
    mean: Optional[list[float]],
    std: Optional[list[float]],
    dtype: torch.dtype,
    clean: bool,
    boxes: Optional[Tensor],
    fill: Optional[Tensor],
    per_pixel: bool,
) -> tuple[Tensor, Tensor]:
    """(mixed, clean): clean is an empty tensor unless asked for."""
    mixed, kept = _outputs(images, dtype, clean)
    plan, outputs = PlanRows(rule, partner, lam, box, mirrored, rules), Outputs(mixed, kept if clean else None)
    _run(images, partners, plan, Norm.of(mean, std), outputs, Erasure.of(boxes, fill, per_pixel))
    return mixed, kept


def _outputs(images: Tensor, dtype: torch.dtype, clean: bool) -> tuple[Tensor, Tensor]:
    mixed = empty_like(images, dtype)
    return mixed, empty_like(mixed) if clean else images.new_empty(0, dtype=dtype)


@mix_op.register_fake
def _(images, partners, rule, partner, lam, box, mirrored, rules, mean, std, dtype, clean, boxes, fill, per_pixel):
    return _outputs(images, dtype, clean)


@operator("mix_out", mutates=("mixed", "kept"))
def mix_out_op(
    images: Tensor,
    partners: Optional[Tensor],
    rule: Tensor,
    partner: Tensor,
    lam: Tensor,
    box: Tensor,
    mirrored: bool,
    rules: list[int],
    mean: Optional[list[float]],
    std: Optional[list[float]],
    mixed: Tensor,
    kept: Optional[Tensor],
    boxes: Optional[Tensor],
    fill: Optional[Tensor],
    per_pixel: bool,
) -> None:
    """As `sdmp::mix`, into existing tensors."""
    plan = PlanRows(rule, partner, lam, box, mirrored, rules)
    erasure = Erasure.of(boxes, fill, per_pixel)
    _run(images, partners, plan, Norm.of(mean, std), Outputs(mixed, kept), erasure)


@mix_out_op.register_fake
def _(images, partners, rule, partner, lam, box, mirrored, rules, mean, std, mixed, kept, boxes, fill, per_pixel):
    return None


@operator("mix_", mutates=("images", "kept"))
def mix_in_place_op(
    images: Tensor,
    partners: Optional[Tensor],
    rule: Tensor,
    partner: Tensor,
    lam: Tensor,
    box: Tensor,
    mirrored: bool,
    rules: list[int],
    mean: Optional[list[float]],
    std: Optional[list[float]],
    kept: Optional[Tensor],
    boxes: Optional[Tensor],
    fill: Optional[Tensor],
    per_pixel: bool,
) -> None:
    """As `sdmp::mix`, over the images themselves."""
    plan = PlanRows(rule, partner, lam, box, mirrored, rules)
    erasure = Erasure.of(boxes, fill, per_pixel)
    _run(images, partners, plan, Norm.of(mean, std), Outputs(images, kept), erasure)


@mix_in_place_op.register_fake
def _(images, partners, rule, partner, lam, box, mirrored, rules, mean, std, kept, boxes, fill, per_pixel):
    return None


@operator("mix_backward")
def mix_backward_op(
    grad_mixed: Optional[Tensor],
    grad_clean: Optional[Tensor],
    rule: Tensor,
    partner: Tensor,
    lam: Tensor,
    box: Tensor,
    mirrored: bool,
    rules: list[int],
    std: Optional[list[float]],
    dtype: torch.dtype,
    partner_rows: int,
) -> tuple[Tensor, Tensor]:
    """(grad_images, grad_partners): the second is empty where partner_rows < 0, that is, images are the partners."""
    given: Tensor = grad_mixed if grad_mixed is not None else grad_clean  # type: ignore[assignment]
    grad_images, grad_partners = _gradients(given, dtype, partner_rows)
    backend = _backends.choose(OP, given.device, lambda name: _refuse(name, given, dtype))
    plan = PlanRows(rule, partner, lam, box, mirrored, rules)
    gradients = Gradients(grad_images, grad_partners if partner_rows >= 0 else None)
    if grad_images.numel() or grad_partners.numel():
        OP.module(backend).mix_backward(Upstream(grad_mixed, grad_clean), plan, std, gradients)
    return grad_images, grad_partners


def _gradients(given: Tensor, dtype: torch.dtype, partner_rows: int) -> tuple[Tensor, Tensor]:
    grad_images = given.new_empty(given.shape, dtype=dtype)
    shape = (partner_rows, *given.shape[1:]) if partner_rows >= 0 else (0,)
    return grad_images, given.new_empty(shape, dtype=dtype)


@mix_backward_op.register_fake
def _(grad_mixed, grad_clean, rule, partner, lam, box, mirrored, rules, std, dtype, partner_rows):
    return _gradients(grad_mixed if grad_mixed is not None else grad_clean, dtype, partner_rows)


def _save(ctx, inputs, output):
    images, partners, rule, partner, lam, box, mirrored, rules, _mean, std, _dtype, clean, boxes, _fill, _each = inputs
    ctx.save_for_backward(rule, partner, lam, box, boxes)
    ctx.host = (mirrored, rules, std, images.dtype, -1 if partners is None else partners.shape[0], clean)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_mixed, grad_kept):
    rule, partner, lam, box, boxes = ctx.saved_tensors
    mirrored, rules, std, dtype, partner_rows, clean = ctx.host
    grad_kept = grad_kept if clean else None
    if grad_mixed is None and grad_kept is None:
        return None, None
    if grad_mixed is not None and boxes is not None:
        grad_mixed = grad_mixed.masked_fill(_erased(boxes, grad_mixed.shape), 0)
    grad_images, grad_partners = torch.ops.sdmp.mix_backward(
        grad_mixed, grad_kept, rule, partner, lam, box, mirrored, rules, std, dtype, partner_rows
    )
    return grad_images, grad_partners if partner_rows >= 0 else None


def _erased(boxes: Tensor, shape: torch.Size) -> Tensor:
    """(N, 1, H, W) bool: in any box of its image, where no source gives anything."""
    top, left, height, width, _ = boxes[..., None].unbind(2)  # (N, R, 1) each
    y, x = (torch.arange(extent, device=boxes.device) for extent in shape[2:])
    down = (y >= top) & (y < top + height)
    across = (x >= left) & (x < left + width)
    return (down[..., None] & across[:, :, None]).any(1, keepdim=True)


mix_op.register_autograd(_backward, setup_context=_save, of=("images", "partners"))
