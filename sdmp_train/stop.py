"""Signals that ask a run to stop, and how its processes then leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 5.0
"""How long further signals are taken for the first one: a launcher and a scheduler often send one each."""


class Stopped(Exception):
    """This process, or another of its run, was asked to stop. Exit code 75: resume me."""

    exit_code = 75


class EndedElsewhere(RuntimeError):
    """Another rank has raised the error that ends the run, and says which; this one ends with the same exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another process of this run ends it with exit code {code}")
        self.exit_code = code


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or SIGHUP. A context manager.

    A signal only sets `asked`; the run looks at it between steps, between batches of a measurement and between files.
    Further signals within `GRACE_SECONDS` are the same request; one that comes later ends the process at once. A signal
    that was ignored before (nohup does that to SIGHUP) stays ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked = False
        self.failure: Exception | None = None
        """Why this process cannot go on, where that is to be said only once the run has been saved."""
        self.speaks = True
        """Whether a signal is answered by a line on the error output."""
        self._asked_at = 0.0
        self._before: dict[signal.Signals, object] = {}

    def check(self, *_: object) -> None:
        """Raise `Stopped` once a stop was asked for. Takes (and ignores) what a progress report is called with."""
        if self.asked:
            raise Stopped("stopped on request")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
            if self.speaks:
                self._answer(number)
        elif now - self._asked_at > GRACE_SECONDS:
            os._exit(128 + number)

    def _answer(self, number: int) -> None:
        name = signal.Signals(number).name
        text = f"\n{name}: stopping once the run is saved; another signal after {GRACE_SECONDS:.0f} s stops at once\n"
        with contextlib.suppress(OSError):  # the terminal may be gone, which is what SIGHUP says
            os.write(2, text.encode())  # not print: the signal may have come in the middle of one

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._before.clear()


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within the block a request to stop ends the process with exit code 75 at once.

    For waits in C++, which hear no Python handler and, where the launcher has died, may last for half an hour; a run
    has nothing to lose before its processes have found each other. Outside the main thread the block changes nothing.
    """
    handlers = {number: getattr(signal.getsignal(number), "__self__", None) for number in StopRequest.SIGNALS}
    heard = {number: request for number, request in handlers.items() if isinstance(request, StopRequest)}
    if not heard or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)  # what arrives is written there whatever the main thread does

    def watch() -> None:
        while numbers := os.read(reader, 64):
            if heard.keys() & set(numbers):
                os._exit(Stopped.exit_code)

    thread = threading.Thread(target=watch, name="leaving at once", daemon=True)
    thread.start()
    try:
        for request in heard.values():
            request.check()  # one that came before the block
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


def ignore_stop_signals() -> None:
    """For a process that ends with its parent, or whose exit code is decided: who stops it is not asked."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
