"""Runs the settings of one question, prints each row as it comes, and writes the results file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import environment, losses, mix, report, step
from bench.harness import Budget, Setting, measure, words
from bench.memory import fix_allocator
from bench.results import Results, default_path

SETTINGS = {"mix": mix.settings, "losses": losses.settings, "step": step.settings}


def run(name: str, args: argparse.Namespace) -> int:
    """Measure one question as the command line asks; returns the exit code."""
    device = choose_device(args.device)
    torch.set_num_threads(args.threads or environment.cores())
    # The losses are timed as users run them; `mix` is about arithmetic and bandwidth, see bench/memory.py.
    allocator = fix_allocator() if name == "mix" and device.type == "cpu" else "default"
    path = args.json or (default_path() if args.size in ("default", "full") and not args.only else None)
    results = Results(path) if path is not None else None
    print(f"{name} on {device.type}: {environment.line()}; allocator {allocator}")
    if results is not None:
        results.begin(name, threads=torch.get_num_threads(), allocator=allocator)
    budget = Budget(args.seconds if args.size != "quick" else min(args.seconds, 2.0))
    if args.size == "tiny":
        budget = Budget(seconds=0.0, min_rounds=1, max_rounds=1, warmup_seconds=0.0)
    measured = measure_all(name, chosen(SETTINGS[name](device, args.size), args.only), device, budget, args, results)
    if results is not None:
        results.finish(name)
        print(f"results in {display(results.path)}")
    if not measured:
        print("no setting was measured: nothing matches --only, no time was left, or all broke")
        return 2
    return 0


def measure_all(
    name: str,
    settings: Iterator[Setting],
    device: torch.device,
    budget: Budget,
    args: argparse.Namespace,
    results: Results | None,
) -> list[dict[str, Any]]:
    """Every setting in turn, until the time is up; rows are printed and written as they finish."""
    started, rows = time.monotonic(), []
    for setting in settings:
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            print(f"\n{setting.name}: no time left")
            if results is not None:
                results.skip(name, setting.name)
            continue
        print(f"\n{setting.name}")
        begun = time.monotonic()
        try:
            row = measure(setting, device, budget, print)
        except Exception as error:
            # Its inputs or its truth do not fit this machine, say: the later settings can still be measured.
            print(f"    not measured: {words(error)}")
            if results is not None:
                results.skip(name, f"{setting.name} ({words(error)})")
            continue
        row["seconds_spent"] = time.monotonic() - begun
        rows.append(row)
        print(report.row(row))
        if results is not None:
            results.add(name, row)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


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
