"""Which folder is taken for which split, and what is refused as ambiguous."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdmp_train.data import DataError, find_splits, open_folder


def make(root: Path, *names: str) -> Path:
    """Empty files, or folders for names that end in a slash: only names are looked at."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def classes(*splits: str) -> list[str]:
    return [f"{split}/{name}/1.jpg" for split in splits for name in ("a", "b")]


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "train2017", "train_set", "train-images"])
@pytest.mark.parametrize(
    "test", ["val", "valid", "Validation", "dev", "eval", "TEST", "testing", "val2017", "test_set"]
)
def test_usual_spellings(tmp_path: Path, train: str, test: str) -> None:
    layout = find_splits(make(tmp_path, *classes(train, test)))
    assert layout.train == tmp_path / train
    assert layout.test == tmp_path / test


def read(root: Path) -> tuple[str, str | None]:
    layout = find_splits(root)
    return layout.train.name if layout.train != root else "", layout.test.name if layout.test else None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/1.jpg", "b/1.jpg"], ("", None)),
        (["bus/1.jpg", "car/1.jpg", "train/1.jpg"], ("", None)),
        (["bus/1.jpg", "car/1.jpg", "test/1.jpg"], ("", None)),
        ([*classes("train")], ("train", None)),
        ([*classes("train"), "annotations/1.xml", "readme.md"], ("train", None)),
        ([*classes("train"), "holdout/a/1.jpg"], ("train", None)),
        ([*classes("train", "val"), "test/1.jpg"], ("train", "val")),
        ([*classes("train", "val"), "unlabeled/1.jpg"], ("train", "val")),
        (["train/1.jpg", "test/1.jpg"], ("train", "test")),
        ([*classes("train"), "val/"], ("train", "val")),
        ([*classes("train", "validation"), "val/"], ("train", "validation")),
        ([*classes("train", "val"), "Train/notes.txt"], ("train", "val")),
        (["trainers/1.jpg", "tests of strength/1.jpg", "valley/1.jpg"], ("", None)),
    ],
)
def test_readings(tmp_path: Path, names: list[str], expected: tuple[str, str | None]) -> None:
    assert read(make(tmp_path, *names)) == expected


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (classes("train", "Train"), "Train/, train/"),
        (classes("train", "training", "val"), "train/, training/, val/"),
        (classes("train", "val", "valid"), "val/, valid/"),
        (["train/1.jpg", "bus/1.jpg"], "bus/, train/"),
        (["train/1.jpg", "test/1.jpg", "bus/1.jpg", "car/1.jpg"], "bus/, car/, test/, train/"),
        (["a/1.jpg", "b/1.jpg", *classes("val")], "a/, b/, val/"),
        (classes("val", "test"), "test/, val/"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path: Path, names: list[str], found: str) -> None:
    with pytest.raises(DataError, match=rf"holds {found}: it is not clear.*--data .*--test-data"):
        find_splits(make(tmp_path, *names))


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    root = make(tmp_path, *classes("train", "val", "test"), "holdout/a/1.jpg")
    assert "test/, holdout/ beside it not used" in find_splits(root).why
    assert "looked for val" in find_splits(root / "train").why
    flat = make(tmp_path / "flat", "bus/1.jpg", "car/1.jpg", "train/1.jpg")
    assert "train/ counts as a class, as bus/, car/" in find_splits(flat).why


def test_run_folders_are_no_classes_beside_a_split(tmp_path: Path) -> None:
    root = make(tmp_path, *classes("train", "val"), "runs/1/.sdmp-run.json", "runs/1/mix.png", "out/.sdmp-run.json")
    assert find_splits(root).why == f"the test split of {root}"


def test_a_linked_folder_that_leads_back_is_looked_at_once(tmp_path: Path) -> None:
    root = make(tmp_path, *classes("train"), "other/notes.txt")
    (root / "other" / "back").symlink_to(root / "other")
    assert read(root) == ("train", None)


def test_a_folder_without_a_test_split_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none of the folders val, validation, test"):
        open_folder(make(tmp_path, "a/1.jpg"), split="val", cache_dir=tmp_path / ".cache")
