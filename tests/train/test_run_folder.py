"""Whose a run folder is: claimed by one run, locked while that lives, deleted only where all of it is ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdmp_train import run_folder
from sdmp_train.card import CARD_MARK
from sdmp_train.config import Config, ConfigError, RunConfig, save_config
from sdmp_train.run_folder import LOCK, MARKER, check_folder, claim, strangers

HOLD = """
import os, sys, time
from pathlib import Path
from sdmp_train.run_folder import claim
held = claim(Path(sys.argv[1]), "auto")
if os.fork() == 0:  # as the loader's workers are
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


@contextmanager
def held(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has claimed the folder and has forked a child; both are gone after the block."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        yield holder, child
    finally:
        for pid in (holder.pid, child):
            if pid != holder.pid or holder.poll() is None:
                os.kill(pid, signal.SIGKILL)
        holder.wait()


def test_a_default_name_that_is_taken_gets_a_number(tmp_path: Path):
    first = claim(tmp_path / "runs" / "now", "new", may_rename=True)
    second = claim(tmp_path / "runs" / "now", "new", may_rename=True)
    third = claim(tmp_path / "runs" / "now", "new", may_rename=True)
    assert [f.path.name for f in (first, second, third)] == ["now", "now-2", "now-3"]
    assert len({f.run_id for f in (first, second, third)}) == 3
    marker = json.loads((first.path / MARKER).read_text())
    assert marker["program"] == "sdmp_train" and marker["format"] == 1 and marker["run"] == first.run_id
    with pytest.raises(ConfigError, match=r"holds an unfinished run; --resume goes on"):
        claim(first.path, "new")
    assert claim(first.path, "resume").run_id == first.run_id


@pytest.mark.parametrize(
    ("step", "total", "max_steps", "said"),
    [
        (8, 8, None, "is finished: all 8 steps are made (its schedules end.* a new one, with more --epochs"),
        (3, 8, 3, "is finished at its --max-steps, 3 of 8; --resume with a larger one goes on"),
        (3, 8, None, r"holds an unfinished run of 20\d\d-\d\d-\d\d \d\d:\d\d; --resume goes on with it"),
        (3, None, None, r"holds an unfinished run of 20\d\d-\d\d-\d\d \d\d:\d\d; --resume goes on with it"),
    ],
)
def test_a_run_that_is_finished_is_said_to_be(
    step: int, total: int | None, max_steps: int | None, said: str, tmp_path: Path
):
    with claim(tmp_path / "run", "new") as mine:
        saved = mine.path / "checkpoints" / f"step-{step:06d}"
    save_config(Config(run=RunConfig(max_steps=max_steps)), mine.path / "config.yaml")
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"step": step, "total_steps": total}))
    (mine.path / "checkpoints" / "latest").write_text(saved.name)
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        check_folder(mine.path, "new")


def test_only_one_process_writes_and_a_dead_one_does_no_harm(tmp_path: Path):
    run = tmp_path / "run"
    with held(run) as (holder, child):
        before = sorted(p.name for p in run.iterdir())
        for mode in ("resume", "auto", "overwrite"):
            with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on \S+;"):
                claim(run, mode)
        with pytest.raises(ConfigError, match="holds an unfinished run"):
            check_folder(run, "new")
        assert sorted(p.name for p in run.iterdir()) == before
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # the forked child lives on, and holds nothing
        with claim(run, "resume"):
            pass


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    assert "No locks available" in (claim(tmp_path / "run", "new").unlocked or "")


def test_a_claim_that_died_at_once_can_be_taken_over(tmp_path: Path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / LOCK).write_text("process 1 on nowhere\n")
    assert claim(tmp_path / "bare", "new").run_id
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / MARKER).write_text("")
    assert claim(tmp_path / "empty", "resume").run_id
    assert json.loads((tmp_path / "empty" / MARKER).read_text())["run"]


def fill(run: Path) -> None:
    """All that a run, its kills and its repairs leave behind."""
    for folder in ("step-000001", "step-000002.damaged", "step-000003.abandoned-1", "step-000004.tmp-9"):
        (run / "checkpoints" / folder).mkdir(parents=True)
        for name in ("model.safetensors", "state.json", "manifest.json"):
            (run / "checkpoints" / folder / name).write_text("x")
    (run / "checkpoints" / "step-000004.tmp-9" / ".half.tmp").write_text("x")
    (run / "checkpoints" / "latest").write_text("step-000001")
    (run / "exported").mkdir()
    (run / "exported.tmp-9").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "train.log", "mix.png", "config.yaml.tmp-77", "exported/config.json"):
        (run / name).write_text("x")


def test_overwrite_deletes_a_run_and_all_of_it(tmp_path: Path):
    run = tmp_path / "run"
    with claim(run, "new") as former:
        fill(run)
    check_folder(run, "overwrite")
    with claim(run, "overwrite") as new:
        assert new.run_id != former.run_id
        assert sorted(p.name for p in run.iterdir()) == [MARKER, LOCK, "checkpoints"]
        assert list((run / "checkpoints").iterdir()) == []


def write(path: Path) -> None:
    path.write_text("years of work")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("thesis.txt", write),
        ("checkpoints/best.pth", write),
        ("checkpoints/step-000001/notes.txt", write),
        ("checkpoints/step-best", Path.mkdir),
        ("exported/notes.txt", write),
        (".git", Path.mkdir),
        ("config.yaml", Path.mkdir),
        ("mix.png", lambda path: path.symlink_to("/etc/hostname")),
        ("exported", lambda path: path.symlink_to("/etc")),
    ],
)
def test_overwrite_refuses_and_names_what_no_run_has_written(name: str, make: Callable[[Path], object], tmp_path: Path):
    run = tmp_path / "run"
    with claim(run, "new"):
        pass
    (run / "checkpoints" / "step-000001").mkdir()
    if name.startswith("exported/"):
        (run / "exported").mkdir()
    make(run / name)
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match=f"{run / name} is something else"):
        claim(run, "overwrite")
    assert sorted(run.rglob("*")) == before


def test_overwrite_takes_no_other_programs_folder_for_a_run(tmp_path: Path):
    hydra, old, other = tmp_path / "hydra", tmp_path / "old", tmp_path / "other"
    for folder in (hydra, old, other):
        folder.mkdir()
        (folder / "config.yaml").write_text("defaults: []\n")
    (old / "checkpoints").mkdir()
    (other / MARKER).write_text('{"program": "something else"}')
    for folder in (hydra, old, other):
        with pytest.raises(ConfigError, match="deletes run folders only"):
            claim(folder, "overwrite")
        assert (folder / "config.yaml").exists()
    with pytest.raises(ConfigError, match="not a run folder"):
        check_folder(hydra, "resume")
    with claim(old, "resume"):  # a run of a version without the marker goes on, and gets one
        assert json.loads((old / MARKER).read_text())["program"] == "sdmp_train"
    check_folder(old, "overwrite")


def test_leftovers_of_a_kill_are_cleaned_when_the_run_goes_on(tmp_path: Path):
    run = tmp_path / "run"
    with claim(run, "new"):
        fill(run)
        (run / "images-0123456789abcdef.jsonl.gz.tmp-9").write_text("x")
        (run / "my.tmp-1").mkdir()
    with claim(run, "resume"):
        pass
    assert [str(p.relative_to(run)) for p in sorted(run.rglob("*.tmp-*"))] == ["my.tmp-1"]
    assert (run / "config.yaml").exists()
    assert (run / "checkpoints" / "step-000003.abandoned-1").is_dir()


@pytest.mark.parametrize("harm", [os.mkfifo, lambda path: path.write_text("[" * 10**5)], ids=["pipe", "deep"])
def test_a_marker_made_by_others_is_no_marker(harm: Callable[[Path], object], tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    harm(run / MARKER)
    with pytest.raises(ConfigError, match="deletes run folders only"):
        check_folder(run, "overwrite")


def test_a_lock_that_is_a_link_or_a_pipe_is_not_written(tmp_path: Path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for make in (lambda lock: lock.symlink_to(mine), os.mkfifo):
        with claim(tmp_path / "run", "auto"):
            pass
        (tmp_path / "run" / LOCK).unlink()
        make(tmp_path / "run" / LOCK)
        with pytest.raises(ConfigError, match="cannot be made"):
            claim(tmp_path / "run", "resume")
        (tmp_path / "run" / LOCK).unlink()
    assert mine.read_text() == "precious"


def test_an_edited_model_card_is_not_ours_to_delete(tmp_path: Path) -> None:
    card = tmp_path / "exported" / "README.md"
    card.parent.mkdir()
    card.write_text(f"---\n{CARD_MARK}\n# a net\n")
    assert list(strangers(tmp_path)) == []
    card.write_text("# my notes\n")
    assert list(strangers(tmp_path)) == [card]
