"""Figures show the logged numbers, and the coefficients that the run drew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import at_step, build_method, with_mixing
from written_runs import write_run

from sdmp_train.config import Config
from sdmp_train.evaluate.figures import MOST_POINTS, NAMES, curves, drawn_lams, figures, lam_figure, thin
from sdmp_train.evaluate.record import read_record


def test_every_logged_number_has_its_panel(tiny: Config, tmp_path: Path):
    record = read_record(write_run(tmp_path / "run", tiny))
    found = {name: figure for name, _, figure in figures([record])}
    assert set(found) == set(NAMES)
    titles = {name: [axes.get_title(loc="left") for axes in figure.axes] for name, figure in found.items()}
    assert titles["losses"] == ["loss", "loss: clean"]
    assert titles["method"] == ["top9"]
    assert titles["speed"] == ["share of the time spent waiting for data"]  # images per second were not logged
    assert titles["optimiser"] == ["learning rate"]
    line = found["losses"].axes[1].lines[0]
    assert np.array_equal(line.get_xdata(), [0.5, 1.0]) and np.array_equal(line.get_ydata(), [2.0, 1.0])
    knn = found["knn"].axes[0].lines
    assert (knn[0].get_marker(), knn[0].get_linestyle()) == ("o", "None"), "two measurements are no curve"
    assert np.array_equal(knn[0].get_ydata(), [25, 75]) and knn[1].get_ydata()[0] == pytest.approx(100 / 3)


def test_a_runs_speed_is_apart_from_the_methods_numbers_and_an_outlier_does_not_hide_it(tiny: Config, tmp_path: Path):
    rows = [
        {"step": n, "epoch": n / 4, "loss": 1.0, "lam_mean": 0.5, "step_seconds": 0.1, "memory_gib": 2.0, "time": 1.7e9}
        for n in range(1, 8)
    ]
    rows.append({**rows[-1], "step": 8, "epoch": 2.0, "step_seconds": 50.0, "memory_gib": 2.5})
    rows = [{**row, "data_wait_fraction": 0.9 * (row["step"] == 1)} for row in rows]
    record = read_record(write_run(tmp_path / "run", tiny, rows=[*rows, {"step": 8, "knn": 0.75, "time": 1.8e9}]))
    found = {name: figure for name, _, figure in figures([record])}
    titles = {name: [axes.get_title(loc="left") for axes in figure.axes] for name, figure in found.items()}
    assert titles["method"] == ["lam mean"]
    assert titles["speed"] == [
        "seconds per step (1 above)",
        "share of the time spent waiting for data",
        "memory, GiB",
    ]
    assert found["speed"].axes[0].get_ylim()[1] == pytest.approx(0.12)
    assert found["speed"].axes[2].get_ylim()[1] > 2.5
    (panel,) = curves([record], {"knn": "kNN accuracy, %"}).axes
    assert np.array_equal(panel.lines[0].get_ydata(), [75])


def test_runs_without_a_number_have_no_figure_of_it(tiny: Config, tmp_path: Path):
    bare = read_record(write_run(tmp_path / "bare", with_mixing(tiny, mixing="none"), rows=[{"step": 1, "epoch": 0.2}]))
    assert list(figures([bare])) == []
    other = read_record(write_run(tmp_path / "other", tiny))
    assert "knn" in {name for name, _, _ in figures([bare, other])}


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_lams_are_those_that_the_run_mixed_with(tiny: Config, tmp_path: Path, per: str):
    config = with_mixing(tiny, per=per)
    record = read_record(write_run(tmp_path / "run", config, rows=[{"step": 4, "epoch": 1.0}]))
    method = build_method(record.config)
    plans = [mixed for step in range(4) for mixed in method.plan(at_step(step)).mixes.values()]
    expected = torch.cat([plan.lam for plan in plans]).sort().values
    found = drawn_lams(record)
    assert np.array_equal(np.sort(np.concatenate(list(found.values()))), expected.numpy())
    assert set(found) <= {"mixup", "cutmix", "resizemix"}


def test_the_legend_of_lam_covers_no_panel():
    drawn = {"first": {"cutmix": np.full(9, 0.02), "mixup": np.full(9, 0.97)}, "second": {"mixup": np.full(9, 0.97)}}
    figure = lam_figure(drawn)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["cutmix", "mixup"]
    box = legend.get_window_extent()
    assert not any(panel.get_legend() or box.overlaps(panel.get_tightbbox()) for panel in figure.axes)
    named = {
        text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    (only,) = figure.axes[1].containers
    assert pytest.importorskip("matplotlib.colors").same_color(only[0].get_facecolor(), named["mixup"])


def test_supervised_rows_that_stay_as_they_are_count_as_unmixed(tiny_supervised: Config, tmp_path: Path):
    half = replace(tiny_supervised, method=replace(tiny_supervised.method, prob=0.5))
    none = replace(tiny_supervised, method=replace(tiny_supervised.method, prob=0.0))
    rows = [{"step": 8, "epoch": 2.0}]
    lams = np.concatenate(list(drawn_lams(read_record(write_run(tmp_path / "half", half, rows=rows))).values()))
    assert 0 < len(lams) < 8 * half.optim.batch_size
    assert drawn_lams(read_record(write_run(tmp_path / "none", none, rows=rows))) == {}


def test_a_log_without_epochs_draws_what_it_can(tiny: Config, tmp_path: Path):
    """A kill may leave kNN lines alone: nobody knows how many steps an epoch has."""
    rows = [{"step": 0, "knn": 0.25}, {"step": 3, "knn": 0.5}]
    assert {name for name, _, _ in figures([read_record(write_run(tmp_path / "run", tiny, rows=rows))])} == {"knn"}


def test_long_curves_keep_their_ends():
    values = [float(i) for i in range(3 * MOST_POINTS + 1)]
    epochs, kept = thin((values, values))
    assert len(kept) <= MOST_POINTS + 1 and kept[0] == 0 and kept[-1] == values[-1] and epochs == kept
    assert thin((values[:5], values[:5])) == (values[:5], values[:5])
