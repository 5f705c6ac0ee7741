"""What mixing and its labels cost in timm's training loop: `python -m bench labels`.

A step is the loop of timm's own script without its prefetcher: mix the batch and make its target, forward, loss,
backward, update. Mixing and loss are timed within it; what they are of the whole step is the share that can be saved at
all. The ways of doing it take the same batches in turn, block after block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import environment
from bench.price import interval

ALPHAS: dict[str, Any] = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


@dataclass(frozen=True)
class Way:
    """One way to mix and to make targets; the loss is timm's for dense ones, ours for two-hot ones."""

    name: str
    ours: bool
    mode: str
    two_hot: bool = False

    def make(self, classes: int) -> tuple[Callable[..., Any], nn.Module]:
        """(mixing, loss)."""
        if self.ours:
            import sdmp_kernels.timm as ours

            labels = "two_hot" if self.two_hot else "dense"
            mixing: Any = ours.Mixup(**ALPHAS, mode=self.mode, num_classes=classes, seed=0, labels=labels)
            if self.two_hot:
                return mixing, ours.SoftTargetCrossEntropy(smoothing=0.1)
        else:
            from timm.data import Mixup

            mixing = Mixup(**ALPHAS, mode=self.mode, num_classes=classes)
        from timm.loss import SoftTargetCrossEntropy

        return mixing, SoftTargetCrossEntropy()


WAYS = (
    Way("timm batch, dense", ours=False, mode="batch"),
    Way("timm elem, dense", ours=False, mode="elem"),
    Way("sdmp batch, dense", ours=True, mode="batch"),
    Way("sdmp batch, two-hot", ours=True, mode="batch", two_hot=True),
    Way("sdmp elem, dense", ours=True, mode="elem"),
    Way("sdmp elem, two-hot", ours=True, mode="elem", two_hot=True),
)
FIRST = WAYS[0].name
PARTS = ("mixing", "loss", "step")


class Loop:
    """A model, its optimiser and one way; every call is a step."""

    def __init__(self, way: Way, arch: str, px: int, classes: int) -> None:
        import timm

        self.mixing, self.loss = way.make(classes)
        torch.manual_seed(0)
        options = {"img_size": px} if "vit" in arch else {}
        self.model = timm.create_model(arch, num_classes=classes, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Seconds of the parts of a step; of the loss, its forward pass and the gradient of the logits."""
        began = time.perf_counter()
        mixed, target = self.mixing(images, labels)
        mixing = time.perf_counter() - began
        logits = self.model(mixed)
        cut = logits.detach().requires_grad_()
        before = time.perf_counter()
        (gradient,) = torch.autograd.grad(self.loss(cut, target), cut)
        loss = time.perf_counter() - before
        self.optimizer.zero_grad()
        logits.backward(gradient)
        self.optimizer.step()
        return {"mixing": mixing, "loss": loss, "step": time.perf_counter() - began}


def run(args: argparse.Namespace) -> int:
    """Time every way, print a row for each, and write them where `--json` says."""
    shape = (args.batch_size, 3, args.px, args.px)
    print(f"labels on cpu, {torch.get_num_threads()} threads, {args.arch}, {shape}, {args.classes} classes: ", end="")
    print(environment.line())
    rows = measure(args)
    for row in rows:
        print(line(row))
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": environment.describe(), "rows": rows}, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of every part by way and block, their medians, and the first way's time over each."""
    loops = {way.name: Loop(way, args.arch, args.px, args.classes) for way in WAYS}
    times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in loops}
    generator = torch.Generator().manual_seed(0)
    for block in range(-1, args.blocks):  # the first one warms up
        images = torch.rand(args.batch_size, 3, args.px, args.px, generator=generator)
        labels = torch.randint(0, args.classes, (args.batch_size,), generator=generator)
        for name in sorted(loops, key=lambda name: (list(loops).index(name) + block) % len(loops)):
            found = loops[name](images.clone(), labels)
            for part in PARTS if block >= 0 else ():
                times[name][part].append(found[part])
    rows = []
    for name, parts in times.items():
        ratios = [one / own for one, own in zip(times[FIRST]["step"], parts["step"], strict=True)]
        low, high = interval(ratios)
        medians = {part: statistics.median(values) for part, values in parts.items()}
        rows.append(
            {"way": name, "times": parts, **medians, "times_first": statistics.median(ratios), "interval": [low, high]}
        )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    mixing, loss, step = (1000 * row[part] for part in PARTS)
    low, high = row["interval"]
    return (
        f"{row['way']:<20} mixing {mixing:7.2f} ms, loss {loss:7.2f} ms, together {100 * (mixing + loss) / step:4.1f} "
        f"% of a step of {step:7.1f} ms; {FIRST} takes {row['times_first']:.3f} times as long "
        f"(95 %: {low:.3f} to {high:.3f})"
    )
