"""mix.png shows the run's own images, mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdmp_kernels import draw_plan, mix
from sdmp_train.picture import BETWEEN_PX, CELL_PX, GAP_PX, HEADING_PX, TITLE_PX, chosen_rows, save_mix_picture, to_cell


def noise(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (6, 3, CELL_PX, CELL_PX), dtype=torch.uint8, generator=generator)


def test_cells_hold_both_views_the_partner_and_the_mixture(tmp_path: Path):
    views, others = noise(0), noise(1)
    plans = [draw_plan(6, (CELL_PX, CELL_PX), rules=(rule,), seed=3, step=0) for rule in ("cutmix", "mixup")]
    examples = [(rule, views, plan) for rule, plan in zip(("cutmix", "mixup"), plans, strict=True)]
    for second in (others, None):
        save_mix_picture(tmp_path / "mix.png", "a title", examples, second)
        picture = np.asarray(Image.open(tmp_path / "mix.png"))
        cells = 3 if second is None else 4
        top = TITLE_PX + 3 * GAP_PX + HEADING_PX + GAP_PX
        for group, row in enumerate(chosen_rows(plans[0], 2)):
            shown = [views[row], *([] if second is None else [second[row]]), views[5 - row], mix(views, plans[0])[row]]
            for place, image in enumerate(shown):
                x = GAP_PX + group * (cells * (CELL_PX + GAP_PX) - GAP_PX + BETWEEN_PX) + place * (CELL_PX + GAP_PX)
                cell = picture[top : top + CELL_PX, x : x + CELL_PX]
                assert np.array_equal(cell, image.permute(1, 2, 0).numpy())


def test_the_samples_shown_are_really_mixed():
    """Two different rows, as near to the lams that show something as the plan has any."""
    plan = draw_plan(16, (8, 8), rules=("mixup",), per="sample", seed=0, step=0)
    rows = chosen_rows(plan, 2)
    assert len(set(rows)) == 2
    first, second = ((plan.lam - wanted).abs() for wanted in (0.35, 0.65))
    assert first[rows[0]] == first.min()
    second[rows[0]] = 2.0
    assert second[rows[1]] == second.min()


def test_small_images_are_enlarged_by_whole_numbers():
    for height, width in ((32, 32), (48, 32), (96, 96), (127, 9)):
        image = noise(0)[0, :, :height, :width]
        shown = np.asarray(to_cell(image))
        times = shown.shape[0] // height
        assert 128 <= max(shown.shape) < 256 and times >= 2
        assert np.array_equal(shown, image.permute(1, 2, 0).numpy().repeat(times, 0).repeat(times, 1))
    assert to_cell(torch.zeros((3, 448, 224), dtype=torch.uint8)).size == (64, 128)


def test_a_long_title_fits(tmp_path: Path):
    plan = draw_plan(6, (CELL_PX, CELL_PX), rules=("mixup",), seed=3, step=0)
    save_mix_picture(tmp_path / "mix.png", "W" * 200, [("mixup", noise(0), plan)])
    picture = np.asarray(Image.open(tmp_path / "mix.png"))
    assert (picture[:TITLE_PX, -GAP_PX:] == 255).all()
