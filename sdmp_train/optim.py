"""Optimisers that a non-finite step leaves untouched, and what is set before each step: schedules, clipping, freezing.

Both optimisers read `found_inf` (a 0-dim float32 tensor on the parameters' device, 1 where the step must change
nothing), the contract of torch's gradient scaler: the host never has to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .methods.method import At, Group
from .settings import OptimConfig


def half_cosine(step: float, steps: float) -> float:
    """From 1 at step 0 down to 0 at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def learning_rate(at: At, config: OptimConfig) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to `min_lr` at the last step (MoCo v3, per iteration)."""
    warmup_steps = config.warmup_epochs * at.steps_per_epoch
    if at.step < warmup_steps:
        return config.lr * at.step / warmup_steps
    span = config.lr - config.min_lr
    return config.min_lr + span * half_cosine(at.step - warmup_steps, at.steps - warmup_steps)


def weight_decay(at: At, config: OptimConfig) -> float:
    """`weight_decay`, or along half a cosine from there to `weight_decay_end` at the last step."""
    end = config.weight_decay_end
    if end is None:
        return config.weight_decay
    return end + (config.weight_decay - end) * half_cosine(at.step, at.steps)


def key_momentum(step: int, *, start: float, steps: int, cosine: bool) -> float:
    """Momentum of the key encoder: `start`, or with `cosine` rising to 1 at `steps`."""
    return 1 - half_cosine(step, steps) * (1 - start) if cosine else start


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose kernel skips the step (moments and step count too) where `found_inf` is 1."""

    moments = ("step", "exp_avg", "exp_avg_sq")
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, parameters: Iterable[Any], *, weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(parameters, lr=0.0, weight_decay=weight_decay, betas=betas, fused=True)


class SGD(torch.optim.SGD):
    """torch's fused SGD with momentum, whose kernel skips the step where `found_inf` is 1.

    Velocities exist, as zeros, before the first step: torch would leave them unset where that one is skipped.
    """

    moments = ("momentum_buffer",)
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, parameters: Iterable[Any], *, weight_decay: float, momentum: float) -> None:
        super().__init__(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, or none where `found_inf` is 1."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and group["momentum"] and self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        super().step()


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017) as MoCo v3 uses them.

    For tensors of two or more dimensions: g += wd * p, then g *= trust * |p| / |g|. For all: v = momentum * v + g,
    p -= lr * v. `clip`: the rate of a layer, trust * |p| / |g|, never exceeds lr (solo-learn's form).
    """

    moments = ("momentum_buffer",)
    found_inf: Tensor | None = None

    def __init__(
        self, parameters: Iterable[Any], *, weight_decay: float, momentum: float, trust: float, clip: bool
    ) -> None:
        defaults = {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "trust": trust, "clip": clip}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, or none where `found_inf` is 1."""
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            if not given:
                continue
            for p in given:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            velocities = [self.state[p]["momentum_buffer"] for p in given]
            grads: list[Tensor] = [p.grad for p in given]
            momentum, lr = group["momentum"], group["lr"]
            if self.found_inf is not None:
                # A bad gradient counts as zero, velocities neither fade nor grow, and nothing is taken away: p - 0 * v.
                bad, zero = self.found_inf > 0, torch.zeros_like(self.found_inf)
                grads = [torch.where(bad, zero, grad) for grad in grads]
                momentum = torch.where(bad, 1.0, torch.full_like(zero, momentum))
                lr = torch.where(bad, zero, torch.full_like(zero, lr))
            self._adapt(given, grads, group)
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, grads)
            torch._foreach_sub_(given, torch._foreach_mul(velocities, lr))

    def _adapt(self, parameters: list[nn.Parameter], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Replace the gradients of matrices, in the list, by decayed and scaled ones."""
        places = [place for place, p in enumerate(parameters) if p.ndim > 1]
        if not places:
            return
        weights: list[Tensor] = [parameters[place] for place in places]
        decayed = torch._foreach_add(
            [grads[place] for place in places], torch._foreach_mul(weights, group["weight_decay"])
        )
        weight_norms = torch.stack(torch._foreach_norm(weights))
        grad_norms = torch.stack(torch._foreach_norm(decayed))
        rates = group["trust"] * weight_norms / grad_norms
        if group["clip"]:
            rates = rates.div(max(group["lr"], torch.finfo(torch.float32).tiny)).clamp(max=1)
        rates = torch.where((weight_norms > 0) & (grad_norms > 0), rates, 1.0)
        if self.found_inf is not None:
            rates = torch.where(self.found_inf > 0, 0.0, rates)
        torch._foreach_mul_(decayed, list(rates.unbind()))
        for place, grad in zip(places, decayed, strict=True):
            grads[place] = grad


Optimizer = AdamW | SGD | LARS
"""Those that read `found_inf` and name their `moments`."""


def apart(groups: Iterable[Group], backbone: Iterable[nn.Parameter], config: OptimConfig) -> list[Group]:
    """The same groups, with the backbone's parameters in groups of their own behind the heads', where they are to be
    trained later (`heads_only_epochs`) or at another rate (`backbone_lr_scale`)."""
    scale = 1.0 if config.backbone_lr_scale is None else config.backbone_lr_scale
    begin, known = config.heads_only_epochs or 0.0, {id(parameter) for parameter in backbone}
    if scale == 1 and begin == 0:
        return list(groups)
    split: list[Group] = []
    for group in groups:
        heads = [p for p in group.parameters if id(p) not in known]
        rest = [p for p in group.parameters if id(p) in known]
        later, slower = max(group.from_epoch, begin), group.lr_scale * scale
        split += [group._replace(parameters=heads), Group(rest, slower, group.decays, later)]
    return [group for group in split if group.parameters]


def make_optimizer(config: OptimConfig, groups: Iterable[Group]) -> Optimizer:
    """The optimiser for those parameters of `groups` that are trained; `set_schedules` sets its rates at every step."""
    trained = [
        {
            "params": [p for p in group.parameters if p.requires_grad],
            "lr_scale": group.lr_scale,
            "decays": group.decays,
            "from_epoch": group.from_epoch,
        }
        for group in groups
    ]
    trained = [group for group in trained if group["params"]]
    if config.opt == "adamw":
        return AdamW(trained, weight_decay=config.weight_decay, betas=config.betas)
    if config.opt == "sgd":
        return SGD(trained, weight_decay=config.weight_decay, momentum=config.momentum)
    return LARS(
        trained,
        weight_decay=config.weight_decay,
        momentum=config.lars_momentum,
        trust=config.lars_trust,
        clip=config.lars_clip,
    )


def drop_frozen_gradients(optimizer: torch.optim.Optimizer, at: At) -> None:
    """Take the gradients of groups that are still frozen away: norm, clipping and optimiser do not see them."""
    for group in optimizer.param_groups:
        if at.epoch < group["from_epoch"]:
            for p in group["params"]:
                p.grad = None


def clip_gradients(gradients: Sequence[Tensor], config: OptimConfig) -> Tensor:
    """Shorten gradients as `config` says; returns the norm of all of them before. A NaN stays one."""
    total = get_total_norm(gradients)
    if config.clip_grad is None or not gradients:
        return total
    if config.clip_mode == "global":
        torch._foreach_mul_(list(gradients), (config.clip_grad / (total + 1e-6)).clamp(max=1))
        return total
    norms = torch.stack(torch._foreach_norm(list(gradients)))
    torch._foreach_mul_(list(gradients), list((config.clip_grad / (norms + 1e-6)).clamp(max=1).unbind()))
    return total


def set_schedules(optimizer: torch.optim.Optimizer, at: At, config: OptimConfig) -> None:
    """Learning rate and weight decay of every group for the step about to be made."""
    lr, decay = learning_rate(at, config), weight_decay(at, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
