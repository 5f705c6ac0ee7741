"""How many test images a classifier gets right. N images, H classifiers, K classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sdmp_kernels.views import Interpolation

from ..data import Index, eval_loader
from ..distributed import World, reduce_mean
from ..log import Log
from ..settings import DataConfig
from ..stop import StopRequest
from .features import standardise
from .subject import Steps

TOP = (1, 5)


def in_words(found: Mapping[str, Any], classes: int) -> str:
    """`top1` and `top5`; of five classes or fewer the second says nothing and is left out."""
    top5 = f" {found['top5']:7.2%} top-5" if classes > max(TOP) else ""
    return f"{found['top1']:7.2%} top-1{top5}"


def accuracies(
    logits: Callable[[Tensor], Tensor],
    index: Index,
    data: DataConfig,
    *,
    world: World,
    batch_size: int,
    log: Log,
    stop: StopRequest,
    what: str = "test images",
    resize_px: int | None = None,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """(H, 2) top-1 and top-5 accuracy over all images of all ranks, float64 on the CPU.

    `logits`: normalised images -> (N, H, K), or (N, K) for H = 1. Where there are fewer than five classes, "top 5" is
    all of them.
    """
    right = torch.zeros(())
    step = Steps(log, stop, -(-len(index) // world.size), batch_size, what)
    loader = eval_loader(
        index,
        data.image_px,
        batch_size=batch_size,
        device=world.device,
        resize_px=resize_px,
        interpolation=interpolation,
        rank=world.rank,
        world_size=world.size,
        loader=data.loader,
        workers=data.workers,
    )
    with torch.inference_mode(), loader as batches:
        for batch in batches:
            step()
            scores = logits(standardise(batch.views[0], data.mean, data.std))
            scores = scores.unsqueeze(1) if scores.ndim == 2 else scores
            right = right + top_counts(scores, batch.labels.to(scores.device))
        step.end()
    sums = reduce_mean(right.to(world.device, torch.float64), world) * world.size
    return sums.cpu() / len(index)


def top_counts(scores: Tensor, labels: Tensor) -> Tensor:
    """(N, H, K) scores, (N,) labels -> (H, 2): rows whose label is the highest, and among the five highest."""
    best = scores.topk(min(max(TOP), scores.shape[-1]), dim=-1).indices == labels.view(-1, 1, 1)
    return torch.stack([best[..., :k].any(-1).sum(0) for k in TOP], dim=1)
