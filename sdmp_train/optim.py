"""Optimisers that a non-finite step leaves untouched, and the two schedules.

Both optimisers read `found_inf` (a 0-dim float32 tensor on the parameters' device, 1 where the step must change
nothing), the contract of torch's gradient scaler: the host never has to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import OptimConfig


def learning_rate(step: int, *, lr: float, steps: int, warmup_steps: float) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to 0 at `steps` (MoCo v3, per iteration)."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def key_momentum(step: int, *, start: float, steps: int, cosine: bool) -> float:
    """Momentum of the key encoder: `start`, or with `cosine` rising to 1 at `steps`."""
    return 1 - 0.5 * (1 + math.cos(math.pi * step / steps)) * (1 - start) if cosine else start


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose kernel skips the step (moments and step count too) where `found_inf` is 1."""

    moments = ("step", "exp_avg", "exp_avg_sq")
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, parameters: Iterable[nn.Parameter], *, weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(parameters, lr=0.0, weight_decay=weight_decay, betas=betas, fused=True)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017) as MoCo v3 uses them.

    For tensors of two or more dimensions: g += wd * p, then g *= trust * |p| / |g|. For all: v = momentum * v + g,
    p -= lr * v. `clip`: the rate of a layer, trust * |p| / |g|, never exceeds lr (solo-learn's form).
    """

    moments = ("momentum_buffer",)
    found_inf: Tensor | None = None

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, weight_decay: float, momentum: float, trust: float, clip: bool
    ) -> None:
        defaults = {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "trust": trust, "clip": clip}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, or none where `found_inf` is 1."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                velocity = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                new = velocity * group["momentum"] + self._scaled(p, p.grad, group)
                if self.found_inf is not None:
                    bad = self.found_inf > 0
                    new = torch.where(bad, velocity, new)
                    p.copy_(torch.where(bad, p, p - group["lr"] * new))
                else:
                    p.sub_(new, alpha=group["lr"])
                velocity.copy_(new)

    def _scaled(self, p: Tensor, grad: Tensor, group: dict[str, float]) -> Tensor:
        if p.ndim <= 1:
            return grad
        grad = grad + group["weight_decay"] * p
        weight_norm, grad_norm = p.norm(), grad.norm()
        rate = group["trust"] * weight_norm / grad_norm
        if group["clip"]:
            rate = rate.div(max(group["lr"], torch.finfo(torch.float32).tiny)).clamp(max=1)
        return grad * torch.where((weight_norm > 0) & (grad_norm > 0), rate, 1.0)


def make_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> AdamW | LARS:
    """The optimiser for those of `parameters` that are trained; its learning rate is set at every step."""
    trained = [p for p in parameters if p.requires_grad]
    if config.opt == "adamw":
        return AdamW(trained, weight_decay=config.weight_decay, betas=config.betas)
    return LARS(
        trained,
        weight_decay=config.weight_decay,
        momentum=config.lars_momentum,
        trust=config.lars_trust,
        clip=config.lars_clip,
    )
