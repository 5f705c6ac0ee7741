"""What a training is made of: its state in parts, the place of its backbone, what a step can take back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, Spy, build_training, noise_batches
from torch import nn

from sdmp_train.commands import export_checkpoint, pretrain
from sdmp_train.config import METHODS, Config, ConfigError
from sdmp_train.evaluate.knn import uncompiled
from sdmp_train.export import load_exported
from sdmp_train.guard import StopRequest
from sdmp_train.loop import step, train
from sdmp_train.training import backbone_place, memory_bytes, state_parts


@pytest.mark.parametrize("name", METHODS)
def test_parts_follow_the_methods_state_and_hold_the_backbone(name: str, request):
    training = build_training(request.getfixturevalue(TINY[name]))
    assert training.config.method_name == name
    step(training, list(noise_batches(training.config, 1)), StopRequest())
    parts = state_parts(training)
    assert [*training.method.state, "optim"] == list(parts)
    names = {name.partition("/")[2] for name in parts["optim"]}
    assert names == {name for name, p in training.method.trained.named_parameters() if p.requires_grad}
    part, _, place = backbone_place(training.method).partition(".")
    for tensor_name, tensor in training.method.backbone.state_dict().items():
        assert parts[part][f"{place}.{tensor_name}"].data_ptr() == tensor.data_ptr()


def test_memory_counts_weights_gradients_and_moments(tiny: Config):
    training = build_training(tiny)
    student = list(training.method.student.parameters())
    trained = sum(p.numel() for p in student if p.requires_grad)
    held = sum(p.numel() for p in [*student, *training.method.momentum_encoder.parameters()])
    assert memory_bytes(training) == 4 * (held + 3 * trained)


def test_buffers_can_be_taken_back_within_the_block_alone(tiny_resnet: Config):
    training = build_training(tiny_resnet)
    norm = training.method.backbone.bn1
    with training.undoable():
        norm.running_mean.fill_(7.0)
        training.undo_buffers(torch.tensor(False))
        assert norm.running_mean.eq(7.0).all()
        training.undo_buffers(torch.tensor(True))
        assert norm.running_mean.eq(0.0).all()
    assert training.buffers._kept == []


@pytest.mark.parametrize("kind", TINY.values())
def test_a_checkpoint_is_exported_as_the_run_exports_it(kind: str, tmp_path: Path, request):
    config = request.getfixturevalue(kind)
    assert pretrain(config, tmp_path / "run") == 0
    assert export_checkpoint(tmp_path / "run", None, tmp_path / "again") == 0
    (first, told), (second, _) = (load_exported(path) for path in (tmp_path / "run" / "exported", tmp_path / "again"))
    assert told["pretraining"]["method"] == config.method_name
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_checkpoint_of_other_parts_is_refused_by_name(tiny: Config, tmp_path: Path, monkeypatch):
    """As version 0.1 wrote them: `model` and `ema`, and no word of where the backbone is."""
    with monkeypatch.context() as patch:
        patch.setattr("sdmp_train.saver.state_parts", as_version_0_1)
        patch.setattr("sdmp_train.run.backbone_place", lambda method: None)
        assert pretrain(tiny, tmp_path / "run") == 0
    for state in (tmp_path / "run" / "checkpoints").glob("step-*/state.json"):
        assert json.loads(state.read_text())["backbone"] is None
    with pytest.raises(
        ConfigError, match="holds the parts ema, model, optim; expected momentum_encoder, optim, student"
    ):
        pretrain(tiny, tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="does not say where its backbone is"):
        export_checkpoint(tmp_path / "run", None, tmp_path / "again")


def as_version_0_1(training):
    parts = state_parts(training)
    return {"model": parts["student"], "ema": parts["momentum_encoder"], "optim": parts["optim"]}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_backbones_train_alike(tiny: Config, backend: str, monkeypatch: pytest.MonkeyPatch):
    """By the names and numbers of a run that is not compiled, to float32's rounding; "eager" traces and no more.

    By SGD: some biases have no gradient but for rounding, of which AdamW would make whole steps.
    """
    tiny = replace(tiny, optim=replace(tiny.optim, opt="sgd"))
    compiled = nn.Module.compile
    asked = []

    def noted(module, **options):
        asked.append(module)
        compiled(module, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", noted)
    losses, ends = [], []
    for run in (tiny.run, replace(tiny.run, compile=True)):
        log = Spy()
        training = build_training(replace(tiny, run=replace(run, max_steps=2)))
        train(training, noise_batches(tiny, 2), log, StopRequest(), lambda _: None)
        losses.append([row["loss"] for row in log.numbers])
        ends.append(training.method.state.state_dict())
    assert [id(module) for module in asked] == [id(module) for module in training.method.backbones]
    assert len(asked) == 2 and all(module._compiled_call_impl is not None for module in asked)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-4)


def test_a_measurement_runs_a_compiled_backbone_as_it_is_written():
    module = nn.Linear(2, 2)
    with uncompiled(module), uncompiled(None):
        assert not torch.compiler.is_compiling()
    ran = []
    module.compile(backend=lambda graph, inputs: (ran.append(graph), graph.forward)[1])
    with uncompiled(module):
        module(torch.zeros(1, 2))
    assert not ran
    module(torch.zeros(1, 2))
    assert ran
