"""Signals: heard, asked once, and never lost to a launcher that sends them twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sdmp_train import stop as stop_module
from sdmp_train.stop import Stopped, StopRequest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_signal_asks_and_the_former_handler_comes_back(name: str, capfd, request: pytest.FixtureRequest):
    number = getattr(signal, name)
    # Whoever runs the tests may ignore it, as nohup and a shell's background jobs do.
    outside, before = signal.signal(number, signal.SIG_DFL), signal.SIG_DFL
    request.addfinalizer(lambda: signal.signal(number, outside))
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(Stopped):
            stop.check(3, 7)
    assert signal.getsignal(number) == before
    assert f"{name}: stopping" in capfd.readouterr().err


def test_an_ignored_signal_stays_ignored():
    """As after nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_repeated_signal_is_the_same_request_and_a_later_one_ends_the_process(monkeypatch):
    ended: list[int] = []
    now = [100.0]
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop_module.os, "_exit", ended.append)
    with StopRequest() as stop:
        for later in (0.0, 0.1, 4.9):
            now[0] = 100 + later
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and ended == []
        now[0] = 105.1
        os.kill(os.getpid(), signal.SIGUSR1)
    assert ended == [128 + signal.SIGUSR1]


WAITING = """
import torch.distributed as dist
from sdmp_train.stop import StopRequest, leaving_at_once
with StopRequest():
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    with leaving_at_once():
        print("waits", flush=True)
        store.get("what nobody sets")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_wait_for_other_processes_is_left_at_once(name: str):
    """It waits in C++ for five minutes, and hears no Python handler: as where a launcher has died at the start."""
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{WAITING}"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waits\n"
        time.sleep(0.5)
        waiting.send_signal(getattr(signal, name))
        assert waiting.wait(timeout=30) == Stopped.exit_code
    finally:
        waiting.kill()


def enter_a_wait() -> None:
    with stop_module.leaving_at_once():
        pytest.fail("it should not have begun")


def test_a_stop_asked_for_before_the_wait_is_not_waited_with():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked
        with pytest.raises(Stopped):
            enter_a_wait()
    assert signal.set_wakeup_fd(-1) == -1
