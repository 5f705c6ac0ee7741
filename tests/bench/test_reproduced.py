"""Means, standard errors and paired differences against a computation by hand; the page says what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import reproduced
from bench.reproduce import Cell
from bench.reproduced import State, finding, gain, load, mean_and_error, table, write

MACHINE = {"gpu": None, "cpu": "Test CPU", "cores": 2}


def document(path: Path, numbers: dict[tuple[str, int, int], list[float]]) -> dict:
    """Results of (arm, images, epochs) by seed; linear was not measured of the first seed."""
    state = State(path, "map-small", MACHINE)
    for (arm, images, epochs), values in numbers.items():
        for seed, value in enumerate(values):
            cell = Cell(arm, images, epochs, seed)
            state.spend(cell, "d", 60.0)
            state.add(cell, "d", {"knn": value, "linear": value + 0.1 if seed else None})
    return load(path)


NUMBERS = {
    ("MoCo v3", 2500, 40): [0.40, 0.42, 0.44],
    ("SDMP", 2500, 40): [0.41, 0.44, 0.46],
    ("MoCo v3", 50000, 2): [0.30, 0.31],
    ("SDMP", 50000, 2): [0.28, 0.29, 0.33],
    ("MoCo v3", 10000, 10): [0.35],
}


def test_means_and_errors(tmp_path: Path):
    found = document(tmp_path / "map.json", NUMBERS)
    mean, error, seeds = gain(found, "SDMP", (2500, 40), "knn")
    assert seeds == 3 and mean == pytest.approx(5 / 3)
    spread = math.sqrt(((1 - 5 / 3) ** 2 + 2 * (2 - 5 / 3) ** 2) / 2)
    assert error == pytest.approx(spread / math.sqrt(3))
    assert gain(found, "SDMP", (50000, 2), "knn")[::2] == (pytest.approx(-2.0), 2)  # the third seed has no partner
    assert gain(found, "SDMP", (10000, 10), "knn") is None
    assert math.isnan(mean_and_error([0.5])[1])


def test_the_table_and_the_finding_show_losing_cells_too(tmp_path: Path):
    found = document(tmp_path / "map.json", NUMBERS)
    rows = [line.split(" | ") for line in table(found).splitlines()[2:]]
    assert [row[0].strip("| ") + " " + row[2] for row in rows] == [
        "2,500 MoCo v3",
        "2,500 SDMP",
        "10,000 MoCo v3",
        "50,000 MoCo v3",
        "50,000 SDMP",
    ]
    assert rows[0][3:6] == ["3", "42.00 ± 1.15", "53.00 ± 1.00"] and rows[0][6] == ""
    assert rows[1][6:8] == ["+1.67 ± 0.33", "+2.00 ± 0.00"]
    assert rows[2][4:6] == ["35.00", "not measured"]
    assert rows[4][6] == "-2.00 ± 0.00"
    assert finding(found) == (
        "SDMP beside MoCo v3 at equal student cost: by kNN ahead in 1, behind in 0, undecided in 1; by linear ahead in "
        "0, behind in 0, undecided in 1 of the settings. In points, images x passes (± standard error; bold is decided: "
        "the 95 % interval of 3 or more seeds excludes 0): kNN **+1.67 ± 0.33** (2,500 x 40), -2.00 ± 0.00 (50,000 x 2, 2 "
        "seeds); linear +2.00 ± 0.00 (2,500 x 40, 2 seeds)."
    )  # linear was measured once at 50,000, and that says nothing


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([1.0, 1.1], "undecided"),
        ([-1.0, -1.2, -1.1], "behind"),
        ([1.0, 1.2, 1.1], "ahead"),
        ([1.0, -1.2, 1.1], "undecided"),
    ],
)
def test_fewer_than_three_seeds_decide_nothing(found: list[float], said: str):
    assert reproduced.verdict(found) == said


def test_a_difference_within_its_interval_is_undecided(tmp_path: Path):
    """+1.67 ± 0.67: 2.5 standard errors, of three seeds not enough."""
    numbers = {("MoCo v3", 2500, 40): [0.40, 0.42, 0.44], ("SDMP", 2500, 40): [0.41, 0.43, 0.47]}
    assert "kNN +1.67 ± 0.67 (2,500 x 40);" in finding(document(tmp_path / "map.json", numbers))


def test_the_intervals_are_students():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for freedom, width in reproduced.T95.items():
        assert width == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.006)


def test_a_training_that_diverged_is_shown_and_counts_in_no_mean(tmp_path: Path):
    document(tmp_path / "map.json", {("MoCo v3", 2500, 40): [0.4, 0.5], ("SDMP", 2500, 40): [0.5, 0.7]})
    state, cell = State(tmp_path / "map.json", "map-small", MACHINE), Cell("SDMP", 2500, 40, 2)
    state.spend(cell, "d", 60.0)
    state.add(cell, "d", {"knn": None, "linear": None, "failed": "not finite"})
    row = table(load(tmp_path / "map.json")).splitlines()[-1]
    assert "| SDMP | 3, 1 failed | 60.00 ± 10.00 |" in row
    assert reproduced.words(state.document["cells"][-1]) == "failed: not finite"


def test_one_seed_says_nothing(tmp_path: Path):
    found = document(tmp_path / "map.json", {("MoCo v3", 2500, 40): [0.4], ("SDMP", 2500, 40): [0.9]})
    assert "nothing can be said" in finding(found)


def test_a_cell_of_other_settings_is_another_and_takes_its_place(tmp_path: Path):
    state, cell = State(tmp_path / "map.json", "map-small", MACHINE), Cell("SDMP", 2500, 40, 0)
    state.spend(cell, "old", 5.0)
    state.spend(cell, "old", 7.0)
    state.add(cell, "old", {"knn": 0.5, "linear": None})
    again = State(tmp_path / "map.json", "map-small", MACHINE)
    assert again.has(cell, "old") and not again.has(cell, "new") and again.document["cells"][0]["seconds"] == 12.0
    again.spend(cell, "new", 1.0)
    again.add(cell, "new", {"knn": 0.6, "linear": None})
    assert [found["digest"] for found in load(tmp_path / "map.json")["cells"]] == ["new"]
    with pytest.raises(SystemExit, match="expected table5"):
        State(tmp_path / "map.json", "table5", MACHINE)
    (tmp_path / "other.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(SystemExit, match="holds no results"):
        load(tmp_path / "other.json")


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path):
    """Both have read the empty file before either writes."""
    states = [State(tmp_path / "map.json", "map-small", MACHINE) for _ in range(2)]
    for number, state in enumerate(states):
        cell = Cell("SDMP", 2500, 40, number)
        state.spend(cell, "d", 3600.0)
        state.add(cell, "d", {"knn": 0.5, "linear": None})
    found = load(tmp_path / "map.json")
    assert [cell["seed"] for cell in found["cells"]] == [0, 1]
    assert not states[0].has(Cell("SDMP", 2500, 40, 1), "d")
    states[0].document = states[0].read()
    assert states[0].has(Cell("SDMP", 2500, 40, 1), "d")
    assert reproduced.hours_for(found, [Cell("SDMP", 2500, 160, 0)]) == pytest.approx(4.0)
    assert reproduced.hours_for({"cells": []}, []) is None


def test_the_page_gets_its_section_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    page = tmp_path / "reproduction.md"
    page.write_text("before\n<!-- map-small:begin -->\nFORMER\n<!-- map-small:end -->\nafter\n")
    readme = tmp_path / "README.md"
    readme.write_text("one\n<!-- map-small-finding:begin -->\nFORMER\n<!-- map-small-finding:end -->\ntwo\n")
    monkeypatch.setattr(reproduced, "PAGE", page)
    monkeypatch.setattr(reproduced, "README", readme)
    found = document(tmp_path / "map.json", NUMBERS)
    assert write(found) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "FORMER" not in text
    assert table(found) in text and "12 trainings, 0.2 hours on Test CPU, 2 cores" in text
    assert readme.read_text() == (
        f"one\n<!-- map-small-finding:begin -->\n{finding(found)}\n<!-- map-small-finding:end -->\ntwo\n"
    )
    assert (tmp_path / "reproduction-map-small.png").stat().st_size > 10_000
    assert write({**found, "cells": []}) == 2 and page.read_text() == text


def test_the_picture_holds_every_point(tmp_path: Path):
    found = document(tmp_path / "map.json", NUMBERS)
    axes = reproduced.figure(found).axes
    assert [panel.get_title(loc="left") for panel in axes[:3]] == ["2,500 images", "10,000 images", "50,000 images"]
    lines = [held.lines[0] for held in axes[0].containers]
    assert [line.get_ydata().tolist() for line in lines] == [[pytest.approx(42.0)], [pytest.approx(131 / 3)]]
    left, right = (line.get_xdata().item() for line in lines)
    assert 37 < left < 40 < right < 43, "the arms stand beside each other"


def bars(panel) -> list[float]:
    """The lengths of a panel's error bars that are drawn."""
    segments = [segment for held in panel.containers for drawn in held.lines[2] for segment in drawn.get_segments()]
    return [float(ends[1, 1] - ends[0, 1]) for ends in segments if len(ends)]


def test_one_seed_has_no_error_bar(tmp_path: Path):
    one = {("MoCo v3", 2500, 40): [0.4], ("SDMP", 2500, 40): [0.9]}
    assert bars(reproduced.figure(document(tmp_path / "one.json", one)).axes[0]) == []
    assert len(bars(reproduced.figure(document(tmp_path / "map.json", NUMBERS)).axes[0])) == 2


def test_the_page_has_a_place_for_every_experiment():
    text = reproduced.PAGE.read_text(encoding="utf-8")
    for name in ("map-small", "table5-small", "table5"):
        assert f"<!-- {name}:begin -->" in text and f"<!-- {name}:end -->" in text
    assert "<!-- map-small-finding:begin -->" in reproduced.README.read_text(encoding="utf-8")
