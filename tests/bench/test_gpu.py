"""The ten-minute proof, walked without a GPU: the same stages at tiny sizes, through Triton's interpreter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import checks, gpu
from bench.environment import ROOT
from bench.results import Results, validate


def bench(*words, timeout=570, **env):
    command = [sys.executable, "-m", "bench", *words]
    given = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=given | env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(what it printed, its document)."""
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU, run `make gpu` itself")
    path = tmp_path_factory.mktemp("dry") / "dry.json"
    done = bench("gpu", "--dry-run", "--json", str(path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout, json.loads(path.read_text())


def test_every_stage_runs_and_nothing_fails(dry_run):
    printed, document = dry_run
    for stage in gpu.STAGES:
        assert f"== {stage.name} " in printed
    assert {name: run["skipped"] for name, run in document["runs"].items() if run["skipped"]} == {}
    assert "nothing failed" in printed
    statuses = {name: check["status"] for name, check in document["checks"].items()}
    assert "failed" not in statuses.values(), statuses
    assert "out of time" not in statuses.values(), statuses
    for stage in ("large", "nosync", "bench mix", "bench losses"):
        assert statuses[stage] == "passed", statuses


def test_the_document_is_whole(dry_run):
    _, document = dry_run
    assert validate(document) == []
    assert document["dry_run"] is True
    assert {run for run, facts in document["runs"].items() if facts["finished"]} == {"gpu", "mix", "losses", "step"}
    assert document["ceilings"]["copy_gb_per_s"] > 0
    assert any(goal["goal"] == "G12" for goal in document["goals"])


def test_no_arm_is_wrong_or_broken(dry_run):
    """Peers included: what is called otherwise than its version wants would show here."""
    _, document = dry_run
    bad = [
        (row["setting"], arm["name"], arm["reason"])
        for row in document["rows"]
        for arm in row["arms"]
        if arm["status"] in ("wrong", "failed")
    ]
    assert bad == []


def test_triton_ran_through_the_interpreter(dry_run):
    _, document = dry_run
    ran = {
        row["op"]
        for row in document["rows"]
        for arm in row["arms"]
        if arm["name"] == "sdmp triton" and arm["status"] == "ok"
    }
    assert {"mix", "soft_cross_entropy", "info_nce"} <= ran
    large = {
        name for name, check in document["checks"].items() if name.startswith("large") and check["status"] == "passed"
    }
    assert {"large mix triton", "large soft_cross_entropy triton", "large info_nce triton"} <= large


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench("gpu")
    assert done.returncode == 2
    assert "--dry-run" in done.stdout


def test_a_stage_that_hangs_is_ended(tmp_path):
    state = gpu.Run(tmp_path / "x.json", "cpu", True, ends=0.0)
    assert state.child(sys.executable, "-c", "import time; time.sleep(60)", seconds=1) is None
    assert state.child(sys.executable, "-c", "raise SystemExit(3)", seconds=60) == 3


def test_the_proof_tunes_after_it_has_timed(tmp_path, monkeypatch):
    names = [stage.name for stage in gpu.PROOF]
    assert names.index("losses") < names.index("step") < names.index("tune") < names.index("sanitizer")
    assert set(names) == {stage.name for stage in gpu.STAGES} | {"tune"}
    state = gpu.Run(tmp_path / "x.json", "cpu", True, ends=0.0)
    calls = []
    codes = iter([0, 1, None])

    def child(*words, seconds):
        calls.append(words)
        return next(codes)

    monkeypatch.setattr(state, "child", child)
    for status in ("passed", "failed", "out of time"):
        gpu.tune_losses(state, 60.0)
        assert json.loads(state.path.read_text())["checks"]["tune info_nce"]["status"] == status
    assert calls[0][1:] == ("-m", "bench", "tune", "--op", "info_nce", "--dry-run")


@pytest.mark.parametrize(("code", "status"), [(0, "passed"), (99, "failed"), (1, "failed"), (None, "out of time")])
def test_the_sanitizer_runs_every_small_call(tmp_path, monkeypatch, code, status):
    state = gpu.Run(tmp_path / "x.json", "cuda", False, ends=0.0)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    asked = []

    def child(*words, seconds, env):
        asked.append((words, env))
        Results(Path(words[words.index("--json") + 1])).check("small mix, sdmp triton", "passed", "ran", 1)
        return code

    monkeypatch.setattr(state, "child", child)
    gpu.sanitizer(state, 60.0)
    found = json.loads(state.path.read_text())["checks"]
    assert [found[f"compute-sanitizer {tool}"]["status"] for tool in gpu.SANITIZER_TOOLS] == [status] * 3
    assert all(words[words.index("check") + 1] == "small" for words, _ in asked)
    assert all(env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for _, env in asked)


def test_small_calls_are_those_of_every_op(tmp_path, monkeypatch):
    every = list(checks._calls(torch.device("cpu"), checks.mix, checks.losses, checks.augment))
    assert any("triton" in name for name, _ in every)
    # Interpreted, they are walked by the dry run.
    monkeypatch.setattr(checks, "_calls", lambda *_: [call for call in every if "triton" not in call[0]])
    results = Results(tmp_path / "small.json")
    assert checks.run("small", torch.device("cpu"), tiny=True, results=results) == 0
    found = results.document["checks"]
    assert {check["status"] for check in found.values()} == {"passed"}
    ops = " ".join(found)
    assert all(words in ops for words in ("mixup", "info_nce", "soft_cross_entropy", "distillation", "view"))


def test_what_is_finished_is_passed_over(tmp_path, monkeypatch, capsys):
    """Of this commit, where nothing is changed; not what failed or was cut, nor with --again."""
    ran = []

    def stage(name, status):
        return lambda state, seconds: (ran.append(name), state.note(name, status, "", 0))

    kinds = ("passed", "failed", "out of time", "absent")
    stages = [gpu.Stage(kind, 1, stage(kind, kind)) for kind in kinds]
    stages.append(gpu.Stage("pictures", 1, stage("pictures", "passed"), always=True))
    monkeypatch.setattr(gpu.environment, "commit", lambda *but: head)
    later = ["failed", "out of time", "pictures"]
    for head, again, expected in (
        (("a", False), False, [*kinds, "pictures"]),
        (("a", False), False, later),
        (("a", False), True, [*kinds, "pictures"]),
        (("a", True), False, [*kinds, "pictures"]),
        (("b", False), False, [*kinds, "pictures"]),
        (("b", False), False, later),
    ):
        ran.clear()
        gpu.run_stages(gpu.Run(tmp_path / "x.json", "cpu", True, time.monotonic() + 60, again), stages)
        assert ran == expected, head
    assert "passed: finished at" in capsys.readouterr().out
    assert validate(json.loads((tmp_path / "x.json").read_text())) == []


PARENT = """
import pathlib, signal, sys, time
from bench import gpu, matrix
child = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(100)"
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
state = gpu.Run(pathlib.Path("x.json"), "cpu", True, ends=time.monotonic() + 100)
command = [sys.executable, "-c", child, sys.argv[1]]
try:
    if sys.argv[2] == "alone":
        state.child(*command, seconds=100)
    else:
        run = lambda words: state.child(*words, seconds=100)
        matrix.run([command], pathlib.Path(sys.argv[1] + "-journal"), run, lambda *told: None)
finally:
    for process in list(state.children):
        gpu.end(process)
"""


@pytest.mark.parametrize("how", ["alone", "as a share of the matrix"])
def test_a_run_that_is_told_to_end_takes_its_children_along(tmp_path, how):
    note = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(note), how], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not note.exists() or not note.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_the_slice_for_pytest_benchmark_runs():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-disable",
        "bench/test_slice.py",
    ]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
