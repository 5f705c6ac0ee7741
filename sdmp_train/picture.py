"""mix.png: what the run's mixing rules do to its own images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdmp_kernels import MixPlan, ViewRecipe, augment, draw_views, mix

from .data import Batch, Source
from .data.index import open_row
from .durable import replacing

LAM = (0.35, 0.65)
"""Samples are shown whose lam is nearest to these: at 0 or 1 nothing would be seen of the mixing."""
CELL_PX = 128
"""The longer side of an image that is made smaller; one that is smaller is shown by its first multiple from here on."""
GAP_PX = 8
BETWEEN_PX = 40
TITLE_PX, NOTE_PX, HEADING_PX, CAPTION_PX = 24, 16, 20, 16
_NAMES = {"mixup": "Mixup", "cutmix": "CutMix", "resizemix": "ResizeMix"}


def views_of(source: Source, recipes: Sequence[ViewRecipe], seed: int) -> Batch:
    """All images of a (small) source as the views of a step 0.

    Raises:
        One of `DECODE_ERRORS`: an image cannot be decoded.
    """
    images = [torch.from_numpy(open_row(source, row).copy()) for row in range(len(source))]
    views = tuple(
        augment(
            images,
            draw_views(recipe, source.heights, source.widths, seed=seed, step=0, view=number),
            recipe.size_px,
            interpolation=recipe.interpolation,
        )
        for number, recipe in enumerate(recipes)
    )
    return Batch(views, torch.arange(len(source)), torch.as_tensor(source.labels))


def save_mix_picture(
    path: Path,
    title: str,
    examples: Sequence[tuple[str, Tensor, MixPlan]],
    other_view: Tensor | None = None,
    note: str = "",
) -> None:
    """One band per example with two samples in it, each as its views, its partner's view and the mixture with its lam.

    examples: one or more of (the rule, (N, 3, H, W) uint8 views, their plan), all on the CPU. other_view: (N, 3, H, W),
    the second view of the same images, where the method has one. note: a line below the title.
    """
    cells = 3 + (other_view is not None)
    count = min(len(LAM), *(len(images) for _, images, _ in examples))
    high, wide = cell_size(*examples[0][1].shape[-2:])
    step = max(wide, CELL_PX) + GAP_PX  # a caption takes its room
    group = cells * step - GAP_PX
    width = 2 * GAP_PX + count * group + (count - 1) * BETWEEN_PX
    head = TITLE_PX + 3 * GAP_PX + (NOTE_PX + GAP_PX if note else 0)
    band = HEADING_PX + high + CAPTION_PX + 4 * GAP_PX
    picture = Image.new("RGB", (width, head + len(examples) * band), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((GAP_PX, GAP_PX), title, fill="black", font=_font(TITLE_PX, title, width - 2 * GAP_PX))
    below_title = (GAP_PX, TITLE_PX + 2 * GAP_PX)
    pen.text(below_title, note, fill="black", font=_font(NOTE_PX, note, width - 2 * GAP_PX))
    for place, (rule, images, plan) in enumerate(examples):
        mixed = mix(images, plan)
        assert isinstance(mixed, Tensor)
        top = head + place * band
        pen.text((GAP_PX, top), _NAMES.get(rule, rule), fill="black", font=ImageFont.load_default(HEADING_PX))
        for group_of, row in enumerate(chosen_rows(plan, count)):
            second = [] if other_view is None else [(other_view[row], "view b")]
            shown = [
                (images[row], "view a" if second else "image"),
                *second,
                (images[int(plan.partner[row])], "partner"),
                (mixed[row], f"mixed, lam {float(plan.lam[row]):.2f}"),
            ]
            left = GAP_PX + group_of * (group + BETWEEN_PX)
            for column, (image, caption) in enumerate(shown):
                corner = (left + column * step, top + HEADING_PX + GAP_PX)
                picture.paste(to_cell(image), corner)
                below = (corner[0], corner[1] + high + 2)
                pen.text(below, caption, fill="black", font=ImageFont.load_default(CAPTION_PX))
    with replacing(path) as draft:
        picture.save(draft, format="PNG")


def chosen_rows(plan: MixPlan, count: int) -> list[int]:
    """`count` different rows whose lam is nearest to `LAM`, one after another."""
    rows: list[int] = []
    for wanted in LAM[:count]:
        distance = (plan.lam - wanted).abs()
        distance[rows] = float("inf")
        rows.append(int(distance.argmin()))
    return rows


def cell_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) at which an image of this size is shown, of the same shape."""
    side = max(height, width)
    if side >= CELL_PX:
        return max(1, round(height * CELL_PX / side)), max(1, round(width * CELL_PX / side))
    times = -(-CELL_PX // side)
    return height * times, width * times


def to_cell(image: Tensor) -> Image.Image:
    """A (3, H, W) uint8 image at the size of its cell: every pixel a square where it is enlarged."""
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)  # what of other channels can be shown
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().to(torch.uint8).numpy())
    high, wide = cell_size(pixels.height, pixels.width)
    return pixels.resize((wide, high), Image.Resampling.NEAREST if high > pixels.height else Image.Resampling.LANCZOS)


def _font(px: int, text: str, room: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """As large as asked for, or as small as it takes to fit."""
    font = ImageFont.load_default(px)
    return font if font.getlength(text) <= room else ImageFont.load_default(px * room / font.getlength(text))
