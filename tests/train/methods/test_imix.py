"""i-mix: queries alone are mixed, with any partner, and its loss is its equation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_runs import (
    as_batch,
    at_step,
    build_method,
    dense_loss,
    loss_of,
    mixed_by_hand,
    random_features,
    random_views,
    seen_by_encoders,
)

from sdmp_kernels import make_plan
from sdmp_train.config import Config, ConfigError
from sdmp_train.methods.contrast import Plan
from sdmp_train.methods.imix import IMixConfig, draw_mix
from sdmp_train.methods.mocov3 import MoCoV3Config


def by_rule(config: Config, rule: str, **changes: object) -> Config:
    return replace(config, method=replace(config.method, rule=rule, **changes))


@pytest.mark.parametrize("rule", ["mixup", "cutmix"])
def test_pixels_of_queries_are_mixed_as_planned_and_those_of_keys_are_clean(rule: str, tiny_imix: Config):
    method = build_method(by_rule(tiny_imix, rule))
    views = random_views(tiny_imix)
    for step in range(3):
        plan = method.plan(at_step(step))
        seen = seen_by_encoders(method, views, plan)
        assert set(seen) == {"q a~", "q b~", "k a", "k b"}
        for name, pixels in seen.items():
            clean = views["ab".index(name[2])].float()
            if name.startswith("k"):
                torch.testing.assert_close(pixels, clean, rtol=0, atol=1e-3)
                continue
            for row in range(len(clean)):
                expected = mixed_by_hand(clean, plan.mixes[name[2]], row)
                torch.testing.assert_close(pixels[row].double(), expected, rtol=0, atol=2e-3)


def test_the_plan_is_a_permutation_with_folded_shares_that_both_views_have(tiny_imix: Config):
    for rule in ("mixup", "cutmix"):
        method = build_method(by_rule(tiny_imix, rule))
        partners, shares = [], []
        for step in range(40):
            one, other = method.plan(at_step(step)).mixes.values()
            assert sorted(one.partner.tolist()) == list(range(8))
            assert torch.equal(one.partner, other.partner)
            assert torch.equal(one.lam, other.lam)
            partners.append(one.partner)
            shares.append(one.lam)
            assert (one.lam.unique().numel() == 1) == (rule == "cutmix")
        assert torch.stack(partners).unique(dim=0).shape[0] >= 38  # of 40,320
        lam = torch.cat(shares)
        assert lam.min() >= 0.5
        assert 0.68 < lam.mean() < 0.82  # of U(1/2, 1): 3/4; CutMix's boxes are rounded down
        again = build_method(by_rule(tiny_imix, rule)).plan(at_step(39)).mixes["b"]
        assert torch.equal(again.partner, partners[39])
        assert torch.equal(again.box, other.box)


@pytest.mark.parametrize("rule", ["mixup", "cutmix"])
def test_ranks_have_their_rows_of_the_shares_and_boxes_of_all(rule: str, tiny_imix: Config):
    """They do not depend on the number of ranks; partners are within one."""
    method = build_method(by_rule(tiny_imix, rule))
    whole = method.plan(at_step(3)).mixes["b"]
    halves = []
    for rank in (0, 1):
        setup = method.setup._replace(rows=4, world=replace(method.world, rank=rank, size=2))
        halves.append(draw_mix(method.config, setup, at_step(3), 1))
    assert torch.equal(torch.cat([half.lam for half in halves]), whole.lam)
    assert torch.equal(torch.cat([half.box for half in halves]), whole.box)
    assert all(sorted(half.partner.tolist()) == [0, 1, 2, 3] for half in halves)
    parts = [draw_mix(method.config, method.setup, at_step(3)._replace(part=part, parts=2), 1) for part in (0, 1)]
    changed = "box" if rule == "cutmix" else "lam"
    assert not torch.equal(getattr(parts[0], changed), getattr(parts[1], changed))


@pytest.mark.parametrize("form", ["ce", "log_mixture"])
@pytest.mark.parametrize("rule", ["mixup", "cutmix"])
def test_the_loss_is_its_equation(rule: str, form: str, tiny_imix: Config):
    method = build_method(by_rule(tiny_imix, rule, form=form))
    plan, temperature = method.plan(at_step(0)), method.temperature
    features = random_features(method)
    loss = method.loss(features, plan, as_batch(random_views(tiny_imix)), at_step(0))
    lam, partner = plan.mixes["a"].lam.double()[:, None], plan.mixes["a"].partner
    own = torch.eye(8, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for query, key in (("a~", "b"), ("b~", "a")):
        q, k = features.queries[query].detach(), features.keys[key]
        if form == "ce":
            expected += dense_loss(q, k, lam * own + (1 - lam) * own[partner], temperature)
        else:
            p = (q.double() @ k.double().T / temperature).softmax(dim=1)
            mixture = (p * (lam * own + (1 - lam) * own[partner])).sum(dim=1)
            expected += -mixture.log().mean() * 2 * temperature
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.terms["mixed"].double(), expected / 2, rtol=1e-6, atol=1e-6)


def test_with_a_share_of_one_it_is_moco_v3(tiny: Config, tiny_imix: Config):
    method = build_method(by_rule(tiny_imix, "mixup"))
    plain = build_method(replace(tiny, method=MoCoV3Config(dim=32, mlp_dim=64, mixing="none")))
    views = random_views(tiny)
    keep = {v: make_plan("mixup", torch.ones(8), (32, 32), partner=torch.randperm(8)) for v in "ab"}
    ours = loss_of(method, views, Plan(False, keep))
    theirs = loss_of(plain, views, plain.plan(at_step(0)))
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-6, atol=1e-6)
    for loss in (ours, theirs):
        loss.total.backward()
    for (name, a), b in zip(method.student.named_parameters(), plain.student.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_picture_shows_what_it_does(tiny_imix: Config):
    method = build_method(tiny_imix)
    ((name, images, plan),) = method.example(as_batch(random_views(tiny_imix)))
    assert (name, images.shape, len(plan)) == ("cutmix", (8, 3, 32, 32), 8)
    assert plan.lam.min() >= 0.5
    assert method.partners_follow_ranks


def test_a_wrong_value_is_refused_by_name():
    with pytest.raises(ConfigError, match="mix_alpha"):
        IMixConfig(alpha=0.0)
