"""Measures the launch tables of the Triton kernels on this GPU: `python -m bench tune`.

The library never tunes at run time: it reads `sdmp_kernels/tables/<arch>.json`, so that ranks and runs cannot differ.
This walks from the present constants of every key to better ones, one constant at a time, checks that results stay
equal within rounding whatever the entry, and writes the file. A change must be worth more than the noise.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import environment, losses, mix
from bench.clock import clock_of
from bench.harness import (
    Absent,
    Arm,
    Budget,
    Call,
    Inputs,
    Runner,
    Setting,
    largest_error,
    on_backend,
    paired,
    prepare,
    short,
    time_rounds,
)
from sdmp_kernels import _launch, draw_plan
from sdmp_kernels import mix as mix_op
from sdmp_kernels.ahead_of_time import OPS
from sdmp_train.advice import command

Constants = dict[str, Any]
WORTH = 1.02
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5), "programs": (1, 65536)}
# Constants that are a size from which on something is done, by one to try where it never is; there, 0.
FROM = {"anchor": 4096}


class Table(dict[str, Constants]):
    """A launch table that remembers which keys were read."""

    def __init__(self, entries: dict[str, Constants]) -> None:
        super().__init__(entries)
        self.read: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`, and noted."""
        if key not in self.read:
            self.read.append(key)
        return super().get(key, default)


@dataclass
class Workload:
    """One setting's Triton arm, bound once; what it returns under the present table is what others must equal."""

    setting: Setting
    call: Call
    keys: list[str]
    expected: list[Tensor]
    seconds_spent: float = 0.0


@dataclass
class Tuning:
    """What was found: the table, and a line per key."""

    table: dict[str, Constants]
    lines: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Tune as the command line asks; returns the exit code."""
    if not args.dry_run and not torch.cuda.is_available():
        walked = command("bench", "tune", "--dry-run")
        print(f"bench tune: torch sees no CUDA device. `{walked}` (with TRITON_INTERPRET=1) walks")
        print("the same path without one.")
        return 2
    device = torch.device("cpu" if args.dry_run else "cuda")
    arch = _launch.architecture(device if args.dry_run else torch.device("cuda", torch.cuda.current_device()))
    print(f"{environment.line()}; table {arch}")
    present = {**_launch.table(_launch.DEFAULT_ARCH), **_launch.table(arch)}
    path = args.out or (None if args.dry_run else _launch.TABLES / f"{arch}.json")
    tuning = tune(present, device, args.op, dry=args.dry_run, seconds=60 * args.minutes, path=path)
    if not tuning.lines:
        print("no launch table was read: no op has a Triton backend that runs here")
        return 2
    if path is not None:
        print(f"wrote {len(tuning.table)} entries to {path.name}")
    return 0


def tune(
    present: dict[str, Constants],
    device: torch.device,
    ops: list[str] | None,
    *,
    dry: bool,
    seconds: float,
    path: Path | None = None,
) -> Tuning:
    """Better constants for every key that the benchmarks' settings read, the present ones where none is better.

    The losses come first, which have most to gain. `path` is written after every key: a run that is cut still counts.
    """
    tuning, ends, done = Tuning(dict(present)), time.monotonic() + seconds, set()
    settings = (*losses.settings(device, size(dry)), *mix.settings(device, size(dry)), *elsewhere(device, dry))
    for setting in settings:
        if tuning.lines and time.monotonic() > ends:
            break
        if ops and setting.op not in ops:
            continue
        workload = bind(setting, tuning.table, device)
        if workload is None:
            continue
        for key in workload.keys:
            if key in done or (tuning.lines and time.monotonic() > ends):
                continue
            done.add(key)
            tuning.table[key], line = best(workload, key, tuning.table, device, dry)
            tuning.lines.append(line)
            print(f"  {line}", flush=True)
            if path is not None:
                path.write_text(json.dumps(tuning.table, indent=1, sort_keys=True) + "\n")
    return tuning


def size(dry: bool) -> str:
    """The benchmarks' sizes to tune on."""
    return "tiny" if dry else "full"


def elsewhere(device: torch.device, dry: bool) -> Iterator[Setting]:
    """What the benchmarks do not time: the backward pass of `mix`, and partners that are no flip."""
    n, px = (4, 16) if dry else (256, 224)
    dtypes = (torch.float32,) if dry else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for flip in (True, False):
            name = f"mix {short(dtype)} forward and backward, {'flip' if flip else 'any partner'}, n = {n}"
            yield Setting(
                op="mix",
                name=name,
                config={"n": n, "px": px, "dtype": short(dtype), "flip": flip},
                inputs=functools.partial(_images, n, px, dtype, device, flip),
                truth=lambda _: [],
                plain=lambda _: [],
                outputs=("mixed", "dimages"),
                dtype=dtype,
                arms=[
                    Arm("sdmp triton", "this project, triton backend", "ours", functools.partial(_both_ways, device))
                ],
            )


def _images(n: int, px: int, dtype: torch.dtype, device: torch.device, flip: bool, copy: int) -> Inputs:
    generator = torch.Generator().manual_seed(copy)
    partner = None if flip else torch.randint(0, n, (n,), generator=generator)
    images, upstream = (torch.randn(n, 3, px, px, generator=generator).to(device, dtype) for _ in range(2))
    plan = draw_plan(n, (px, px), per="sample", partner=partner, seed=0, step=copy, device=device)
    return {"images": images.requires_grad_(), "upstream": upstream, "plan": plan}


def _both_ways(device: torch.device, inputs: Inputs) -> Call:
    def run() -> list[Tensor]:
        mixed = mix_op(inputs["images"], inputs["plan"])
        assert isinstance(mixed, Tensor)
        return [mixed.detach(), *torch.autograd.grad(mixed, [inputs["images"]], inputs["upstream"])]

    return Call(on_backend("mix", "triton", device, run))


def bind(setting: Setting, table: dict[str, Constants], device: torch.device) -> Workload | None:
    """The setting's Triton arm and the keys it reads; None where it does not run here."""
    arm = next((a for a in setting.arms if a.name == "sdmp triton"), None)
    if arm is None:
        return None
    inputs = setting.inputs(0)
    try:
        reading = Table(table)
        with _launch.table_in_force(reading):
            call = arm.bind(inputs)
            expected = [t.detach().clone() for t in call.run()]
    except Absent:
        return None
    return Workload(setting, call, list(reading.read), expected)


def best(
    workload: Workload, key: str, table: dict[str, Constants], device: torch.device, dry: bool
) -> tuple[Constants, str]:
    """Walk from the present constants of a key, one constant at a time, while it gets faster; (constants, a line).

    First of all to those that the op names, which differ in several at once.
    """
    start = dict(table[key])
    chosen, gain = start, 1.0
    moves: list[Callable[[Constants], list[Constants]]] = [lambda _: others(key, device)]
    moves += [functools.partial(one_apart, name) for name in start]
    for changes in moves:
        options = [chosen | change for change in changes(chosen)]
        found = faster(workload, key, table, chosen, options, device, dry) if options else None
        if found is not None:
            chosen, ratio = found
            gain *= ratio
    words = f"{gain:.3f}x faster" if chosen != start else "kept"
    return chosen, f"{key}: {_words(chosen)} ({words}; {workload.setting.name})"


def one_apart(name: str, present: Constants) -> list[Constants]:
    """The changes of one constant that are worth a trial."""
    return [{name: value} for value in neighbours(name, present[name])]


def others(key: str, device: torch.device) -> list[Constants]:
    """Constants that the op of a key wants tried together."""
    op, arch = key.split(".")[0], _launch.architecture(device)
    module = f"sdmp_kernels.ops.{op}.triton"
    if op not in OPS or importlib.util.find_spec(module) is None:
        return []
    alternatives = getattr(importlib.import_module(module), "alternatives", None)
    return [] if alternatives is None else alternatives(arch).get(key, [])


def neighbours(name: str, value: Any) -> list[Any]:
    """Values to try beside a constant's present one: the other boolean; none for what is no positive number."""
    if isinstance(value, bool):
        return [not value]
    if name in FROM:
        return [0] if value else [FROM[name]]
    if not isinstance(value, int) or value < 1:
        return []
    if name == "num_stages":
        candidates = [value - 1, value + 1]
    elif value & (value - 1) == 0:
        candidates = [value // 2, value * 2]
    else:
        return []
    low, high = LIMITS.get(name, (16, 65536))
    return [candidate for candidate in candidates if low <= candidate <= high]


def faster(
    workload: Workload,
    key: str,
    table: dict[str, Constants],
    present: Constants,
    options: list[Constants],
    device: torch.device,
    dry: bool,
) -> tuple[Constants, float] | None:
    """The option that beats the present constants by more than `WORTH`, timed side by side; None where none does."""
    entries = {f"entry {number}": option for number, option in enumerate([present, *options])}
    budget = Budget(seconds=0.0, min_rounds=2, max_rounds=2, warmup_seconds=0.0) if dry else Budget(seconds=0.6)
    runners: dict[str, Runner] = {}
    for name, entry in entries.items():
        arm = Arm(name, _words(entry), "peer", _bound(workload, key, table, entry), graph=device.type == "cuda")
        checked = _equal_arm(arm, workload)
        runner, outcome = prepare(checked, workload.setting, [{}], [], None, device, budget)
        if runner is None:
            print(f"    {key} {_words(entry)}: {outcome['status']} ({outcome['reason']})")
            if entry is present:
                return None
            continue
        runners[name] = runner
    time_rounds(list(runners.values()), clock_of(device.type), budget)
    first = runners.pop("entry 0")
    gains = {name: paired(first, runner) for name, runner in runners.items()}
    if not gains:
        return None
    winner = max(gains, key=lambda name: gains[name]["p50"])
    # Worth it only where nearly every round says so: a difference within the spread is noise.
    return (entries[winner], gains[winner]["p50"]) if gains[winner]["p20"] > WORTH else None


def _bound(
    workload: Workload, key: str, table: dict[str, Constants], entry: Constants
) -> Callable[[dict[str, Any]], Call]:
    def bind_entry(_: dict[str, Any]) -> Call:
        entries = Table({**table, key: entry})

        def call() -> Any:
            with _launch.table_in_force(entries):
                return workload.call.run()

        call()
        if key not in entries.read:
            raise ValueError(f"{key} was not read again: its constants are cached, so that they cannot be measured")
        return Call(call, workload.call.reset)

    return bind_entry


def _equal_arm(arm: Arm, workload: Workload) -> Arm:
    """The arm, with a check that its results equal those of the present table within rounding."""

    def check(_: dict[str, Any], results: Any) -> float:
        worst = 0.0
        for result, expected in zip(results, workload.expected, strict=True):
            unit = torch.finfo(workload.setting.dtype).eps * max(float(expected.abs().max()), 1e-30)
            worst = max(worst, largest_error(result, expected) / unit)
        return worst

    # In units of the last place of the largest value: another block size sums in another order.
    return Arm(arm.name, arm.what, arm.kind, arm.bind, check, tolerance=4.0, graph=arm.graph)


def _words(constants: Constants) -> str:
    return ", ".join(f"{name}={value}" for name, value in constants.items())
