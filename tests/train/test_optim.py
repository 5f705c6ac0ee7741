"""Schedules against their formulas, optimisers against slow ones, and steps that must change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdmp_train.config import OptimConfig
from sdmp_train.methods.method import At, Group
from sdmp_train.optim import (
    LARS,
    SGD,
    AdamW,
    apart,
    clip_gradients,
    drop_frozen_gradients,
    key_momentum,
    learning_rate,
    make_optimizer,
    set_schedules,
    weight_decay,
)


def at(step: int, steps: int = 100, steps_per_epoch: int = 10) -> At:
    return At(step, steps, steps_per_epoch)


def test_learning_rate_rises_linearly_then_falls_along_half_a_cosine():
    config = OptimConfig(base_lr=2.0, batch_size=256, epochs=10, warmup_epochs=1)
    rates = [learning_rate(at(step), config) for step in range(100)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert learning_rate(at(0), replace(config, warmup_epochs=0)) == 2.0
    assert learning_rate(at(3, steps=4, steps_per_epoch=4), replace(config, epochs=1)) == pytest.approx(1.5)


def test_learning_rate_falls_to_its_floor():
    config = OptimConfig(base_lr=2.0, batch_size=256, epochs=10, warmup_epochs=1, min_lr=0.5)
    assert learning_rate(at(5), config) == pytest.approx(1.0)
    assert learning_rate(at(55), config) == pytest.approx(1.25)
    assert learning_rate(at(100), config) == pytest.approx(0.5)


def test_weight_decay_is_constant_or_goes_along_half_a_cosine():
    config = OptimConfig(epochs=10, warmup_epochs=1, weight_decay=0.04)
    assert {weight_decay(at(step), config) for step in (0, 50, 99)} == {0.04}
    rising = replace(config, weight_decay_end=0.4)
    expected = {0: 0.04, 25: 0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi / 4)), 50: 0.22, 100: 0.4}
    for step, value in expected.items():
        assert weight_decay(at(step), rising) == pytest.approx(value)


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


@pytest.mark.parametrize("opt", ["adamw", "lars", "sgd"])
def test_found_inf_leaves_weights_and_moments_untouched(opt: str):
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
    optimizer = make_optimizer(OptimConfig(opt=opt), [Group(parameters)])
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


def test_sgd_equals_torchs_own_and_skips_a_bad_first_step():
    mine, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    ours = SGD([mine], weight_decay=0.1, momentum=0.9)
    plain = torch.optim.SGD([theirs], lr=0.01, momentum=0.9, weight_decay=0.1, foreach=False)
    ours.param_groups[0]["lr"] = 0.01
    mine.grad = torch.full((4,), float("inf"))
    ours.found_inf = torch.ones(())
    ours.step()
    assert torch.equal(mine, torch.ones(4)) and torch.equal(ours.state[mine]["momentum_buffer"], torch.zeros(4))
    ours.found_inf = torch.zeros(())
    for step in range(4):
        mine.grad = theirs.grad = torch.arange(4.0) - step
        ours.step()
        plain.step()
    torch.testing.assert_close(mine, theirs)


def test_frozen_parameters_are_not_given_to_the_optimiser():
    frozen, trained = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    assert make_optimizer(OptimConfig(), [Group([frozen, trained])]).param_groups[0]["params"] == [trained]


class FormerLARS(torch.optim.Optimizer):
    """LARS one tensor at a time, in the order of operations that trained runs have had since version 0.1."""

    def __init__(self, parameters, *, lr, wd, momentum, trust, clip):
        super().__init__(parameters, {"lr": lr, "wd": wd, "momentum": momentum, "trust": trust, "clip": clip})

    @torch.no_grad()
    def step(self, bad: torch.Tensor) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                velocity = self.state[p].setdefault("v", torch.zeros_like(p))
                new = velocity * group["momentum"] + self.scaled(p, p.grad, group)
                new = torch.where(bad, velocity, new)
                p.copy_(torch.where(bad, p, p - group["lr"] * new))
                velocity.copy_(new)

    def scaled(self, p: torch.Tensor, grad: torch.Tensor, group: dict) -> torch.Tensor:
        if p.ndim <= 1:
            return grad
        grad = grad + group["wd"] * p
        weight_norm, grad_norm = p.norm(), grad.norm()
        rate = group["trust"] * weight_norm / grad_norm
        if group["clip"]:
            rate = rate.div(max(group["lr"], torch.finfo(torch.float32).tiny)).clamp(max=1)
        return grad * torch.where((weight_norm > 0) & (grad_norm > 0), rate, 1.0)


@pytest.mark.parametrize("clip", [False, True])
def test_lars_rounds_as_it_always_did(clip: bool):
    """Bit for bit, bad steps, absent gradients, zero weights and channels_last weights included."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 33), (7,), (8, 3, 3, 3), (5, 4), (16, 8, 3, 3))
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    start[3].zero_()
    start[4] = start[4].contiguous(memory_format=torch.channels_last)
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    new = LARS(ours, weight_decay=0.03, momentum=0.9, trust=0.02, clip=clip)
    old = FormerLARS(theirs, lr=0.7, wd=0.03, momentum=0.9, trust=0.02, clip=clip)
    new.param_groups[0]["lr"] = 0.7
    for step in range(6):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator)
            if step == 3:
                gradient.view(-1)[0] = float("nan") if number % 2 else float("inf")
            absent = number == 1 and step < 2
            a.grad, b.grad = (None, None) if absent else (gradient.clone(), gradient.clone())
        bad = torch.tensor(float(step == 3))
        new.found_inf = bad
        new.step()
        old.step(bad > 0)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            if b in old.state:
                assert torch.equal(new.state[a]["momentum_buffer"], old.state[b]["v"])


def test_lars_launches_few_operations():
    """A ResNet-50 has 161 tensors; one at a time they take about 2,000 operations."""
    parameters = [nn.Parameter(torch.ones(s)) for s in [(4, 4)] * 54 + [(4,)] * 107]
    optimizer = make_optimizer(OptimConfig(opt="lars"), [Group(parameters)])
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    with Operations() as seen:
        optimizer.step()
    assert seen.count < 250


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher; a view launches nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "detach" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("opt", ["adamw", "lars", "sgd"])
def test_groups_have_their_own_rate_and_decay_and_stay_frozen_until_their_epoch(opt: str):
    config = OptimConfig(
        opt=opt, base_lr=0.1, batch_size=256, epochs=10, warmup_epochs=0, weight_decay=0.5, lars_trust=1.0
    )
    plain, slow, undecayed, late = (nn.Parameter(torch.ones(3, 3)) for _ in range(4))
    groups = [Group([plain]), Group([slow], lr_scale=0.1), Group([undecayed], decays=False)]
    optimizer = make_optimizer(config, [*groups, Group([late], from_epoch=1.0)])

    def step(place: At) -> None:
        for p in (plain, slow, undecayed, late):
            p.grad = torch.full_like(p, 0.25)
        drop_frozen_gradients(optimizer, place)
        set_schedules(optimizer, place, config)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()

    step(at(9))
    assert torch.equal(late, torch.ones(3, 3)) and late not in optimizer.state
    moved = [float((1 - p.detach()).mean()) for p in (plain, slow, undecayed)]
    assert moved[1] == pytest.approx(0.1 * moved[0], rel=1e-4)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    lr = learning_rate(at(9), config)
    assert rates == [(lr, 0.5), (0.1 * lr, 0.5), (lr, 0.0), (lr, 0.5)]
    if opt == "adamw":
        assert moved[0] == pytest.approx(lr * (1 + 0.5), rel=1e-4)
        assert moved[2] == pytest.approx(lr, rel=1e-4)
    step(at(10))
    assert not torch.equal(late, torch.ones(3, 3))


def gradients() -> list[torch.Tensor]:
    return [torch.tensor([3.0, 4.0]), torch.tensor([[0.3], [0.4]]), torch.tensor([12.0])]


def test_clipping_is_off_global_or_per_parameter():
    untouched = gradients()
    assert float(clip_gradients(untouched, OptimConfig())) == pytest.approx((25 + 0.25 + 144) ** 0.5)
    assert all(torch.equal(a, b) for a, b in zip(untouched, gradients(), strict=True))

    whole = gradients()
    norm = clip_gradients(whole, OptimConfig(clip_grad=2.0))
    assert float(norm) == pytest.approx((25 + 0.25 + 144) ** 0.5)
    assert float(torch.cat([g.flatten() for g in whole]).norm()) == pytest.approx(2.0, rel=1e-5)
    assert float(whole[0][0] / whole[2][0]) == pytest.approx(3 / 12)

    each = gradients()
    clip_gradients(each, OptimConfig(clip_grad=2.0, clip_mode="parameter"))
    assert [float(g.norm()) for g in each] == pytest.approx([2.0, 0.5, 2.0], rel=1e-5)


@pytest.mark.parametrize("mode", ["global", "parameter"])
def test_clipping_does_not_hide_a_gradient_that_is_not_finite(mode: str):
    poisoned = gradients()
    poisoned[1][0] = float("nan")
    assert not clip_gradients(poisoned, OptimConfig(clip_grad=2.0, clip_mode=mode)).isfinite()


def test_a_backbones_parameters_are_set_apart_where_they_are_trained_otherwise():
    """Behind the heads' of the same group, whose rate is the one that is logged; as they are where nothing is asked."""
    head, late, body, norm = (nn.Parameter(torch.ones(2)) for _ in range(4))
    groups = [Group([body, head], lr_scale=0.5), Group([norm], decays=False), Group([late], from_epoch=3.0)]
    assert apart(groups, [body, norm], OptimConfig()) == groups
    assert apart(groups, [body, norm], OptimConfig(heads_only_epochs=0, backbone_lr_scale=1)) == groups
    found = apart(groups, [body, norm, late], OptimConfig(heads_only_epochs=2, backbone_lr_scale=0.1))
    assert [[id(p) for p in group.parameters] for group in found] == [[id(p)] for p in (head, body, norm, late)]
    assert [group[1:] for group in found] == [
        (0.5, True, 0.0),
        (0.05, True, 2.0),
        (0.1, False, 2.0),
        (0.1, True, 3.0),
    ]
