"""A file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdmp_train.durable import draft_of, remove_leftovers, replacing, write_durably


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_durably(path, "first")
    with replacing(path) as draft:
        draft.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_former_file_and_no_draft(error: type[BaseException], tmp_path: Path):
    path = tmp_path / "a.txt"
    write_durably(path, "first")

    def fail():
        with replacing(path) as draft:
            draft.write_text("sec")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_taken_away_by_name(tmp_path: Path):
    for name in ("a.txt.tmp-1", "b.txt.tmp-1", "a.txt.tmp-x"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt.tmp-2").mkdir()
    assert remove_leftovers(tmp_path, r"a\.txt") == ["a.txt.tmp-1", "a.txt.tmp-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt.tmp-x", "b.txt.tmp-1"]
    assert draft_of(tmp_path / "a.txt").name.startswith("a.txt.tmp-")
    assert remove_leftovers(tmp_path / "none", "a") == []
