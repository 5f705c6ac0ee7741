"""Random calls of `mix` for the compiled kernels: every dtype, layout, rule and kind of partner, from a seed.

As a script, `native_trials.py LIBRARY` prints a digest of every trial's results computed by that library: how kernels
for different instruction sets are compared, which one process cannot have both.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdmp_kernels import MixPlan, Rule, draw_plan, plan
from sdmp_kernels.ops.mix.arguments import Erasure, Gradients, Norm, Outputs, PlanRows, Upstream

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (torch.uint8, *FLOATS)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "channels_sliced", "stepped", "spread")
RULES = (("mixup",), ("cutmix",), ("resizemix",), ("mixup", "cutmix"), ("mixup", "cutmix", "resizemix", "keep"))
SEEDS = range(160)


@dataclass
class Trial:
    """Arguments of one forward and one backward call, in the order of the backends' functions."""

    images: Tensor
    partners: Tensor | None
    plan: PlanRows
    norm: Norm | None
    dtype: torch.dtype
    clean: bool
    grad_mixed: Tensor | None
    grad_clean: Tensor | None
    layouts: tuple[str, str, str]  # of mixed, clean and the gradients
    grad_dtype: torch.dtype  # of the images' gradients

    def forward(
        self, mix: Callable[..., Any], mixed: Tensor, kept: Tensor | None, erasure: Erasure | None = None
    ) -> list[Tensor]:
        """Run a backend's `mix` into the given tensors: [mixed] or [mixed, clean]."""
        erased = () if erasure is None else (erasure,)
        mix(self.images, self.partners, self.plan, self.norm, Outputs(mixed, kept), *erased)
        return [mixed] if kept is None else [mixed, kept]

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """Tensors for `forward`, poisoned."""
        blank = torch.full(self.images.shape, 77, dtype=self.dtype)
        return lay_out(blank, self.layouts[0]), lay_out(blank, self.layouts[1]) if self.clean else None

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Tensors for `backward`, poisoned."""
        own = torch.full(self.images.shape, 77, dtype=self.grad_dtype)
        if self.partners is None:
            return lay_out(own, self.layouts[2]), None
        other = torch.full(self.partners.shape, 77, dtype=self.grad_dtype)
        return lay_out(own, self.layouts[2]), lay_out(other, self.layouts[2])

    def backward(self, mix_backward: Callable[..., Any], own: Tensor, other: Tensor | None) -> list[Tensor]:
        """Run a backend's `mix_backward` into the given tensors: [images] or [images, partners]."""
        upstream = Upstream(self.grad_mixed, self.grad_clean)
        mix_backward(upstream, self.plan, self.norm and self.norm.std, Gradients(own, other))
        return [own] if other is None else [own, other]

    @property
    def exact(self) -> bool:
        """Whether the results are those of the reference bit for bit: what is resized or normalised is only close."""
        return self.norm is None and not (self.plan.rule == Rule.RESIZEMIX).any()


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    n, c, h, w = values.shape
    if layout == "contiguous":
        return values.contiguous().clone()
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().clone().transpose(2, 3)
    shape, view = {
        "sliced": ((n, c + 1, h + 2, w + 3), lambda b: b[:, 1:, 1 : h + 1, 2 : w + 2]),
        "channels_sliced": ((n, h + 1, w + 2, c + 1), lambda b: b[:, 1:, 1 : w + 1, :c].permute(0, 3, 1, 2)),
        "stepped": ((n, c, h, 2 * w), lambda b: b[..., ::2]),
        "spread": ((2 * n, c, h, w), lambda b: b[::2]),
    }[layout]
    return view(torch.zeros(shape, dtype=values.dtype)).copy_(values)


def make(seed: int) -> Trial:
    """The trial of a seed. Every second one has the dense layouts and sizes that vector kernels take."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dense = seed % 2 == 0
    n, c = pick.choice([1, 2, 3, 4, 5]), pick.choice([1, 2, 3, 3, 3, 5])
    h, w = pick.choice([1, 2, 3, 7, 16, 33]), pick.choice([16, 32, 48, 160] if dense else [1, 2, 3, 8, 17, 65, 700])
    kind = pick.choice(LAYOUTS[:2])
    layouts = [kind if dense else pick.choice(LAYOUTS) for _ in range(7)]
    own = pick.random() < (0.8 if dense else 0.5)
    mirrored = pick.random() < (0.8 if dense else 0.4)
    rows = n if own or mirrored else pick.choice([1, 2, n + 1])
    plan = draw_plan(
        n, (h, w), rules=pick.choice(RULES), per=pick.choice(["batch", "sample"]), seed=seed, prob=0.9, step=0
    )
    partner = plan.partner if mirrored else torch.randint(0, rows, (n,), generator=generator)
    lam, box = extremes(plan, pick)
    source, result = pick.choice(DTYPES), pick.choice(DTYPES)
    result = source if pick.random() < 0.4 else result
    normalised = result != torch.uint8 and pick.random() < 0.5

    def pixels(count: int) -> Tensor:
        if source == torch.uint8:
            return torch.randint(0, 256, (count, c, h, w), generator=generator, dtype=torch.uint8)
        values = torch.rand(count, c, h, w, generator=generator)
        return (values * 290 - 20 if result == torch.uint8 else values).to(source)

    def gradient(layout: str, dtype: torch.dtype) -> Tensor:
        return lay_out(torch.randn(n, c, h, w, generator=generator).to(dtype), layout)

    images = pixels(n)
    if images.is_floating_point() and pick.random() < 0.3:
        images.view(-1)[::7] = float("nan")
    upstream, given = pick.choice(FLOATS), pick.choice(["mixed", "clean", "both"])
    return Trial(
        images=lay_out(images, layouts[0]),
        partners=None if own else lay_out(pixels(rows), layouts[1]),
        plan=PlanRows(plan.rule, partner, lam, box, mirrored, [int(rule) for rule in plan.rules]),
        norm=Norm([pick.random() for _ in range(c)], [pick.random() + 0.1 for _ in range(c)]) if normalised else None,
        dtype=result,
        clean=pick.random() < 0.5,
        grad_mixed=None if given == "clean" else gradient(layouts[2], upstream),
        grad_clean=None if given == "mixed" else gradient(layouts[3], upstream),
        layouts=(layouts[4], layouts[5], layouts[6]),
        grad_dtype=upstream if pick.random() < 0.5 else pick.choice(FLOATS),
    )


def erasure(trial: Trial, seed: int) -> Erasure:
    """Up to four boxes per image, of any size and place, over one another, with colours of any kind."""
    pick = random.Random(-1 - seed)
    n, c, h, w = trial.images.shape
    count, per_pixel = pick.choice([1, 2, 4]), pick.random() < 0.6
    boxes = torch.zeros(n, count, 5, dtype=torch.int32)
    rows = 1
    for box in boxes.view(-1, 5):
        if pick.random() < 0.7:
            height, width = pick.randint(0, h), pick.randint(0, w)
            numbers = [pick.randint(0, h - height), pick.randint(0, w - width), height, width, rows]
            rows += height * width if per_pixel else 1
            box.copy_(torch.tensor(numbers))
    fill = torch.randn(rows, c, generator=torch.Generator().manual_seed(seed)) * 100
    fill[::5] = float("nan")
    return Erasure(boxes, fill, per_pixel)


def extremes(plan: MixPlan, pick: random.Random) -> tuple[Tensor, Tensor]:
    """lam and box of a plan with some rows at the ends of their ranges."""
    lam, box = plan.lam.clone(), plan.box.clone()
    for row, rule in enumerate(plan.rule.tolist()):
        if rule == Rule.MIXUP and pick.random() < 0.3:
            lam[row] = pick.choice([0.0, 1.0])
        if rule >= Rule.CUTMIX and pick.random() < 0.2:
            box[row] = torch.tensor([0, 0, *plan.size])
    return lam, box


def digest(results: list[Tensor]) -> str:
    """The bits of some tensors; one NaN is like another."""
    found = hashlib.sha256()
    for tensor in results:
        whole = tensor.clone(memory_format=torch.contiguous_format)
        if whole.is_floating_point():
            whole[whole.isnan()] = float("nan")
        found.update(whole.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests() -> list[str]:
    """Of every seed: what the CPU kernels that are loaded compute."""
    from sdmp_kernels.ops.mix import native

    found = []
    for seed in SEEDS:
        trial = make(seed)
        found.append(
            digest(trial.forward(native.mix, *trial.outputs(), erasure(trial, seed) if seed % 4 == 0 else None))
        )
        found.append(digest(trial.backward(native.mix_backward, *trial.gradients())))
    return found


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    # numpy draws the same plans; the installed library would register the same operators again.
    plan.compiled_draws = lambda: None  # type: ignore[assignment]
    print("\n".join(digests()))
