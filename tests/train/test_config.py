"""Configurations survive YAML, also that of older versions; wrong names and values are refused with near matches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sdmp_train.config import (
    METHODS,
    Config,
    ConfigError,
    drift,
    from_dict,
    load_config,
    save_config,
    to_dict,
    with_method,
)
from sdmp_train.presets import presets


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


def test_every_method_survives_yaml_under_its_name(tmp_path: Path):
    for name, method in METHODS.items():
        config = Config(method=method.Config())
        assert (config.method_name, config.method_class) == (name, method)
        save_config(config, tmp_path / "config.yaml")
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["method"]["name"] == name
        assert load_config(tmp_path / "config.yaml", Config()) == config


def test_a_file_of_version_0_1_is_still_read(tmp_path: Path):
    """With a group `mixing`, the method's name in `method.method`, and the frozen patches in `model`."""
    (tmp_path / "c.yaml").write_text(
        "model: {arch: vit_small, stop_grad_conv1: false}\n"
        "method: {method: mocov3, dim: 128, mlp_dim: 512, momentum: 0.9, momentum_cosine: false, temperature: 0.1}\n"
        "mixing: {mixing: sdmp, variant: extra, rules: [cutmix], per: sample, alpha: 0.5, shared_lam: true,\n"
        "  source_weight: static, pair_weight: random, extra_weight: 0.25}\n"
    )
    config = load_config(tmp_path / "c.yaml", Config())
    expected = replace(
        Config().method,
        dim=128,
        mlp_dim=512,
        momentum=0.9,
        momentum_cosine=False,
        temperature=0.1,
        stop_grad_conv1=False,
        variant="extra",
        rules=("cutmix",),
        per="sample",
        alpha=0.5,
        shared_lam=True,
        source_weight="static",
        extra_weight=0.25,
    )
    assert config == replace(Config(), model=replace(Config().model, arch="vit_small"), method=expected)
    (tmp_path / "c.yaml").write_text("mixing: {mixing: none}\n")
    assert load_config(tmp_path / "c.yaml", Config()).method.mixing == "none"
    (tmp_path / "c.yaml").write_text("mixing: {mixng: none}\n")
    with pytest.raises(ConfigError, match=r"unknown setting method\.mixng\. Did you mean mixing"):
        load_config(tmp_path / "c.yaml", Config())


def test_an_unknown_method_gets_near_matches():
    with pytest.raises(ConfigError, match="Did you mean mocov3"):
        with_method(Config(), "mocov2")
    with pytest.raises(ConfigError, match=r"method is \['mocov3'\]"):
        from_dict({"method": {"name": ["mocov3"]}}, Config())
