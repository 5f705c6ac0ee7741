"""The spread of features: closed forms, and what counts as collapse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import KINDS, Spy, build_training, noise_batches

from sdmp_train.guard import StopRequest
from sdmp_train.loop import train
from sdmp_train.methods import health
from sdmp_train.methods.health import collapse_of, spread_of


def test_one_vector_has_no_spread_and_rank_one():
    one = torch.tensor([[1.0, 2.0, -2.0]]).expand(10, 3)
    found = spread_of(one * torch.linspace(1, 5, 10)[:, None])
    assert float(found["feature_std"]) == pytest.approx(0, abs=1e-6)
    assert float(found["effective_rank"]) == pytest.approx(1, abs=1e-5)
    assert "nearly the same" in collapse_of({name: float(v) for name, v in found.items()})


@pytest.mark.parametrize(("n", "d"), [(8, 8), (16, 8), (8, 24)])
def test_orthogonal_vectors_have_full_rank(n: int, d: int):
    vectors = torch.eye(max(n, d))[:, :d][:n] if n <= d else torch.eye(d).repeat(n // d, 1)
    assert float(spread_of(vectors)["effective_rank"]) == pytest.approx(min(n, d), rel=1e-5)


def test_directions_at_random_have_a_spread_of_one():
    vectors = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    found = spread_of(vectors)
    assert float(found["feature_std"]) == pytest.approx(1, abs=0.02)
    assert 60 < float(found["effective_rank"]) <= 64
    assert collapse_of({name: float(value) for name, value in found.items()}) is None


def test_the_rank_is_that_of_the_definition():
    vectors = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 3, 1, 0.3, 0.1, 0.01])
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    share = torch.linalg.svdvals(unit)
    share = share / share.sum()
    expected = math.exp(-float((share * share.log()).sum()))
    assert float(spread_of(vectors)["effective_rank"]) == pytest.approx(expected, rel=1e-5)


def test_opposite_vectors_lie_on_a_line():
    line = torch.tensor([[1.0, 1.0]]) * torch.tensor([1.0, -1.0] * 4)[:, None]
    found = {name: float(value) for name, value in spread_of(line).items()}
    assert found["feature_std"] == pytest.approx(1)
    assert "on one line" in collapse_of(found)


def test_what_is_not_finite_gives_nan_and_no_verdict():
    found = {name: float(v) for name, v in spread_of(torch.full((4, 3), float("nan"))).items()}
    assert all(math.isnan(value) for value in found.values())
    assert collapse_of(found) is None
    assert collapse_of({}) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_logs_its_spread_where_a_line_is_written_and_nowhere_else(kind: str, request):
    config = request.getfixturevalue(kind)
    config = replace(config, run=replace(config.run, log_every_steps=3, max_steps=5))
    training, log, calls = build_training(config), Spy(), []
    honest = training.method.health
    training.method.health = lambda features: calls.append(training.step) or honest(features)
    train(training, noise_batches(config, 8), log, StopRequest(), lambda _: None)
    assert calls == [2, 4]  # of the steps 0 to 4 the third and the last
    assert [line["step"] for line in log.numbers] == [3, 5]
    for line in log.numbers:
        assert 0 < line["feature_std"] < 2
        assert 1 < line["effective_rank"] <= 32


def test_a_collapse_is_said_once(tiny, monkeypatch):
    training, log = build_training(tiny), Spy()
    monkeypatch.setattr(health, "LEAST_STD", 100.0)
    train(training, noise_batches(tiny, 8), log, StopRequest(), lambda _: None)
    said = [line for line in log.lines if "collapsed" in line]
    assert len(said) == 1
    assert said[0].startswith("warning  likely collapsed at step 3: the features of all images are nearly the same")
