"""The op matrix of `bench gpu`: every share's outcomes are on disk as they come, whatever ends it, and none is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from ops import matrix as trials

from bench import gpu, matrix, shard
from bench.environment import ROOT
from bench.results import Results, load

TESTS = ("test_values", "test_gradients", "test_inputs_of_any_layout")
ENV = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def items():
    """Tests as pytest collects them: test by test, op by op."""
    found = list(trials.trials())
    return [
        SimpleNamespace(originalname=test, callspec=SimpleNamespace(params={"trial": trial}))
        for test in TESTS
        for trial in found
    ]


def described(item):
    return item.originalname, str(shard.trial_of(item))


def test_what_proves_most_comes_first_and_ops_take_turns(items):
    ordered = [(test, shard.trial_of(item)) for item in shard.by_value(items) for test in [item.originalname]]
    assert Counter(map(described, items)) == Counter(map(described, shard.by_value(items)))
    backends = [trial.backend for _, trial in ordered]
    assert backends == sorted(backends, key=shard.BACKENDS.index)
    first = [trial for test, trial in ordered if trial.backend == "reference" and test == "test_values"]
    assert {str(trial.dtype) for trial in first[:20]} == {"torch.bfloat16"}
    assert len({trial.op for trial in first[:4]}) == 4, "the first cases of all ops come before any op's second"
    tests = [test for test, trial in ordered if trial.backend == "reference"]
    assert tests == sorted(tests, key=TESTS.index)


@pytest.mark.parametrize("of", [1, 3, 16])
def test_shares_are_even_and_together_everything_and_a_trial_stays_with_one(items, of):
    ordered = shard.by_value(items)
    shares = [shard.share(ordered, number + 1, of) for number in range(of)]
    assert Counter(map(described, ordered)) == Counter(described(item) for one in shares for item in one)
    assert max(map(len, shares)) - min(map(len, shares)) <= len(TESTS)
    homes = [{str(shard.trial_of(item)) for item in one} for one in shares]
    assert sum(map(len, homes)) == len(set().union(*homes))


def line(op, outcome, test="test_values", where="triton-cuda", why=""):
    return {"op": op, "outcome": outcome, "test": test, "where": where, "trial": f"{op}-a", "why": why, "seconds": 0.1}


def journal_of(path, *lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_a_journal_is_counted_also_where_its_last_line_was_cut(tmp_path):
    path = journal_of(
        tmp_path / "j.jsonl",
        {"shard": "1/2", "planned": {"mix": 3}},
        {"shard": "2/2", "planned": {"mix": 2, "info_nce": 1}},
        line("mix", "passed"),
        line("mix", "skipped", where="cuda-cuda"),
        line("mix", "failed", test="test_gradients", why="assert 1 <= 0"),
    )
    path.write_text(path.read_text() + '{"op": "mix", "outc')
    found = matrix.read(path)
    assert found["mix"].outcomes == {"passed": 1, "skipped": 1, "failed": 1}
    assert found["mix"].values == {"triton-cuda": 1}
    assert found["mix"].left == 2
    assert found["mix"].words == "1 passed, 1 failed, 1 skipped of 5; test_gradients[mix-a]: assert 1 <= 0"
    assert found["info_nce"].left == 1
    assert matrix.read(tmp_path / "none.jsonl")["mix"].planned == 0


@pytest.mark.parametrize(
    ("planned", "outcomes", "codes", "status"),
    [
        (2, {"passed": 2}, [0, 0], "passed"),
        (2, {"passed": 2}, [0, None], "passed"),  # the share that was cut held another op's tests
        (2, {"passed": 1, "failed": 1}, [0, 1], "failed"),
        (2, {"passed": 1, "failed": 1}, [None], "failed"),
        (5, {"passed": 2}, [None], "out of time"),
        (5, {"passed": 2}, [0, -11], "failed"),  # a process that died took the rest along
        (0, {}, [0, 5], "absent"),
        (0, {}, [None], "out of time"),
        (0, {}, [4], "failed"),
    ],
)
def test_an_op_is_judged_by_what_came_out_and_how_its_processes_ended(planned, outcomes, codes, status):
    assert matrix.judge(matrix.Tally(planned, Counter(outcomes)), codes)[0] == status


def test_a_matrix_process_killed_at_any_moment_leaves_the_outcomes_so_far(tmp_path):
    journal = tmp_path / "j.jsonl"
    chosen = ["-k", "test_values and soft_cross_entropy and reference"]
    process = subprocess.Popen(
        matrix.command(journal, *chosen), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while sum(matrix.read(journal)["soft_cross_entropy"].outcomes.values()) < 3:
        assert process.poll() is None or matrix.read(journal)["soft_cross_entropy"].outcomes["passed"] >= 3
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    tally = matrix.read(journal)["soft_cross_entropy"]
    assert tally.outcomes["passed"] >= 3
    assert tally.planned > 20
    assert {json.loads(one)["test"] for one in journal.read_text().splitlines()[1:-1]} == {"test_values"}


WRITER = """
import pathlib, sys, time
journal = pathlib.Path(sys.argv[1])
journal.write_text('{"shard": "1/1", "planned": {"mix": 9}}\\n' + sys.argv[2] + "\\n")
time.sleep(100)
"""


def test_a_share_that_runs_out_reports_what_passed(tmp_path):
    state = gpu.Run(tmp_path / "x.json", "cpu", True, ends=0.0)
    state.child = lambda *words, seconds, quiet: (
        journal_of(tmp_path / "x.matrix.jsonl", {"shard": "1/1", "planned": {"mix": 9}}, line("mix", "passed")) and None
    )
    gpu.op_matrix(state, 1.0)
    told = Results(state.path).document["checks"]
    assert told["op matrix mix"]["status"] == "out of time"
    assert "1 passed, 0 failed, 0 skipped of 9" in told["op matrix mix"]["detail"]
    assert told["op matrix mix"]["facts"]["triton-cuda"] == 1
    assert state.failed == []


def test_a_run_killed_in_the_middle_has_written_what_it_had_found(tmp_path):
    """The whole run is killed, not asked to end; the results file holds the outcomes so far."""
    script = f"""
import pathlib, sys
from bench import matrix
from bench.results import Results
path = pathlib.Path({str(tmp_path / "x.json")!r})
def child(words):
    import subprocess
    return subprocess.run(words).returncode
def say(op, status, detail, facts):
    Results(path).check(f"op matrix {{op}}", status, detail, 0.0, **facts)
command = [sys.executable, "-c", {WRITER!r}, {str(tmp_path / "j.jsonl")!r}, {json.dumps(line("mix", "passed"))!r}]
matrix.run([command], pathlib.Path({str(tmp_path / "j.jsonl")!r}), child, say, every_seconds=0.05)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=ENV, start_new_session=True)
    deadline = time.monotonic() + 120
    try:
        while not (tmp_path / "x.json").exists() or "op matrix mix" not in load(tmp_path / "x.json")["checks"]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    told = load(tmp_path / "x.json")["checks"]["op matrix mix"]
    assert told["status"] == "out of time"
    assert "1 passed, 0 failed, 0 skipped of 9" in told["detail"]
