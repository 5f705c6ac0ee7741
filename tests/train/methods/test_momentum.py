"""The twin that runs a follower's forward passes: the bits of autocast itself, and casts once a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_runs import Spy, all_tensors, build_training, noise_batches
from torch import nn

from sdmp_train.guard import StopRequest
from sdmp_train.loop import train
from sdmp_train.methods import momentum
from sdmp_train.methods.momentum import Lowered


def after_steps(config, steps: int):
    """A training of bf16 precision after some steps on noise."""
    config = replace(config, run=replace(config.run, precision="bf16", max_steps=steps))
    training = build_training(config)
    views = len(training.method.views(training.at))
    assert views == 2 or config.method_name == "dino"
    batches = noise_batches(config, steps, views)
    log = Spy()
    train(training, batches, log, StopRequest(), lambda _: None)
    return training, log


@pytest.mark.parametrize("name", ["tiny", "tiny_resnet", "tiny_dino"])
def test_a_training_has_the_bits_of_one_without_twins(name: str, request: pytest.FixtureRequest, monkeypatch) -> None:
    config = request.getfixturevalue(name)
    if name == "tiny_dino":
        config = replace(config, method=replace(config.method, local_crops_number=0, mix_weight=0.5))
    training, log = after_steps(config, 2)
    monkeypatch.setattr(momentum, "PRODUCTS", ())  # a twin that shares everything
    plain, plain_log = after_steps(config, 2)
    found, expected = all_tensors(training), all_tensors(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert [row["loss"] for row in log.numbers] == [row["loss"] for row in plain_log.numbers]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in log.numbers)


def test_only_the_weights_of_products_are_cast(tiny_resnet) -> None:
    training, _ = after_steps(tiny_resnet, 1)
    method = training.method
    own, twin = dict(method.momentum_encoder.named_modules()), dict(method.keys.twin.named_modules())
    assert own.keys() == twin.keys()
    for place, module in own.items():
        for key, parameter in module.named_parameters(recurse=False):
            other = getattr(twin[place], key)
            assert (other is not parameter) is isinstance(module, nn.Linear | nn.Conv2d)
            assert other.dtype == (torch.bfloat16 if other is not parameter else torch.float32)
            assert parameter.dtype == torch.float32 and not other.requires_grad
        for key, buffer in module.named_buffers(recurse=False):
            assert getattr(twin[place], key) is buffer  # also after the guard has put others in their place


def test_weights_are_cast_anew_in_every_step(tiny) -> None:
    method = build_training(replace(tiny, run=replace(tiny.run, precision="bf16"))).method
    weight = method.momentum_encoder.projector[0].weight
    with torch.no_grad():
        weight.add_(1)
    twin = method.keys.refresh()
    assert torch.equal(twin.projector[0].weight, weight.bfloat16())


def test_in_float32_there_is_no_twin(tiny) -> None:
    method = build_training(tiny).method
    assert method.keys.twin is method.keys.refresh() is method.momentum_encoder


def test_layers_that_do_more_with_their_weights_keep_them() -> None:
    class Standardised(nn.Linear):
        """Its weights are standardised in float32 before the product."""

    follower = nn.Sequential(Standardised(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    twin = Lowered(follower, torch.bfloat16).twin
    assert twin[0].weight is follower[0].weight and twin[1].weight.dtype == torch.bfloat16
