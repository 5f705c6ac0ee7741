"""Configurations survive YAML, also that of older versions; wrong names and values are refused with near matches."""

from __future__ import annotations

import itertools
import os
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
        ("optim: {opt: adam}", "expected one of adamw, lars, sgd. Did you mean adamw"),
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


DEEP = "optim: " + "[" * 5000 + "]" * 5000
BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION, "anchors and aliases"),
        ("optim: &x {epochs: 3}", "anchors and aliases"),
        ("optim: {epochs: *x}", "anchors and aliases"),
        (DEEP, "nested deeper than 8"),
        ("optim: {epochs: !!int ''}", "tags"),
        ("optim: {epochs: !!python/object/apply:os.system ['true']}", "tags"),
        ("optim: !custom {epochs: 3}", "tags"),
        ("run: {preset: !!binary '****'}", "tags"),
        ("run: {preset: 2021-13-45}", "cannot read"),
        ("run: {preset: 2021-12-01}", "expected str"),
        ("optim: {epochs: " + "9" * 5000 + "}", "cannot read"),
        ("optim: {epochs: 0x" + "f" * 5000 + "}", "optim.epochs is a int too large to print"),
        ("optim: {epochs: 0b_}", "cannot read"),
        ("optim: {base_lr: " + "9" * 4000 + "}", "optim.base_lr is "),
        ("optim: {base_lr: .inf}", "lr is inf"),
        ("optim: {epochs: 99999999999999999999}", "optim.epochs is 99999999999999999999"),
        ("? [a, b]\n: 3", "cannot read"),
        ("? 0x" + "f" * 5000 + "\n: 3", "unknown group a int too large"),
        ("optim:\n  ? 0x" + "f" * 5000 + "\n  : 3", "unknown setting optim.a int"),
        ('data: {data: "a\\0b"}', "data.data is"),
        ("mixing: {rules: [" + "mixup, " * 5000 + "]}", "rules is"),
        ("mixing: {rules: [" + "x" * 50000 + "]}", "rules is"),
        ("x" * 60000, "expected groups"),
        ("[]", "expected groups"),
        ("0", "expected groups"),
        ("\ufeff\x07", "cannot read"),
        ("#" * 70000, "larger than 65536 bytes"),
    ],
)
def test_a_hostile_file_is_refused_in_one_short_line(text: str, message: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml", Config())
    assert message in str(error.value)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"data: {data: caf\xe9}")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/stdin"), tmp_path, tmp_path / "latin"):
        with pytest.raises(ConfigError, match="cannot read the config file"):
            load_config(path, Config())


def test_an_empty_file_changes_nothing_and_odd_paths_survive(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml", Config()) == Config()
    for name in ("caf\u00e9", "two\nlines", "caf\udce9"):
        config = replace(Config(), data=replace(Config().data, data=name))
        save_config(config, tmp_path / "c.yaml")
        assert load_config(tmp_path / "c.yaml", Config()) == config


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
    for name, settings in METHODS.items():
        config = Config(method=settings())
        assert (config.method_name, config.method_class) == (name, settings.method_class())
        assert settings.method_class().Config is settings
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
