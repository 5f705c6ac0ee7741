"""Is `mix` faster than a copy is long, and than what people use today? `python -m bench mix`.

Every arm writes into an existing tensor where it can (`out=`), and on the CPU the allocator keeps freed memory, so
that page faults of fresh outputs do not drown the arithmetic; an arm that makes its own output says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.harness import (
    Arm,
    Call,
    Inputs,
    Model,
    Setting,
    backends_of,
    ceiling_copy,
    default_backend,
    largest_error,
    model_of,
    on_backend,
    short,
    with_graph,
)
from bench.large import BEYOND, fits, some_rows
from sdmp_kernels import MixPlan, Rule, draw_plan, mix, use_backend

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RULES = {
    "mixup": (Rule.MIXUP,),
    "cutmix": (Rule.CUTMIX,),
    "resizemix": (Rule.RESIZEMIX,),
    "mixture": (Rule.MIXUP, Rule.CUTMIX, Rule.RESIZEMIX),
}


@dataclass(frozen=True)
class Ask:
    """What one setting asks of `mix`. "mixture" draws one of the three rules per sample; the others are alone."""

    rule: str
    source: torch.dtype
    result: torch.dtype
    n: int
    px: int = 224
    channels_last: bool = False
    clean: bool = False

    @property
    def normalised(self) -> bool:
        """uint8 comes from a decoder and leaves normalised; floats are normalised already."""
        return self.source == torch.uint8

    @property
    def name(self) -> str:
        """In words, unique."""
        layout = " channels_last" if self.channels_last else ""
        to = f" to normalised {short(self.result)}" if self.normalised else ""
        both = ", clean and mixed" if self.clean else ""
        return f"{self.rule} {short(self.source)}{layout}{to}, {self.n} x 3 x {self.px} x {self.px}{both}"

    @property
    def config(self) -> dict[str, Any]:
        """As values."""
        return {
            "rule": self.rule,
            "source": short(self.source),
            "result": short(self.result),
            "n": self.n,
            "px": self.px,
            "channels_last": self.channels_last,
            "clean": self.clean,
        }

    @property
    def model(self) -> Model:
        """Bytes and operations of a call."""
        images = torch.empty(self.n, 3, self.px, self.px, dtype=self.source, device="meta")
        std = STD if self.normalised else None
        return model_of("mix", images=images, plan=self.plan(0), std=std, dtype=self.result, clean=self.clean)

    def plan(self, step: int) -> MixPlan:
        """The plan of a step, on the host."""
        rules = [rule.name.lower() for rule in RULES[self.rule]]
        return draw_plan(self.n, (self.px, self.px), rules=rules, per="sample", seed=0, step=step)


def asks(device: str, size: str) -> list[Ask]:
    """The default settings of a device, most valuable first; `size`: "tiny" (for tests), "quick", "default", "full"."""
    f32, bf16, u8 = torch.float32, torch.bfloat16, torch.uint8
    if size == "tiny":
        return [
            Ask("mixup", f32, f32, n=4, px=8),
            Ask("mixture", f32, f32, n=4, px=8),
            Ask("mixture", u8, f32, n=4, px=8, channels_last=True, clean=True),
        ]
    if device == "cpu":
        n, px = (32, 96) if size == "quick" else (128, 224)
        wanted = [
            Ask("mixup", f32, f32, n, px),
            Ask("cutmix", f32, f32, n, px),
            Ask("resizemix", f32, f32, n, px),
            Ask("mixup", u8, bf16, n, px, channels_last=True),
            Ask("mixture", f32, f32, n, px),
            Ask("mixture", u8, bf16, n, px, channels_last=True, clean=True),
        ]
        if size == "full":
            wanted += [
                Ask("mixup", bf16, bf16, n, px),
                Ask("mixup", f32, f32, n, px, channels_last=True),
                Ask("mixture", u8, f32, n, px),
                *(Ask("mixture", f32, f32, many, side) for many, side in ((32, 224), (512, 96), (1024, 32))),
            ]
        return wanted
    n = 64 if size == "quick" else 1024
    wanted = [
        Ask("mixup", bf16, bf16, n),
        Ask("mixture", u8, bf16, n, channels_last=True, clean=True),
        Ask("resizemix", bf16, bf16, n),
        Ask("cutmix", bf16, bf16, n),
        Ask("mixture", bf16, bf16, n),
        Ask("mixup", u8, bf16, n, channels_last=True),
        Ask("mixture", u8, bf16, min(n, 256), channels_last=True, clean=True),
        Ask("mixup", bf16, bf16, 64),
    ]
    if size in ("default", "full"):
        wanted += [Ask("mixup", f32, f32, n), Ask("mixup", bf16, bf16, n, channels_last=True)]
    if size == "full":
        wanted += [
            Ask("mixture", bf16, bf16, 4096),
            Ask("mixture", u8, bf16, n, clean=True),
            Ask("mixture", bf16, bf16, n, px=96),
            Ask("mixture", bf16, bf16, n, px=32),
            Ask("mixup", torch.float16, torch.float16, n),
        ]
    return list(dict.fromkeys(wanted))


def settings(device: torch.device, size: str) -> Iterator[Setting]:
    """Every setting, built when its turn comes."""
    for ask in asks(device.type, size):
        yield setting(ask, device, size)


def setting(ask: Ask, device: torch.device, size: str) -> Setting:
    """The setting and its arms."""
    return Setting(
        op="mix",
        name=ask.name,
        config=ask.config,
        inputs=functools.partial(make_inputs, ask, device),
        truth=functools.partial(truth, ask),
        plain=functools.partial(plain, ask),
        outputs=("clean", "mixed") if ask.clean else ("mixed",),
        dtype=ask.result,
        arms=list(arms(ask, device, size)),
        model=ask.model,
    )


def make_inputs(ask: Ask, device: torch.device, copy: int) -> Inputs:
    """Images, a plan drawn per sample, and outputs to write into."""
    generator = torch.Generator(device).manual_seed(copy)
    shape = (ask.n, 3, ask.px, ask.px)
    if ask.source == torch.uint8:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    else:
        images = torch.randn(shape, device=device, generator=generator).to(ask.source)
    if ask.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    plan = ask.plan(copy)
    outs = [torch.empty_like(images, dtype=ask.result) for _ in range(2 if ask.clean else 1)]
    return {"images": images, "plan": plan.to(device), "host_plan": plan, "out": outs}


def truth(ask: Ask, inputs: Inputs) -> list[Tensor]:
    """The reference in float64, on the device's own images."""
    images = inputs["images"].double()
    scale: dict[str, Any] = {"mean": MEAN, "std": STD} if ask.normalised else {}
    if ask.normalised:
        images = images / 255
    with use_backend("reference", "mix"):
        result = mix(images, inputs["plan"], clean=ask.clean, **scale)
    return list(result) if isinstance(result, tuple) else [result]


def plain(ask: Ask, inputs: Inputs) -> list[Tensor]:
    """What PyTorch gives at the dtype of the result, one sample after the other."""
    unit = eager_normalise(inputs["images"], ask.result) if ask.normalised else inputs["images"]
    mixed = literal_loop(unit, inputs["host_plan"])
    return [unit, mixed] if ask.clean else [mixed]


def arms(ask: Ask, device: torch.device, size: str) -> Iterator[Arm]:
    """All arms of a setting: the copy that bounds them, ours, plain PyTorch, compiled, and other libraries."""
    graphs = device.type == "cuda"
    yield from with_graph(ceiling_copy(ask.model.floor_bytes, device), graphs)
    for backend in backends_of("mix", device):
        if backend != "reference" or size in ("tiny", "full"):
            yield from with_graph(ours(ask, backend, device), graphs and backend != "reference")
    default = default_backend("mix", device)
    if default != "reference" and not ask.normalised:
        yield ours_otherwise(default, device, in_place=False)
        yield ours_otherwise(default, device, in_place=True)
    yield from eager_arms(ask)
    compiled = compiled_arm(ask, device)
    if size != "tiny":
        yield from with_graph(compiled, graphs)
    images = functools.partial(float_images, ask)
    floats = set(RULES[ask.rule]) & {Rule.MIXUP, Rule.CUTMIX}
    if floats and not ask.clean:
        for mode in ("batch", "pair", "elem") if not ask.normalised else ("elem",):
            yield with_normalise(ask, peers.timm_mixup(mode, sorted(floats), images))
    if len(RULES[ask.rule]) == 1 and floats and not ask.normalised:
        yield peers.torchvision_mix(RULES[ask.rule][0], images)
        yield peers.kornia_mix(RULES[ask.rule][0], images)
    if not ask.normalised:
        yield peers.official_loop(images)


def ours(ask: Ask, backend: str, device: torch.device) -> Arm:
    """`mix` on one backend, into an existing output."""
    scale: dict[str, Any] = {"mean": MEAN, "std": STD} if ask.normalised else {}

    def bind(inputs: Inputs) -> Call:
        images, plan, out = inputs["images"], inputs["plan"], inputs["out"]
        target = tuple(out) if ask.clean else out[0]
        for tensor in out:
            tensor.fill_(float("nan"))  # so that an element left unwritten is found by the check
        run = on_backend("mix", backend, device, lambda: mix(images, plan, clean=ask.clean, out=target, **scale))

        def call() -> Sequence[Tensor]:
            run()
            return out

        return Call(call)

    return Arm(f"sdmp {backend}", f"this project, {backend} backend, out=", "ours", bind)


def ours_otherwise(backend: str, device: torch.device, *, in_place: bool) -> Arm:
    """`mix` as most will call it: into a new tensor, or over the images themselves."""

    def bind(inputs: Inputs) -> Call:
        images, plan = inputs["images"], inputs["plan"]
        if not in_place:
            run = on_backend("mix", backend, device, lambda: mix(images, plan))
            return Call(lambda: [run()])
        scratch = images.clone()
        run = on_backend("mix", backend, device, lambda: mix(scratch, plan, out=scratch))
        return Call(lambda: [run()], reset=lambda: scratch.copy_(images))

    name = "in place" if in_place else "new output"
    return Arm(f"sdmp {backend}, {name}", f"this project, {backend} backend, {name}", "ours", bind)


# Plain PyTorch.


def eager_normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(x / 255 - mean) / std in float32, then cast: what a user writes after the loader."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return images.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


def float_images(ask: Ask, inputs: Inputs) -> Tensor:
    """The images as the peers take them: normalised floats."""
    if not ask.normalised:
        return inputs["images"]
    if "normalised" not in inputs:
        inputs["normalised"] = eager_normalise(inputs["images"], ask.result)
    return inputs["normalised"]


def with_normalise(ask: Ask, arm: Arm) -> Arm:
    """For uint8 input: conversion and normalisation join the arm's timed part, as peers take floats only."""
    if not ask.normalised:
        return arm

    def bind(inputs: Inputs) -> Call:
        inner = arm.bind(inputs)
        images = inputs["images"]

        def run() -> Sequence[Tensor]:
            eager_normalise(images, ask.result)
            return inner.run()

        return Call(run, reset=inner.reset)

    what = f"{arm.what}, after conversion and normalisation in plain PyTorch"
    return Arm(f"normalise + {arm.name}", what, arm.kind, bind, arm.check, arm.tolerance)


def literal_loop(images: Tensor, plan: MixPlan, out: Tensor | None = None) -> Tensor:
    """One sample after the other, with host-known boxes: slices for CutMix, F.interpolate for ResizeMix."""
    out = images.clone() if out is None else out.copy_(images)
    rows = zip(plan.rule.tolist(), plan.partner.tolist(), plan.lam.tolist(), plan.box.tolist(), strict=True)
    for i, (rule, j, lam, (top, left, height, width)) in enumerate(rows):
        if rule == Rule.MIXUP:
            out[i] = lam * images[i] + (1 - lam) * images[j]
        elif height * width:
            patch = images[j, :, top : top + height, left : left + width]
            if rule == Rule.RESIZEMIX:
                patch = F.interpolate(images[j][None], size=(height, width), mode="bilinear", align_corners=False)[0]
            out[i, :, top : top + height, left : left + width] = patch
    return out


def inside(plan: MixPlan, px: int) -> Tensor:
    """(N, 1, H, W) bool: the pixels within each row's box."""
    place = torch.arange(px, device=plan.device)
    top, left, height, width = plan.box.unbind(1)
    rows = (place >= top[:, None]) & (place < (top + height)[:, None])
    columns = (place >= left[:, None]) & (place < (left + width)[:, None])
    return rows[:, None, :, None] & columns[:, None, None, :]


def resized_by_grid(images: Tensor, plan: MixPlan) -> Tensor:
    """Every partner resized into its box by one grid_sample over the whole picture; garbage outside the box."""
    size = images.shape[-1]
    place = torch.arange(size, device=images.device, dtype=torch.float32)
    top, left, height, width = plan.box.float().clamp(min=0).unbind(1)

    def axis(start: Tensor, extent: Tensor) -> Tensor:
        return (2 * (place - start[:, None]) + 1) / extent.clamp(min=1)[:, None] - 1

    y, x = axis(top, height), axis(left, width)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    flipped = images.flip(0).float()
    return F.grid_sample(flipped, grid, mode="bilinear", padding_mode="border", align_corners=False).to(images.dtype)


def eager_arms(ask: Ask) -> Iterator[Arm]:
    """Plain PyTorch, in the forms a careful user would try; the fastest is the "best eager" of the tables."""
    if ask.normalised:
        yield from _eager_uint8(ask)
        return
    for name, (what, function, tolerance) in eager_forms(ask.rule).items():
        yield _eager(name, what, function, tolerance)


EagerForm = tuple[str, Callable[[Tensor, MixPlan, MixPlan, Tensor], Tensor], float | None]


def eager_forms(rule: str) -> dict[str, EagerForm]:
    """By name: what it is, function(images, plan, plan on the host, out), and its own tolerance, if it needs one."""
    forms: dict[str, EagerForm] = {}
    if rule == "mixup":
        forms["eager literal"] = ("lam * x + (1 - lam) * x.flip(0)", _mixup_literal, None)
        forms["eager lerp"] = ("torch.lerp(x.flip(0), x, lam, out=)", _mixup_lerp, None)
    elif rule == "cutmix":
        forms["eager where"] = ("torch.where(mask, x.flip(0), x, out=)", _cutmix_where, None)
        forms["eager slices"] = ("copy, then one slice per sample, boxes known to the host", _by_loop, None)
    elif rule == "resizemix":
        forms["eager F.interpolate loop"] = ("copy, then F.interpolate per sample into its box", _by_loop, None)
        # The sampling positions of grid_sample are rounded to float32 over the whole picture.
        forms["eager grid_sample"] = ("one grid_sample, then torch.where", _resize_grid, 1e-2)
    else:
        forms["eager loop"] = ("copy, then per sample its rule", _by_loop, None)
        forms["eager by rule"] = ("rows of one rule at a time: lerp, where, grid_sample", _by_rule, 1e-2)
    return forms


def _eager(name: str, what: str, function: Callable[..., Tensor], tolerance: float | None) -> Arm:
    def bind(inputs: Inputs) -> Call:
        images, plan, host, out = inputs["images"], inputs["plan"], inputs["host_plan"], inputs["out"][0]
        return Call(lambda: [function(images, plan, host, out)])

    return Arm(name, f"torch {torch.__version__} eager: {what}", "eager", bind, tolerance=tolerance)


def _lam(plan: MixPlan, dtype: torch.dtype) -> Tensor:
    return plan.lam.to(dtype).view(-1, 1, 1, 1)


def _mixup_literal(images: Tensor, plan: MixPlan, _: MixPlan, out: Tensor) -> Tensor:
    lam = _lam(plan, images.dtype)
    return torch.add(lam * images, (1 - lam) * images.flip(0), out=out)


def _mixup_lerp(images: Tensor, plan: MixPlan, _: MixPlan, out: Tensor) -> Tensor:
    return torch.lerp(images.flip(0), images, _lam(plan, images.dtype), out=out)


def _cutmix_where(images: Tensor, plan: MixPlan, _: MixPlan, out: Tensor) -> Tensor:
    return torch.where(inside(plan, images.shape[-1]), images.flip(0), images, out=out)


def _resize_grid(images: Tensor, plan: MixPlan, _: MixPlan, out: Tensor) -> Tensor:
    return torch.where(inside(plan, images.shape[-1]), resized_by_grid(images, plan), images, out=out)


def _by_loop(images: Tensor, _: MixPlan, host: MixPlan, out: Tensor) -> Tensor:
    return literal_loop(images, host, out)


def _by_rule(images: Tensor, plan: MixPlan, host: MixPlan, out: Tensor) -> Tensor:
    flipped = images.flip(0)
    pasted = torch.where((plan.rule == Rule.RESIZEMIX).view(-1, 1, 1, 1), resized_by_grid(images, plan), flipped)
    torch.where(inside(plan, images.shape[-1]), pasted, images, out=out)
    blended = (host.rule == Rule.MIXUP).nonzero()[:, 0].to(images.device)
    lam = _lam(plan, images.dtype)[blended]
    return out.index_copy_(0, blended, torch.lerp(flipped[blended], images[blended], lam))


def _eager_uint8(ask: Ask) -> Iterator[Arm]:
    def run(images: Tensor, host: MixPlan, plan: MixPlan, out: list[Tensor]) -> Sequence[Tensor]:
        unit = eager_normalise(images, torch.float32)
        if ask.clean:
            out[0].copy_(unit)
        if ask.rule == "mixup":
            out[-1].copy_(torch.lerp(unit.flip(0), unit, _lam(plan, torch.float32)))
        else:
            out[-1].copy_(literal_loop(unit, host))
        return out

    def bind(inputs: Inputs) -> Call:
        given = (inputs["images"], inputs["host_plan"], inputs["plan"], inputs["out"])
        return Call(lambda: run(*given))

    form = "lerp" if ask.rule == "mixup" else "per-sample loop"
    yield Arm("eager", f"torch {torch.__version__} eager: float, / 255, - mean, / std, {form}, cast", "eager", bind)


# torch.compile. One expression of all rules asked for, which Inductor fuses into one kernel that reads both sources.


def compiled_arm(ask: Ask, device: torch.device) -> Arm:
    """torch.compile of the branch-free expression, into an existing output."""
    state: dict[str, Any] = {}
    scale: list[Tensor] = []
    # Plain values: the compiler need not see through this module's classes.
    normalised, clean, kind, mixup, resizemix = (
        ask.normalised,
        ask.clean,
        ask.rule,
        int(Rule.MIXUP),
        int(Rule.RESIZEMIX),
    )

    def expression(images: Tensor, rule: Tensor, lam: Tensor, box: Tensor, outs: list[Tensor]) -> None:
        x = images.float()
        if normalised:
            x = (x / 255 - scale[0]) / scale[1]
        partner = x.flip(0)
        share = lam.view(-1, 1, 1, 1)
        if kind == "mixup":
            mixed = share * x + (1 - share) * partner
        else:
            paste = partner if kind == "cutmix" else bilinear(partner, box)
            if kind == "mixture":
                paste = torch.where((rule == resizemix).view(-1, 1, 1, 1), paste, partner)
            mixed = torch.where(box_mask(box, x.shape[-1]), paste, x)
            if kind == "mixture":
                mixed = torch.where((rule == mixup).view(-1, 1, 1, 1), share * x + (1 - share) * partner, mixed)
        if clean:
            outs[0].copy_(x)
        outs[-1].copy_(mixed)

    def bind(inputs: Inputs) -> Call:
        if "compiled" not in state:
            scale[:] = [torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD)]
            state["compiled"] = torch.compile(expression, fullgraph=True, dynamic=False)
        compiled, plan, out = state["compiled"], inputs["plan"], inputs["out"]
        given = (inputs["images"], plan.rule, plan.lam, plan.box, out)

        def run() -> Sequence[Tensor]:
            compiled(*given)
            return out

        return Call(run)

    what = f"torch {torch.__version__} torch.compile (default mode, static shapes) of one fused expression, out="
    # As with grid_sample, positions are float32 over the whole picture.
    return Arm("torch.compile", what, "compile", bind, tolerance=1e-2 if ask.rule in ("resizemix", "mixture") else None)


def box_mask(box: Tensor, px: int) -> Tensor:
    """(N, 1, H, W) bool, in a form Inductor fuses."""
    place = torch.arange(px, device=box.device)
    top, left, height, width = (box[:, i, None] for i in range(4))
    rows = (place >= top) & (place < top + height)
    columns = (place >= left) & (place < left + width)
    return rows[:, None, :, None] & columns[:, None, None, :]


def bilinear(images: Tensor, box: Tensor) -> Tensor:
    """(N, C, H, W): every image resized to its box, at the box's place, by four gathers and their weights."""
    n, channels, height, width = images.shape

    def taps(start: Tensor, extent: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        place = torch.arange(size, device=images.device) - start[:, None]
        source = (place + 0.5) * (size / extent.clamp(min=1)[:, None]) - 0.5
        source = source.clamp(0, size - 1)
        low = source.floor().long()
        return low, (low + 1).clamp(max=size - 1), source - low

    y0, y1, fy = taps(box[:, 0], box[:, 2], height)
    x0, x1, fx = taps(box[:, 1], box[:, 3], width)
    row = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]

    def at(y: Tensor, x: Tensor) -> Tensor:
        return images[row, channel, y[:, None, :, None], x[:, None, None, :]]

    fy, fx = fy[:, None, :, None], fx[:, None, None, :]
    upper = at(y0, x0) * (1 - fx) + at(y0, x1) * fx
    lower = at(y1, x0) * (1 - fx) + at(y1, x1) * fx
    return upper * (1 - fy) + lower * fy


# More than 2^31 elements.


def large(device: torch.device, tiny: bool, backend: str) -> float:
    """uint8 images in and out, every rule, the flip; the backward pass is linear in the same offsets."""
    px = 16 if tiny else 224
    n = 6 if tiny else BEYOND // (3 * px * px) + 1
    fits(device, 3 * n * 3 * px * px)
    images = torch.randint(0, 256, (n, 3, px, px), dtype=torch.uint8, device=device)
    plan = draw_plan(n, (px, px), per="sample", seed=0, step=0, device=device)
    with use_backend(backend, "mix"):
        mixed = mix(images, plan)
    assert isinstance(mixed, Tensor)
    rows = some_rows(n, device)
    part = _part(plan, rows)
    with use_backend("reference", "mix"):
        truth = mix(images[rows], part)
    assert isinstance(truth, Tensor)
    # One step of uint8: a tie may round either way.
    return largest_error(mixed[rows], truth)


def _part(plan: MixPlan, rows: Tensor) -> MixPlan:
    """The plan of some rows that are closed under its pairing."""
    place = {int(row): i for i, row in enumerate(rows)}
    partner = torch.tensor([place[int(plan.partner[row])] for row in rows], device=rows.device)
    return MixPlan(
        rule=plan.rule[rows],
        partner=partner,
        lam=plan.lam[rows],
        partner_lam=plan.partner_lam[rows],
        box=plan.box[rows],
        size=plan.size,
        mirrored=False,
        rules=plan.rules,
    )
