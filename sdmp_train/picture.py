"""mix.png: what the run's mixing rules do to its own images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sdmp_kernels import MixPlan, mix

from .durable import replacing

COLUMNS = 4
CELL_PX = 96
GAP_PX = 6
CAPTION_PX = 16


def save_mix_picture(path: Path, examples: Sequence[tuple[str, Tensor, MixPlan]]) -> None:
    """One row per example and up to four samples in it, each as source, mixed, partner, with lam written below.

    examples: one or more of (what it shows, (N, 3, S, S) uint8 images, their plan), all on the CPU.
    """
    count = min(COLUMNS, *(len(images) for _, images, _ in examples))
    cell, left = CELL_PX, 78
    width = left + count * (3 * cell + 2 * GAP_PX) + (count - 1) * 3 * GAP_PX + GAP_PX
    height = GAP_PX + len(examples) * (cell + CAPTION_PX + GAP_PX)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    for row, (what, images, plan) in enumerate(examples):
        mixed = mix(images, plan)
        if not isinstance(mixed, Tensor):
            raise TypeError("mix without clean=True gives one tensor")
        top = GAP_PX + row * (cell + CAPTION_PX + GAP_PX)
        pen.text((GAP_PX, top + cell // 2), what, fill="black")
        for column in range(count):
            x = left + column * (3 * cell + 5 * GAP_PX)
            sources = (images[column], mixed[column], images[int(plan.partner[column])])
            lam = float(plan.lam[column])
            captions = ("source", f"mixed, lam {lam:.2f}", "partner")
            for place, (image, caption) in enumerate(zip(sources, captions, strict=True)):
                corner = (x + place * (cell + GAP_PX), top)
                picture.paste(to_cell(image), corner)
                pen.text((corner[0], top + cell + 2), caption, fill="black")
    with replacing(path) as draft:
        picture.save(draft, format="PNG")


def to_cell(image: Tensor) -> Image.Image:
    """A (3, S, S) uint8 image, scaled to a cell: blocky where it is enlarged."""
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().to(torch.uint8).numpy())
    method = Image.Resampling.NEAREST if pixels.width < CELL_PX else Image.Resampling.LANCZOS
    return pixels.resize((CELL_PX, CELL_PX), method)
