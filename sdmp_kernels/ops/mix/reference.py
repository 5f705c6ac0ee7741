"""The definition of `mix`, one row at a time (method: paper Eq. 1 and 2).

Shapes: images (N, C, H, W), partners (M, C, H, W); those of the rest are in `arguments`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmp_kernels.ops.mix.arguments import Erasure, Gradients, Norm, Outputs, PlanRows, Upstream
from sdmp_kernels.plan import Rule


def mix(
    images: Tensor,
    partners: Tensor | None,
    plan: PlanRows,
    norm: Norm | None,
    outputs: Outputs,
    erasure: Erasure | None = None,
) -> None:
    """Write the mixed images, erased where that is asked for, and, where they are wanted, the unmixed ones."""
    pixels = mix_pixels(images, partners, plan)
    finished = normalise(pixels, images.dtype, norm)
    outputs.mixed.copy_(store(finished if erasure is None else erase(finished, erasure), outputs.mixed.dtype))
    if outputs.clean is not None:
        own = normalise(images.to(pixels.dtype), images.dtype, norm)
        outputs.clean.copy_(store(own, outputs.clean.dtype))


def mix_pixels(images: Tensor, partners: Tensor | None, plan: PlanRows) -> Tensor:
    """(N, C, H, W) mixed pixels in float32 (float64 for float64 images), not rounded, not normalised."""
    own = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
    others = own if partners is None else partners.to(own.dtype)
    rows = []
    listed = zip(plan.rule.tolist(), plan.partner.tolist(), plan.box.tolist(), strict=True)
    for i, (rule, j, box) in enumerate(listed):
        itself = partners is None and i == j
        rows.append(mix_row(own[i], others[j], Rule(rule), plan.lam[i].to(own.dtype), box, itself))
    return torch.stack(rows) if rows else own.clone()


def mix_row(own: Tensor, other: Tensor, rule: Rule, lam: Tensor, box: list[int], itself: bool) -> Tensor:
    """(C, H, W): one image mixed with its partner."""
    if rule == Rule.MIXUP and lam != 1 and not itself:
        return lam * own + (1 - lam) * other
    top, left, height, width = box
    if rule in (Rule.KEEP, Rule.MIXUP) or height * width == 0:
        return own
    if rule == Rule.CUTMIX:
        patch = other[:, top : top + height, left : left + width]
    else:
        patch = F.interpolate(other[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    pasted = own.clone()
    pasted[:, top : top + height, left : left + width] = patch
    return pasted


def normalise(pixels: Tensor, source: torch.dtype, norm: Norm | None) -> Tensor:
    """(x - mean) / std per channel, x on the 0 to 1 scale (uint8 sources divided by 255)."""
    if norm is None:
        return pixels
    unit = pixels / 255 if source == torch.uint8 else pixels
    centre = torch.tensor(norm.mean, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)
    spread = torch.tensor(norm.std, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)
    return (unit - centre) / spread


def erase(pixels: Tensor, erasure: Erasure) -> Tensor:
    """(N, C, H, W): a copy whose boxes are filled, the later ones over the earlier ones."""
    erased, fill = pixels.clone(), erasure.fill.to(pixels.dtype)
    for i, boxes in enumerate(erasure.boxes.tolist()):
        for top, left, height, width, first in boxes:
            patch = erased[i, :, top : top + height, left : left + width]
            if erasure.per_pixel:
                patch.copy_(fill[first : first + height * width].T.reshape(patch.shape))
            elif height * width > 0:
                patch.copy_(fill[first][:, None, None])
    return erased


def store(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding to `dtype`; to nearest, ties to even, and within 0 to 255 for uint8 (NaN becomes 0)."""
    if dtype == torch.uint8:
        pixels = pixels.nan_to_num(nan=0.0).round().clamp(0, 255)
    return pixels.to(dtype)


def mix_backward(upstream: Upstream, plan: PlanRows, std: list[float] | None, gradients: Gradients) -> None:
    """Write the gradients of float images, and of `partners` where they were given: the transpose of `mix`."""
    work = torch.float64 if gradients.images.dtype == torch.float64 else torch.float32
    own = torch.zeros_like(gradients.images, dtype=work)
    others = own if gradients.partners is None else torch.zeros_like(gradients.partners, dtype=work)
    if upstream.clean is not None:
        own += denormalise(upstream.clean.to(work), std)
    if upstream.mixed is not None:
        grads = denormalise(upstream.mixed.to(work), std)
        listed = zip(plan.rule.tolist(), plan.partner.tolist(), plan.box.tolist(), strict=True)
        for i, (rule, j, box) in enumerate(listed):
            itself = gradients.partners is None and i == j
            to_own, to_other = mix_row_backward(grads[i], Rule(rule), plan.lam[i].to(work), box, itself)
            own[i] += to_own
            if to_other is not None:
                others[j] += to_other
    gradients.images.copy_(own)
    if gradients.partners is not None:
        gradients.partners.copy_(others)


def mix_row_backward(
    grad: Tensor, rule: Rule, lam: Tensor, box: list[int], itself: bool
) -> tuple[Tensor, Tensor | None]:
    """(C, H, W) gradients of one mixed image to its own pixels and to its partner's."""
    if rule == Rule.MIXUP and lam != 1 and not itself:
        return lam * grad, (1 - lam) * grad
    top, left, height, width = box
    if rule in (Rule.KEEP, Rule.MIXUP) or height * width == 0:
        return grad, None
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    to_own = grad.clone()
    to_own[inside] = 0
    if rule == Rule.CUTMIX:
        to_other = torch.zeros_like(grad)
        to_other[inside] = grad[inside]
    else:
        to_other = torch.ops.aten.upsample_bilinear2d_backward(
            grad[inside][None].contiguous(), [height, width], [1, *grad.shape], False
        )[0]
    return to_own, to_other


def denormalise(grads: Tensor, std: list[float] | None) -> Tensor:
    """The gradient through (x - mean) / std of float images."""
    if std is None:
        return grads
    return grads / torch.tensor(std, dtype=grads.dtype, device=grads.device).view(-1, 1, 1)
