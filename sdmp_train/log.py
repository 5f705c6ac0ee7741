"""What a run says: lines on the terminal and in train.log, numbers in metrics.jsonl, a live line on a terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .durable import write_durably
from .reading import open_for_append, open_regular
from .text import printable_lines
from .trackers import Tracker, numbers_of

PLAIN_SECONDS = 5.0
STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
"""What begins a line of train.log: when it was said, by the clock of this machine."""


class Screen:
    """The standard output, for rich; once it is gone (a closed terminal, a reader that has ended) all is dropped."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._gone = False

    def write(self, text: str) -> int:
        """Write what can be written."""
        self._try(lambda: self._out().write(text))
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        self._try(self._out().flush)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._out().isatty()

    def fileno(self) -> int:
        """Its descriptor, from which rich takes the width."""
        return self._out().fileno()

    def _out(self) -> TextIO:
        # While a live line is shown, sys.stdout is rich's own, which writes here.
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def _try(self, action: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            action()
        except OSError:
            self._gone = True
            with contextlib.suppress(OSError, ValueError):
                # What Python still holds goes nowhere: its flush at exit would fail and change the exit code.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._out().fileno())


class LineFile:
    """A text file that lines are appended to, each by one write. One that does not fit on the disk is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped = 0
        self._file = open_for_append(path, follow=True)
        self._torn = self._file.seek(0, os.SEEK_END) > 0 and not ends_line(path)

    def write(self, line: str) -> bool:
        """Append a line; False where that failed."""
        data = ("\n" * self._torn + line + "\n").encode()
        try:
            written = self._file.write(data)
        except OSError:
            written = 0
        if written < len(data):
            self.dropped += 1
            self._torn = self._torn or written > 0
            return False
        self._torn = False
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def ends_line(path: Path) -> bool:
    """Whether the last byte of a file ends a line, which it does not where a kill tore the last write."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


class Log:
    """The one voice of a run. Quiet on every rank but the first; keeps its lines until a folder is opened."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(file=cast(TextIO, Screen()), highlight=False, soft_wrap=True)
        self._pending: list[str] = []
        self._text: LineFile | None = None
        self._metrics: LineFile | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed_at = -math.inf
        self._unfinished = False
        self._held_back: str | None = None
        self.last_loss: float | None = None
        self.trackers: list[Tracker] = []

    def open(self, folder: Path, *, from_step: int = 0) -> None:
        """Write to `folder` from now on; drop the metrics of steps that a resumed run will make again.

        With `from_step` 0 nothing has been made: all former metrics are dropped.

        Raises:
            OSError, ValueError: where the files cannot be opened, or are pipes. Later writes that fail cost a notice
                and the line.
        """
        if self.quiet:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            with open_regular(path) as file:
                lines = file.read().decode(errors="replace").splitlines()
            write_durably(path, "".join(line + "\n" for line in lines if from_step and kept(line, from_step)))
        self._metrics = LineFile(path)
        self._text = LineFile(folder / "train.log")
        for line in self._pending:
            self._append(self._text, line)
        self._pending.clear()

    def say(self, line: str = "") -> None:
        """Print a line and keep it in train.log."""
        if self.quiet:
            return
        line = printable_lines(line)
        self.console.print(line, markup=False)
        self._write(line)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl, with its `time`; numbers that JSON lacks (NaN) become null."""
        self.last_loss = values.get("loss", self.last_loss)
        if self._metrics is None:
            return
        values = {**values, "time": values.get("time", time.time())}
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._append(self._metrics, json.dumps(plain))
        self._hand_on(lambda tracker: tracker.log(int(values.get("step", 0)), numbers_of(values)))

    def start_progress(self, total_steps: int, done_steps: int) -> None:
        """Show the live line, where there is a terminal."""
        if self.quiet or not self.console.is_terminal:
            return
        columns = (
            BarColumn(bar_width=12),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._task = self._progress.add_task("starting", total=total_steps, completed=done_steps)
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the live line."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def report(self, line: str, live: str | None = None) -> None:
        """A line of numbers: always in train.log; on the live line, or plainly but not more often than every 5 s.

        The last one is printed at the latest where the progress ends.

        live: what the live line shows instead, which has about 45 of 80 columns.
        """
        if self.quiet:
            return
        self._write(line)
        self._held_back = None if self.progress(line, live) else line

    def progress(self, line: str, live: str | None = None) -> bool:
        """How far something is: on the live line, or plainly but not more often than every 5 s; not in train.log.

        Returns whether the line is printed, to stay.
        """
        if self.quiet:
            return False
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=line if live is None else live)
        elif time.monotonic() - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            self._unfinished = True
            self.console.print(line, markup=False)
            return True
        return False

    def end_progress(self, line: str) -> None:
        """Take the live line away; where plain lines were printed, the last word is `line`, that all is done."""
        unfinished = self._unfinished
        self.stop_progress()
        if unfinished:
            self.console.print(line, markup=False)

    def stop_progress(self) -> None:
        """Take the live line away; the last line of numbers that was not printed is."""
        self._unfinished = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._held_back is not None:
            self.console.print(self._held_back, markup=False)
            self._held_back = None

    def close(self) -> None:
        """End the live line and close the files."""
        self.stop_progress()
        self._hand_on(lambda tracker: tracker.close())
        self.trackers.clear()
        for file in (self._text, self._metrics):
            if file is not None:
                file.close()
        self._text = self._metrics = None

    def _hand_on(self, action: Callable[[Tracker], None]) -> None:
        """To every tracker; one that fails is heard of once and then left alone."""
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(f"{type(tracker).__name__} gets no more numbers: {type(error).__name__}: {error}")

    def _write(self, line: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}"
        if self._text is not None:
            self._append(self._text, line)
        else:
            self._pending.append(line)

    def _append(self, file: LineFile, line: str) -> None:
        if not file.write(line) and file.dropped == 1:
            self.console.print(f"{file.path} cannot be written (is the disk full?); the run goes on", markup=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def kept(line: str, from_step: int) -> bool:
    """Whether a line of metrics is whole and of a step that the resumed run has already made."""
    try:
        return json.loads(line)["step"] <= from_step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
