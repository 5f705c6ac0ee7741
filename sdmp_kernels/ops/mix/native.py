"""`mix` by the compiled kernels of csrc/: backend `cpp` on the CPU and `cuda` on NVIDIA GPUs.

`_backends.native_library` has loaded the library before any of these is called. One signature with `reference`.
"""

import torch
from torch import Tensor

# A CUDA kernel takes the constants of this many channels along; more are normalised in several launches.
_CHANNELS = 64


def mix(
    images: Tensor,
    partners: Tensor | None,
    rule: Tensor,
    partner: Tensor,
    lam: Tensor,
    box: Tensor,
    mirrored: bool,
    rules: list[int],
    mean: list[float] | None,
    std: list[float] | None,
    mixed: Tensor,
    clean: Tensor | None,
) -> None:
    """Write the mixed images into `mixed` and, where given, the unmixed ones into `clean`: one pass, one launch."""
    plan = (rule.contiguous(), partner.contiguous(), lam.contiguous(), box.contiguous(), mirrored)
    if not images.is_cuda:
        torch.ops.sdmp.mix_cpu(images, partners, *plan, mean, std, mixed, clean)
        return
    for some in _channels(images.shape[1], std):
        own, others, result, kept = (None if t is None else t[:, some] for t in (images, partners, mixed, clean))
        means, stds = (None if values is None else values[some] for values in (mean, std))
        torch.ops.sdmp.mix_cuda(own, others, *plan, means, stds, result, kept)


def mix_backward(
    grad_mixed: Tensor | None,
    grad_clean: Tensor | None,
    rule: Tensor,
    partner: Tensor,
    lam: Tensor,
    box: Tensor,
    mirrored: bool,
    rules: list[int],
    std: list[float] | None,
    grad_images: Tensor,
    grad_partners: Tensor | None,
) -> None:
    """Write the gradients: every pixel gathers what the rows gave that took it, so no two threads write one place."""
    plan = (rule.contiguous(), partner.contiguous(), lam.contiguous(), box.contiguous(), mirrored)
    rows = (grad_images if grad_partners is None else grad_partners).shape[0]
    order, starts = (None, None) if mirrored else takers(partner, rows)
    if not grad_images.is_cuda:
        torch.ops.sdmp.mix_backward_cpu(grad_mixed, grad_clean, *plan, order, starts, std, grad_images, grad_partners)
        return
    for some in _channels(grad_images.shape[1], std):
        upstream = (None if t is None else t[:, some] for t in (grad_mixed, grad_clean))
        result = (None if t is None else t[:, some] for t in (grad_images, grad_partners))
        stds = None if std is None else std[some]
        torch.ops.sdmp.mix_backward_cuda(*upstream, *plan, order, starts, stds, *result)


def _channels(channels: int, std: list[float] | None) -> list[slice]:
    """The channels of every launch."""
    if std is None or channels <= _CHANNELS:
        return [slice(0, channels)]
    return [slice(start, start + _CHANNELS) for start in range(0, channels, _CHANNELS)]


def takers(partner: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows that took row j: `order[starts[j] : starts[j + 1]]`, ascending. (N,) and (rows + 1,) int64."""
    taken, order = torch.sort(partner.clamp(0, max(rows - 1, 0)), stable=True)
    return order, torch.searchsorted(taken, torch.arange(rows + 1, device=partner.device))
