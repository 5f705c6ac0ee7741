"""Every protocol is a file with settings of its own and one function."""

from __future__ import annotations

import dataclasses

import pytest

from sdmp_train.evaluate.command import PROTOCOLS


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_owns_its_settings_and_one_function(name: str):
    settings, evaluate = PROTOCOLS[name]
    assert dataclasses.is_dataclass(settings)
    assert settings.__dataclass_params__.frozen
    assert settings.__module__ == evaluate.__module__ == f"sdmp_train.evaluate.{name}"
    assert {field.name for field in dataclasses.fields(settings)} >= {"run", "weights", "device"}
