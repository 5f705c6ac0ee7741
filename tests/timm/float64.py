"""A plan carried out in float64, row by row, independent of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sdmp_kernels import Erasure, MixPlan, Rule


def mixed(images: Tensor, plan: MixPlan) -> Tensor:
    """(N, C, H, W) float64: Mixup and CutMix of `images` (uint8 or floating)."""
    source = images.double()
    result = source.clone()
    for i in range(len(source)):
        partner, lam = source[int(plan.partner[i])], float(plan.lam[i])
        rule = Rule(int(plan.rule[i]))
        if rule == Rule.MIXUP:
            result[i] = lam * source[i] + (1 - lam) * partner
        elif rule == Rule.CUTMIX:
            top, left, height, width = plan.box[i].tolist()
            result[i, :, top : top + height, left : left + width] = partner[:, top : top + height, left : left + width]
        else:
            assert rule == Rule.KEEP
    return result


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x / 255 - mean) / std per channel."""
    m, s = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    return (images.double() / 255 - m) / s


def erased(images: Tensor, erasure: Erasure) -> Tensor:
    """(N, C, H, W): a copy with every box filled, pixel by pixel, one after another."""
    result = images.double().clone()
    for i, boxes in enumerate(erasure.boxes.tolist()):
        for top, left, height, width, first in boxes:
            for y in range(height):
                for x in range(width):
                    row = first + y * width + x if erasure.per_pixel else first
                    result[i, :, top + y, left + x] = erasure.fill[row].double()
    return result


def target(labels: Tensor, plan: MixPlan, classes: int, smoothing: float) -> Tensor:
    """(N, K) float64: timm's smoothed target of class numbers."""
    rows = torch.full((len(labels), classes), smoothing / classes, dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        rows[i, label] += (1 - smoothing) * float(plan.lam[i])
        rows[i, int(labels[int(plan.partner[i])])] += (1 - smoothing) * (1 - float(plan.lam[i]))
    return rows
