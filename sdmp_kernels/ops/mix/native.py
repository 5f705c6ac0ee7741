"""`mix` by the compiled kernels of csrc/: backend `cpp` on the CPU and `cuda` on NVIDIA GPUs.

`_backends.native_library` has loaded the library before any of these is called. One signature with `reference`.
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.mix.arguments import Erasure, Gradients, Norm, Outputs, PlanRows, Upstream
from sdmp_kernels.plan import MixPlan

# A CUDA kernel takes the constants of this many channels along; more are normalised in several launches.
_CHANNELS = 64


def mix(
    images: Tensor,
    partners: Tensor | None,
    plan: PlanRows,
    norm: Norm | None,
    outputs: Outputs,
    erasure: Erasure | None = None,
) -> None:
    """Write the mixed images, erased where that is asked for (on a CPU), and, where they are wanted, the unmixed ones:
    one pass, one launch.
    """
    rows, (mean, std) = _contiguous(plan), norm or (None, None)
    if not images.is_cuda:
        boxes, fill, per_pixel = (None, None, False) if erasure is None else erasure
        erased = (None if t is None else t.contiguous() for t in (boxes, fill))
        torch.ops.sdmp.mix_cpu(images, partners, *rows, mean, std, *outputs, *erased, per_pixel)
        return
    for some in _channels(images.shape[1], std):
        own, others, mixed, clean = (None if t is None else t[:, some] for t in (images, partners, *outputs))
        means, stds = (None if values is None else values[some] for values in (mean, std))
        torch.ops.sdmp.mix_cuda(own, others, *rows, means, stds, mixed, clean)


def mix_plain(images: Tensor, plan: MixPlan, out: Tensor) -> bool:
    """Mix packed images on a CPU and say so, or do nothing and say that: the kernel looks whether they are plain."""
    height, width = plan.size
    return torch.ops.sdmp.mix_plain_cpu.default(
        images, plan.rule, plan.partner, plan.lam, plan.box, plan.mirrored, height, width, out
    )


def mix_backward(upstream: Upstream, plan: PlanRows, std: list[float] | None, gradients: Gradients) -> None:
    """Write the gradients: every pixel gathers what the rows gave that took it, so no two threads write one place."""
    rows = _contiguous(plan)
    sources = len(gradients.images if gradients.partners is None else gradients.partners)
    order, starts = (None, None) if plan.mirrored else takers(plan.partner, sources)
    if not gradients.images.is_cuda:
        torch.ops.sdmp.mix_backward_cpu(*upstream, *rows, order, starts, std, *gradients)
        return
    for some in _channels(gradients.images.shape[1], std):
        given = (None if t is None else t[:, some] for t in upstream)
        result = (None if t is None else t[:, some] for t in gradients)
        stds = None if std is None else std[some]
        torch.ops.sdmp.mix_backward_cuda(*given, *rows, order, starts, stds, *result)


def _contiguous(plan: PlanRows) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """What the compiled kernels are told of a plan; which rules occur, they see for themselves."""
    rule, partner, lam, box = (tensor.contiguous() for tensor in plan[:4])
    return rule, partner, lam, box, plan.mirrored


def _channels(channels: int, std: list[float] | None) -> list[slice]:
    """The channels of every launch."""
    if std is None or channels <= _CHANNELS:
        return [slice(0, channels)]
    return [slice(start, start + _CHANNELS) for start in range(0, channels, _CHANNELS)]


def takers(partner: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows that took row j: `order[starts[j] : starts[j + 1]]`, ascending. (N,) and (rows + 1,) int64."""
    taken, order = torch.sort(partner.clamp(0, max(rows - 1, 0)), stable=True)
    return order, torch.searchsorted(taken, torch.arange(rows + 1, device=partner.device))
