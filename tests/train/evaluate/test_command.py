"""Every protocol has settings in a file of its name, and one function in another."""

from __future__ import annotations

import dataclasses

import pytest

from sdmp_train.cli import main
from sdmp_train.evaluate.command import PROTOCOLS


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_owns_its_settings_and_one_function(name: str):
    settings = PROTOCOLS[name]
    assert dataclasses.is_dataclass(settings)
    assert settings.__dataclass_params__.frozen
    assert settings.__module__ == f"sdmp_train.evaluate.settings.{name}"
    assert settings.function().__module__ == f"sdmp_train.evaluate.{name}"
    assert {field.name for field in dataclasses.fields(settings)} >= {"run", "weights", "device"}


def test_help_lists_every_protocol(capsys):
    assert main(["eval", "--help"]) == 0
    printed = capsys.readouterr().out
    for name, settings in PROTOCOLS.items():
        assert f"  {name:12} {settings.__doc__.splitlines()[0]}" in printed


@pytest.mark.parametrize("name", PROTOCOLS)
def test_one_flag_style(name: str, capsys):
    """The backbone by position, --run or --weights; the images by --data; -b; and every flag has a text."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--run", "--weights", "--data", "--output", "--device", "--workers", "-j", "--batch-size", "-b"):
        assert flag in printed, flag
    assert "The same as --run" in printed
