"""The heads as MoCo v3 has them, and the momentum encoder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_runs import as_batch, at_step, build_method, dense_loss, random_features, random_views, with_mixing
from torch import nn
from torch.nn.functional import normalize

from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.methods import contrast
from sdmp_train.methods.contrast import ContrastConfig, Features, build_student, mlp_head
from sdmp_train.models import build_backbone


def layers(head: nn.Sequential) -> list[str]:
    return [
        f"{m.in_features}-{m.out_features}" if isinstance(m, nn.Linear) else type(m).__name__ for m in head.children()
    ]


def test_heads_of_a_vit(tiny: Config):
    student = build_student(build_backbone(tiny.model, 32, seed=0), tiny.method, seed=0)
    norm = ["BatchNorm1d", "ReLU"]
    assert layers(student.encoder.projector) == ["32-64", *norm, "64-64", *norm, "64-32", "BatchNorm1d"]
    assert layers(student.predictor) == ["32-64", *norm, "64-32", "BatchNorm1d"]
    assert not student.encoder.projector[-1].affine
    assert student.encoder.projector[1].affine
    assert all(m.bias is None for m in student.encoder.projector if isinstance(m, nn.Linear))


def test_heads_of_a_resnet(tiny_resnet: Config):
    student = build_student(build_backbone(tiny_resnet.model, 32, seed=0), tiny_resnet.method, seed=0)
    assert layers(student.encoder.projector) == ["96-64", "BatchNorm1d", "ReLU", "64-32", "BatchNorm1d"]
    assert layers(student.predictor) == ["32-64", "BatchNorm1d", "ReLU", "64-32"]


@pytest.mark.parametrize(
    ("arch", "image_px"),
    [
        ("deit_tiny_patch16_224", 32),
        ("swin_tiny_patch4_window7_224", 32),
        ("mobilenetv3_small_100", 32),
        ("convnext_atto", 40),
        ("test_resnet", 33),
        ("deit3_small_patch16_224", 32),
        ("vit_tiny_r_s16_p8_224", 64),
    ],
)
def test_the_heads_fit_whatever_architecture_takes_the_images(arch: str, image_px: int):
    backbone = build_backbone(ModelConfig(arch=arch), image_px, seed=0)
    student = build_student(backbone, ContrastConfig(dim=8, mlp_dim=16), seed=0)
    (queries,) = student(torch.zeros(2, 3, image_px, image_px))
    assert queries.shape == (2, 8)


# Each logit is off by 2^-8 / T at most and a term 2 T CE by twice that, times 2 T, see `Contrast.encode`.
WORST = 2.0**-6


@pytest.mark.parametrize("mixing", ["none", "sdmp"])
def test_features_are_bf16_under_bf16_precision_and_the_loss_is_near_that_of_float32(tiny: Config, mixing: str):
    config = with_mixing(replace(tiny, run=replace(tiny.run, precision="bf16")), mixing=mixing)
    method = build_method(config)
    plan = method.plan(at_step(1))
    with torch.no_grad():
        features = method.encode(method.mix(as_batch(random_views(config)), plan))
    found = [*features.queries.values(), *features.keys.values()]
    assert {t.dtype for t in found} == {torch.bfloat16}
    single = Features(*({name: t.float() for name, t in part.items()} for part in features))
    generator = torch.Generator().manual_seed(0)
    exact = Features(
        *(
            {name: normalize(torch.randn(t.shape, generator=generator), dim=1) for name, t in part.items()}
            for part in single
        )
    )
    near = Features(*({name: t.bfloat16() for name, t in part.items()} for part in exact))
    total = sum(term.weight for term in method.terms)
    batch = as_batch(random_views(config))
    losses = [method.loss(given, plan, batch, at_step(1)) for given in (features, single, near, exact)]
    # The products themselves are exact, and added up in float32: only the rounding of the features counts.
    assert abs(float(losses[0].total - losses[1].total)) <= 1e-6 * total
    assert abs(float(losses[2].total - losses[3].total)) <= WORST * total
    # And of random unit vectors, whose errors are as random, a twentieth of the worst.
    assert 0 < abs(float(losses[2].total - losses[3].total)) <= WORST / 20 * total


def test_one_call_per_query_with_an_upstream_factor_of_one(tiny: Config, monkeypatch):
    """The weights of the terms are the op's business; the log has each term as it is."""
    method = build_method(with_mixing(tiny))
    plan = method.plan(at_step(1))
    features = method.encode(method.mix(as_batch(random_views(tiny)), plan))
    honest, factors = contrast.info_nce, []

    def watched(*args: Any, **options: Any) -> Any:
        loss, terms = honest(*args, **options)
        loss.register_hook(lambda grad: factors.append(float(grad)))
        return loss, terms

    monkeypatch.setattr(contrast, "info_nce", watched)
    loss = method.loss(features, plan, as_batch(random_views(tiny)), at_step(1))
    loss.total.backward()
    assert factors == [1.0] * len(features.queries)
    temperature, total = method.temperature, 0.0
    for term in method.terms:
        target, query = method.target(term, plan), features.queries[term.query]
        alone = honest(query, features.keys[term.key], target, temperature=temperature)
        total += float(term.weight * 2 * temperature * alone.detach())
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-6)
    assert set(loss.terms) == {term.name for term in method.terms}


def test_heads_depend_on_the_seed_alone_and_global_random_state_is_not_moved(tiny: Config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_student(build_backbone(tiny.model, 32, seed=0), tiny.method, seed=3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again = build_student(build_backbone(tiny.model, 32, seed=0), tiny.method, seed=3).state_dict()
    other = build_student(build_backbone(tiny.model, 32, seed=0), tiny.method, seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["predictor.0.weight"], other["predictor.0.weight"])


def test_one_layer_more_for_every_hidden_width():
    assert layers(mlp_head([3, 5, 7], last_norm=False)) == ["3-5", "BatchNorm1d", "ReLU", "5-7"]


def test_moco_widths_are_the_defaults():
    assert (ContrastConfig().dim, ContrastConfig().mlp_dim) == (256, 4096)


def test_the_momentum_encoder_follows_parameters_and_keeps_its_own_statistics(tiny_resnet: Config):
    method = build_method(tiny_resnet)
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    before = {name: t.clone() for name, t in method.momentum_encoder.state_dict().items()}
    method.follow_student(torch.tensor(0.25))
    student = method.student.encoder.state_dict()
    parameters = dict(method.momentum_encoder.named_parameters())
    assert len(parameters) < len(before), "the test needs batch norms"
    for name, tensor in method.momentum_encoder.state_dict().items():
        expected = before[name] + 0.25 * (student[name] - before[name]) if name in parameters else before[name]
        torch.testing.assert_close(tensor, expected)


def test_the_temperature_is_that_of_the_architecture_unless_it_is_given(tiny: Config, tiny_resnet: Config):
    """MoCo v3's readme gives 0.2 for ViTs, and its code's default of 1 for ResNets; it is in every term and the 2T."""
    assert (build_method(tiny).temperature, build_method(tiny_resnet).temperature) == (0.2, 1.0)
    given = replace(tiny_resnet, method=replace(tiny_resnet.method, temperature=0.1))
    assert build_method(given).temperature == 0.1
    features = random_features(build_method(tiny))
    found = []
    for config in (tiny_resnet, given):
        method = build_method(config)
        found.append(method.loss(features, method.plan(at_step(0)), as_batch(random_views(config)), at_step(0)).terms)
        assert method.chance()["loss"] == pytest.approx(4 * method.temperature * math.log(8))
    own = torch.eye(8, dtype=torch.float64)
    for terms, temperature in zip(found, (1.0, 0.1), strict=True):
        expected = dense_loss(features.queries["a"], features.keys["b"], own, temperature)
        torch.testing.assert_close(terms["clean"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("changes", "name"), [({"dim": 0}, "moco_dim"), ({"temperature": 0.0}, "moco_t")])
def test_a_wrong_value_is_refused_by_name(changes: dict, name: str):
    with pytest.raises(ConfigError, match=name):
        ContrastConfig(**changes)
