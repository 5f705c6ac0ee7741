"""What a run says: lines on the terminal and in train.log, numbers in metrics.jsonl, a live line on a terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 5.0


class Log:
    """The one voice of a run. Quiet on every rank but the first; keeps its lines until a folder is opened."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._pending: list[str] = []
        self._text: TextIO | None = None
        self._metrics: TextIO | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed_at = -math.inf

    def open(self, folder: Path, *, from_step: int = 0) -> None:
        """Write to `folder` from now on; drop the metrics of steps that a resumed run will make again."""
        if self.quiet:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if kept(line, from_step)]
            path.write_text("".join(lines))
        self._metrics = path.open("a", encoding="utf-8", buffering=1)
        self._text = (folder / "train.log").open("a", encoding="utf-8", buffering=1)
        for line in self._pending:
            self._text.write(line + "\n")
        self._pending.clear()

    def say(self, line: str = "") -> None:
        """Print a line and keep it in train.log."""
        if self.quiet:
            return
        self.console.print(line, markup=False)
        self._write(line)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl; numbers that JSON lacks (NaN, infinities) become null."""
        if self._metrics is None:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._metrics.write(json.dumps(plain) + "\n")

    def start_progress(self, total_steps: int, done_steps: int) -> None:
        """Show the live line, where there is a terminal."""
        if self.quiet or not self.console.is_terminal:
            return
        columns = (
            BarColumn(bar_width=24),
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

    def report(self, line: str) -> None:
        """A line of numbers: always in train.log; on the live line, or plainly but not more often than every 5 s."""
        if self.quiet:
            return
        self._write(line)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=line)
        elif time.monotonic() - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            self.console.print(line, markup=False)

    def stop_progress(self) -> None:
        """Take the live line away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """End the live line and close the files."""
        self.stop_progress()
        for file in (self._text, self._metrics):
            if file is not None:
                file.close()
        self._text = self._metrics = None

    def _write(self, line: str) -> None:
        if self._text is not None:
            self._text.write(line + "\n")
        else:
            self._pending.append(line)

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
    except (ValueError, KeyError, TypeError):
        return False
