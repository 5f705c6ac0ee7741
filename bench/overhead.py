"""What a call costs on the host: the first one of a process, and every one after it, on a few rows.

On a few rows nothing but the host's work is timed. Everything runs on the CPU with one thread, each subject in a
process of its own, beside the forward and backward pass of `F.cross_entropy` of labels, which PyTorch has in C++ and
which does less, and beside what a user of plain PyTorch would write for the same result (`eager` of the op's cases).
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

# The case of an op's `cases.py` that is timed; the first one that has gradients where there is none of this name.
CASE = "few_rows"
PLAN = "draw_plan"
ROWS, CLASSES = 8, 16
ROOT = Path(__file__).parent.parent


def run(args: argparse.Namespace) -> int:
    """Measure every op and `draw_plan`, print a row for each, and write them where `--json` says."""
    from bench import environment

    print(f"overhead on cpu, one thread: {environment.line()}")
    head = f"{'':<20} {'first call':>11} {'modules':>8} {'memory':>8} {'a call':>9}"
    print(f"{head} {'over F.cross_entropy':>21} {'over eager':>11}")
    rows = []
    for subject in subjects():
        command = [sys.executable, "-m", "bench.overhead", subject, str(args.seconds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(f"{subject:<20} not measured: {(done.stderr.strip() or 'it ended without a word').splitlines()[-1]}")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": environment.describe(), "rows": rows}, indent=1) + "\n")
    return 0 if rows else 2


def subjects() -> list[str]:
    """Every op of the registry, then `draw_plan`."""
    import sdmp_kernels  # noqa: F401  registers the ops
    from sdmp_kernels import _backends

    return [*sorted(_backends.OPS), PLAN]


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    first, memory = f"{1e3 * row['first_seconds']:.1f} ms", f"{row['first_bytes'] / 1e6:.0f} MB"
    each = f"{1e6 * row['seconds']:.0f} us"
    eager = f"{row['eager_ratio']:.1f}x" if row["eager_ratio"] is not None else "-"
    return f"{row['name']:<20} {first:>11} {row['modules']:>8} {memory:>8} {each:>9} {row['ratio']:>20.1f}x {eager:>11}"


def measure(name: str, seconds: float) -> dict[str, Any]:
    """One subject, in this process, which should be a fresh one.

    Returns:
        `first_seconds`, `modules` and `first_bytes`: what the first call took, imported and added to the resident set;
        `seconds` a call afterwards, and `ratio`, how often a forward and backward pass of `F.cross_entropy` goes into
        that; `eager_ratio` likewise for the same result by plain PyTorch, None where there is none. Medians over
        rounds in which they take turns, of the processor's time and not of the clock's, so that other programs on the
        machine count less.
    """
    torch.set_num_threads(1)
    call, plain, eager = subject(name), cross_entropy(), None if name == PLAN else subject(name, "eager")
    before, resident, begin = set(sys.modules), _resident(), time.perf_counter()
    call()
    first = time.perf_counter() - begin
    row = {"name": name, "first_seconds": first, "modules": len(set(sys.modules) - before)}
    row["first_bytes"] = max(0, _resident() - resident)
    count = max(1, int(0.02 / _seconds(call, 20)))
    others = [plain] if eager is None else [plain, eager]
    for other in others:
        _seconds(other, 20)
    times: list[list[float]] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(times) < 5:
        times.append([_seconds(each, count) for each in (call, *others)])
    row["seconds"] = statistics.median(ours for ours, *_ in times)
    ratios = [statistics.median(turn[0] / turn[i + 1] for turn in times) for i in range(len(others))]
    row["ratio"], row["eager_ratio"] = ratios[0], ratios[1] if eager is not None else None
    return row


def subject(name: str, how: str = "call") -> Callable[[], object]:
    """A call of an op on its case and its backward pass, by the op or by `eager` of its cases; or of `draw_plan`."""
    if name == PLAN:
        from sdmp_kernels import draw_plan

        steps = iter(range(10**9))
        return lambda: draw_plan(ROWS, (32, 32), per="sample", step=next(steps))
    cases = importlib.import_module(f"sdmp_kernels.ops.{name}.cases")
    some = [case for case in cases.CASES if case.grads] or cases.CASES
    case = next((case for case in some if case.name == CASE), some[0])
    made = case.inputs(torch.Generator().manual_seed(0))
    single = case.cast if torch.float32 in case.dtypes else ()
    inputs = {n: pytree.tree_map_only(Tensor, _single, v) if n in single else v for n, v in made.items()}
    run = getattr(cases, how)
    leaves = [leaf.requires_grad_() for n in case.grads for leaf in pytree.tree_leaves(inputs[n])]

    def call() -> None:
        result = next(_tensors(run(**inputs)))
        if not leaves:
            return
        # Not `backward(gradient)`, which makes PyTorch import its symbolic shapes the first time.
        (result if result.ndim == 0 else result.sum()).backward()
        for leaf in leaves:
            leaf.grad = None

    return call


def cross_entropy() -> Callable[[], object]:
    """Forward and backward pass of PyTorch's own, on as many rows."""
    logits = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(ROWS)

    def call() -> None:
        F.cross_entropy(logits, labels).backward()
        logits.grad = None

    return call


def _single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _tensors(result: Any) -> Iterator[Tensor]:
    return (item for item in pytree.tree_leaves(result) if isinstance(item, Tensor))


def _seconds(call: Callable[[], object], count: int) -> float:
    """The processor's seconds of one of `count` calls."""
    begin = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - begin) / count


def _resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], float(sys.argv[2]))))
