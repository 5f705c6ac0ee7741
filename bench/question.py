"""Runs the settings of one question, prints each row as it comes, and writes the results file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import apart, augment, environment, losses, mix, report, step
from bench.harness import EXIT_ABSENT, Budget, OutOfTime, Setting, absence, measure, words
from bench.memory import fix_allocator
from bench.results import Results, default_path

KEPT_FROM_MINUTES = 3.0
"""A run that is given less time leaves no file unless one is named."""
SETTINGS = {"views": augment.settings, "mix": mix.settings, "losses": losses.settings, "step": step.settings}


def run(name: str, args: argparse.Namespace) -> int:
    """Measure one question as the command line asks; returns the exit code.

    0 where all was measured; 1 where something of ours is wrong or broke; 2 where nothing was measured; `EXIT_ABSENT`
    where a setting was not, because what it needs is not on this machine.
    """
    device = choose_device(args.device)
    torch.set_num_threads(args.threads or environment.cores())
    # The losses are timed as users run them; `mix` is about arithmetic and bandwidth, see bench/memory.py.
    allocator = fix_allocator() if name == "mix" and device.type == "cpu" else "default"
    path = args.json or (None if is_short(args) else default_path())
    results = Results(path) if path is not None else None
    alone = measured_apart(name, device, args.size)
    processes = f"one to check each arm, and one per arm in each of {apart.ROUNDS} rounds" if alone else "one"
    print(f"{name} on {device.type}: {environment.line()}; allocator {allocator}; processes: {processes}")
    if results is not None:
        results.begin(name, threads=torch.get_num_threads(), allocator=allocator, processes=processes)
    budget = Budget(args.seconds if args.size != "quick" else min(args.seconds, 2.0))
    if args.size == "tiny":
        budget = Budget(seconds=0.0, min_rounds=1, max_rounds=1, warmup_seconds=0.0)
    settings = chosen(SETTINGS[name](device, args.size), args.only)
    measured, gaps = measure_all(name, settings, device, budget, args, results)
    if results is not None:
        results.finish(name)
        print(f"results in {display(results.path)}")
    elif args.size != "tiny":
        print("results are not kept: a short run, or one of some settings; --json FILE writes them")
    if not measured:
        print("no setting was measured: nothing matches --only, no time was left (--minutes), or all broke")
        return 2
    for gap in gaps:
        if gap.kind != "lacking":
            print(f"{gap.kind}: {gap.name}: {gap.reason}")
    kinds = {gap.kind for gap in gaps}
    return 1 if "broken" in kinds else EXIT_ABSENT if "absent" in kinds else 0


def is_short(args: argparse.Namespace) -> bool:
    """Whether a run says too little to be taken for this machine's newest results."""
    less = args.minutes is not None and args.minutes < KEPT_FROM_MINUTES
    return args.size not in ("default", "full") or args.only is not None or less


def measured_apart(name: str, device: torch.device, size: str) -> bool:
    """Whether every arm gets processes of its own: the losses on a CPU, but for the short runs."""
    return name == "losses" and device.type == "cpu" and size in ("default", "full")


def run_arm(args: argparse.Namespace) -> int:
    """One arm of one setting, in the process that `bench/apart.py` has started for it; returns the exit code."""
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    return apart.child(args, SETTINGS[args.question](device, args.size), device)


def doing(text: str) -> None:
    """What is done next, for who looks on: on a terminal alone, and not among the results."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


class Gap(NamedTuple):
    """What was not measured.

    Attributes:
        kind: "absent": a setting for which nothing of ours could run here; "broken": a setting, or an arm of ours,
            that raised or was wrong; "lacking": any arm that could not run here.
        name, reason: of which, and why.
    """

    kind: str
    name: str
    reason: str


def gaps_of(row: dict[str, Any]) -> list[Gap]:
    """What a row's arms did not measure. A replay lacks what its arm lacks, and is not named again."""
    arms = [arm for arm in row["arms"] if not arm["graph"]]
    found = [Gap("lacking", arm["name"], arm["reason"]) for arm in arms if arm["status"] == "absent"]
    ours = [arm for arm in row["arms"] if arm["kind"] == "ours" and arm["status"] != "ok"]
    broken = [arm for arm in ours if arm["status"] != "absent"]
    found += [Gap("broken", f"{row['setting']}, {arm['name']}", arm["reason"]) for arm in broken]
    if row["ours"] is None and not broken:
        found.append(Gap("absent", row["setting"], "; ".join(f"{arm['name']}: {arm['reason']}" for arm in ours)))
    return found


def measure_all(
    name: str,
    settings: Iterator[Setting],
    device: torch.device,
    budget: Budget,
    args: argparse.Namespace,
    results: Results | None,
) -> tuple[list[dict[str, Any]], list[Gap]]:
    """Every setting in turn, until the time is up; rows are printed and written as they finish. (rows, gaps)."""
    rows, gaps = [], []
    if args.minutes is not None:
        budget = replace(budget, deadline=time.monotonic() + 60 * args.minutes)
    for setting in settings:
        if budget.over:
            print(f"\n{setting.name}: no time left")
            if results is not None:
                results.skip(name, setting.name)
            continue
        print(f"\n{setting.name}")
        begun = time.monotonic()
        try:
            if measured_apart(name, device, args.size):
                start = apart.starter(name, setting, device, args)
                row = apart.measure(setting, device, start, print, doing, budget)
            else:
                row = measure(setting, device, budget, print, doing)
        except OutOfTime:
            print("    given up: no time left")
            if results is not None:
                results.skip(name, setting.name)
            continue
        except Exception as error:
            # Its inputs or its truth do not fit this machine, say: the later settings can still be measured.
            print(f"    not measured: {words(error)}")
            gaps.append(_unmeasured(setting, error))
            if results is not None:
                results.skip(name, f"{setting.name} ({words(error)})")
                results.gap(name, *gaps[-1])
            continue
        row["seconds_spent"] = time.monotonic() - begun
        rows.append(row)
        print(report.row(row))
        if results is not None:
            results.add(name, row)
            for gap in gaps_of(row):
                results.gap(name, *gap)
        gaps += gaps_of(row)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, gaps


def _unmeasured(setting: Setting, error: Exception) -> Gap:
    """A setting whose inputs or truth could not be made; too little memory is something this machine lacks."""
    if isinstance(error, torch.OutOfMemoryError):
        return Gap("absent", setting.name, "it does not fit in this device's memory")
    why = absence(error)
    return Gap("broken", setting.name, words(error)) if why is None else Gap("absent", setting.name, why)


def chosen(settings: Iterator[Setting], only: str | None) -> Iterator[Setting]:
    """The settings whose name contains `only`."""
    return (setting for setting in settings if only is None or only in setting.name)


def choose_device(name: str) -> torch.device:
    """The device by name; "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device; leave it out to measure on the CPU")
    return torch.device(name)


def display(path: Path) -> str:
    """A path as seen from the repository, where it lies inside."""
    try:
        return str(path.resolve().relative_to(environment.ROOT))
    except ValueError:
        return str(path)
