"""The loop: what a step changes, what a bad step must not, and that the host never waits for the device within one."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import KINDS, Spy, all_tensors, at_step, build_training, noise_batches

from sdmp_train import guard, loop, meter, methods, optim
from sdmp_train.config import METHODS, Config, ModelConfig
from sdmp_train.distributed import World
from sdmp_train.guard import StopRequest
from sdmp_train.log import Log
from sdmp_train.loop import Outcome, step, train
from sdmp_train.methods.method import Group
from sdmp_train.optim import make_optimizer

METHOD_FILES = sorted(
    path for path in Path(methods.__path__[0]).glob("*.py") if path.stem not in ("__init__", "method")
)


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


@pytest.mark.parametrize("kind", KINDS)
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
    moved = [name for name, tensor in all_tensors(training).items() if not torch.equal(after[name], tensor)]
    assert len(moved) > len(after) / 2
    assert all(v.isfinite().all() for v in all_tensors(training).values())


@pytest.mark.parametrize("arch", ["levit_128s", "swin_tiny_patch4_window7_224", "mobilenetv3_small_100"])
def test_architectures_with_buffers_that_autograd_keeps_are_trained(arch: str, tiny: Config):
    """Tables of relative positions are buffers too, beside the batch norms' of the heads."""
    config = replace(tiny, model=ModelConfig(arch=arch), optim=replace(tiny.optim, batch_size=2))
    training = build_training(config)
    log = Spy()
    assert run(training, 1, log) is Outcome.DONE
    assert not any("was not finite" in line for line in log.lines)


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
    promised |= {"data_wait_fraction", "time", "step_seconds", "memory_gib", "grad_norm", "lam_mean"}
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


def test_a_step_on_two_halves_is_the_step_on_the_whole(tiny_supervised: Config):
    """Without batch statistics, drop path and mixing between the halves: same gradient, same update."""
    config = replace(tiny_supervised, method=replace(tiny_supervised.method, drop_path=0.0, prob=0.0))
    half_batch = replace(config.optim, batch_size=4, base_lr=2 * config.optim.base_lr)
    whole, halves = build_training(config), build_training(replace(config, optim=half_batch))
    (batch,) = noise_batches(config, 1)
    parts = [
        replace(
            batch,
            views=(batch.views[0][rows],),
            ids=batch.ids[rows],
            labels=batch.labels[rows],
            valid=batch.valid[rows],
        )
        for rows in (slice(0, 4), slice(4, 8))
    ]
    whole.step = halves.step = 2
    one, two = step(whole, [batch], StopRequest()), step(halves, parts, StopRequest())
    assert whole.step == halves.step == 3
    assert whole.optimizer.param_groups[0]["lr"] == halves.optimizer.param_groups[0]["lr"] > 0
    torch.testing.assert_close(two.loss.total, one.loss.total)
    torch.testing.assert_close(two.loss.facts["top1"], one.loss.facts["top1"])
    torch.testing.assert_close(two.grad_norm, one.grad_norm)
    for (name, a), b in zip(whole.method.trained.named_parameters(), halves.method.trained.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_momentum_encoder_follows_once_a_step_however_many_batches(tiny: Config, monkeypatch):
    training, shares = build_training(tiny), []
    monkeypatch.setattr(training.method, "follow_student", shares.append)
    made = step(training, list(noise_batches(tiny, 3)), StopRequest())
    assert len(shares) == training.step == 1
    assert set(made.loss.terms) == {"clean", "source", "pair"}
    assert made.loss.total == pytest.approx(
        float(made.loss.terms["clean"] + (made.loss.terms["source"] + made.loss.terms["pair"]) / 2)
    )


def test_frozen_groups_and_clipping_are_part_of_the_step(tiny: Config, monkeypatch):
    """The norm that is logged is that of what is trained, before clipping; the gradient that is applied is shorter."""
    training = build_training(replace(tiny, optim=replace(tiny.optim, clip_grad=1e-3)))
    student = training.method.student
    groups = [Group(list(student.encoder.parameters()), from_epoch=1.0), Group(list(student.predictor.parameters()))]
    training.optimizer = make_optimizer(training.config.optim, groups)
    start = all_tensors(training)
    training.step = 3
    for batch in noise_batches(tiny, 2):
        made = step(training, [batch], StopRequest())
        norm = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)
        assert made.grad_norm > 2e-3
        frozen = all(
            torch.equal(start[f"student.{name}"], p)
            for name, p in student.named_parameters()
            if name.startswith("encoder")
        )
        assert frozen == (training.step == 4)
    assert not torch.equal(start["student.predictor.0.weight"], student.predictor[0].weight)


def test_no_generator_is_moved_by_a_step_and_layers_draw_from_seed_step_and_rank(tiny_supervised: Config):
    (batch,) = noise_batches(tiny_supervised, 1)

    def logits(seed: int, at: int, global_seed: int, rank: int = 0) -> torch.Tensor:
        config = replace(tiny_supervised, run=replace(tiny_supervised.run, seed=seed))
        training = build_training(config)
        training.world = World(torch.device("cpu"), rank, 1)
        training.step, method = at, training.method
        torch.manual_seed(global_seed)
        before, seen = torch.get_rng_state(), []
        honest, plan = method.encode, method.plan(at_step(0))
        method.plan = lambda at: plan
        method.encode = lambda images: seen.append(honest(images)) or seen[-1]
        method.classifier.load_state_dict(start)
        step(training, [batch], StopRequest())
        assert torch.equal(before, torch.get_rng_state())
        return seen[0].detach()

    start = build_training(tiny_supervised).method.classifier.state_dict()
    first = logits(0, 5, global_seed=1)
    assert torch.equal(first, logits(0, 5, global_seed=2))
    for other in (logits(1, 5, 1), logits(0, 6, 1), logits(0, 5, 1, rank=1)):
        assert not torch.equal(first, other)


def test_no_hidden_wait_for_the_device():
    """Words that make the host wait occur only where a line is written, a flag is read one step late, or in mix.png."""
    of_methods = [importlib.import_module(f"sdmp_train.methods.{path.stem}") for path in METHOD_FILES]
    allowed = {"meter.read", "guard.pop", "loop.train", "mixing.examples_of_rules"} | {
        f"{name}.example" for name in METHODS
    }
    waits = re.compile(r"\.(item|cpu|tolist|numpy)\(|\b(float|int|bool)\(\w*(loss|norm|bad|grad|share)")
    looked_at = set()
    for module in (loop, guard, meter, optim, *of_methods):
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
