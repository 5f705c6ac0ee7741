"""Cells that can be stopped and go on, shares of the images, and measures against scikit-learn and known answers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import environment, reproduce, reproduced
from bench.__main__ import main
from bench.reproduce import Cell, Experiment, config_of, digest, gain_map, linear, share, table5
from sdmp_train import run_folder
from sdmp_train.evaluate.knn import Features
from sdmp_train.presets import get_preset


def arguments(**changes) -> argparse.Namespace:
    given = {
        "small": True,
        "width": 4,
        "epochs": None,
        "seeds": None,
        "minutes": None,
        "data": None,
        "only": None,
        "part": None,
    }
    given |= {"device": "cpu", "folder": None, "json": None, "write": False, "experiment": "map"}
    return argparse.Namespace(**{**given, **changes})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the same form: 2 classes, 24 training and 8 test images of each, told apart by their colour."""
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for name, level in (("dark", 60), ("light", 180)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 50, level + 50, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.jpg")
    return root


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """Two arms of three steps an epoch; what `reproduce map` runs."""
    monkeypatch.setattr(reproduce, "LABELLED", 48)
    recipe = reproduce.narrow(get_preset("cifar10-r18-sdmp"), 4, batch_size=8)
    recipe = replace(recipe, data=replace(recipe.data, workers=0), method=replace(recipe.method, dim=16, mlp_dim=16))
    cells = tuple(Cell(arm, 24, 2, 0) for arm in ("MoCo v3", "SDMP"))
    experiment = Experiment("map-small", cells, recipe, 48, small=True)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "map", lambda args: experiment)
    monkeypatch.setattr(reproduce, "loader", lambda: "torchvision")
    return experiment


def test_cells_run_stop_and_go_on_and_nothing_is_measured_twice(small, pictures: Path, tmp_path: Path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    places = {"data": pictures, "folder": tmp_path / "runs", "json": tmp_path / "map.json"}
    assert reproduce.run(arguments(**places, minutes=1e-6)) == reproduce.LATER
    assert (
        "2 of 2 cells are left: the same command goes on with mocov3-24-images-2-epochs-seed-0"
        in capsys.readouterr().out
    )
    assert reproduce.run(arguments(**places)) == reproduce.DONE
    document = reproduced.load(places["json"])
    assert [cell["arm"] for cell in document["cells"]] == ["MoCo v3", "SDMP"] and document["spent"] == {}
    for cell in document["cells"]:
        assert cell["bank"] == 48 and cell["queries"] == 16 and 0 <= cell["knn"] <= 1 and cell["seconds"] > 0
        steps = (tmp_path / "runs" / cell["name"] / "metrics.jsonl").read_text()
        assert json.loads(steps.splitlines()[-1])["step"] == 6
    before = places["json"].read_text()
    capsys.readouterr()
    assert reproduce.run(arguments(**places)) == reproduce.DONE
    assert places["json"].read_text() == before and "[1/2]" not in capsys.readouterr().out


def test_a_cell_that_another_process_trains_is_left_to_it(small, monkeypatch, pictures: Path, tmp_path: Path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    first, second = (cell.name for cell in small.cells)
    held = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    (tmp_path / "runs" / first).mkdir(parents=True)
    lock = tmp_path / "runs" / first / run_folder.LOCK
    command = [sys.executable, "-c", held, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        places = {"data": pictures, "folder": tmp_path / "runs", "json": tmp_path / "map.json"}
        assert reproduce.run(arguments(**places)) == reproduce.LATER
        other.communicate(b"\n")
    assert [cell["name"] for cell in reproduced.load(places["json"])["cells"]] == [second]
    said = capsys.readouterr().out
    assert "left to another process: the run folder" in said and "1 of 2 cells are left" in said


def test_a_stopped_cell_is_the_unbroken_one(small, pictures: Path, tmp_path: Path):
    """Stopped after a step, gone on with: the same features to the last bit."""
    from sdmp_train.stop import StopRequest

    cell, found = small.cells[1], []
    for name, after in (("whole", None), ("broken", 2)):
        config = config_of(small, cell, pictures, tmp_path / name, "cpu")
        stop = StopRequest()
        if after is not None:
            short = replace(config, run=replace(config.run, max_steps=after))
            assert reproduce.train(short, tmp_path / name / cell.name, stop, quiet=True) == 0
        assert reproduce.train(config, tmp_path / name / cell.name, stop, quiet=True) == 0
        found.append(reproduce.measure(tmp_path / name / cell.name, pictures, 0, "cpu"))
        exported = (tmp_path / name / cell.name / "exported" / "model.safetensors").read_bytes()
        found[-1]["weights"] = exported
    assert found[0]["weights"] == found[1]["weights"] and found[0]["knn"] == found[1]["knn"]
    stop.asked = True
    assert reproduce.train(config, tmp_path / "new" / cell.name, stop, quiet=True) == reproduce.LATER


def test_the_papers_kind_of_linear_evaluation_is_that_of_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from sdmp_train.evaluate import command

    class Asked(dict):
        @staticmethod
        def function():
            return evaluate

    def evaluate(config):
        assert (config["run"], config["data"], config["device"]) == (str(tmp_path), "images", "cpu")
        return {"top1": 0.75}

    monkeypatch.setitem(command.PROTOCOLS, "linear", Asked)
    assert reproduce.by_protocol(tmp_path, Path("images"), "cpu")["linear"] == 0.75
    monkeypatch.delitem(command.PROTOCOLS, "linear")
    assert reproduce.by_protocol(tmp_path, Path("images"), "cpu")["no_linear"] == "this version has no eval linear"


def test_a_measurement_that_is_stopped_is_gone_on_with_later(small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The clock reaches the request of an evaluation at work; the cell is no result until it is measured."""
    import time

    from sdmp_train.stop import StopRequest

    def measure(*_):
        with StopRequest() as own:
            own.speaks = False
            while True:
                own.check()
                time.sleep(0.01)

    monkeypatch.setattr(reproduce, "measure", measure)
    with reproduce.stopping_at(time.monotonic() + 0.2) as stop:
        assert reproduce.worth_of(small, tmp_path, tmp_path, "cpu") is None
        assert stop.asked


def test_a_share_is_spread_over_the_classes(pictures: Path, tmp_path: Path):
    place = share(pictures, 12, tmp_path)
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*.jpg"))
    assert names == [f"{name}/{number:02}.jpg" for name in ("dark", "light") for number in (0, 4, 9, 13, 18, 23)]
    assert (place / "dark" / "04.jpg").read_bytes() == (pictures / "train" / "dark" / "04.jpg").read_bytes()
    assert share(pictures, 12, tmp_path) == place
    late = tmp_path / "late"
    (late / "dark").mkdir(parents=True)
    assert reproduce.put_in_place(late, place) == place and not late.exists()  # another process was first
    with pytest.raises(SystemExit, match="50 are asked"):
        share(pictures, 100, tmp_path)


def test_arms_differ_in_their_method_alone(small, pictures: Path, tmp_path: Path):
    configs = [config_of(small, cell, pictures, tmp_path, "cpu") for cell in small.cells]
    assert configs[0].method.mixing == "none" and configs[1].method.mixing == "sdmp"
    assert replace(configs[0], method=configs[1].method) == configs[1]
    assert configs[0].method.dim == 16 and configs[0].optim.warmup_epochs == 0.2
    assert digest(configs[0]) != digest(configs[1])
    moved = replace(configs[0], data=replace(configs[0].data, data="elsewhere", loader="dali"))
    assert digest(moved) == digest(configs[0])  # the same numbers come of it


def test_the_cheap_cells_come_first_and_every_arm_of_a_seed_together():
    cells = gain_map(arguments()).cells
    costs = [cell.images * cell.epochs for cell in cells]
    assert costs == sorted(costs) and costs[0] == 100_000
    batch = gain_map(arguments()).recipe.optim.batch_size
    assert all(images % batch == 0 for images in {cell.images for cell in cells})  # no image is left out of a pass
    arms = len(reproduce.arms_there_are())
    for first in range(0, len(cells), arms):
        assert len({(c.images, c.epochs, c.seed) for c in cells[first : first + arms]}) == 1
    assert {cell.seed for cell in cells} == {0, 1, 2}
    with pytest.raises(SystemExit, match="--small"):
        gain_map(arguments(small=False))


def test_parts_are_every_cell_once():
    cells = list(gain_map(arguments()).cells)
    parts = [reproduce.part_of(cells, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(cell for part in parts for cell in part) == sorted(cells)
    assert reproduce.part_of(cells, None) == cells
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(SystemExit, match="expected i/n"):
            reproduce.part_of(cells, wrong)


def test_table5_is_the_papers_row(tmp_path: Path):
    experiment = table5(arguments(small=False))
    config = config_of(experiment, experiment.cells[-1], tmp_path, tmp_path, "cpu")
    preset = get_preset("table5/cifar10-r50-sdmp")
    assert (config.model, config.method, config.optim, config.run.preset) == (
        preset.model,
        preset.method,
        preset.optim,
        "table5/cifar10-r50-sdmp",
    )
    small = table5(arguments())
    assert small.cells[0].epochs == 20 and small.recipe.model.width == 4 and small.labelled > 0


def test_the_linear_classifier_on_known_answers():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(0)

    def features(count: int, noise: float) -> Features:
        labels = torch.arange(count) % 3
        rows = torch.eye(5)[labels] + noise * torch.randn(count, 5, generator=generator)
        return Features(torch.nn.functional.normalize(rows, dim=1), labels)

    assert linear(features(150, 0.05), features(60, 0.05)) == (1.0, "")
    bank, queries = features(300, 1.0), features(150, 1.0)
    found, _ = linear(bank, queries, strengths=(0.1,))
    x = (bank.rows - bank.rows.mean(0)) / bank.rows.std(0)
    model = linear_model.LogisticRegression(C=0.1, max_iter=5000, tol=1e-8).fit(x.numpy(), bank.labels.numpy())
    asked = (queries.rows - bank.rows.mean(0)) / bank.rows.std(0)
    assert found == pytest.approx(model.score(asked.numpy(), queries.labels.numpy()), abs=1e-9)
    assert 0.4 < found < 0.95


def test_without_scikit_learn_there_is_a_reason(small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(reproduce.importlib.util, "find_spec", lambda name: None)
    assert reproduce.run(arguments(json=tmp_path / "map.json", data=tmp_path)) == reproduce.WRONG
    assert "needs scikit-learn" in capsys.readouterr().out and not (tmp_path / "map.json").exists()
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    rows = Features(torch.eye(4), torch.arange(4))
    assert linear(rows, rows) == (None, "scikit-learn is not installed")


def test_the_command_line_knows_it(tmp_path: Path, capsys):
    with pytest.raises(SystemExit, match="no results"):
        main(["reproduce", "map", "--small", "--write", "--json", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="2"):
        main(["reproduce", "table9"])
    assert environment.ROOT.name not in capsys.readouterr().out
