"""The tuner: what it tries, that it only takes what is right and clearly faster, and that the table is put back."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench import tune
from bench.environment import ROOT
from bench.harness import Arm, Call, Setting
from sdmp_kernels import _launch


def test_neighbours_are_powers_of_two_within_what_a_kernel_can_have():
    assert tune.neighbours("block", 1024) == [512, 2048]
    assert tune.neighbours("block", 16) == [32]
    assert tune.neighbours("num_warps", 4) == [2, 8]
    assert tune.neighbours("num_warps", 16) == [8]
    assert tune.neighbours("num_stages", 3) == [2, 4]
    assert tune.neighbours("num_stages", 1) == [2]
    assert tune.neighbours("block", 48) == []
    assert tune.neighbours("order", "ij") == []
    assert tune.neighbours("peel", True) == [False] and tune.neighbours("peel", False) == [True]
    assert tune.neighbours("programs", 1) == [2] and tune.neighbours("programs", 2048) == [1024, 4096]
    assert tune.neighbours("slice", 0) == []
    assert tune.neighbours("anchor", 0) == [4096] and tune.neighbours("anchor", 8192) == [0]


def workload(wrong_above=10**9):
    """A kernel whose time falls with its block, and whose answer is wrong above some block."""

    def run():
        block = _launch.constants("cpu", "op.kernel.small")["block"]
        total = sum(range(40_000_000 * 64 // block**2))
        return [torch.tensor([1.0 if block <= wrong_above else 2.0 + 0 * total])]

    setting = Setting("op", "op small", {}, lambda _: {}, list, list, ("y",), torch.float32, [])
    return tune.Workload(setting, Call(run), ["op.kernel.small"], [torch.tensor([1.0])])


def test_it_walks_to_the_faster_entry():
    table = {"op.kernel.small": {"block": 64}}
    chosen, line = tune.best(workload(), "op.kernel.small", table, torch.device("cpu"), dry=True)
    assert chosen == {"block": 128}
    assert "op.kernel.small: block=128" in line
    assert table == {"op.kernel.small": {"block": 64}}


def test_it_jumps_to_constants_that_the_op_wants_together(monkeypatch):
    """Neither a block of 256 nor one warp could be reached alone."""
    together = {"block": 256, "num_warps": 1}
    monkeypatch.setattr(tune, "others", lambda key, device: [together] if key == "op.kernel.small" else [])
    monkeypatch.setattr(tune, "neighbours", lambda *_: [])
    table = {"op.kernel.small": {"block": 64, "num_warps": 4, "order": "ij"}}
    chosen, _ = tune.best(workload(), "op.kernel.small", table, torch.device("cpu"), dry=True)
    assert chosen == {"block": 256, "num_warps": 1, "order": "ij"}


def test_what_an_op_wants_tried_is_found_and_fits_its_table(monkeypatch):
    monkeypatch.setattr(tune._launch, "architecture", lambda _: "sm_90")
    key = "info_nce.attend.half.256"
    (together,) = tune.others(key, torch.device("cpu"))
    present = _launch.table("sm_90")[key]
    assert set(together) < set(present) and not together.items() <= present.items()
    assert tune.others("info_nce.scale.any", torch.device("cpu")) == tune.others("op.kernel.small", None) == []


def test_a_faster_entry_with_another_answer_is_not_taken(capsys):
    table = {"op.kernel.small": {"block": 64}}
    chosen, line = tune.best(workload(wrong_above=64), "op.kernel.small", table, torch.device("cpu"), dry=True)
    assert chosen == {"block": 64}
    assert "kept" in line
    assert "block=128: wrong" in capsys.readouterr().out


def test_a_run_that_is_cut_leaves_what_it_found(tmp_path, monkeypatch):
    """The losses first, and the file anew after every key."""
    made = [Setting(op, op, {}, lambda _: {}, list, list, ("y",), torch.float32, []) for op in ("mix", "info_nce")]
    monkeypatch.setattr(tune.mix, "settings", lambda *_: made[:1])
    monkeypatch.setattr(tune.losses, "settings", lambda *_: made[1:])
    monkeypatch.setattr(tune, "elsewhere", lambda *_: ())
    monkeypatch.setattr(tune, "bind", lambda setting, *_: tune.Workload(setting, Call(list), [setting.op], []))

    def best(work, key, *_):
        if key == "mix":
            raise KeyboardInterrupt
        return {"block": 128}, key

    monkeypatch.setattr(tune, "best", best)
    present = {"mix": {"block": 1}, "info_nce": {"block": 1}}
    path = tmp_path / "table.json"
    with pytest.raises(KeyboardInterrupt):
        tune.tune(present, torch.device("cpu"), None, dry=True, seconds=60, path=path)
    assert json.loads(path.read_text()) == {"mix": {"block": 1}, "info_nce": {"block": 128}}


def test_the_librarys_own_table_is_in_force_again_afterwards():
    """Also after an error, and one table within another; the backward pass's own thread sees it too."""
    own = dict(_launch.table("sm_80"))
    table, inner = tune.Table({"a.b.c": {"block": 1}}), tune.Table({"a.b.c": {"block": 2}})

    def fail():
        with _launch.table_in_force(inner):
            assert _launch.constants("cpu", "a.b.c") == {"block": 2}
            raise RuntimeError("no such kernel")

    with _launch.table_in_force(table):
        with pytest.raises(RuntimeError, match="no such kernel"):
            fail()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(_launch.constants, "cpu", "a.b.c").result() == {"block": 1}
        assert table.read == inner.read == ["a.b.c"]
    assert _launch.table("sm_80") == own


def test_an_entry_that_is_cached_cannot_be_measured(capsys):
    cached = Call(lambda: [torch.tensor([1.0])])
    setting = Setting("op", "op small", {}, lambda _: {}, list, list, ("y",), torch.float32, [])
    asked = tune.Workload(setting, cached, ["k"], [torch.tensor([1.0])])
    chosen, _ = tune.best(asked, "k", {"k": {"block": 64}}, torch.device("cpu"), dry=True)
    assert chosen == {"block": 64}
    assert "was not read again" in capsys.readouterr().out


def test_a_setting_without_a_triton_arm_is_passed_over():
    arm = Arm("sdmp torch", "", "ours", lambda _: Call(list))
    setting = Setting("op", "op small", {}, lambda _: {}, list, list, ("y",), torch.float32, [arm])
    assert tune.bind(setting, {}, torch.device("cpu")) is None


def test_dry_run_writes_a_whole_table(tmp_path):
    """The same path through the interpreter, in a process of its own."""
    out = tmp_path / "table.json"
    command = [sys.executable, "-m", "bench", "tune", "--dry-run", "--op", "mix", "--minutes", "0", "--out", str(out)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    assert set(written) == set(_launch.table(_launch.DEFAULT_ARCH))
    assert "mix." in done.stdout
