"""Run folders for the tests of what reads them: one written by hand, with known numbers, and one that a run has left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdmp_train.commands import pretrain
from sdmp_train.config import Config, save_config

LOG = """\
preset   table5/cifar10-r50-sdmp
device   CPU (2 threads; torch sees no GPU), fp32
data     36 images, 3 classes, 40 x 40 px in the median: photos/<b>bold</b>
model    test_vit at 32 px: 0.03 M parameters, 0.05 M with heads
step 4/8  epoch 1.0  loss 3.841  111 img/s  waiting for data 1%
kNN       33.3% raw pixels (k = 20, 28 bank, 8 queries)
2026-11-27 21:44:05  device   CPU (1 threads; torch sees no GPU), fp32
"""
ROWS = (
    {"step": 0, "knn": 0.25},
    {"step": 0, "knn_raw_pixels": 1 / 3},
    {"step": 2, "epoch": 0.5, "loss": 3.5, "loss_clean": 2.0, "lr": 0.1, "data_wait_fraction": 0.5, "top9": 1.0},
    {"step": 4, "epoch": 1.0, "loss": None, "loss_clean": 1.0, "lr": 0.2, "data_wait_fraction": 0.25},
    {"step": 4, "knn": 0.75},
)


def write_run(folder: Path, config: Config, rows: Any = ROWS, log: str = LOG) -> Path:
    """A run folder with these lines in its logs."""
    (folder / "checkpoints").mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.log").write_text(log)
    return folder


def small_run(folder: Path, config: Config) -> Path:
    """A real run of a few steps that measures kNN after every epoch."""
    run = replace(config.run, knn_max_images=36, knn_every_epochs=1)
    assert pretrain(replace(config, run=run), folder) == 0
    return folder
