"""Wheels are checked before they are installed."""

import json

import pytest

from bench import offline


@pytest.fixture
def folder(tmp_path):
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    wheel.write_bytes(b"not really a wheel")
    (tmp_path / offline.MANIFEST).write_text(json.dumps({wheel.name: offline.digest(wheel)}))
    return tmp_path


@pytest.fixture
def installed(monkeypatch):
    """The commands that would have been run."""
    commands = []

    class Done:
        returncode = 0

    monkeypatch.setattr(offline.subprocess, "run", lambda command: commands.append(command) or Done())
    return commands


def test_whole_wheels_are_installed_without_any_registry(folder, installed, tmp_path, capsys):
    assert offline.unpack(folder, tmp_path / "site") == 0
    assert "--no-index" in installed[0]
    assert installed[0][-1] == str(folder / "thing-1-py3-none-any.whl")
    assert "export PYTHONPATH=" in capsys.readouterr().out


def test_a_damaged_wheel_is_refused(folder, installed, capsys):
    (folder / "thing-1-py3-none-any.whl").write_bytes(b"something else")
    assert offline.unpack(folder, None) == 2
    assert installed == []
    assert "missing or damaged" in capsys.readouterr().out


def test_a_folder_that_was_not_packed_says_how_to_pack_it(tmp_path, capsys):
    assert offline.unpack(tmp_path, None) == 2
    assert "bench offline pack" in capsys.readouterr().out
