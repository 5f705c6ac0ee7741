"""The same training with the definition of every op and with its Triton kernels, here in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_loop import Spy, run
from tiny_runs import build_training

from sdmp_kernels import _backends, _launch, use_backend
from sdmp_train.config import Config

STEPS = 50
# Both curves are float32 arithmetic of one training: rounding differs by 1e-7 a step and is amplified by AdamW over
# fifty steps. A wrong weight of a thousandth moves the curve by more, see the last test.
BAND = 2e-4

needs_interpreter = pytest.mark.skipif(bool(_backends.unavailable("triton", "cpu")), reason="no interpreter here")


def curve(config: Config, backend: str) -> torch.Tensor:
    """(50,) the losses that a run logs, all ops on one backend."""
    log = Spy()
    with use_backend(backend), np.errstate(all="ignore"):
        run(build_training(config, steps_per_epoch=STEPS), STEPS, log)
    losses = [values["loss"] for values in log.numbers if "loss" in values]
    assert len(losses) == STEPS
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture
def fifty(tiny: Config) -> Config:
    return replace(tiny, optim=replace(tiny.optim, epochs=1, warmup_epochs=0.2))


@needs_interpreter
def test_same_loss_curve(fifty: Config):
    expected = curve(fifty, "reference")
    with _launch.recording() as names:
        got = curve(fifty, "triton")
    assert {name.split("_")[0] for name in names} >= {"mix", "info"}
    print((got - expected).abs().max(), expected)
    assert (got - expected).abs().max() <= BAND
