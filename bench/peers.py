"""What other libraries offer for the same work, called as their users call them, each named absent where it is not.

Their laws differ (one lam per batch, another pairing, hard labels only), so each comes with what must be true of its
answer. Nothing here is copied from them.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.arms import loss_arm
from bench.environment import PACKAGES, version
from bench.harness import Absent, Arm, Call, Inputs
from sdmp_kernels import Rule

Images = Callable[[Inputs], Tensor]


def require(module: str, package: str) -> ModuleType:
    """Import a peer, or raise `Absent` with what would install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if version(package) is None:
            raise Absent(f"{package} is not installed (pip install {package})") from None
        raise Absent(f"{package} {version(package)} does not import here: {error}") from None


def named(package: str, words: str) -> str:
    """An arm's description: package, version, what it does differently."""
    return f"{package} {version(package) or ''}".strip() + (f": {words}" if words else "")


# Mixing. `images` is never written by an arm; those that work in place get a copy, restored untimed.


def mixing_error(mixed: Tensor, own: Tensor, partner: Tensor, rules: Sequence[Rule]) -> float:
    """How far each sample is from being its own image and its partner's mixed by one of `rules`; the largest.

    Mixup: some one share per sample explains all its pixels. CutMix: there is a box with the partner's pixels inside
    and the own ones outside. Shares and boxes are read off the result, as the peers do not tell what they drew.
    """
    parts = zip(mixed.split(64), own.split(64), partner.split(64), strict=True)
    return max(_mixing_error(m.double(), o.double(), p.double(), rules) for m, o, p in parts)


def _mixing_error(mixed: Tensor, own: Tensor, partner: Tensor, rules: Sequence[Rule]) -> float:
    errors = [own.new_full((len(own),), float("inf"))]
    if Rule.MIXUP in rules:
        apart = own - partner
        share = ((mixed - partner) * apart).sum((1, 2, 3)) / apart.square().sum((1, 2, 3)).clamp(min=1e-12)
        errors.append((mixed - torch.addcmul(partner, share.view(-1, 1, 1, 1), apart)).abs().amax((1, 2, 3)))
    if Rule.CUTMIX in rules:
        changed = (mixed != own).any(1)
        box = changed.any(2)[:, None, :, None] & changed.any(1)[:, None, None, :]
        errors.append((mixed - torch.where(box, partner, own)).abs().amax((1, 2, 3)))
    return float(torch.stack(errors).amin(0).max())


def timm_mixup(mode: str, rules: Sequence[Rule], images: Images) -> Arm:
    """timm's Mixup, pixels only (no targets), in place; one lam per batch, per pair or per sample by `mode`."""

    def bind(inputs: Inputs) -> Call:
        mixup = require("timm.data.mixup", "timm").Mixup(
            mixup_alpha=float(Rule.MIXUP in rules), cutmix_alpha=float(Rule.CUTMIX in rules), mode=mode
        )
        source, scratch = images(inputs), images(inputs).clone()
        mix = getattr(mixup, f"_mix_{mode}")

        def run() -> Sequence[Tensor]:
            mix(scratch)
            return [scratch]

        return Call(run, reset=lambda: scratch.copy_(source))

    def check(inputs: Inputs, results: Sequence[Tensor]) -> float:
        source = images(inputs)
        return mixing_error(results[0], source, source.flip(0), rules)

    words = f'Mixup mode="{mode}", pixels only, in place, {" or ".join(r.name.lower() for r in rules)}'
    return Arm(f"timm {mode}", named("timm", words), "peer", bind, check)


def torchvision_mix(rule: Rule, images: Images) -> Arm:
    """torchvision v2's MixUp or CutMix: one lam or box for the batch, partner is the row before."""

    def bind(inputs: Inputs) -> Call:
        v2 = require("torchvision.transforms.v2", "torchvision")
        transform = {Rule.MIXUP: v2.MixUp, Rule.CUTMIX: v2.CutMix}[rule](num_classes=2)
        source = images(inputs)
        labels = torch.zeros(len(source), dtype=torch.int64, device=source.device)
        return Call(lambda: [transform(source, labels)[0]])

    def check(inputs: Inputs, results: Sequence[Tensor]) -> float:
        source = images(inputs)
        return mixing_error(results[0], source, source.roll(1, 0), [rule])

    words = "one lam for the batch, partner by roll(1)"
    return Arm("torchvision v2", named("torchvision", words), "peer", bind, check)


def kornia_mix(rule: Rule, images: Images) -> Arm:
    """kornia's RandomMixUpV2 or RandomCutMixV2: per sample, partner by random permutation."""
    used: dict[str, Any] = {}

    def bind(inputs: Inputs) -> Call:
        augmentation = require("kornia.augmentation", "kornia")
        name = {Rule.MIXUP: "RandomMixUpV2", Rule.CUTMIX: "RandomCutMixV2"}[rule]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            used["transform"] = getattr(augmentation, name)(p=1.0, data_keys=["input"])
        source = images(inputs)
        return Call(lambda: [used["transform"](source)])

    def check(inputs: Inputs, results: Sequence[Tensor]) -> float:
        drawn = used["transform"]._params
        pairs = drawn["mixup_pairs"] if rule == Rule.MIXUP else drawn["mix_pairs"][0]
        source = images(inputs)
        return mixing_error(results[0], source, source[pairs.to(source.device)], [rule])

    return Arm("kornia", named("kornia", "per sample, random permutation"), "peer", bind, check)


def official_loop(images: Images) -> Arm:
    """The shape of the paper's released code, restated: a Python loop that fetches lam per sample and writes it back.

    Here it mixes as the released code meant to (its box test is never true), from this project's plan.
    """

    def bind(inputs: Inputs) -> Call:
        source, plan = images(inputs), inputs["plan"]
        rules, boxes = plan.rule.tolist(), plan.box.tolist()
        lam = plan.lam.clone()

        def run() -> Sequence[Tensor]:
            mixed, (height, width) = source.clone(), plan.size
            for i in range(len(source)):
                share = lam[i].item()  # the host waits here, once per sample
                other = source[len(source) - 1 - i]
                top, left, h, w = boxes[i]
                if rules[i] == Rule.MIXUP:
                    mixed[i] = source[i] * share + other * (1 - share)
                elif h * w:
                    patch = other[:, top : top + h, left : left + w]
                    if rules[i] == Rule.RESIZEMIX:
                        patch = F.interpolate(other[None], size=(h, w), mode="bilinear", align_corners=False)[0]
                    mixed[i, :, top : top + h, left : left + w] = patch
                    lam[i] = 1 - h * w / (height * width)
            return [mixed]

        return Call(run)

    what = "per-sample loop in the style of the paper's released code, with its pixels actually mixed"
    return Arm("official-style loop", what, "peer", bind)


# Losses. All of these take hard labels only: they do less than the two-hot losses beside them, and say so.

HARD = "hard labels only"


def _hard(inputs: Inputs) -> Tensor:
    return torch.arange(len(inputs["q"]), device=inputs["q"].device)


def _linear_arm(name: str, package: str, words: str, make: Callable[[Inputs], Callable[[], Tensor]]) -> Arm:
    """An arm for the cross-entropy of q @ k.T / temperature with label i, held to loss and dq in float64."""

    def bind(inputs: Inputs) -> Call:
        loss, leaves = make(inputs), inputs["leaves"]
        if inputs["q"].device.type != "cuda":
            raise Absent(f"{package} runs on CUDA devices only")

        def run() -> Sequence[Tensor]:
            value = loss()
            return [value.detach(), *torch.autograd.grad(value, leaves)]

        return Call(run)

    return Arm(name, named(package, f"{words}{HARD}, source term only"), "peer", bind, hard_error, tolerance=5e-2)


@torch.no_grad()
def hard_error(inputs: Inputs, results: Sequence[Tensor]) -> float:
    """The larger of the errors of loss and dq, each relative to its largest term: what half inputs' rounding moves."""
    q, k, t = inputs["q"].double(), inputs["k"][0].double(), inputs["temperature"]
    losses, grads = [], []
    for rows in torch.arange(len(q), device=q.device).split(2048):
        logits = q[rows] @ k.T / t
        lse = torch.logsumexp(logits, 1)
        losses.append(lse - logits.gather(1, rows[:, None])[:, 0])
        grads.append((torch.exp(logits - lse[:, None]) @ k - k[rows]) / (t * len(q)))
    dq = torch.cat(grads)
    loss_error = float((results[0].double() - torch.cat(losses).mean()).abs()) * t
    return max(loss_error, float((results[1].double() - dq).abs().max() / dq.abs().max()))


def liger_linear() -> Arm:
    """Liger's fused linear cross-entropy."""

    def make(inputs: Inputs) -> Callable[[], Tensor]:
        function = require("liger_kernel.transformers.functional", "liger-kernel").liger_fused_linear_cross_entropy
        q, (k, *_), scale, labels = inputs["q"], inputs["k"], 1 / inputs["temperature"], _hard(inputs)
        return lambda: function(q * scale, k, labels)

    return _linear_arm("Liger", "liger-kernel", "fused_linear_cross_entropy, ", make)


def cut_cross_entropy() -> Arm:
    """Apple's cut cross-entropy without its gradient filter, which would drop real signal of contrastive rows."""

    def make(inputs: Inputs) -> Callable[[], Tensor]:
        function = require("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
        exact = "accum_e_fp32" in inspect.signature(function).parameters
        options = {"impl": "cce_exact"} if exact else {"impl": "cce", "filter_eps": None}
        q, (k, *_), scale, labels = inputs["q"], inputs["k"], 1 / inputs["temperature"], _hard(inputs)
        return lambda: function(q * scale, k, labels, **options)

    return _linear_arm("cut-cross-entropy", "cut-cross-entropy", "exact (no gradient filter), ", make)


def quack_linear() -> Arm:
    """QuACK's chunked linear cross-entropy (Hopper and later)."""

    def make(inputs: Inputs) -> Callable[[], Tensor]:
        function = require("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
        q, (k, *_), scale, labels = inputs["q"], inputs["k"], 1 / inputs["temperature"], _hard(inputs)
        return lambda: function(q * scale, k, labels)

    return _linear_arm("QuACK", "quack-kernels", "chunked_linear_cross_entropy, ", make)


def inf_cl() -> Arm:
    """Inf-CL's flash contrastive loss."""

    def make(inputs: Inputs) -> Callable[[], Tensor]:
        function = require("inf_cl", "inf-cl").cal_flash_loss
        q, (k, *_), scale, labels = inputs["q"], inputs["k"], 1 / inputs["temperature"], _hard(inputs)
        return lambda: function(q, k, labels, scale=scale, head_dim=q.shape[1]).mean()

    return _linear_arm("Inf-CL", "inf-cl", "cal_flash_loss (computes the gradient of k in any case), ", make)


def hard_cross_entropy(name: str, module: str, package: str, function: str) -> Arm:
    """A library's cross-entropy of given logits with hard labels (the first column of each target).

    It may write its gradient over the logits, as Liger does, so it gets its own, restored untimed.
    """

    def bind(inputs: Inputs) -> Call:
        loss = getattr(require(module, package), function)
        if inputs["logits"].device.type != "cuda":
            raise Absent(f"{package} runs on CUDA devices only")
        source, labels = inputs["logits"].detach(), inputs["target"].first
        logits = source.clone().requires_grad_()

        def run() -> Sequence[Tensor]:
            value = loss(logits, labels, reduction="mean")
            return [value.detach(), *torch.autograd.grad(value, [logits])]

        return Call(run, reset=lambda: logits.detach().copy_(source))

    @torch.no_grad()
    def check(inputs: Inputs, results: Sequence[Tensor]) -> float:
        source, labels = inputs["logits"], inputs["target"].first
        losses, worst = [], 0.0
        for rows in torch.arange(len(source), device=source.device).split(256):
            z = source[rows].double()
            losses.append(F.cross_entropy(z, labels[rows], reduction="none"))
            grad = torch.softmax(z, 1).scatter_add_(1, labels[rows, None], -torch.ones_like(z[:, :1]))
            worst = max(worst, float((results[1][rows].double() * len(source) - grad).abs().max()))
        return max(worst, float((results[0].double() - torch.cat(losses).mean()).abs()))

    return Arm(name, named(package, HARD), "peer", bind, check, tolerance=5e-2)


# Dense labels, as the users of timm and torchvision meet them: made of the labels in every step, then a soft loss.


def timm_dense_labels(forward: bool) -> Arm:
    """timm's `mixup_target` with a share per sample, and its SoftTargetCrossEntropy."""

    def make(inputs: Inputs) -> Callable[[], Tensor]:
        mixup_target = require("timm.data.mixup", "timm").mixup_target
        loss = require("timm.loss", "timm").SoftTargetCrossEntropy()
        logits, (labels, _, weight) = inputs["logits"], inputs["target"]
        columns = logits.shape[1]
        return lambda: loss(logits, mixup_target(labels, columns, weight[:, None]))

    words = "dense mixed labels and SoftTargetCrossEntropy"
    return loss_arm("timm dense labels", named("timm", words), "peer", make, forward=forward)


def torchvision_dense_labels(forward: bool) -> Arm:
    """The labels of torchvision v2's MixUp and `F.cross_entropy`; the images it wants with them are one pixel each."""
    used: dict[str, Tensor] = {}

    def make(inputs: Inputs) -> Callable[[], Tensor]:
        v2 = require("torchvision.transforms.v2", "torchvision")
        logits, labels = inputs["logits"], inputs["target"].first
        transform = v2.MixUp(num_classes=logits.shape[1])
        pixels = torch.zeros(len(labels), 1, 1, 1, device=labels.device)

        def loss() -> Tensor:
            _, used["dense"] = transform(pixels, labels)
            return F.cross_entropy(logits, used["dense"].to(logits.dtype))

        return loss

    @torch.no_grad()
    def check(inputs: Inputs, results: Sequence[Tensor]) -> float:
        source, losses, worst = inputs["logits"], [], 0.0
        for rows in torch.arange(len(source), device=source.device).split(256):
            z, dense = source[rows].double(), used["dense"][rows].double()
            losses.append(F.cross_entropy(z, dense, reduction="none"))
            if not forward:
                grad = torch.softmax(z, 1) - dense
                worst = max(worst, float((results[1][rows].double() * len(source) - grad).abs().max()))
        return max(worst, float((results[0].double() - torch.cat(losses).mean()).abs()))

    words = "dense mixed labels of one lam for the batch, partner by roll(1), and F.cross_entropy"
    arm = loss_arm("torchvision dense labels", named("torchvision", words), "peer", make, forward=forward)
    return replace(arm, check=check, tolerance=5e-2)


def present() -> list[tuple[str, str]]:
    """Every library that arms compare with, and its version, or that it is absent."""
    return [(name, version(name) or f"absent (pip install {name})") for name in PACKAGES if name != "sdmp-kernels"]
