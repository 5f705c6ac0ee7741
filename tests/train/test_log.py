"""Lines for people, numbers for programs."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from sdmp_train.log import Log


def test_lines_before_the_folder_is_open_are_kept(tmp_path: Path):
    with Log(console=Console(file=io.StringIO())) as log:
        log.say("before")
        log.open(tmp_path)
        log.say("after [not markup]")
    assert (tmp_path / "train.log").read_text() == "before\nafter [not markup]\n"


def test_numbers_that_json_lacks_become_null(tmp_path: Path):
    with Log(console=Console(file=io.StringIO())) as log:
        log.open(tmp_path)
        log.metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
    }


def test_every_report_is_in_the_file_but_few_on_a_plain_output(tmp_path: Path):
    screen = io.StringIO()
    with Log(console=Console(file=screen)) as log:
        log.open(tmp_path)
        log.start_progress(3, 0)
        for step in range(3):
            log.report(f"step {step}")
            log.advance(step)
    assert screen.getvalue() == "step 0\n"
    assert (tmp_path / "train.log").read_text() == "step 0\nstep 1\nstep 2\n"


def test_a_terminal_gets_a_live_line():
    screen = io.StringIO()
    with Log(console=Console(file=screen, force_terminal=True, width=100)) as log:
        log.start_progress(10, 0)
        log.report("step 5 loss 1.0")
        log.advance(5)
    assert "step 5 loss 1.0" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()


def test_other_ranks_are_silent(tmp_path: Path, capsys):
    with Log(quiet=True) as log:
        log.open(tmp_path)
        log.say("x")
        log.report("y")
        log.metrics({"step": 1})
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
