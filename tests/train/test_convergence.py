"""Steps with the definition of every op, and with its Triton kernels: the same loss curve. Fifty are a slow test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import Spy, build_training
from torch import Tensor

from sdmp_kernels import TwoHot, _backends, _launch, use_backend
from sdmp_train.config import Config
from sdmp_train.data import Batch
from sdmp_train.guard import StopRequest
from sdmp_train.loop import Outcome, train
from sdmp_train.methods import contrast

STEPS, PX = 50, 16
# Both curves are one training in float32. Rounding differs by 5e-7 in the first step's loss, which AdamW and the batch
# norms of the heads amplify; 1e-5 was measured. A weight wrong by a hundredth moves the curve by more, see below.
BAND = 1e-3
# With features rounded to bf16 the first losses are near, and single ones then part, as they do with noise of that size
# in float32 (batches of eight). Their means over ten steps, from 1.7 to 1.0, keep within 0.05 of each other; with such
# noise within 0.07.
BF16_FIRST, BF16_BAND = 1e-3, 0.1


def batches(config: Config) -> Iterator[Batch]:
    """Sixteen images of coloured squares in two batches that alternate, each view with noise of its own."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand(16, 3, 4, 4, generator=generator).repeat_interleave(PX // 4, 2).repeat_interleave(PX // 4, 3)
    for step in range(STEPS):
        ids = torch.arange(8) + 8 * (step % 2)
        views = (200 * squares[ids] + 55 * torch.rand(8, 3, PX, PX, generator=generator) for _ in range(2))
        pixels = tuple(view.to(torch.uint8).contiguous(memory_format=torch.channels_last) for view in views)
        yield Batch(pixels, ids, torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool))


def curve(config: Config, backend: str, steps: int = STEPS) -> Tensor:
    """(steps,) the first losses that a run with all ops on one backend logs."""
    config = replace(config, run=replace(config.run, max_steps=steps))
    log = Spy()
    with use_backend(backend), np.errstate(all="ignore"):
        outcome = train(build_training(config, STEPS), batches(config), log, StopRequest(), lambda _: None)
    assert outcome is Outcome.DONE
    losses = [numbers["loss"] for numbers in log.numbers if "loss" in numbers]
    assert len(losses) == steps
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture
def fifty(tiny: Config) -> Config:
    """Fifty steps of a ViT of width 32 on 16 px views."""
    optim = replace(tiny.optim, epochs=1, warmup_epochs=0.2)
    return replace(tiny, data=replace(tiny.data, image_px=PX), optim=optim, run=replace(tiny.run, max_steps=STEPS))


@pytest.mark.skipif(bool(_backends.unavailable("triton", "cpu")), reason="no interpreter here")
@pytest.mark.parametrize("steps", [5, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_the_triton_kernels_train_as_the_definitions_do(steps: int, fifty: Config):
    with _launch.recording() as none:
        expected = curve(fifty, "reference", steps)
    with _launch.recording() as names:
        got = curve(fifty, "triton", steps)
    assert not none
    assert names >= {"mix_pair_kernel", "info_nce_attend_kernel", "info_nce_merge_kernel"}
    if steps == STEPS:
        assert expected[-5:].mean() < 0.7 * expected[:5].mean()
    assert (got - expected).abs().max() <= BAND


def rounded_features(monkeypatch: pytest.MonkeyPatch, rounded: Callable[[Tensor], Tensor]) -> None:
    """From now on the loss sees its unit vectors rounded, and nothing else is."""
    honest = contrast.info_nce

    def with_rounded(q: Tensor, k: list[Tensor], targets: list[TwoHot], **options: float) -> Any:
        return honest(rounded(q), [rounded(keys) for keys in k], targets, **options)

    monkeypatch.setattr(contrast, "info_nce", with_rounded)


@pytest.mark.parametrize("steps", [10, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_features_in_bf16_train_as_those_in_float32_do(steps: int, fifty: Config, monkeypatch):
    expected = curve(fifty, "torch", steps)
    rounded_features(monkeypatch, lambda features: features.bfloat16())
    got = curve(fifty, "torch", steps)
    assert 0 < abs(float(got[0] - expected[0])) <= BF16_FIRST
    assert (got - expected).view(-1, 10).mean(1).abs().max() <= BF16_BAND


def test_coarser_features_leave_the_band(fifty: Config, monkeypatch):
    """The comparison can fail: rounded to eighths, unit vectors of 32 elements train otherwise."""
    expected = curve(fifty, "torch", 10)
    rounded_features(monkeypatch, lambda features: (8 * features).round() / 8)
    assert abs(float((curve(fifty, "torch", 10) - expected).mean())) > BF16_BAND


def test_a_slightly_wrong_op_leaves_the_band(fifty: Config, monkeypatch):
    """The comparison can fail: target weights a hundredth off show."""
    expected = curve(fifty, "reference")
    honest = contrast.info_nce

    def wrong(q: Tensor, k: list[Tensor], targets: list[TwoHot], **options: float) -> list[Tensor]:
        return honest(q, k, [t._replace(weight=0.99 * t.weight) for t in targets], **options)

    monkeypatch.setattr(contrast, "info_nce", wrong)
    assert (curve(fifty, "reference") - expected).abs().max() > 5 * BAND
