"""The loop: what a step changes, what a bad step must not, and that the host never waits for the device within one."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace

import pytest
import torch
from tiny_runs import all_tensors, build_training, noise_batches

from sdmp_train import guard, loop, meter, optim
from sdmp_train.config import Config
from sdmp_train.guard import StopRequest
from sdmp_train.log import Log
from sdmp_train.loop import Outcome, train
from sdmp_train.methods import contrast, mocov3


class Spy(Log):
    """A silent log that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.numbers: list[dict] = []

    def say(self, line: str = "") -> None:
        self.lines.append(line)

    def metrics(self, values) -> None:
        self.numbers.append(dict(values))


def run(training, steps: int, log: Log | None = None, after_step=lambda _: None) -> Outcome:
    """Train on noise from where `training` stands to step `steps`."""
    training.config = replace(training.config, run=replace(training.config.run, max_steps=steps))
    batches = noise_batches(training.config, training.total_steps)
    for _ in range(training.step):
        next(batches)
    return train(training, batches, log or Spy(), StopRequest(), after_step)


def poison(training, monkeypatch, steps: set[int], value: float = float("nan")) -> None:
    """Make the loss of some steps not finite."""
    honest = training.method.loss

    def loss(features, plan, batch, at):
        found = honest(features, plan, batch, at)
        return found._replace(total=found.total * value) if at.step in steps else found

    monkeypatch.setattr(training.method, "loss", loss)


def test_a_step_changes_weights_moments_momentum_encoder_and_statistics(tiny_resnet: Config):
    training = build_training(tiny_resnet)
    before = all_tensors(training)
    assert run(training, 2) is Outcome.DONE
    after = all_tensors(training)
    for name in ("student.encoder.backbone.conv1.weight", "momentum_encoder.backbone.conv1.weight"):
        assert not torch.equal(before[name], after[name])
    assert not torch.equal(
        before["student.encoder.backbone.bn1.running_mean"], after["student.encoder.backbone.bn1.running_mean"]
    )
    assert after["student.encoder.backbone.bn1.num_batches_tracked"] == 4  # two queries a step
    assert any(name.startswith("moments") for name in after)


@pytest.mark.parametrize("kind", ["tiny", "tiny_resnet"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(kind: str, value: float, request, monkeypatch):
    training = build_training(request.getfixturevalue(kind))
    run(training, 2)
    before = all_tensors(training)
    poison(training, monkeypatch, {2}, value)
    log = Spy()
    run(training, 3, log)
    after = all_tensors(training)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert log.lines == [f"step 2 was not finite and changed nothing; its images: {list(range(16, 24))}"]
    run(training, 5, log)
    assert not torch.equal(after["student.predictor.0.weight"], all_tensors(training)["student.predictor.0.weight"])
    assert all(v.isfinite().all() for v in all_tensors(training).values())


def test_too_many_bad_steps_in_a_row_end_the_run(tiny: Config, monkeypatch):
    training = build_training(replace(tiny, run=replace(tiny.run, max_bad_steps=3)))
    poison(training, monkeypatch, {1, 2, 4, 5, 6})
    assert run(training, 8) is Outcome.NOT_FINITE
    assert training.step == 8  # known one step late: step 6 is the third in a row, step 7 was already made


def test_a_stop_request_ends_the_run_after_the_step(tiny: Config):
    training, stop = build_training(tiny), StopRequest()

    def ask(training):
        stop.asked = training.step == 3

    outcome = train(training, noise_batches(tiny, 8), Spy(), stop, ask)
    assert outcome is Outcome.STOPPED
    assert 3 < training.step <= 5


def test_metrics_have_the_promised_names(tiny: Config):
    log = Spy()
    run(build_training(tiny), 4, log)
    assert [line["step"] for line in log.numbers] == [1, 2, 3, 4]
    promised = {"step", "epoch", "loss", "loss_clean", "loss_source", "loss_pair", "lr", "images_per_second"}
    promised |= {"data_wait_fraction", "grad_norm", "lam_mean"}
    assert promised <= set(log.numbers[-1])
    last = log.numbers[-1]
    assert last["loss"] == pytest.approx(last["loss_clean"] + (last["loss_source"] + last["loss_pair"]) / 2, rel=1e-5)
    assert last["epoch"] == 1.0
    assert 0 <= last["lam_mean"] <= 1
    assert log.numbers[0]["lr"] == 0


def test_the_momentum_encoder_averages_before_the_keys_of_the_next_step(tiny: Config):
    """xi_1 = m_1 xi_0 + (1 - m_1) theta_1, with the momentum of step 1."""
    training = build_training(tiny)
    start = training.method.momentum_encoder.projector[0].weight.clone()
    run(training, 2)
    first = training.method.momentum_encoder.projector[0].weight.clone()
    moved = training.method.student.encoder.projector[0].weight.detach()
    momentum = optim.key_momentum(2, start=0.99, steps=8, cosine=True)
    torch.testing.assert_close(first, momentum * start + (1 - momentum) * moved, rtol=1e-4, atol=1e-6)


def test_the_loss_falls_when_the_same_images_come_again(tiny: Config):
    config = replace(tiny, optim=replace(tiny.optim, epochs=20, warmup_epochs=1))
    training, log = build_training(config), Spy()
    batches = [next(noise_batches(config, 1))] * training.total_steps
    assert train(training, batches, log, StopRequest(), lambda _: None) is Outcome.DONE
    first, last = log.numbers[0]["loss"], log.numbers[-1]["loss"]
    assert last < 0.6 * first, (first, last)


def test_no_hidden_wait_for_the_device():
    """Words that make the host wait occur only where a line is written, a flag is read one step late, or in mix.png."""
    allowed = {"meter.read", "guard.pop", "loop.train", "mocov3.example"}
    waits = re.compile(r"\.(item|cpu|tolist|numpy)\(|\b(float|int|bool)\(\w*(loss|norm|bad|grad|share)")
    looked_at = set()
    for module in (loop, guard, meter, optim, contrast, mocov3):
        source = inspect.getsource(module)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                name = f"{module.__name__.split('.')[-1]}.{node.name}"
                looked_at.add(name)
                found = waits.search(ast.get_source_segment(source, node) or "")
                assert bool(found) <= (name in allowed), (name, found)
    assert allowed <= looked_at


def test_the_loop_is_one_page():
    assert len(inspect.getsource(loop).splitlines()) <= 150
