"""Every setting of DINO moves something in a training, and every flag of its code's users reaches its setting."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import pytest
import torch
from tiny_runs import as_batch, build_training, random_views

from sdmp_train.cli import parse_pretrain
from sdmp_train.config import Config
from sdmp_train.guard import StopRequest
from sdmp_train.loop import step
from sdmp_train.methods.dino import DINOConfig

OTHER = {
    "out_dim": 32,
    "head_dim": 16,
    "bottleneck_dim": 8,
    "norm_last_layer": False,
    "use_bn_in_head": True,
    "student_temp": 0.2,
    "warmup_teacher_temp": 0.05,
    "teacher_temp": 0.06,
    "warmup_teacher_temp_epochs": 3,
    "momentum_teacher": 0.9,
    "center_momentum": 0.5,
    "freeze_last_layer": 0.5,
    "drop_path_rate": 0.25,
    "vit_start": "mocov3",
    "local_crops_number": 2,
    "local_px": 24,
    "global_crops_scale": (0.3, 1.0),
    "local_crops_scale": (0.1, 0.3),
    "mixing": "none",
    "rules": ("mixup",),
    "per": "sample",
    "alpha": 0.5,
    "shared_lam": True,
    "flip": "global",
    "source_weight": "static",
    "pair_weight": "static",
    "mix_weight": 0.5,
}
"""For each setting, a value that differs from the trial's."""

FLAGS = {
    "--out-dim 4096": ("out_dim", 4096),
    "--head-dim 512": ("head_dim", 512),
    "--bottleneck-dim 128": ("bottleneck_dim", 128),
    "--no-norm-last-layer": ("norm_last_layer", False),
    "--use-bn-in-head": ("use_bn_in_head", True),
    "--student-temp 0.2": ("student_temp", 0.2),
    "--warmup-teacher-temp 0.03": ("warmup_teacher_temp", 0.03),
    "--teacher-temp 0.07": ("teacher_temp", 0.07),
    "--warmup-teacher-temp-epochs 30": ("warmup_teacher_temp_epochs", 30),
    "--momentum-teacher 0.9995": ("momentum_teacher", 0.9995),
    "--center-momentum 0.8": ("center_momentum", 0.8),
    "--vit-start mocov3": ("vit_start", "mocov3"),
    "--freeze-last-layer 2": ("freeze_last_layer", 2.0),
    "--drop-path-rate 0.2": ("drop_path_rate", 0.2),
    "--local-crops-number 6": ("local_crops_number", 6),
    "--local-px 64": ("local_px", 64),
    "--global-crops-scale 0.25 1": ("global_crops_scale", (0.25, 1.0)),
    "--local-crops-scale 0.05 0.25": ("local_crops_scale", (0.05, 0.25)),
    "--mixing none": ("mixing", "none"),
    "--rules mixup cutmix": ("rules", ("mixup", "cutmix")),
    "--mix-per sample": ("per", "sample"),
    "--mix-alpha 0.5": ("alpha", 0.5),
    "--shared-lam": ("shared_lam", True),
    "--flip global": ("flip", "global"),
    "--source-weight static": ("source_weight", "static"),
    "--pair-weight static": ("pair_weight", "static"),
    "--mix-weight 0.5": ("mix_weight", 0.5),
}


def of(config: Config, **changes: object) -> Config:
    return replace(config, method=replace(config.method, **changes))


def trace(config: Config) -> str:
    """A digest of all that a short training did: views asked for, partners' scope, losses, and every tensor it left."""
    training = build_training(config, steps_per_epoch=1)
    found = hashlib.sha256(repr((training.method.views(training.at), training.method.partners_follow_ranks)).encode())
    for number in range(2):  # two epochs
        made = step(training, [as_batch(random_views(config, seed=number))], StopRequest())
        assert bool(made.loss.total.isfinite())
        found.update(made.loss.total.numpy().tobytes())
    for name, tensor in training.method.state.state_dict().items():
        found.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_no_setting_is_left_out_below() -> None:
    names = {field.name for field in fields(DINOConfig)}
    assert set(OTHER) == names
    assert {name for name, _ in FLAGS.values()} == names


@pytest.mark.slow
def test_every_setting_moves_something(tiny_dino: Config) -> None:
    config = of(tiny_dino, warmup_teacher_temp=0.02, warmup_teacher_temp_epochs=2)
    config = replace(config, optim=replace(config.optim, warmup_epochs=0))
    plain = trace(config)
    assert plain == trace(config), "the same settings do the same"
    traces = {name: trace(of(config, **{name: value})) for name, value in OTHER.items()}
    assert [name for name, found in traces.items() if found == plain] == []
    assert len(set(traces.values())) == len(traces), "no two settings do the same thing"


@pytest.mark.parametrize("words", FLAGS)
def test_flags_are_spelled_as_in_dinos_code(words: str) -> None:
    name, value = FLAGS[words]
    assert getattr(DINOConfig(), name) != value, "the default would prove nothing"
    found = parse_pretrain("pretrain", ["--method", "dino", *words.split()]).config.method
    assert found == replace(DINOConfig(), **{name: value})
