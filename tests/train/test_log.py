"""Lines for people, numbers for programs."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from sdmp_train.log import STAMP, Log


def said(folder: Path) -> list[str]:
    """The lines of train.log, each of which has its time in front."""
    lines = (folder / "train.log").read_text().splitlines()
    assert all(STAMP.match(line) for line in lines)
    return [STAMP.sub("", line) for line in lines]


def test_lines_before_the_folder_is_open_are_kept(tmp_path: Path):
    with Log(console=Console(file=io.StringIO())) as log:
        log.say("before")
        log.open(tmp_path)
        log.say("after [not markup]")
    assert said(tmp_path) == ["before", "after [not markup]"]


def test_numbers_that_json_lacks_become_null(tmp_path: Path):
    with Log(console=Console(file=io.StringIO())) as log:
        log.open(tmp_path)
        log.metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
        log.metrics({"step": 2, "time": 3.5})
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert abs(first.pop("time") - time.time()) < 60
    assert second == {"step": 2, "time": 3.5}
    assert first == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
    }


def test_every_report_is_in_the_file_but_few_and_the_last_on_a_plain_output(tmp_path: Path):
    screen = io.StringIO()
    with Log(console=Console(file=screen)) as log:
        log.open(tmp_path)
        log.start_progress(3, 0)
        for step in range(3):
            log.report(f"step {step}")
            log.advance(step)
        log.stop_progress()
        log.say("done")
    assert screen.getvalue() == "step 0\nstep 2\ndone\n"
    assert said(tmp_path) == ["step 0", "step 1", "step 2", "done"]


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


def test_a_full_disk_costs_lines_and_one_notice(tmp_path: Path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    screen = io.StringIO()
    with Log(console=Console(file=screen, width=1000)) as log:
        log.open(tmp_path)
        for word in ("one", "two"):
            log.say(word)
            log.metrics({"step": 1, "time": 2.0})
    notice = f"{tmp_path / 'train.log'} cannot be written (is the disk full?); the run goes on"
    assert screen.getvalue().splitlines() == ["one", notice, "two"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "time": 2.0}\n' * 2


def test_a_line_after_a_torn_one_begins_anew(tmp_path: Path):
    (tmp_path / "train.log").write_text("whole\nto")
    with Log(console=Console(file=io.StringIO())) as log:
        log.open(tmp_path)
        log.say("next")
    assert re.fullmatch(r"whole\nto\n[\d :-]{21}next\n", (tmp_path / "train.log").read_text())


def test_metrics_that_come_again_are_dropped_and_of_step_0_all(tmp_path: Path):
    lines = ['{"step": 0, "knn": 1}', '{"step": 1}', '{"step": 2}', '{"st']
    for from_step, left in ((1, 2), (0, 0)):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        with Log(console=Console(file=io.StringIO())) as log:
            log.open(tmp_path, from_step=from_step)
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:left]


def test_a_reader_that_goes_away_does_not_end_the_run():
    code = (
        "from sdmp_train.log import Log\n"
        "import sys, time\n"
        "log = Log()\n"
        "log.say('first')\n"
        "sys.stdin.readline()\n"
        "for i in range(3): log.say('lost')\n"
        "sys.exit(75)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait() == 75


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log"])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / name)
    with Log(console=Console(file=io.StringIO())) as log, pytest.raises((OSError, ValueError)):
        log.open(tmp_path, from_step=1)


def test_lines_that_are_nested_too_deeply_are_dropped(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 10**5 + "\n")
    with Log(console=Console(file=io.StringIO())) as log:
        log.open(tmp_path, from_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_names_chosen_by_others_reach_terminal_and_file_as_escapes(tmp_path: Path):
    screen = io.StringIO()
    with Log(console=Console(file=screen, width=200)) as log:
        log.open(tmp_path)
        log.say("run \x1b[2J\udcff\nnext")
    assert screen.getvalue() == "run \\x1b[2J\\xff\nnext\n"
    assert (tmp_path / "train.log").read_text()[21:] == screen.getvalue()


def test_progress_that_was_printed_is_ended():
    screen = io.StringIO()
    with Log(console=Console(file=screen, width=80)) as log:
        log.end_progress("7 of 7")
        log.progress("0 of 9")
        log.progress("4 of 9")  # not within five seconds of another
        log.end_progress("9 of 9")
    assert screen.getvalue() == "0 of 9\n9 of 9\n"


def test_the_live_line_fits_eighty_columns(tmp_path: Path):
    screen = io.StringIO()
    with Log(console=Console(file=screen, force_terminal=True, width=80)) as log:
        log.open(tmp_path)
        log.start_progress(123_456, 0)
        log.report("the whole line", live="step 123450/123456  loss 13.841  1.11e+03 img/s")
        log.advance(123_450)
        log.stop_progress()
    assert "step 123450/123456  loss 13.841  1.11e+03 img/s" in screen.getvalue()
    assert "the whole line" in (tmp_path / "train.log").read_text()
    assert screen.getvalue().endswith("the whole line\n")  # what the live line leaves behind
