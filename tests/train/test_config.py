"""Settings are validated, named in errors with near matches, and survive YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sdmp_train.config import (
    Config,
    ConfigError,
    DataConfig,
    MixingConfig,
    OptimConfig,
    RunConfig,
    drift,
    from_dict,
    load_config,
    save_config,
    to_dict,
)
from sdmp_train.presets import presets


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: OptimConfig(batch_size=1), "batch_size"),
        (lambda: OptimConfig(epochs=10, warmup_epochs=40), "warmup_epochs"),
        (lambda: OptimConfig(base_lr=float("nan")), "lr"),
        (lambda: OptimConfig(base_lr=0.0), "lr"),
        (lambda: DataConfig(crop_min_frac=0.0), "crop_min"),
        (lambda: DataConfig(std=(0.2, 0.0, 0.2)), "std"),
        (lambda: DataConfig(image_px=4), "image_px"),
        (lambda: RunConfig(seed=-1), "seed"),
        (lambda: RunConfig(max_steps=0), "max_steps"),
        (lambda: MixingConfig(rules=()), "rules"),
        (lambda: MixingConfig(rules=("mixup", "mixup")), "rules"),
    ],
)
def test_a_wrong_value_is_refused_by_name(build, names):
    with pytest.raises(ConfigError, match=names):
        build()


def test_an_unknown_rule_gets_near_matches():
    with pytest.raises(ConfigError, match="Did you mean cutmix"):
        MixingConfig(rules=("cutmx",))


def test_effective_learning_rate_scales_with_the_global_batch():
    assert OptimConfig(base_lr=1.5e-4, batch_size=1024).lr == pytest.approx(6e-4)


@pytest.mark.parametrize("name", ["quickstart", "table5/cifar10-r50-sdmp", "table9/mocov3-vit_s-sdmp-extra"])
def test_yaml_round_trip(name: str, tmp_path: Path):
    config = presets()[name].config
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", Config()) == config


def test_yaml_overrides_only_what_it_names(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("optim: {base_lr: 1e-3, epochs: 400}\n")  # YAML reads 1e-3 as text
    config = load_config(tmp_path / "c.yaml", Config())
    assert (config.optim.base_lr, config.optim.epochs) == (1e-3, 400)
    assert replace(config, optim=Config().optim) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optm: {epochs: 3}", "unknown group 'optm'. Did you mean optim"),
        ("optim: {epoch: 3}", "unknown setting optim.epoch. Did you mean epochs"),
        ("optim: {epochs: many}", "optim.epochs is 'many'; expected int"),
        ("optim: {epochs: true}", "optim.epochs is True; expected int"),
        ("optim: {opt: adam}", "expected one of adamw, lars. Did you mean adamw"),
        ("optim: 3", "must hold names and values"),
        ("- a", "expected groups"),
        ("a: [", "cannot read"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, message: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml", Config())
    assert message in str(error.value)


def test_dictionaries_hold_only_what_yaml_knows():
    config = presets()["quickstart"].config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), Config()) == config


def test_drift_names_what_would_change_the_training_and_nothing_else():
    old = Config()
    new = replace(
        old,
        optim=replace(old.optim, base_lr=1.0),
        run=replace(old.run, log_every_steps=3, max_steps=5, seed=7),
        data=replace(old.data, workers=3, data="elsewhere"),
    )
    assert drift(old, old) == []
    assert drift(old, new) == ["optim.base_lr: 0.00015 -> 1.0", "run.seed: 0 -> 7"]
