"""Small images, where the host's work counts: `python -m bench small`.

A batch of 100 images of 32 x 32 pixels on one thread of a CPU: drawing a plan for every sample and mixing in place,
beside timm's `Mixup`, which draws one lam for the batch; our drop-in for it, which makes targets as it does; and, per
rule, our composition of PyTorch's operators, for machines without compiled kernels, beside what a user writes of them.
What of that rounds otherwise than the definition of `mix`, which our composition keeps to bit for bit, is marked.

The arms are called in turn, thousands of times; a ratio is the median of those of neighbouring calls.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import environment
from bench.mix import eager_forms
from sdmp_kernels import MixPlan, draw_plan, mix, use_backend

SHAPE = (100, 3, 32, 32)
CLASSES = 10
RULES = ("mixup", "cutmix", "resizemix")


def run(args: argparse.Namespace) -> int:
    """Print a row for every pair, and write them where `--json` says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(f"{SHAPE[0]} images of {SHAPE[2]} px, float32, on one thread: {environment.line()}")
        rows = []
        for name, ours, theirs in pairs():
            found = measure(ours, theirs, args.seconds)
            rows.append({"name": name, **found})
            ours_us, theirs_us = (f"{1e6 * found[which]:>6.0f} us" for which in ("ours", "theirs"))
            print(f"{name:<96} {ours_us}, {theirs_us}: {found['ratio']:.2f} of its speed", flush=True)
    finally:
        torch.set_num_threads(threads)
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": environment.describe(), "rows": rows}, indent=1) + "\n")
    return 0


def pairs() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """(what is compared, ours, theirs)."""
    from timm.data.mixup import Mixup

    from sdmp_kernels.timm import Mixup as DropIn

    images, labels, steps = torch.rand(SHAPE), torch.arange(SHAPE[0]) % CLASSES, itertools.count()
    for rule in ("mixup", "cutmix"):
        alphas: dict[str, Any] = {"mixup_alpha": float(rule == "mixup"), "cutmix_alpha": float(rule == "cutmix")}
        timm, drop_in = (
            functools.partial(kind(**alphas, num_classes=CLASSES), images, labels) for kind in (Mixup, DropIn)
        )

        def drawn(rule: str = rule) -> None:
            mix(images, draw_plan(SHAPE[0], SHAPE[2:], rules=(rule,), step=next(steps)), out=images)

        yield f"{rule}: draw_plan + mix, per sample, beside timm's batch mode", drawn, timm
        yield f"{rule}: the drop-in, beside timm's batch mode", drop_in, timm
    for rule in RULES:
        for form, (_, function, _) in eager_forms(rule).items():
            plan, out = draw_plan(SHAPE[0], SHAPE[2:], rules=(rule,), step=0), torch.empty(SHAPE)
            composed = functools.partial(mix, images, plan, out=out)
            eager = functools.partial(function, images, plan, plan, out)
            marked = f"{form} ({otherwise})" if (otherwise := differs(eager, images, plan)) else form
            with use_backend("torch"):  # the choice is no part of a call
                yield f"{rule}: without compiled kernels, beside {marked}", composed, eager


def differs(eager: Callable[[], Tensor], images: Tensor, plan: MixPlan) -> str:
    """How far an eager form is from the definition, in words; nothing where all bits are equal."""
    with use_backend("reference"):
        wanted = mix(images, plan)
    assert isinstance(wanted, Tensor)
    error = float((eager() - wanted).abs().max())
    return f"rounds otherwise, by up to {error:.0e}" if error > 0 else ""


def measure(ours: Callable[[], object], theirs: Callable[[], object], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each, and the median of theirs / ours of neighbouring calls."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (ours, theirs):
        for _ in range(5):
            call()
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(times[0]) < 5:
        for call, kept in zip((ours, theirs), times, strict=True):
            begin = time.perf_counter()
            call()
            kept.append(time.perf_counter() - begin)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*times, strict=True))
    return {"ours": statistics.median(times[0]), "theirs": statistics.median(times[1]), "ratio": ratio}
