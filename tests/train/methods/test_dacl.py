"""DACL: both sides are noised, each with its own numbers, and the target is the row itself."""

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

from sdmp_train.config import Config, ConfigError
from sdmp_train.methods.dacl import DACLConfig
from sdmp_train.methods.mocov3 import MoCoV3Config


def test_pixels_of_both_sides_are_noised_as_planned(tiny_dacl: Config):
    method = build_method(tiny_dacl)
    views = random_views(tiny_dacl)
    for step in range(3):
        plan = method.plan(at_step(step))
        seen = seen_by_encoders(method, views, plan)
        assert set(seen) == {"q a~", "q b~", "k a~", "k b~"}
        for name, pixels in seen.items():
            clean, mix = views["ab".index(name[2])].float(), plan.mixes[name[2]]
            for row in range(len(clean)):
                expected = mixed_by_hand(clean, mix, row)
                torch.testing.assert_close(pixels[row].double(), expected, rtol=0, atol=2e-3)


def test_views_share_neither_partners_nor_shares(tiny_dacl: Config):
    method, shares = build_method(tiny_dacl), []
    for step in range(100):
        one, other = method.plan(at_step(step)).mixes.values()
        assert sorted(one.partner.tolist()) == sorted(other.partner.tolist()) == list(range(8))
        assert not torch.equal(one.lam, other.lam)
        shares += [one.lam, other.lam]
    partners = [method.plan(at_step(7)).mixes[view].partner for view in "ab"]
    assert not torch.equal(*partners)
    lam = torch.cat(shares)
    assert 0.5 <= lam.min() < 0.52 and 0.98 < lam.max() <= 1  # U(alpha, 1)
    assert lam.mean() == pytest.approx(0.75, abs=0.02)
    again = build_method(tiny_dacl).plan(at_step(7)).mixes["b"]
    assert torch.equal(again.partner, partners[1])


def test_the_loss_is_its_equation(tiny_dacl: Config):
    method = build_method(tiny_dacl)
    plan, features = method.plan(at_step(0)), random_features(method)
    loss = method.loss(features, plan, as_batch(random_views(tiny_dacl)), at_step(0))
    own, temperature = torch.eye(8, dtype=torch.float64), method.temperature
    expected = dense_loss(features.queries["a~"].detach(), features.keys["b~"], own, temperature)
    expected += dense_loss(features.queries["b~"].detach(), features.keys["a~"], own, temperature)
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-6, atol=1e-6)


def test_without_noise_it_is_moco_v3(tiny: Config, tiny_dacl: Config):
    method = build_method(replace(tiny_dacl, method=replace(tiny_dacl.method, alpha=1.0)))
    plain = build_method(replace(tiny, method=MoCoV3Config(dim=32, mlp_dim=64, mixing="none")))
    views = random_views(tiny)
    ours = loss_of(method, views, method.plan(at_step(0)))
    theirs = loss_of(plain, views, plain.plan(at_step(0)))
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-6, atol=1e-6)


def test_the_picture_shows_the_noise(tiny_dacl: Config):
    ((name, images, plan),) = build_method(tiny_dacl).example(as_batch(random_views(tiny_dacl)))
    assert (name, len(images), len(plan)) == ("noise", 8, 8)
    assert plan.lam.min() >= 0.5


def test_a_wrong_value_is_refused_by_name():
    with pytest.raises(ConfigError, match="dacl_alpha"):
        DACLConfig(alpha=1.5)
