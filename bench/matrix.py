"""The op matrix of `bench gpu`: shared out over the cores, most valuable first, its outcomes on disk as they come."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdmp_kernels import _backends

TESTS = "tests/ops/test_every_op.py"
# Exit codes of pytest after which every outcome is in the journal: all passed, some failed, nothing to run.
ORDERLY = (0, 1, 5)
MOST_PROCESSES = 16


def command(journal: Path, *options: str) -> list[str]:
    """The matrix as a process that writes its outcomes into `journal`."""
    quiet = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    return [sys.executable, "-m", "pytest", TESTS, *quiet, "-p", "bench.shard", "--journal", str(journal), *options]


@dataclass
class Tally:
    """What a journal holds of one op.

    Attributes:
        planned: how many tests were to run.
        outcomes: "passed", "failed", "skipped" -> how many.
        values: passed value tests by "backend-device".
        failures: "test[trial]: why" of those that failed.
    """

    planned: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tests without an outcome."""
        return self.planned - sum(self.outcomes.values())

    @property
    def words(self) -> str:
        """In words; the first failures by name."""
        some = [f"{self.outcomes[name]} {name}" for name in ("passed", "failed", "skipped")]
        told = f"{', '.join(some)} of {self.planned}"
        return "; ".join([told, *self.failures[:3]])

    @property
    def facts(self) -> dict[str, int]:
        """For the results file."""
        return {**self.outcomes, **self.values, "planned": self.planned}


def read(journal: Path) -> dict[str, Tally]:
    """Outcomes so far, by op; a last line that a killed process left unfinished does not count."""
    tallies = {op: Tally() for op in _backends.OPS}
    for line in _lines(journal):
        for op, planned in line.get("planned", {}).items():
            tallies[op].planned += planned
        if "outcome" in line:
            tally = tallies[line["op"]]
            tally.outcomes[line["outcome"]] += 1
            if line["outcome"] == "failed":
                tally.failures.append(f"{line['test']}[{line['trial']}]: {line['why']}")
            if line["outcome"] == "passed" and line["test"] == "test_values":
                tally.values[line["where"]] += 1
    return tallies


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    if not journal.exists():
        return
    for line in journal.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def run(
    commands: Sequence[list[str]],
    journal: Path,
    child: Callable[[list[str]], int | None],
    say: Callable[[str, str, str, dict[str, int]], object],
    every_seconds: float = 2.0,
) -> dict[str, tuple[str, str]]:
    """Run all shares side by side; {op: (status, detail)}.

    Args:
        commands: one per share.
        journal: where they write; what was there is replaced.
        child: runs a command; its exit code, or None where its time ran out.
        say: records an op's status, detail and facts, called again and again while the shares run, so that a run
            killed at any moment leaves what it had found.
        every_seconds: how often.
    """
    journal.unlink(missing_ok=True)
    pool = ThreadPoolExecutor(len(commands))
    try:
        shares: list[Future[int | None]] = [pool.submit(child, words) for words in commands]
        told: dict[str, str] = {}
        while not all(one.done() for one in shares):
            wait(shares, timeout=every_seconds)
            for op, tally in read(journal).items():
                if tally.planned and told.get(op) != tally.words:
                    told[op] = tally.words
                    say(op, "out of time", f"cut while it ran: {tally.words}", tally.facts)
        codes = [one.result() for one in shares]
    finally:
        # Whoever was told to end must not wait for the shares: it is the one who ends them.
        pool.shutdown(wait=False, cancel_futures=True)
    found = {}
    for op, tally in read(journal).items():
        found[op] = judge(tally, codes)
        say(op, *found[op], tally.facts)
    return found


def judge(tally: Tally, codes: Sequence[int | None]) -> tuple[str, str]:
    """(status, detail) of an op once all shares have ended."""
    broken = [code for code in codes if code is not None and code not in ORDERLY]
    if broken and (tally.left or not tally.planned):
        return "failed", f"a process ended with exit code {broken[0]}: {tally.words}"
    if tally.outcomes["failed"]:
        return "failed", tally.words
    if tally.left or (not tally.planned and None in codes):
        return "out of time", f"ended before its end: {tally.words}"
    if not tally.planned:
        return "absent", "no case of this op runs here yet"
    return "passed", tally.words
