"""What is read of a run folder is what was written there, and nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from written_runs import write_run

from sdmp_train.config import Config, ConfigError
from sdmp_train.evaluate.record import departures, paper_row, read_record
from sdmp_train.presets import get_preset


def test_numbers_come_back_by_epoch(tiny: Config, tmp_path: Path):
    record = read_record(write_run(tmp_path / "run", tiny))
    assert record.steps_per_epoch == 4
    assert record.series("knn") == ([0.0, 1.0], [0.25, 0.75])
    epochs, losses = record.series("loss")
    assert epochs == [0.5, 1.0] and losses[0] == 3.5 and math.isnan(losses[1])  # null: it was not finite
    assert record.mean("loss") == 3.5
    assert record.mean("data_wait_fraction") == 0.375
    assert record.last("loss_clean") == 1.0 and record.last("never") is None and record.mean("never") is None
    assert record.step == 4


def test_the_last_line_of_a_kind_counts(tiny: Config, tmp_path: Path):
    said = read_record(write_run(tmp_path / "run", tiny)).said
    assert said["device"].startswith("CPU (1 threads")
    assert said["knn"] == "k = 20, 28 bank, 8 queries"
    assert "steps" not in said  # "step 4/8 ..." is another line


def test_torn_and_strange_lines_are_passed_over(tiny: Config, tmp_path: Path):
    folder = write_run(tmp_path / "run", tiny)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": "5", "loss": 1}\n{"step": 6, "loss": "x", "lr": 0.5}\n{"step": 7, "lo')
    record = read_record(folder)
    assert record.step == 6 and record.last("lr") == 0.5 and record.series("loss")[0] == [0.5, 1.0]


def test_what_is_not_there_is_empty(tiny: Config, tmp_path: Path):
    folder = write_run(tmp_path / "run", tiny, rows=(), log="")
    (folder / "train.log").unlink()
    (folder / "metrics.jsonl").unlink()
    record = read_record(folder)
    assert (record.rows, record.said, record.evaluations, record.pictures, record.step) == ((), {}, (), {}, 0)
    assert math.isnan(record.steps_per_epoch)
    with pytest.raises(ConfigError, match="no run folder"):
        read_record(tmp_path)


def test_pictures_are_files_of_the_folder_alone(tiny: Config, tmp_path: Path):
    folder = write_run(tmp_path / "run", tiny)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "attention.png").write_bytes(b"")
    captions = {"attention.png": "heads", "absent.png": "gone", "../../secret.png": "elsewhere"}
    (folder / "pictures" / "captions.json").write_text(json.dumps({"captions": captions}))
    assert read_record(folder).pictures == {"attention.png": "heads"}


def test_a_run_is_held_against_its_preset(tmp_path: Path):
    preset = get_preset("table5/cifar10-r50-sdmp")
    assert paper_row(preset).result.startswith("89.5 %")
    assert paper_row(get_preset("quickstart")) is None
    chosen = replace(preset, data=replace(preset.data, loader="dali"), run=replace(preset.run, precision="fp32"))
    whole = [{"step": 40_000, "epoch": 200.0}]
    assert departures(read_record(write_run(tmp_path / "same", chosen, rows=whole))) == []
    other = replace(chosen, optim=replace(chosen.optim, batch_size=64))
    found = departures(read_record(write_run(tmp_path / "other", other, rows=[{"step": 40, "epoch": 2.0}])))
    assert found == ["optim.batch_size: 256 -> 64", "40 of 4000 steps are on record"]
