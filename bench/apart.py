"""Every arm in processes of its own, with the default allocator: as a user meets it.

In one process the arms disturb each other: what one has freed, the next is given without a page fault, and a compiler
has started threads. So an arm is checked and weighed in one fresh process, and timed in others, once per round; the
rounds are interleaved as in one process, and ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.environment import ROOT
from bench.harness import Budget, OutOfTime, Runner, Setting

ROUNDS = 3
# One process each: is the answer right and how much memory does it take; and how long does it take.
CHECK, TIME = "check", "time"
Entry = dict[str, Any]


def measure(
    setting: Setting,
    device: torch.device,
    start: Callable[[str, str], Entry],
    say: Callable[[str], object],
    doing: Callable[[str], object] = harness.silent,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """One row of the results, as `harness.measure` makes it.

    Args:
        setting: what is asked.
        device: where it runs.
        start: (name of an arm, `CHECK` or `TIME`) -> that arm's entry, from a process of its own.
        say: told which arms have no time, and why.
        doing: told what is done next, for who waits.
        budget: no process is started after its deadline; the rest of it is the processes' own.

    Raises:
        OutOfTime: the deadline passed before every arm had its times.
    """

    def begin(name: str, part: str, words: str) -> Entry:
        if budget is not None and budget.over:
            raise OutOfTime
        doing(f"    {name}: {words}")
        return start(name, part)

    told = {arm.name: begin(arm.name, CHECK, "checked and weighed") for arm in setting.arms}
    runners = [Runner(arm, [], told[arm.name]["errors"]) for arm in setting.arms if told[arm.name]["status"] == "ok"]
    order, shuffle = list(runners), random.Random(0)
    for round_ in range(1, ROUNDS + 1):
        shuffle.shuffle(order)
        for runner in order:
            if runner.failure is None:
                _time(runner, begin(runner.arm.name, TIME, f"timed, round {round_} of {ROUNDS}"))
    for runner in runners:
        if runner.failure is not None:
            kept = {name: told[runner.arm.name][name] for name in ("name", "kind", "what", "graph", "errors")}
            told[runner.arm.name] = kept | {"status": "failed", "reason": runner.failure}
    runners = [runner for runner in runners if runner.failure is None]
    for runner in runners:
        told[runner.arm.name] |= harness.rates(runner, runners, setting, device)
    for entry in told.values():
        if entry["status"] != "ok":
            say(f"    {entry['name']}: {entry['status']} ({entry['reason']})")
    return harness.row_of(setting, device, 1, runners, list(told.values()))


def _time(runner: Runner, entry: Entry) -> None:
    if entry["status"] == "ok":
        runner.times.append(entry["seconds"]["p50"])
        runner.inner = entry["seconds"]["rounds"]
    else:
        runner.failure = entry["reason"]


def starter(question: str, setting: Setting, device: torch.device, args: argparse.Namespace) -> Callable[..., Entry]:
    """`start` of `measure`: `python -m bench arm`, in a process of its own."""
    seconds = args.seconds / (ROUNDS * max(1, len(setting.arms)))
    kinds = {arm.name: arm for arm in setting.arms}

    def start(name: str, part: str) -> Entry:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            path = Path(folder) / "entry.json"
            options = {
                "--setting": setting.name,
                "--arm": name,
                "--part": part,
                "--device": device.type,
                "--size": args.size,
                "--seconds": str(seconds),
                "--threads": str(torch.get_num_threads()),
                "--json": str(path),
            }
            words = [sys.executable, "-m", "bench", "arm", question, *(w for pair in options.items() for w in pair)]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            if done.returncode == 0:
                return json.loads(path.read_text())
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1][:200]
        arm = kinds[name]
        entry = {"name": name, "kind": arm.kind, "what": arm.what, "graph": arm.graph, "errors": []}
        return entry | {"status": "failed", "reason": f"its process ended with exit code {done.returncode}: {last}"}

    return start


def child(args: argparse.Namespace, settings: Iterable[Setting], device: torch.device) -> int:
    """What such a process does: one part of one arm; its entry goes into the file `args.json`. The exit code."""
    setting = next(one for one in settings if one.name == args.setting)
    arm = next(one for one in setting.arms if one.name == args.arm)
    if args.part == CHECK:
        budget = Budget(seconds=0.0, min_rounds=1, max_rounds=1, warmup_seconds=0.0)
        entry = harness.measure(replace(setting, arms=[arm]), device, budget, print)["arms"][0]
    else:
        entry = _timed(arm, setting, device, args.seconds)
    args.json.write_text(json.dumps({"errors": [], **entry}))
    return 0


def _timed(arm: harness.Arm, setting: Setting, device: torch.device, seconds: float) -> Entry:
    """Its times, by themselves: no truth is computed here, which would leave memory behind."""
    budget = Budget(seconds=seconds, min_rounds=3)
    checked = replace(arm, check=lambda inputs, results: 0.0)
    runner, entry = harness.prepare(checked, setting, [setting.inputs(0)], [], None, device, budget)
    if runner is None:
        return entry
    harness.time_rounds([runner], harness.clock_of(device.type), budget)
    if runner.failure is not None:
        return entry | {"status": "failed", "reason": runner.failure}
    return entry | {"seconds": harness.percentiles(runner.times) | {"rounds": len(runner.times)}}
