"""Two trainings in turns: stopped, gone on with, finished, written down; the epochs that fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu, reproduce, train
from bench.__main__ import main
from bench.harness import EXIT_ABSENT
from bench.results import Results, validate
from sdmp_train.curves import Curves
from sdmp_train.run import Run
from sdmp_train.run_folder import stored_config


def trained(place: Path, *words: str) -> int:
    given = ["--tiny", "--device", "cpu", "--json", str(place / "train.json"), "--folder", str(place / "runs")]
    return main(["train", *given, *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where both were stopped at once, and then gone on with."""
    place = tmp_path_factory.mktemp("train")
    with pytest.MonkeyPatch.context() as patch:
        # Each run's own pictures are tested elsewhere, and slow.
        patch.setattr(Curves, "last", lambda self: None)
        patch.setattr(Run, "picture", lambda self: None)
        assert trained(place, "--minutes", "1e-6") == reproduce.LATER
        assert trained(place) == reproduce.DONE
    return place


def test_a_turn_is_of_both_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut leaves both at the same epoch, or one a turn ahead."""
    order = []
    monkeypatch.setattr(
        reproduce, "train", lambda config, folder, *_, **__: order.append((folder.name, config.run.max_steps)) or 0
    )
    monkeypatch.setattr(
        train, "note", lambda results, folder: results.document.update(trainings=dict.fromkeys(train.PRESETS))
    )
    monkeypatch.setattr(train, "line_of", lambda name, told: name)
    assert trained(tmp_path) == reproduce.LATER
    assert order == [(name, steps) for steps in (14, 28) for name in train.PRESETS]


def test_both_make_all_their_epochs_in_turns(finished: Path) -> None:
    document = json.loads((finished / "train.json").read_text())
    assert validate(document) == []
    assert document["runs"]["train"]["finished"] is not None
    assert list(document["trainings"]) == list(train.PRESETS)
    for name, told in document["trainings"].items():
        assert told["epochs_done"] == told["epochs"] == train.TINY_EPOCHS
        assert told["loader"] == stored_config(finished / "runs" / name).data.loader == "resident"
        assert told["images_per_s"] > 0 and 0 <= told["data_wait_fraction"] <= 1
        assert "stall_p50" in told["stall"]
        assert [epoch for epoch, _ in told["knn"]] == [0, 1, 2] and told["knn"][-1][1] > 0.5
        assert len(told["loss"]) == told["step"] <= train.POINTS
    assert stored_config(finished / "runs" / train.PRESETS[1]).method.mixing == "sdmp"


def test_what_it_writes_is_small_enough_to_carry(finished: Path) -> None:
    state = gpu.Run(finished / "train.json", "cpu", True, ends=0.0)
    assert [place.name for place in gpu.written(state)] == ["train-curves.png", "train.json"]
    assert state.failed == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "LARGEST_BYTES", 10)
        gpu.written(state)
    assert len(state.failed) == 2 and "MiB" in state.failed[0]


def test_nothing_is_trained_twice(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "train", lambda *_, **__: pytest.fail("trained again"))
    assert trained(finished) == reproduce.DONE


def test_again_begins_anew(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(config, folder, stop, *, quiet, certified, overwrite):
        asked.append((folder.name, config.run.max_steps, certified, overwrite))
        return reproduce.DONE

    monkeypatch.setattr(reproduce, "train", noted)
    assert trained(finished, "--again") == reproduce.DONE
    assert asked == [(name, 14, True, True) for name in train.PRESETS]


def test_without_the_images_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(train.environment, "shared_data", lambda name: None)
    assert main(["train", "--json", str(tmp_path / "a.json"), "--folder", str(tmp_path / "runs")]) == EXIT_ABSENT
    assert "give --data DIR" in capsys.readouterr().out
    told = json.loads((tmp_path / "a.json").read_text())["runs"]["train"]
    assert "cifar10-jpeg.tar.xz" in told["absent"]["CIFAR-10"] and told["finished"] is None


def test_the_epochs_that_fit() -> None:
    assert train.epochs_that_fit(100, 7, 200) == 14
    assert train.epochs_that_fit(1, 7, 200) == 1
    assert train.epochs_that_fit(1e6, 7, 200) == 200
    assert train.milestones(10, 4) == [2, 5, 8, 10]
    assert train.milestones(1, 4) == [1]


def test_an_epoch_is_timed_by_the_trainer_s_own_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps of this very training, so many untimed and so many timed; the mean, times the steps of CIFAR-10."""
    made = []
    monkeypatch.setattr(train, "one_step", lambda training, batch: made.append((training, batch)))
    times = iter([0.0, 5.0, 10.0, 13.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(times))
    config = train.config_of(train.PRESETS[1], tmp_path, "cpu", tiny=True)
    assert train.epoch_seconds(config) == pytest.approx(3.0 / train.TIMED_STEPS * 50_000 // 8, rel=1e-3)
    assert len(made) == train.WARM_STEPS + train.TIMED_STEPS
    assert made[0][0].config.method == config.method and made[0][1].views[0].shape == (8, 3, 16, 16)


@pytest.mark.parametrize(
    ("code", "status"),
    [(0, "passed"), (75, "out of time"), (1, "failed"), (EXIT_ABSENT, "absent"), (None, "out of time")],
)
def test_the_stage_of_the_gpu_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, status: str
) -> None:
    state = gpu.Run(tmp_path / "x.json", "cuda", False, ends=0.0, again=True, folder=tmp_path / "kept")
    called = []

    def bench(*words: str, seconds: float) -> int | None:
        called.append(words)
        results = Results(state.path)
        results.begin("train", threads=1, allocator="default")
        results.gap("train", "absent", "CIFAR-10", "no archive")
        return code

    monkeypatch.setattr(state, "bench", bench)
    gpu.train(state, 600.0)
    (words,) = called
    assert words[:5] == ("train", "--device", "cuda", "--minutes", "9.50") and words[-1] == "--again"
    assert words[words.index("--folder") + 1] == str(tmp_path / "kept")
    assert json.loads(state.path.read_text())["checks"]["train"]["status"] == status
    assert bool(state.cut) is (status == "out of time") and bool(state.failed) is (status == "failed")


def test_images_live_on_the_device() -> None:
    for name in train.PRESETS:
        config = train.lasting(train.config_of(name, Path("data"), "auto", tiny=False), 20)
        assert config.data.loader == "resident" and config.run.preset == name
        assert (config.optim.epochs, config.optim.warmup_epochs, config.optim.batch_size) == (20, 2.0, 256)
