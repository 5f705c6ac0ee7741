"""Rules are checked by name; the batches of a step share its one plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_runs import at_step, build_method, build_training, noise_batches

from sdmp_train import loop
from sdmp_train.config import Config, ConfigError
from sdmp_train.guard import StopRequest
from sdmp_train.methods.mixing import draw_batch_plan, examples_of_rules
from sdmp_train.methods.settings.mixing import check_rules


@pytest.mark.parametrize(
    ("rules", "alpha", "message"),
    [
        ((), 1.0, "rules is"),
        (("mixup", "mixup"), 1.0, "each rule once"),
        (("cutmx",), 1.0, "Did you mean cutmix"),
        (("mixup",), 0.0, "mix_alpha is 0.0"),
    ],
)
def test_wrong_rules_are_refused_by_name(rules: tuple[str, ...], alpha: float, message: str):
    with pytest.raises(ConfigError, match=message):
        check_rules(rules, alpha)


def test_two_batches_of_a_step_have_their_rows_of_the_plan_that_one_batch_of_both_has(tiny: Config):
    half = build_method(tiny).setup
    whole = half._replace(rows=2 * half.rows)
    options = {"rules": ("mixup", "cutmix"), "alpha": 1.0, "per": "batch"}
    for step in range(4):
        expected = draw_batch_plan(whole, at_step(step), 1, **options)
        parts = [draw_batch_plan(half, at_step(step)._replace(part=i, parts=2), 1, **options) for i in (0, 1)]
        for name in ("rule", "lam", "box"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_global_flip_pairs_within_each_accumulated_batch(ranks: int, tiny: Config):
    """Row i of rank r in one batch has the share of its partner, row n-1-i of rank W-1-r in the same batch."""
    base = build_method(tiny).setup
    options = {"rules": ("mixup", "cutmix"), "alpha": 1.0, "per": "sample"}
    for part in (0, 1):
        at = at_step(3)._replace(part=part, parts=2)
        setups = [base._replace(world=replace(base.world, rank=rank, size=ranks)) for rank in range(ranks)]
        flipped = [draw_batch_plan(setup, at, 0, flip="global", **options) for setup in setups]
        local = [draw_batch_plan(setup, at, 0, **options) for setup in setups]
        assert torch.equal(torch.cat([p.partner_lam for p in flipped]), torch.cat([p.lam for p in flipped]).flip(0))
        for one, other in zip(flipped, local, strict=True):
            assert one.mirrored
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("rule", "lam", "box"))


def test_accumulated_batches_with_a_global_flip_are_a_step(tiny: Config):
    """On one rank it is the local flip, bit for bit."""
    found = []
    for flip in ("local", "global"):
        training = build_training(replace(tiny, method=replace(tiny.method, flip=flip)))
        found.append(loop.step(training, list(noise_batches(tiny, 2)), StopRequest()).loss.total)
    assert torch.equal(*found)


def test_examples_are_of_each_rule(tiny: Config):
    plans = examples_of_rules(
        torch.zeros(4, 3, 16, 16, dtype=torch.uint8), rules=("cutmix", "mixup"), alpha=1.0, seed=3
    )
    assert [name for name, _, _ in plans] == ["cutmix", "mixup"]
    assert [[rule.name.lower() for rule in plan.rules] for _, _, plan in plans] == [["cutmix"], ["mixup"]]
    assert all(plan.size == (16, 16) and len(plan) == 4 for _, _, plan in plans)
