"""curves.png: drawn once there is something to see, again as the run goes, and never at the cost of the run."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdmp_train import curves
from sdmp_train.commands import pretrain
from sdmp_train.config import Config
from sdmp_train.log import Log

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def test_a_run_has_its_curves_at_its_end(tiny: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(curves, "FEWEST_LINES", 4)
    run = replace(tiny.run, max_steps=4, knn_max_images=30)
    assert pretrain(replace(tiny, run=run), tmp_path / "run") == 0
    picture = np.asarray(Image.open(tmp_path / "run" / "curves.png").convert("RGB"))
    assert picture.shape[0] > 200
    assert (picture == [0, 0x72, 0xB2]).all(-1).any()  # the colour of its lines
    assert pretrain(replace(tiny, run=run), tmp_path / "run", overwrite=True) == 0


def test_a_run_of_few_lines_has_none(tiny: Config, tmp_path: Path):
    assert pretrain(replace(tiny, run=replace(tiny.run, max_steps=2, knn_max_images=0)), tmp_path / "run") == 0
    assert not (tmp_path / "run" / "curves.png").exists()


def test_they_are_drawn_again_as_the_run_goes_by_one_thread_at_a_time(tmp_path: Path, monkeypatch):
    drawn: list[float] = []

    def slow(folder: Path) -> None:
        drawn.append(time.monotonic())
        time.sleep(0.05)

    monkeypatch.setattr(curves, "draw_curves", slow)
    monkeypatch.setattr(curves, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(curves, "SHARE", 1)
    made = curves.Curves(tmp_path, Log(quiet=True))
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        made.after_step()
    made.last()
    assert 3 <= len(drawn) <= 13
    assert all(later - sooner > 0.05 for sooner, later in itertools.pairwise(drawn))


def test_a_picture_that_cannot_be_drawn_costs_one_notice(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "EVERY_SECONDS", 0.0)
    with Log() as log:
        made = curves.Curves(tmp_path / "nothing", log)
        made.after_step()
        made.last()
        made.last()
    assert capsys.readouterr().out.count("curves.png cannot be drawn") == 1
