"""Arms in processes of their own: what a row is made of, and that such a process does what it is asked."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import apart, question, soft_cross_entropy
from bench.__main__ import main
from bench.harness import Arm, Budget, Call, Model, OutOfTime, Setting
from bench.results import ARM, ROW, validate

CPU = torch.device("cpu")


def setting(*arms):
    return Setting("op", "op", {}, lambda _: {}, list, list, (), torch.float32, arms, Model(1000, 1500, 10))


def arm(name, kind):
    return Arm(name, f"{name}, in words", kind, lambda _: Call(list))


def entry(of, status="ok", **more):
    told = {"name": of.name, "kind": of.kind, "what": of.what, "graph": False, "errors": [], "status": status}
    return told | more


def pretended(arms, times, started, failing=(), absent=()):
    """`start`: hands out each arm's times in turn, and notes the order."""
    by_name = {one.name: one for one in arms}
    left = {name: list(values) for name, values in times.items()}

    def start(name, part):
        started.append((name, part))
        of = by_name[name]
        if name in absent:
            return entry(of, "absent", reason=f"{name} is not installed")
        if part == apart.CHECK:
            return entry(of, extra_peak_bytes=64, memory_method="counted", launches=None, host_syncs=None, seconds={})
        if name in failing:
            return entry(of, "failed", reason="its process ended with exit code -9: killed")
        seconds = left[name].pop(0)
        return entry(of, seconds={"p20": seconds, "p50": seconds, "p80": seconds, "rounds": 4})

    return start


def test_no_process_is_started_after_the_deadline():
    arms, started, told = [arm("sdmp cpp", "ours"), arm("eager", "eager")], [], []
    start = pretended(arms, {}, started)
    with pytest.raises(OutOfTime):
        apart.measure(setting(*arms), CPU, start, print, told.append, Budget(deadline=time.monotonic() - 1))
    assert started == told == []


def test_a_row_is_made_of_three_interleaved_rounds_and_their_own_ratios():
    arms = [arm("copy", "ceiling"), arm("sdmp cpp", "ours"), arm("eager", "eager"), arm("kornia", "peer")]
    # A slow moment in the second round hits all arms alike.
    times = {"copy": [1.0, 10.0, 1.1], "sdmp cpp": [2.0, 20.0, 2.2], "eager": [8.0, 80.0, 8.8]}
    started, said = [], []
    row = apart.measure(setting(*arms), CPU, pretended(arms, times, started, absent=["kornia"]), said.append)
    assert row["ours"] == "sdmp cpp"
    told = {one["name"]: one for one in row["arms"]}
    assert told["eager"]["times_ours"] == pytest.approx({"p20": 4.0, "p50": 4.0, "p80": 4.0})
    assert told["sdmp cpp"]["share_of_copy"]["p50"] == pytest.approx(0.5)
    assert told["sdmp cpp"]["seconds"]["rounds"] == 3
    assert told["sdmp cpp"]["extra_peak_bytes"] == 64
    assert told["sdmp cpp"]["gb_per_s"] == pytest.approx(1000 / 2.2 / 1e9)
    assert said == ["    kornia: absent (kornia is not installed)"]
    rounds = started[len(arms) :]
    assert [part for _, part in started[: len(arms)]] == [apart.CHECK] * len(arms)
    for number in range(apart.ROUNDS):
        assert sorted(rounds[3 * number : 3 * number + 3]) == sorted((name, apart.TIME) for name in times)
    assert len({tuple(rounds[3 * n : 3 * n + 3]) for n in range(3)}) > 1


def test_an_arm_whose_process_dies_is_named_and_has_no_time():
    arms = [arm("sdmp cpp", "ours"), arm("eager", "eager")]
    start = pretended(arms, {"sdmp cpp": [1.0] * 3}, [], failing=["eager"])
    row = apart.measure(setting(*arms), CPU, start, lambda _: None)
    told = {one["name"]: one for one in row["arms"]}
    assert told["eager"]["status"] == "failed"
    assert "exit code -9" in told["eager"]["reason"]
    assert "seconds" not in told["eager"]
    assert set(told["eager"]) <= {name.removesuffix("?") for name in ARM}
    assert set(row) <= {name.removesuffix("?") for name in ROW}


def test_the_losses_on_a_cpu_are_measured_so_and_short_runs_and_gpus_are_not():
    cuda = torch.device("cuda")
    assert question.measured_apart("losses", CPU, "default")
    assert question.measured_apart("losses", CPU, "full")
    assert not question.measured_apart("losses", CPU, "quick")
    assert not question.measured_apart("losses", cuda, "default")
    assert not question.measured_apart("mix", CPU, "default")


def tiny(seconds=0.0):
    """The start of real processes for the smallest setting."""
    asked = soft_cross_entropy.setting(n=4, columns=64, dtype=torch.float32, device=CPU, size="tiny")
    args = argparse.Namespace(seconds=seconds, size="tiny")
    return asked, apart.starter("losses", asked, CPU, args)


def test_a_process_checks_weighs_and_times_its_arm_and_one_that_fails_says_so():
    _, start = tiny()
    checked = start("eager gathered", apart.CHECK)
    assert checked["status"] == "ok"
    assert checked["errors"][0]["output"] == "loss"
    assert "extra_peak_bytes" in checked
    timed = start("eager gathered", apart.TIME)
    assert timed["seconds"]["rounds"] >= 3
    assert timed["seconds"]["p50"] > 0
    assert "extra_peak_bytes" not in timed


def test_a_process_that_ends_badly_is_a_failed_arm(monkeypatch):
    _, start = tiny()
    done = subprocess.CompletedProcess([], -11, "", "warming up\nSegmentation fault\n")
    monkeypatch.setattr(apart.subprocess, "run", lambda *words, **options: done)
    told = start("eager gathered", apart.CHECK)
    assert told["status"] == "failed"
    assert told["reason"] == "its process ended with exit code -11: Segmentation fault"


@pytest.fixture
def threads():
    """As many threads afterwards as before."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_the_command_makes_a_whole_document(tmp_path, monkeypatch, threads):
    """`bench losses` with the smallest setting measured apart; its processes are calls of the same command here."""
    asked, run = [], subprocess.run

    def settings(device, size):
        made = soft_cross_entropy.setting(n=4, columns=64, dtype=torch.float32, device=device, size="tiny")
        yield replace(made, arms=[one for one in made.arms if one.name in ("copy", "sdmp torch")])

    def process(words, **options):
        if list(words[:3]) != [sys.executable, "-m", "bench"]:
            return run(words, **options)  # git and the like, which say what the machine is
        asked.append(words[words.index("--arm") + 1])
        return subprocess.CompletedProcess(words, main(words[3:]), "", "")

    monkeypatch.setitem(question.SETTINGS, "losses", settings)
    monkeypatch.setattr(question, "measured_apart", lambda *_: True)
    monkeypatch.setattr(apart.subprocess, "run", process)
    path = tmp_path / "x.json"
    command = ["losses", "--tiny", "--device", "cpu", "--threads", str(threads), "--json", str(path)]
    assert main(command) == 0
    assert len(asked) == 2 * (1 + apart.ROUNDS)
    document = json.loads(path.read_text())
    assert validate(document) == []
    assert document["runs"]["losses"]["processes"].startswith("one to check each arm")
    (row,) = document["rows"]
    assert row["ours"] == "sdmp torch"
    assert {one["name"]: one["status"] for one in row["arms"]} == {"copy": "ok", "sdmp torch": "ok"}
    assert "share_of_copy" in row["arms"][1]
