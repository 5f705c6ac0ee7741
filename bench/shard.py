"""A pytest plugin: one share of the op matrix, most valuable first, every outcome appended to a file as it comes.

`python -m pytest tests/ops/test_every_op.py -p bench.shard --journal FILE --shard 2/8 --place cuda`. All tests of one
case, dtype and backend are in one share, so that a kernel is compiled by the process that runs it. A process killed
at any moment leaves the lines it has written; bench/matrix.py reads them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# What proves most comes first: compiled backends, values before gradients before the rest, the dtype of training.
BACKENDS = ("triton", "cuda", "cpp", "torch", "reference")
TESTS = ("test_values", "test_gradients")
DTYPES = ("bfloat16", "float32", "uint8", "float16")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options above."""
    group = parser.getgroup("op matrix")
    group.addoption("--journal", type=Path, help="append outcomes to this file, one JSON object a line")
    group.addoption("--shard", default="1/1", help="which share, of how many")
    group.addoption("--place", help="only trials on this device")
    group.addoption("--one-each", action="store_true", help="only the values of each op's most valuable trial")


def place(order: tuple[str, ...], name: str) -> int:
    """Where a name stands in an order; those it does not have come last."""
    return order.index(name) if name in order else len(order)


def trial_of(item: Any) -> Any:
    """The trial of a test of the matrix; None for a test that has none."""
    return item.callspec.params.get("trial") if hasattr(item, "callspec") else None


def by_value(items: list[Any]) -> list[Any]:
    """The tests of trials, most valuable first; the ops take turns, so that none waits for another's last case."""
    numbers: dict[tuple[str, str], int] = {}
    for item in items:
        trial = trial_of(item)
        numbers.setdefault((trial.op, trial.case.name), sum(op == trial.op for op, _ in numbers))

    def value(item: Any) -> tuple[int, ...]:
        trial = trial_of(item)
        return (
            place(BACKENDS, trial.backend),
            place(TESTS, item.originalname),
            place(DTYPES, str(trial.dtype).removeprefix("torch.")),
            numbers[trial.op, trial.case.name],
        )

    return sorted(items, key=value)


def share(items: list[Any], number: int, of: int) -> list[Any]:
    """Every `of`-th trial from the `number`-th on, with all of its tests."""
    groups: dict[str, int] = {}
    for item in items:
        groups.setdefault(str(trial_of(item)), len(groups))
    return [item for item in items if groups[str(trial_of(item))] % of == number - 1]


def one_each(items: list[Any]) -> list[Any]:
    """The values of the first trial of every op."""
    first: dict[str, Any] = {}
    for item in items:
        if item.originalname == TESTS[0]:
            first.setdefault(trial_of(item).op, item)
    return list(first.values())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Keep this share, in order, and say how many tests of each op it holds."""
    if config.option.journal is None:
        return
    number, of = map(int, config.option.shard.split("/"))
    wanted = config.option.place
    chosen = [item for item in items if trial_of(item) and wanted in (None, trial_of(item).device)]
    chosen = by_value(chosen)
    if config.option.one_each:
        chosen = one_each(chosen)
    chosen = share(chosen, number, of)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    config.stash[_OPEN] = _Journal(config.option.journal)
    config.stash[_OPEN].write({"shard": config.option.shard, "planned": Counter(trial_of(i).op for i in items)})


class _Journal:
    """Whole lines, appended: several processes may write into one file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write((json.dumps(line) + "\n").encode())


_OPEN = pytest.StashKey[_Journal]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Any:
    """Append the outcome of a test: when its body has run, or when it was skipped or broke before that."""
    report = (yield).get_result()
    journal = item.config.stash.get(_OPEN, None)
    if journal is None or not (report.when == "call" or (report.when == "setup" and not report.passed)):
        return
    trial = trial_of(item)
    why = str(call.excinfo.value).strip().partition("\n")[0][:200] if call.excinfo is not None else ""
    journal.write(
        {
            "test": item.originalname,
            "trial": str(trial),
            "op": trial.op,
            "where": f"{trial.backend}-{trial.device}",
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "why": why,
        }
    )
