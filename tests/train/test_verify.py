"""`verify`: what it finds, remembers and prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from sdmp_train.cli import main
from sdmp_train.data import open_folder
from sdmp_train.data.index import ROTTED
from sdmp_train.verify import verify_data


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two splits, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, names in (("train", "ab"), ("val", "ab")):
        for name in names:
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20 + i, 16), (10 * i, 0, 0)).save(tmp_path / "set" / split / name / f"{i}.png")
    return tmp_path / "set"


def test_splits_are_splits_and_training_reads_what_was_found(
    cached: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify_data(str(cached)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert [line.split(",")[0] for line in lines if "images," in line] == ["train: 6 images", "test: 6 images"]
    assert "         3  a" in lines and lines[-1] == "every image decodes"
    monkeypatch.setattr("sdmp_train.data.index._check_file", lambda *_: pytest.fail("it is known"))
    assert len(open_folder(cached, check="decode")) == 6


def test_a_bit_that_flips_without_a_trace_is_found_again_and_again(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No decoder minds a BMP's pixels."""
    path = cached / "train" / "a" / "0.bmp"
    Image.new("RGB", (20, 16), "red").save(path)
    assert main(["verify", str(cached)]) == 0
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        capsys.readouterr()
        assert main(["verify", str(cached), "--bad-list", str(tmp_path / "bad.tsv")]) == 2
        printed = capsys.readouterr()
        assert ROTTED in printed.err and "0.bmp" in printed.err
        assert f"1 bad file is listed in {tmp_path / 'bad.tsv'}" in printed.out
        assert (tmp_path / "bad.tsv").read_text() == f"{str(path)!r}\t{ROTTED}\n"
    path.touch()  # somebody has changed it, and says so
    assert main(["verify", str(cached)]) == 0


def test_many_bad_files_fit_on_a_screen_and_all_are_in_the_list(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(50):
        (cached / "val" / "b" / f"bad{i}.png").write_bytes(b"\x89PNG")
    assert main(["verify", str(cached), "--bad-list", str(tmp_path / "bad.tsv")]) == 2
    printed = capsys.readouterr()
    assert len((printed.out + printed.err).splitlines()) <= 24
    assert len((tmp_path / "bad.tsv").read_text().splitlines()) == 50


def test_splits_that_cannot_be_told_apart(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cached / "Train").mkdir()
    Image.new("RGB", (9, 9)).save(cached / "Train" / "x.png")
    verify_data(str(cached))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("splits are not told apart") and lines[1].startswith("13 images")


def test_why_there_are_no_classes(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 16)).save(cached / "train" / "x.png")
    assert verify_data(str(cached / "train")) == 0
    assert "  1 of 7 images in no class folder, such as x.png; " in capsys.readouterr().out
