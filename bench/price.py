"""What SDMP adds to a training step beyond its extra forward passes: `python -m bench price`.

SDMP sees more images without gradient than the plain method: one more momentum forward (MoCo v3, `replace`), two more
global views for the teacher (DINO). Everything else, mixing, targets and losses, is to be nearly free:

    price = step with SDMP / (step of the plain method + those forward passes by themselves)

The three are timed in turn, block after block, so that what slows the machine slows all of them; the price is the
median over the blocks, with the interval that holds the true median with 95 % confidence (of the order statistics).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import environment
from bench.step import make_training, one_step

BLOCKS = 20
METHODS = {"mocov3": "quickstart", "dino": "quickstart-dino"}
"""By method, the preset whose views are timed on a CPU, on the ViT of the first."""


def run(args: argparse.Namespace) -> int:
    """Time every method, print a row for each with its arithmetic, and write them where `--json` says."""
    print(f"price of SDMP on cpu, {torch.get_num_threads()} threads, {args.blocks} blocks: {environment.line()}")
    rows = []
    for method in METHODS:
        row = measure(method, args.batch_size, args.blocks, args.seconds)
        rows.append(row)
        print(line(row), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": environment.describe(), "rows": rows}, indent=1) + "\n")
    return 0


def measure(method: str, batch_size: int, blocks: int, seconds: float) -> dict[str, Any]:
    """Seconds of the plain step, of the extra forward passes and of the step with SDMP, in every block; the price."""
    plain, sdmp = (step_of(method, mixing, batch_size) for mixing in ("none", "sdmp"))
    calls = {"plain": plain, "extra": extra_of(method, batch_size), "sdmp": sdmp}
    for call in calls.values():
        call()
    repeats = {name: max(1, round(seconds / max(timed(call, 1), 1e-6))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for block in range(blocks):
        # In another order in every block: none always runs on what another has just warmed.
        for name in sorted(calls, key=lambda name: (list(calls).index(name) + block) % len(calls)):
            times[name].append(timed(calls[name], repeats[name]))
    prices = [
        mixed / (alone + more) for alone, more, mixed in zip(times["plain"], times["extra"], times["sdmp"], strict=True)
    ]
    low, high = interval(prices)
    return {
        "method": method,
        "batch_size": batch_size,
        "times": times,
        "prices": prices,
        "price": statistics.median(prices),
        "interval": [low, high],
    }


def config_of(method: str, batch_size: int) -> Any:
    """What is timed: settings, views and model."""
    from sdmp_train.presets import get_preset

    config, model = get_preset(METHODS[method]), get_preset(METHODS["mocov3"]).model
    return replace(config, model=model, optim=replace(config.optim, batch_size=batch_size, epochs=2))


def step_of(method: str, mixing: str, batch_size: int) -> Callable[[], Any]:
    """A step of the trainer's own on views that lie there."""
    from sdmp_train.pace import noise

    config = config_of(method, batch_size)
    config = replace(config, method=replace(config.method, mixing=mixing))
    training = make_training(config, torch.device("cpu"))
    batch = noise(training, batch_size, classes=0)
    return lambda: one_step(training, batch)


def extra_of(method: str, batch_size: int) -> Callable[[], Any]:
    """The forward passes without gradient that SDMP has and the plain method has not."""
    config = config_of(method, batch_size)
    found: Any = make_training(config, torch.device("cpu")).method
    network, count = (found.momentum_encoder, 1) if method == "mocov3" else (found.teacher, 2)
    px = config.data.image_px
    images = torch.randn(count * batch_size, 3, px, px).contiguous(memory_format=torch.channels_last)

    def forward() -> Any:
        with torch.no_grad():
            return network(images)

    return forward


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call, the mean of several in a row."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The two order statistics between which the median lies with at least 95 % confidence, whatever the law.

    The number of values below the median is binomial with probability 1/2.
    """
    ordered, count = sorted(values), len(values)
    tail, lowest = 0.0, 0
    for below in range(count // 2):
        tail += math.comb(count, below) / 2**count
        if 2 * tail > 0.05:
            break
        lowest = below + 1
    return ordered[max(lowest - 1, 0)], ordered[count - max(lowest, 1)]


def line(row: dict[str, Any]) -> str:
    """The arithmetic of a price, for people."""
    plain, extra, sdmp = (1000 * statistics.median(row["times"][name]) for name in ("plain", "extra", "sdmp"))
    low, high = row["interval"]
    return (
        f"{row['method']:<8} batch {row['batch_size']}: {sdmp:.1f} ms with SDMP / ({plain:.1f} ms without + "
        f"{extra:.1f} ms of extra forward) = {row['price']:.3f} "
        f"(95 %: {low:.3f} to {high:.3f}, {len(row['prices'])} blocks)"
    )
