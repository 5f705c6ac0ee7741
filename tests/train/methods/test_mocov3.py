"""What reaches the encoders is what the plan says, the targets come from that plan, and the loss is the paper's."""

from __future__ import annotations

import math
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
    with_mixing,
)
from torch import Tensor

from sdmp_kernels import TwoHot, make_plan
from sdmp_train.config import Config
from sdmp_train.methods import contrast
from sdmp_train.methods.contrast import Plan

FORWARDS = {"none": (2, 2), "replace": (2, 3), "algorithm1": (1, 2), "extra": (3, 4)}


def variant_of(config: Config, variant: str, **changes: object) -> Config:
    kind = {"mixing": "none"} if variant == "none" else {"variant": variant}
    return with_mixing(config, **kind, **changes)


@pytest.mark.parametrize("rule", ["mixup", "cutmix", "resizemix"])
@pytest.mark.parametrize("variant", ["replace", "algorithm1", "extra"])
def test_pixels_that_reach_the_encoders_differ_from_the_clean_view_exactly_as_planned(
    tiny: Config, variant: str, rule: str
):
    method = build_method(variant_of(tiny, variant, rules=(rule,)))
    views = random_views(tiny, len(method.view_names))
    for step in range(3):
        plan = method.plan(at_step(step))
        seen = seen_by_encoders(method, views, plan)
        ordered = (views[1], views[0], *views[2:]) if plan.swap else views
        for name, pixels in seen.items():
            view = name.split()[1]
            clean = ordered["abcd".index(view[0])].float()
            if not view.endswith("~"):
                torch.testing.assert_close(pixels, clean, rtol=0, atol=1e-3)
                continue
            assert (pixels - clean).abs().max() > 10, "a mixed view must not be the clean one"
            for row in range(len(clean)):
                expected = mixed_by_hand(clean, plan.mixes[view[0]], row)
                torch.testing.assert_close(pixels[row].double(), expected, rtol=0, atol=2e-3)


def test_labels_are_the_shares_of_the_pixels_that_reached_the_encoder(tiny: Config, monkeypatch):
    """The weight of the source target is measured from the pixels of the query, not read from the plan."""
    method = build_method(with_mixing(tiny, rules=("cutmix",)))
    targets: list[TwoHot] = []
    monkeypatch.setattr(
        contrast,
        "info_nce",
        lambda q, k, target, **_: targets.extend(target) or (q.sum(), torch.zeros(len(k))),
    )
    views = random_views(tiny)
    share: dict[str, Tensor] = {}
    for step in range(4):
        plan = method.plan(at_step(step))
        seen = seen_by_encoders(method, views, plan)
        for view in "ab":
            clean, mixed = seen["k a" if view == "a" else "k b"], seen["k a~" if view == "a" else "q b~"]
            unchanged = ((clean - mixed).abs() < 1e-3).all(dim=1)
            share[view] = unchanged.float().mean(dim=(1, 2))
        targets.clear()
        loss_of(method, views, plan)
        clean_target, source, pair = targets
        rows = torch.arange(len(views[0]))
        assert torch.equal(clean_target.first, rows)
        assert torch.equal(clean_target.weight, torch.ones(len(rows)))
        for target in (source, pair):
            assert torch.equal(target.first, rows)
            assert torch.equal(target.second, rows.flip(0))
        # A pixel of noise equals its partner's by chance once in 2**24: what is unchanged is the row's own share.
        torch.testing.assert_close(source.weight, share["b"], rtol=0, atol=1e-6)
        torch.testing.assert_close(share["a"], share["b"], rtol=0, atol=1e-6)
        overlap = 1 - (share["b"] + share["a"].flip(0) - 1).abs()
        torch.testing.assert_close(pair.weight, 1 / (1 + overlap), rtol=0, atol=1e-6)


def test_replace_is_clean_plus_half_source_plus_half_pair(tiny: Config):
    method = build_method(tiny)
    views, plan = random_views(tiny), method.plan(at_step(0))
    images = method.mix(as_batch(views), plan)
    student, momentum = method.student, method.momentum_encoder
    with torch.no_grad():
        q1, q2m = student(images["a"], images["b~"])
        k1, k1m, k2 = momentum(images["a"]), momentum(images["a~"]), momentum(images["b"])
    n, lam, temperature = len(views[0]), plan.mixes["b"].lam.double(), method.temperature
    own, cross = torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64).flip(1)
    c = (1 - (lam + lam.flip(0) - 1).abs())[:, None]
    expected = {
        "clean": dense_loss(q1, k2, own, temperature),
        "source": dense_loss(q2m, k1, lam[:, None] * own + (1 - lam[:, None]) * cross, temperature),
        "pair": dense_loss(q2m, k1m, own / (1 + c) + cross * c / (1 + c), temperature),
    }
    loss = loss_of(method, views, plan)
    for name, value in expected.items():
        torch.testing.assert_close(loss.terms[name].double(), value, rtol=1e-5, atol=1e-5)
    total = expected["clean"] + (expected["source"] + expected["pair"]) / 2
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["replace", "algorithm1", "extra"])
def test_the_other_form_is_minus_the_log_of_the_mixed_probability(variant: str, tiny: Config):
    """On random features, float64: -log(w p_own + (1 - w) p_partner) in place of two shares of -log p."""
    method = build_method(variant_of(tiny, variant, form="log_mixture"))
    plan, features, temperature = method.plan(at_step(1)), random_features(method), method.temperature
    loss = method.loss(features, plan, as_batch(random_views(tiny, len(method.view_names))), at_step(1))
    expected = torch.zeros((), dtype=torch.float64)
    for term in method.terms:
        p = (features.queries[term.query].double() @ features.keys[term.key].double().T / temperature).softmax(dim=1)
        weight = torch.ones(8, dtype=torch.float64)
        if term.name != "clean":
            lam = plan.mixes[term.query[0]].lam.double()
            weight = lam if term.name == "source" else 1 / (2 - (lam + lam.flip(0) - 1).abs())
        mixture = weight * p.diag() + (1 - weight) * p.flip(1).diag()
        expected += term.weight * 2 * temperature * -mixture.log().mean()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["replace", "algorithm1", "extra"])
def test_with_a_share_of_one_every_variant_has_a_closed_form(variant: str, tiny: Config):
    """lam = 1 mixes no pixel; c = min(1, 0) + min(0, 1) = 0 then, so that source and pair are clean terms.

    replace: clean(a -> b) + 1/2 clean(b -> a) + 1/2 clean(b -> a), which is MoCo v3; algorithm1: 2 clean(b -> a);
    extra: MoCo v3 + 2 * 1/2 clean(c -> d).
    """
    method = build_method(variant_of(tiny, variant))
    ones = {view: make_plan("mixup", torch.ones(8), (32, 32)) for view in method.mixed_views}
    views = random_views(tiny, len(method.view_names))
    plan = Plan(False, ones)
    got = loss_of(method, views, plan).total.double()
    student, momentum, images = method.student, method.momentum_encoder, method.mix(as_batch(views), plan)
    own, t = torch.eye(8, dtype=torch.float64), method.temperature

    def clean(query: str, key: str) -> Tensor:
        with torch.no_grad():
            return dense_loss(student(images[query])[0], momentum(images[key]), own, t)

    expected = {
        "replace": lambda: clean("a", "b") + clean("b~", "a"),
        "algorithm1": lambda: 2 * clean("b~", "a"),
        "extra": lambda: clean("a", "b") + clean("b", "a") + clean("c~", "d"),
    }[variant]()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", FORWARDS)
def test_forwards_and_gradients(tiny: Config, variant: str):
    """Method.md's count of forwards; gradient to the trained student parameters, none to the momentum encoder."""
    method = build_method(variant_of(tiny, variant))
    plan = method.plan(at_step(0))
    calls = {"q": 0, "k": 0}

    def count(name: str):
        return lambda *_: calls.update({name: calls[name] + 1})

    method.student.encoder.backbone.register_forward_hook(count("q"))
    method.momentum_encoder.register_forward_hook(count("k"))
    loss = loss_of(method, random_views(tiny, len(method.view_names)), plan)
    loss.total.backward()
    assert (calls["q"], calls["k"]) == FORWARDS[variant]
    assert set(loss.terms) == {term.name for term in method.terms}
    for name, parameter in method.student.named_parameters():
        frozen = name.endswith("pos_embed") or "patch_embed.proj" in name
        assert (parameter.grad is None) == frozen, name
    assert all(p.grad is None for p in method.momentum_encoder.parameters())
    assert len(method.views(at_step(0))) == len(method.view_names)


@pytest.mark.parametrize("variant", FORWARDS)
def test_the_first_loss_is_near_chance(tiny: Config, variant: str):
    config = variant_of(replace(tiny, method=replace(tiny.method, dim=256, mlp_dim=256)), variant)
    config = replace(config, optim=replace(config.optim, batch_size=64))
    method = build_method(config)
    chance = method.chance()
    assert chance["loss"] == pytest.approx(2 * 0.2 * math.log(64) * sum(term.weight for term in method.terms))
    views, plan = random_views(config, len(method.view_names)), method.plan(at_step(0))
    assert 0.85 < float(loss_of(method, views, plan).total.detach()) / chance["loss"] < 1.15


def test_the_plan_is_a_function_of_seed_and_step(tiny: Config):
    first, second = build_method(tiny), build_method(tiny)
    torch.manual_seed(1)
    for step in (0, 5, 1):
        a, b = first.plan(at_step(step)), second.plan(at_step(step))
        assert a.swap == b.swap
        assert all(torch.equal(a.mixes[v].box, b.mixes[v].box) for v in "ab")
        assert torch.equal(a.mixes["a"].rule, a.mixes["b"].rule)
        assert torch.allclose(a.mixes["a"].lam, a.mixes["b"].lam)
    swaps = [first.plan(at_step(step)).swap for step in range(200)]
    assert 70 < sum(swaps) < 130
    other = build_method(replace(tiny, run=replace(tiny.run, seed=1)))
    assert swaps != [other.plan(at_step(step)).swap for step in range(200)]


def test_views_swap_roles(tiny: Config):
    method = build_method(tiny)
    views = random_views(tiny)
    swapped = next(method.plan(at_step(step)) for step in range(50) if method.plan(at_step(step)).swap)
    kept = replace(swapped, swap=False)
    assert torch.equal(method.mix(as_batch(views), swapped)["a"], method.mix(as_batch(views[::-1]), kept)["a"])
    assert not torch.equal(method.mix(as_batch(views), swapped)["a"], method.mix(as_batch(views), kept)["a"])


def test_static_weights_of_table_6(tiny: Config):
    plain = build_method(tiny)
    static = build_method(with_mixing(tiny, source_weight="static", pair_weight="static"))
    plan = plain.plan(at_step(0))
    for term in plain.terms[1:]:
        target = static.target(term, plan)
        assert torch.equal(target.weight, torch.full((8,), 0.5))
        assert not torch.equal(plain.target(term, plan).weight, target.weight)


def test_shared_lam_of_table_7(tiny: Config):
    plan = build_method(with_mixing(tiny, shared_lam=True, rules=("mixup",))).plan(at_step(0))
    assert plan.mixes["a"].lam.unique().numel() == 1
    assert build_method(tiny).plan(at_step(0)).mixes["a"].lam.unique().numel() > 1
