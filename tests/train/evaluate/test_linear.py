"""Linear evaluation: heads against plain ones trained alone, recipes, folders, stops and resumptions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from subjects import DEEP_VIT, RESNET, export, results, run_lines
from tiny_runs import as_batch, random_views
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from sdmp_train.config import Config, ConfigError, OptimConfig
from sdmp_train.distributed import World
from sdmp_train.evaluate import fitting
from sdmp_train.evaluate.features import feature_maker
from sdmp_train.evaluate.linear import RECIPES, LinearConfig, LinearProbe, evaluate_linear, features_of
from sdmp_train.export import load_exported
from sdmp_train.loop import step
from sdmp_train.models import build_backbone
from sdmp_train.stop import Stopped, StopRequest
from sdmp_train.training import Training, assemble
from sdmp_train.weights import weights_digest

CPU = World(torch.device("cpu"))
RATES = (0.1, 3.0, 30.0)


def probe(tiny: Config, config: LinearConfig) -> Training:
    """The training that `config` means on a small ViT: two epochs of four steps of eight images."""
    backbone = build_backbone(DEEP_VIT, 32, seed=0)
    optim = OptimConfig(opt="sgd", base_lr=max(config.rates), weight_decay=0, epochs=2, warmup_epochs=0, batch_size=8)
    return assemble(
        replace(tiny, optim=optim),
        CPU,
        steps_per_epoch=4,
        classes=3,
        method_class=lambda _config, _build, setup: LinearProbe(config, backbone, setup),
    )


@pytest.mark.parametrize("batch_norm", [False, True])
def test_each_head_is_trained_as_it_would_be_alone(tiny: Config, batch_norm: bool):
    """In float64, by torch's own cross-entropy and SGD, one head at a time."""
    config = LinearConfig(lr=RATES, features="last4", batch_norm=batch_norm)
    training = probe(tiny, config)
    heads = training.method.heads
    start = [(w.detach().double(), b.detach().double()) for w, b in zip(heads.weights, heads.biases, strict=True)]
    batches = [as_batch(random_views(tiny, 1, seed=number)) for number in range(6)]
    for batch in batches:
        step(training, [batch], StopRequest())
    read, _ = feature_maker(training.method.backbone, "last4")
    for number, (rate, (weight, bias)) in enumerate(zip(RATES, start, strict=True)):
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
        for at, batch in enumerate(batches):
            with torch.no_grad():
                features = read(training.method.mix(batch, None)).double()
            if batch_norm:
                features = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
            optimizer.param_groups[0]["lr"] = rate * 8 / 256 * 0.5 * (1 + math.cos(math.pi * at / 8))
            optimizer.zero_grad()
            cross_entropy(features @ weight.T + bias, batch.labels).backward()
            optimizer.step()
        torch.testing.assert_close(heads.weights[number].double(), weight, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(heads.biases[number].double(), bias, rtol=2e-4, atol=2e-4)
    moved = [float((w.detach() - s[0]).norm()) for w, s in zip(heads.weights, start, strict=True)]
    assert 0 < moved[0] < moved[1] < moved[2]


class Pooled(nn.Module):
    """(N, 3, H, W) -> the mean of each channel in the four quarters, times 10: features that no plane separates."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 10 * adaptive_avg_pool2d(images, 2).flatten(1)


def test_a_head_trained_for_long_is_scikit_learns_logistic_regression(tiny: Config):
    """Without regularisation, on the same features: the optimum of the same convex problem."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    config = LinearConfig(lr=(0.5, 1.0), batch_norm=True)
    optim = OptimConfig(opt="sgd", base_lr=1.0, weight_decay=0, epochs=200, warmup_epochs=0, batch_size=96)
    training = assemble(
        replace(tiny, optim=optim),
        CPU,
        steps_per_epoch=1,
        classes=3,
        method_class=lambda _config, _build, setup: LinearProbe(config, Pooled(), setup),
    )
    batch = as_batch(random_views(replace(tiny, optim=optim), 1))
    for _ in range(200):
        step(training, [batch], StopRequest())
    features = training.method.features(training.method.mix(batch, None))
    rows = features.double().numpy()
    rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-6)
    model = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
    theirs = model.fit(rows, batch.labels.numpy()).predict_proba(rows)
    for scores in training.method.heads(features).detach().unbind(1):
        np.testing.assert_allclose(scores.softmax(1).numpy(), theirs, atol=2e-3)
    assert 0.4 < (theirs.argmax(1) == batch.labels.numpy()).mean() < 1  # a plane helps, and does not separate


def test_the_backbone_stays_as_it_is_and_no_gradient_reaches_it(tiny: Config):
    training = probe(tiny, LinearConfig(lr=RATES, batch_norm=True))
    before = weights_digest(training.method.backbone)
    for number in range(3):
        step(training, [as_batch(random_views(tiny, 1, seed=number))], StopRequest())
    assert weights_digest(training.method.backbone) == before
    assert all(p.grad is None for p in training.method.backbone.parameters())
    assert not training.method.backbone.training
    assert set(training.method.state) == {"heads"}  # checkpoints need no backbone


def test_recipes_are_those_of_the_papers(tiny: Config):
    narrow, wide = (build_backbone(replace(DEEP_VIT, width=width), 32, seed=0) for width in (32, 768))
    moco, dino = LinearConfig(), LinearConfig(recipe="dino")
    assert (features_of(moco, narrow), features_of(moco, wide)) == ("output", "output")
    assert (features_of(dino, narrow), features_of(dino, wide)) == ("last4", "output+mean")
    assert features_of(replace(dino, features="mean"), wide) == "mean"
    assert (RECIPES["mocov3"].epochs, RECIPES["dino"].epochs) == (90, 100)
    assert {3.0, 0.1} <= set(moco.rates) and 0.001 in dino.rates
    assert {recipe.batch_size for recipe in RECIPES.values()} == {1024}
    view = probe(tiny, dino).method.views(None)[0]
    assert (view.interpolation, view.scale, view.flip_prob) == ("bicubic", (0.08, 1.0), 0.5)


def settings(tiny: Config, tmp_path: Path, **changes) -> LinearConfig:
    """Two epochs of three steps on the tiny images, in `tmp_path/out`."""
    weights = tmp_path / "net"
    if not weights.exists():
        export(tiny, weights)
    given = {"weights": str(weights), "data": tiny.data.data, "output": str(tmp_path / "out"), "lr": (0.1, 1.0)}
    options = {"epochs": 2, "batch_size": 8, "device": "cpu", "workers": 0, "loader": "torchvision"}
    return LinearConfig(**{**given, **options, "log_every_steps": 1, **changes})


def test_what_is_printed_is_returned_and_kept(tiny: Config, tmp_path: Path, capsys):
    found = evaluate_linear(settings(tiny, tmp_path, batch_size=None))
    (row,) = results(tmp_path / "out")
    assert row["protocol"] == "linear" and row["weights"].endswith("net") and len(row["weights_sha256"]) == 64
    assert {name: row[name] for name in found} == found
    assert (found["test_images"], found["train_images"]) == (7, 29)
    assert found["top1"] == max(head["top1"] for head in found["sweep"])
    printed = capsys.readouterr().out
    assert "the lowest of 2 cross-entropies" in printed and "chance level 1.099" in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == min(line["loss_lr_0.1"], line["loss_lr_1"]) for line in lines)
    assert "batch    1,024 -> 29: there are 29 images to train on; the learning rate peaks at 1 x 29 / 256" in printed
    for head in found["sweep"]:
        assert f"linear {head['top1']:7.2%} top-1" in printed
    with pytest.raises(ConfigError, match=r"holds a training already; --resume .*--output OTHER"):
        evaluate_linear(settings(tiny, tmp_path, batch_size=None))
    assert evaluate_linear(settings(tiny, tmp_path, batch_size=None, resume=True)) == found  # measured again
    assert len(results(tmp_path / "out")) == 2


@pytest.mark.parametrize(("features", "batch_norm"), [("output", False), ("output", True), ("last4", False)])
def test_the_best_classifier_is_used_as_printed(features, batch_norm: bool, tiny: Config, tmp_path: Path, capsys):
    """Of the features that timm's model gives by itself; the norm's statistics are worked into the last layer."""
    export(tiny, tmp_path / "net", DEEP_VIT)
    config = settings(tiny, tmp_path, features=features, batch_norm=batch_norm, lr=(0.5, 30.0))
    found = evaluate_linear(config)
    printed = capsys.readouterr().out
    assert ("exported" in found) == (tmp_path / "out" / "exported").exists() == (features == "output")
    if features != "output":
        return
    assert run_lines(printed, capsys) in ("bars", "checks", "dots")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out' / 'exported'}", pretrained=True).eval()
    assert loaded.default_cfg["interpolation"] == "bilinear" and loaded.num_classes == 3
    parts = load_file(tmp_path / "out" / "checkpoints" / "step-000006" / "heads.safetensors")
    images = torch.randn(4, 3, 32, 32)
    features = load_exported(tmp_path / "net")[0](images)
    if batch_norm:
        features = (features - parts["norm.running_mean"]) / (parts["norm.running_var"] + 1e-6).sqrt()
    best = (0.5, 30.0).index(found["lr"])
    expected = features @ parts[f"weights.{best}"].T + parts[f"biases.{best}"]
    torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4)


def test_a_stopped_evaluation_goes_on_to_the_same_bits(tiny: Config, tmp_path: Path, monkeypatch):
    plain = evaluate_linear(settings(tiny, tmp_path, batch_norm=True))
    whole = (tmp_path / "out" / "checkpoints" / "step-000006" / "heads.safetensors").read_bytes()
    train = fitting.train

    def stopping(training, loader, log, stop, after_step):
        def after(training):
            after_step(training)
            stop.asked = stop.asked or training.step == 2

        return train(training, loader, log, stop, after)

    halved = settings(tiny, tmp_path, batch_norm=True, output=str(tmp_path / "halved"))
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "train", stopping)
        with pytest.raises(Stopped):
            evaluate_linear(halved)
    (saved,) = (tmp_path / "halved" / "checkpoints").glob("step-*")
    assert saved.name != "step-000006" and not (tmp_path / "halved" / "evaluations.jsonl").exists()
    with pytest.raises(ConfigError, match=r"lr: .* changed"):
        evaluate_linear(replace(halved, resume=True, lr=(0.1, 2.0)))
    other = export(tiny, tmp_path / "other", RESNET)
    with pytest.raises(ConfigError, match="weights"):
        evaluate_linear(replace(halved, resume=True, weights=other))
    again = evaluate_linear(replace(halved, resume=True))
    assert (tmp_path / "halved" / "checkpoints" / "step-000006" / "heads.safetensors").read_bytes() == whole
    assert again["sweep"] == plain["sweep"]


def test_a_stop_is_heard_while_the_images_are_looked_at(tiny: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(StopRequest, "check", lambda self, *_: (_ for _ in ()).throw(Stopped("asked")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing is remembered of them
    with pytest.raises(Stopped):
        evaluate_linear(settings(tiny, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": ()}, "lr is "),
        ({"lr": (0.1, 0.1)}, "lr is "),
        ({"lr": (0.0,)}, "lr is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"crop_min": 0.0}, "crop_min is 0"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"run": "a", "weights": "b"}, "more than one backbone"),
        ({"save_every_minutes": 0.0}, "save_every_minutes is 0"),
    ],
)
def test_settings_are_checked_before_anything_is_read(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LinearConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": None}, "output is missing"),
        ({"batch_size": 64}, "batch_size is 64; expected at most the 29 images"),
        ({"features": "last4"}, "the backbone has 2 blocks; expected at least 4, or give --features output"),
        ({"data": None}, "data is missing"),
        ({"weights": None}, "eval linear needs a backbone"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    tiny: Config, tmp_path: Path, changes: dict, message: str
):
    with pytest.raises(ConfigError, match=message):
        evaluate_linear(settings(tiny, tmp_path, **changes))
    assert not (tmp_path / "out").exists()
