"""mix.png shows the run's own images, mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdmp_kernels import draw_plan, mix
from sdmp_train.picture import CELL_PX, GAP_PX, save_mix_picture


def test_cells_hold_source_mixed_and_partner(tmp_path: Path):
    views = torch.randint(
        0, 256, (6, 3, CELL_PX, CELL_PX), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    plan, other = (draw_plan(6, (CELL_PX, CELL_PX), rules=(rule,), seed=3, step=0) for rule in ("cutmix", "mixup"))
    save_mix_picture(tmp_path / "mix.png", [("cutmix", views, plan), ("mixup", views, other)])
    picture = np.asarray(Image.open(tmp_path / "mix.png"))
    mixed = mix(views, plan)
    top, left = GAP_PX, 78
    for place, image in enumerate((views[0], mixed[0], views[5])):
        x = left + place * (CELL_PX + GAP_PX)
        cell = picture[top : top + CELL_PX, x : x + CELL_PX]
        assert np.array_equal(cell, image.permute(1, 2, 0).numpy())
