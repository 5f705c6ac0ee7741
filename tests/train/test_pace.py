"""What a run says of its own length, and that saying it changes nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from tiny_runs import CPU

from sdmp_train import pace
from sdmp_train.checkpoint import load_checkpoint, newest_checkpoint
from sdmp_train.cli import main
from sdmp_train.commands import pretrain
from sdmp_train.config import Config
from sdmp_train.cost import image_gflop
from sdmp_train.pace import Pace, is_long, measure_pace, too_much


def test_the_line_says_what_was_measured_and_what_follows():
    assert Pace(1.5, 2.0, 8, 8).line(100) == (
        "time     1.50 s a step (fastest of 3, on noise), without loading: 100 steps take 2 min 30 s; peak memory 2.0 GiB"
    )
    assert "scaled from 8 to 96 images" in Pace(1.5, 2.0, 8, 96).line(100)


def test_a_large_batch_is_scaled_from_few_images(tiny: Config, monkeypatch):
    monkeypatch.setattr(pace, "FEW", 4)
    monkeypatch.setattr(pace, "FEW_GFLOP", 0.0)
    found = measure_pace(replace(tiny, optim=replace(tiny.optim, batch_size=4096)), CPU, 3)
    assert found is not None
    assert (found.images, found.rows) == (4, 4096)
    assert found.seconds > 0
    assert found.memory_gib > 0


def test_only_long_steps_of_a_cpu_are_measured_before_a_run(tiny: Config):
    rows = int(pace.LONG_GFLOP / image_gflop(tiny)) + 1
    assert not is_long(tiny, CPU)
    assert is_long(replace(tiny, optim=replace(tiny.optim, batch_size=rows)), CPU)


def test_a_run_that_was_timed_is_the_same_run(tiny: Config, tmp_path: Path, monkeypatch, capsys):
    config = replace(tiny, run=replace(tiny.run, max_steps=2, knn_max_images=0))
    torch.manual_seed(5)
    assert pretrain(config, tmp_path / "plain") == 0
    monkeypatch.setattr(pace, "LONG_GFLOP", 0.0)
    torch.manual_seed(5)
    assert pretrain(config, tmp_path / "timed") == 0
    drawn = torch.rand(1)
    assert re.search(r"^time     .* a step .*: 2 steps take ", capsys.readouterr().out, re.MULTILINE)
    plain, timed = (load_checkpoint(newest_checkpoint(tmp_path / n / "checkpoints"))[0] for n in ("plain", "timed"))
    for part, tensors in plain.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, timed[part][name]), (part, name)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_plan_says_hours_and_memory(image_folder: Path, capsys):
    words = ["--preset", "quickstart", "-b", "8", "--depth", "1", "--device", "cpu", "-j", "0", "--data"]
    assert main(["plan", *words, str(image_folder)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^time     .* steps take .*; peak memory [\d.]+ GiB$", printed, re.MULTILINE)
    assert re.search(
        r"^weights  \d+ MiB of memory: weights, gradients, moments.*\n\Z", printed, re.MULTILINE
    )  # at the end
    assert "warning" not in printed


def test_a_peak_beyond_the_machine_is_warned_of():
    has = pace.machine_gib(CPU.device)
    assert has is not None
    assert too_much(Pace(1.0, has - 1, 8, 8), CPU.device) is None
    said = too_much(Pace(1.0, 7 * has, 8, 8), CPU.device)
    assert said is not None and f"more than the {has:.1f} GiB of this machine" in said


def test_the_fastest_of_the_steps_after_the_first_counts(tiny: Config, monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 14.0, 20.0, 22.0, 30.0, 33.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(pace, "step", lambda *_: None)
    found = measure_pace(tiny, CPU, 3)
    assert found is not None and found.seconds == 2.0 * found.rows / found.images
