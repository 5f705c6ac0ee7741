"""Signals: heard, asked once, and never lost to a launcher that sends them twice."""

from __future__ import annotations

import os
import signal

import pytest

from sdmp_train import stop as stop_module
from sdmp_train.stop import Stopped, StopRequest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_signal_asks_and_the_former_handler_comes_back(name: str, capfd):
    number = getattr(signal, name)
    before = signal.getsignal(number)
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
