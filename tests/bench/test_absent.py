"""What is not on a machine is named absent, with its reason, and never reads as passed; what is broken is not absent."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from bench_documents import arm, row

from bench import checks, gpu, question
from bench.environment import ROOT, shared_data
from bench.harness import EXIT_ABSENT, Absent, Arm, Budget, Call, Setting, absence, measure
from bench.results import Results

CPU = torch.device("cpu")
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def without(folder, *names):
    """An environment whose Python, and every Python it starts, cannot import these packages."""
    (folder / "sitecustomize.py").write_text(BLOCK.format(names=names))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def child(command, env, timeout=300):
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def raised(make):
    try:
        make()
    except Exception as error:
        return error


def imported(name):
    return raised(lambda: __import__(name))


def test_a_package_that_is_not_installed_is_absent_and_a_module_of_ours_that_is_gone_is_broken():
    assert absence(Absent("needs 40 GB")) == "needs 40 GB"
    assert absence(imported("libdouble.fast")) == "libdouble is not installed"
    assert absence(imported("sdmp_train.gone")) is None
    assert absence(imported("bench.gone")) is None
    assert absence(raised(lambda: [][0])) is None

    def wrapped():
        try:
            __import__("libdouble")
        except ImportError as error:
            raise RuntimeError("the loader does not start") from error

    assert absence(raised(wrapped)) == "libdouble is not installed"


def importing(name):
    def bind(_):
        __import__(name)
        return Call(list)

    return Arm(f"with {name}", "", "ours", bind)


@pytest.mark.parametrize(("name", "status"), [("libdouble", "absent"), ("sdmp_train.gone", "failed")])
def test_arms_are_told_apart_so(name, status):
    setting = Setting("op", "op", {}, lambda _: {}, lambda _: [], lambda _: [], (), torch.float32, [importing(name)])
    budget = Budget(seconds=0.0, min_rounds=1, max_rounds=1, warmup_seconds=0.0)
    measured = measure(setting, CPU, budget, lambda _: None)
    assert measured["arms"][0]["status"] == status
    gaps = {gap.kind for gap in question.gaps_of(measured)}
    assert gaps == ({"lacking", "absent"} if status == "absent" else {"broken"})
    again = replace(setting, inputs=lambda _: __import__(name))
    assert question._unmeasured(again, raised(lambda: again.inputs(0))).kind == (
        "absent" if status == "absent" else "broken"
    )


def test_an_absent_peer_is_lacking_and_a_wrong_arm_of_ours_is_broken():
    made = row(arms=[arm("sdmp cpp", "ours", 1.0), arm("kornia", "peer", status="absent")])
    assert [gap[:2] for gap in question.gaps_of(made)] == [("lacking", "kornia")]
    made = row(arms=[arm("sdmp cpp", "ours", 1.0), arm("sdmp torch", "ours", status="wrong")])
    assert [gap[:2] for gap in question.gaps_of(made)] == [("broken", f"{made['setting']}, sdmp torch")]


def test_a_check_of_which_a_part_is_absent_is_absent(tmp_path):
    state = gpu.Run(tmp_path / "x.json", "cpu", True, ends=0.0)

    def bench(*words, seconds):
        Results(state.path).check("nosync mix", "passed", "", 0)
        Results(state.path).check("nosync training step", "absent", "timm is not installed", 0)
        return checks.exit_code(["passed", "absent"])

    state.bench = bench
    gpu.check("nosync")(state, 10.0)
    told = Results(state.path).document["checks"]["nosync"]
    assert told["status"] == "absent"
    assert told["detail"].endswith("nosync training step: timm is not installed")
    assert checks.exit_code(["passed", "absent", "failed"]) == 1
    assert checks.exit_code(["passed"]) == 0
    assert checks.exit_code([]) == EXIT_ABSENT


def stage_run(tmp_path, code, change):
    """`gpu`'s record of a stage whose process ended so, having written what `change` does."""
    state = gpu.Run(tmp_path / "x.json", "cpu", True, ends=0.0)

    def bench(*words, seconds):
        results = Results(state.path)
        results.begin("mix", threads=1, allocator="default")
        change(results)
        return code

    state.bench = bench
    gpu.question("mix")(state, 10.0)
    return state, {name: check["status"] for name, check in Results(state.path).document["checks"].items()}


def test_stages_say_passed_only_where_everything_was_there(tmp_path):
    assert stage_run(tmp_path, 0, lambda results: None)[1] == {"bench mix": "passed"}
    state, told = stage_run(tmp_path, EXIT_ABSENT, lambda results: results.gap("mix", "absent", "mixup", "no backend"))
    assert told["bench mix"] == "absent"
    assert state.absent == ["bench mix (not all of it could run here. mixup: no backend)"]
    assert stage_run(tmp_path, 1, lambda results: None)[1]["bench mix"] == "failed"
    assert stage_run(tmp_path, None, lambda results: None)[1]["bench mix"] == "out of time"
    assert stage_run(tmp_path, 0, lambda results: results.skip("mix", "cutmix"))[1]["bench mix"] == "out of time"
    told = stage_run(tmp_path, 0, lambda results: results.gap("mix", "lacking", "kornia", "kornia is not installed"))[1]
    assert told == {"bench mix": "passed", "bench mix, kornia": "absent"}


def step_stage(tmp_path, monkeypatch, *blocked):
    """(`gpu`'s record, its checks, its rows) of the stage that times training steps, without some packages."""
    for name, value in without(tmp_path, *blocked).items():
        monkeypatch.setenv(name, value)  # of the process that the stage starts
    state = gpu.Run(tmp_path / "dry.json", "cpu", True, ends=time.monotonic() + 300)
    gpu.question("step")(state, 300.0)
    assert state.failed == state.cut == []
    document = json.loads(state.path.read_text())
    return state, document["checks"], document["rows"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_without_timm_the_step_does_not_read_as_passed(tmp_path, monkeypatch):
    state, checks, _ = step_stage(tmp_path, monkeypatch, "timm")
    assert checks["bench step"]["status"] == "absent"
    assert "timm is not installed" in checks["bench step"]["detail"]
    assert any(text.startswith("bench step (") for text in state.absent)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_without_tyro_the_step_is_measured_all_the_same_and_without_dali_its_loader_is_named(tmp_path, monkeypatch):
    _, checks, rows = step_stage(tmp_path, monkeypatch, "tyro", "nvidia")
    step = next(row for row in rows if row["setting"].startswith("training step, "))
    assert step["ours"] == "MoCo v3 + SDMP"
    assert checks["bench step"]["status"] == "absent"
    assert checks["bench step, dali"]["status"] == "absent"
    assert checks["bench step, fed by dali"]["status"] == "absent"


NO_SYNC = """
import pathlib, torch
from bench import checks
from bench.results import Results
# The ops' own calls are tested elsewhere; here the training step counts.
checks.mix.settings = checks.losses.settings = lambda device, size: ()
results = Results(pathlib.Path("{path}"))
raise SystemExit(checks.run("nosync", torch.device("cpu"), tiny=True, results=results))
"""


@pytest.mark.parametrize(("blocked", "code", "status"), [("timm", EXIT_ABSENT, "absent"), ("tyro", 0, "passed")])
def test_the_training_step_of_the_sync_check_is_absent_without_timm_and_there_without_tyro(
    tmp_path, blocked, code, status
):
    path = tmp_path / "x.json"
    done = child([sys.executable, "-c", NO_SYNC.format(path=path)], without(tmp_path, blocked))
    assert done.returncode == code, done.stdout + done.stderr
    found = Results(path).document["checks"]["nosync training step"]
    assert found["status"] == status
    assert blocked != "timm" or found["detail"] == "timm is not installed"


def test_settings_need_no_command_line_library(tmp_path):
    """Presets, files and checks; only the command line itself asks for tyro."""
    script = """
import dataclasses, typing
from sdmp_train import config, presets
made = presets.get_preset("quickstart")
assert typing.get_type_hints(config.Config, include_extras=True)
print(dataclasses.replace(made.optim, batch_size=4).batch_size)
"""
    done = child([sys.executable, "-c", script], without(tmp_path, "tyro"))
    assert done.stdout.strip() == "4", done.stderr


def test_shared_data_lies_in_the_repository_or_beside_it(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    assert shared_data("a.tar", root) is None
    beside, inside = (folder / "shared" / "data" / "a.tar" for folder in (tmp_path, root))
    for path in (beside, inside):
        path.parent.mkdir(parents=True)
        path.write_text("")
        assert shared_data("a.tar", root) == path
