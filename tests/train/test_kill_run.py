"""A run of two processes under torchrun on a slow disk, killed: the short form of `tests/kill_run.py`."""

from __future__ import annotations

from pathlib import Path

import kill_run
import pytest
from kill_run import Bench, Launch, at_event, judge

from sdmp_train.checkpoint import load_checkpoint, newest_checkpoint


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_kills_lose_nothing_that_was_saved(kills: int, tmp_path: Path):
    tally = kill_run.kill_many(tmp_path, kills=kills, seed=3)
    assert tally.wrong == []
    assert len(tally.launches) == kills


def test_a_signal_to_all_while_the_last_checkpoint_is_written_waits_for_it(bench: Bench):
    """The scheduler signals launcher and workers, and the launcher signals the workers again, in the midst of a save."""
    bench.slow_seconds = 0.3
    launch = bench.launch(at_event("saves", 2, "SIGTERM", "all", times=2))
    assert judge(bench, launch, -1) == []
    assert launch.codes == {0: 75, 1: 75}
    saves = [int(str(e["step"])) for e in launch.events if e["event"] == "saves"]
    assert launch.saved == saves and len(saves) >= 2
    left = [float(str(e["time"])) for e in launch.events if e["event"] == "exit"]
    last_save = max(float(str(e["time"])) for e in launch.events if e["event"] == "saved")
    assert min(left) > last_save  # no rank has left before the checkpoint was whole
    assert newest_checkpoint(bench.run / "checkpoints").name == f"step-{saves[-1]:06d}"


@pytest.mark.slow
def test_a_save_longer_than_the_launchers_patience_leaves_the_one_before(bench: Bench):
    bench.options = ["--shutdown-timeout", "2"]
    bench.launch(at_event("step", 1, "SIGTERM", "all"))
    former = load_checkpoint(newest_checkpoint(bench.run / "checkpoints"))[1]["step"]
    bench.slow_seconds = 3.0
    launch = bench.launch(at_event("step", 1, "SIGTERM", "all"))
    assert 0 not in launch.codes and launch.saved == []  # the first rank was killed in the midst of it
    assert judge(bench, Launch("", launch.events), former) == []
    assert load_checkpoint(newest_checkpoint(bench.run / "checkpoints"))[1]["step"] == former


@pytest.mark.slow
def test_a_live_run_is_not_gone_on_with(bench: Bench, tmp_path: Path):
    (tmp_path / "other").mkdir()
    other = Bench(tmp_path / "other")
    other.run = bench.run
    seen: list[Launch] = []

    def second(bench: Bench, agent: object, launch: Launch) -> None:
        kill_run.wait_until(lambda: bench.happened("step") > 0, kill_run.PATIENCE_SECONDS)
        seen.append(other.launch())

    bench.slow_seconds = 0.3
    assert bench.launch(second).codes == {0: 0, 1: 0}
    assert seen[0].codes == {0: 2, 1: 2}
    assert "is in use by process" in (other.folder / "output").read_text()
