"""Schedules against their formulas, optimisers against slow ones, and steps that must change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sdmp_train.config import OptimConfig
from sdmp_train.optim import LARS, AdamW, key_momentum, learning_rate, make_optimizer


def test_learning_rate_rises_linearly_then_falls_along_half_a_cosine():
    rates = [learning_rate(step, lr=2.0, steps=100, warmup_steps=10) for step in range(100)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert learning_rate(0, lr=2.0, steps=100, warmup_steps=0) == 2.0
    assert learning_rate(3, lr=2.0, steps=4, warmup_steps=4) == pytest.approx(1.5)


def test_key_momentum_rises_to_one():
    assert key_momentum(0, start=0.99, steps=10, cosine=True) == pytest.approx(0.99)
    assert key_momentum(5, start=0.99, steps=10, cosine=True) == pytest.approx(0.995)
    assert key_momentum(10, start=0.99, steps=10, cosine=True) == pytest.approx(1.0)
    assert key_momentum(7, start=0.9, steps=10, cosine=False) == 0.9


def lars_by_hand(p, g, v, *, lr, wd, momentum, trust, clip):
    """One LARS update of one tensor in float64, from the formula."""
    p, g, v = p.double(), g.double(), v.double()
    if p.ndim > 1:
        g = g + wd * p
        rate = trust * p.norm() / g.norm() if p.norm() > 0 and g.norm() > 0 else 1.0
        g = g * (min(float(rate) / lr, 1.0) if clip else rate)
    v = momentum * v + g
    return p - lr * v, v


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("trust", [0.001, 5.0])
def test_lars_follows_its_formula(clip: bool, trust: float):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 3), (5,), (2, 3, 3, 3))]
    optimizer = LARS(parameters, weight_decay=0.1, momentum=0.9, trust=trust, clip=clip)
    optimizer.param_groups[0]["lr"] = 0.5
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in parameters]
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        expected = [
            lars_by_hand(q, p.grad, v, lr=0.5, wd=0.1, momentum=0.9, trust=trust, clip=clip)
            for p, (q, v) in zip(parameters, expected, strict=True)
        ]
        optimizer.step()
        for p, (q, _) in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.detach().double(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opt", ["adamw", "lars"])
def test_found_inf_leaves_weights_and_moments_untouched(opt: str):
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
    optimizer = make_optimizer(OptimConfig(opt=opt), parameters)
    optimizer.param_groups[0]["lr"] = 0.1

    def state():
        moments = [v.clone() for m in optimizer.state.values() for v in m.values()]
        return [p.detach().clone() for p in parameters] + moments

    for p in parameters:
        p.grad = torch.full_like(p, 0.5)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before = state()
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert len(before) > 2
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.equal(before[0], parameters[0].detach())


def test_adamw_equals_torchs_own():
    mine, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    ours = AdamW([mine], weight_decay=0.1, betas=(0.9, 0.999))
    plain = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, foreach=False)
    ours.param_groups[0]["lr"] = 0.01
    for step in range(4):
        mine.grad = theirs.grad = torch.arange(4.0) - step
        ours.step()
        plain.step()
    torch.testing.assert_close(mine, theirs)


def test_frozen_parameters_are_not_given_to_the_optimiser():
    frozen, trained = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    assert make_optimizer(OptimConfig(), [frozen, trained]).param_groups[0]["params"] == [trained]
