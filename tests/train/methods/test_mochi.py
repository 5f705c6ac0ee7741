"""MoCHi: the hardest negatives of each query, mixed; the loss and its gradient are those of features really built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_runs import as_batch, at_step, build_method, dense_loss, loss_of, random_features, random_views
from torch import Tensor
from torch.nn.functional import normalize

from sdmp_train.config import Config, ConfigError
from sdmp_train.methods.contrast import Features
from sdmp_train.methods.method import At
from sdmp_train.methods.mochi import Draws, MoCHi, MoCHiConfig
from sdmp_train.methods.mocov3 import MoCoV3Config

LATE = at_step(5)


def literal(query: Tensor, key: Tensor, method: MoCHi, draws: Draws) -> Tensor:
    """One direction in float64, row by row, with every synthetic negative built and scaled to length 1."""
    config = method.config
    rows = []
    for i, q in enumerate(query):
        others = [j for j in range(len(key)) if j != i]
        nearest = sorted(others, key=lambda j: -float(q.detach() @ key[j]))[: config.hard]
        hard = key[nearest]
        made = []
        for s in range(config.mixed):
            a = draws.share[i, s].double()
            made.append(a * hard[draws.first[i, s]] + (1 - a) * hard[draws.second[i, s]])
        for s in range(config.query_mixed):
            b = draws.query_share[i, s].double()
            made.append(b * q.detach() + (1 - b) * hard[draws.third[i, s]])
        negatives = normalize(torch.stack(made), dim=1).detach()
        logits = torch.cat([key @ q, negatives @ q]) / method.temperature
        rows.append(logits.logsumexp(0) - logits[i])
    return torch.stack(rows).mean() * 2 * method.temperature


def test_the_loss_and_its_gradient_are_those_of_the_negatives_really_built(tiny_mochi: Config):
    method = build_method(tiny_mochi)
    features = random_features(method, gradient=True)
    loss = method.loss(features, method.plan(LATE), as_batch(random_views(tiny_mochi)), LATE)
    loss.total.backward()
    draws = method.draws(LATE, 4)
    expected = torch.zeros((), dtype=torch.float64)
    exact = {name: q.detach().double().requires_grad_() for name, q in features.queries.items()}
    for query, key in (("a", "b"), ("b", "a")):
        expected = expected + literal(exact[query], features.keys[key].double(), method, draws)
    expected.backward()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-5)
    for name, q in exact.items():
        torch.testing.assert_close(features.queries[name].grad.double(), q.grad, rtol=1e-4, atol=1e-6)


def test_hard_negatives_are_the_nearest_keys_of_others(tiny_mochi: Config):
    """With type 1 alone and a share of 1, every synthetic negative is one of the four nearest keys but the own."""
    method = build_method(tiny_mochi)
    query, key = (normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(i)), dim=1) for i in (0, 1))
    key[3] = query[3]  # the own key is the nearest of all, and must not be among them
    honest = method.draws(LATE, 4)
    method.draws = lambda at, count: honest._replace(share=torch.ones_like(honest.share))
    known, mixed, _ = method.similarities(query, key, torch.arange(8), LATE)
    for i in range(8):
        nearest = sorted((float(known[i, j]) for j in range(8) if j != i), reverse=True)[:4]
        chosen = torch.tensor(nearest)[honest.first[i]]
        torch.testing.assert_close(mixed[i], chosen, rtol=1e-5, atol=1e-6)


def test_more_hard_negatives_than_there_are_keys_are_all_of_them(tiny_mochi: Config):
    method = build_method(replace(tiny_mochi, method=replace(tiny_mochi.method, hard=100)))
    counts = []
    honest = method.draws
    method.draws = lambda at, count: counts.append(count) or honest(at, count)
    assert loss_of(method, random_views(tiny_mochi), method.plan(LATE), LATE).total.isfinite()
    assert counts == [7, 7]


def test_opposite_and_equal_keys_give_no_nan(tiny_mochi: Config):
    method = build_method(tiny_mochi)
    one = normalize(torch.ones(8, 32), dim=1)
    signs = torch.tensor([1.0, -1.0] * 4)[:, None]
    honest = method.draws(LATE, 4)
    method.draws = lambda at, count: honest._replace(share=torch.full_like(honest.share, 0.5))
    queries = {"a": one.clone().requires_grad_(), "b": (one * signs).requires_grad_()}
    features = Features(queries, {"a": one * signs, "b": one})
    loss = method.loss(features, method.plan(LATE), as_batch(random_views(tiny_mochi)), LATE)
    loss.total.backward()
    assert loss.total.isfinite()
    assert all(q.grad.isfinite().all() for q in queries.values())


def test_draws_follow_from_seed_step_rank_and_part_alone(tiny_mochi: Config):
    method = build_method(tiny_mochi)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = method.draws(at_step(6), 4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, build_method(tiny_mochi).draws(at_step(6), 4), strict=True))
    assert first.first.max() <= 3 and first.query_share.max() < 0.5
    other_rank = build_method(tiny_mochi)
    other_rank.setup = other_rank.setup._replace(world=replace(other_rank.world, rank=1, size=2))
    for other in (method.draws(LATE, 4), method.draws(at_step(6)._replace(part=1, parts=2), 4)):
        assert not torch.equal(first.share, other.share)
    assert not torch.equal(first.share, other_rank.draws(at_step(6), 4).share)
    assert method.partners_follow_ranks


@pytest.mark.parametrize("changes", [{"warmup": 10.0}, {"mixed": 0, "query_mixed": 0}])
def test_in_the_first_epochs_and_without_synthetic_negatives_it_is_moco_v3(
    changes: dict, tiny: Config, tiny_mochi: Config
):
    method = build_method(replace(tiny_mochi, method=replace(tiny_mochi.method, **changes)))
    plain = build_method(replace(tiny, method=MoCoV3Config(dim=32, mlp_dim=64, mixing="none")))
    views = random_views(tiny)
    ours = loss_of(method, views, method.plan(LATE), LATE)
    theirs = loss_of(plain, views, plain.plan(LATE), LATE)
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-6, atol=1e-6)


def test_synthetic_negatives_begin_with_their_epoch_and_raise_the_loss(tiny_mochi: Config):
    method = build_method(tiny_mochi)  # warm-up: half an epoch of four steps
    features = random_features(method)
    batch, own = as_batch(random_views(tiny_mochi)), torch.eye(8, dtype=torch.float64)
    plain = dense_loss(features.queries["a"], features.keys["b"], own, 0.2)
    plain += dense_loss(features.queries["b"], features.keys["a"], own, 0.2)
    losses = [method.loss(features, method.plan(at_step(step)), batch, at_step(step)).total for step in (0, 1, 2, 3)]
    torch.testing.assert_close(torch.stack(losses[:2]).double(), plain.expand(2), rtol=1e-6, atol=1e-6)
    assert all(loss > plain + 0.1 for loss in losses[2:])
    assert "from epoch 0.5 on 6 + 3 synthetic negatives of the 4 hardest" in method.describe()
    assert At(2, 8, 4).epoch == 0.5


@pytest.mark.parametrize(("changes", "name"), [({"hard": 0}, "mochi_hard"), ({"mixed": -1}, "mochi_mixed")])
def test_a_wrong_value_is_refused_by_name(changes: dict, name: str):
    with pytest.raises(ConfigError, match=name):
        MoCHiConfig(**changes)
