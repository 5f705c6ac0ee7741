"""Commands that are printed work when they are pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdmp_train import advice


def put(folder: Path, name: str, target: Path | None = None) -> Path:
    """A program in a folder: a link, or a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if target is not None:
        path.symlink_to(target)
    else:
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    return path


@pytest.mark.parametrize("case", ["the same", "another", "none", "another environment's link to one Python"])
def test_which_python_is_meant_is_said_where_it_is_another(case: str, tmp_path: Path, monkeypatch):
    base = put(tmp_path / "base", "python3.12")
    own = put(tmp_path / "my env" / "bin", "python3", base)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if case == "the same":
        put(own.parent, "python", base)
        elsewhere = own.parent
    elif case == "another":
        put(elsewhere, "python")
    elif case != "none":
        put(elsewhere, "python", base)
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.setenv("PATH", str(elsewhere))
    assert advice.command("sdmp_train", "report", "a b") == "python -m sdmp_train report 'a b'"
    assert advice.python() == ("python" if case == "the same" else f"'{own}'")
    assert advice.elsewhere() == ([] if case == "the same" else [f"`python` is here '{own}'"])
    activate = put(own.parent, "activate")
    assert advice.elsewhere() == ([] if case == "the same" else [f"`python` is here '{own}': source '{activate}'"])


def test_a_clone_is_installed_from_where_it_lies(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(advice, "SOURCES", tmp_path)
    assert advice.install("train") == "pip install 'sdmp-kernels[train]'"
    assert advice.install() == "pip install sdmp-kernels"
    (tmp_path / "pyproject.toml").touch()
    assert advice.install("train") == f"{advice.python()} -m pip install -e '{tmp_path}[train]'"
    assert advice.own_environment("sdmp_train") == ""
    installed = put(tmp_path / ".venv" / "bin", "python")
    assert f"{installed} -m sdmp_train" in advice.own_environment("sdmp_train")
    monkeypatch.chdir(tmp_path)
    assert advice.install("train") == f"{advice.python()} -m pip install -e '.[train]'"


@pytest.mark.parametrize("words", [["bench", "env"], ["sdmp_kernels"], ["sdmp_train"]])
def test_without_torch_a_program_says_so_in_a_line(words: list[str]):
    done = subprocess.run(
        [sys.executable, "-S", "-m", *words],  # without site-packages
        cwd=advice.SOURCES,
        env={**os.environ, "PYTHONPATH": str(advice.SOURCES)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    said = f"error: (torch|tyro) is not installed, which {words[0]} needs: .* -m pip install -e .*"
    assert re.fullmatch(said, done.stderr.rstrip("\n")), done.stderr


PROGRAMS = [["sdmp_train", "--help"], ["bench", "--help"], ["sdmp_kernels"], ["sdmp_kernels.timm", "--help"]]


@pytest.mark.parametrize("words", PROGRAMS, ids=" ".join)
def test_a_reader_that_has_read_enough_is_no_traceback(words: list[str]):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", *words], cwd=advice.SOURCES, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
