"""Image folders as Hugging Face's `datasets` has them: classes from metadata.csv and metadata.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdmp_train.config import Config, DataConfig
from sdmp_train.data import DataError, Index, open_folder
from sdmp_train.splits import open_images

LABELS = {"a.png": "cat", "b.png": "dog", "c.png": "cat", "x/d.png": "dog"}


def write(root: Path, labels: dict[str, object], kind: str, within: str = "", listed: Path | None = None) -> None:
    """Images, and beside them (or in `listed`) what names their classes; `within` stands before the names there."""
    for number, name in enumerate(labels):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(root / name)
    rows = [{"file_name": within + name, "text": 'a "b", c\nd', "label": label} for name, label in labels.items()]
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = "text,label,file_name\r\n" + "".join(f'"a ""b"", c\nd",{r["label"]},{r["file_name"]}\r\n' for r in rows)
    ((listed or root) / f"metadata.{kind}").write_text(text, encoding="utf-8")


def classes(index: Index) -> dict[str, str]:
    return {name: index.classes[label] for name, label in zip(index.paths, index.labels.tolist(), strict=True)}


def opened(root: Path, tmp_path: Path, **options: object) -> Index:
    return open_folder(root, cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_classes_beside_the_images(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "set", LABELS, kind)
    index = opened(tmp_path / "set", tmp_path)
    assert classes(index) == LABELS and index.classes == ("cat", "dog")
    assert index.notes == (f"classes read from {tmp_path}/set/metadata.{kind}",)


@pytest.mark.parametrize("beside", [False, True])
def test_splits_with_a_file_each_or_one_above(tmp_path: Path, beside: bool) -> None:
    numbers = {"a.png": 10, "b.png": 9, "c.png": 10}
    for split in ("train", "test"):
        write(
            tmp_path / "set" / split,
            numbers,
            "jsonl",
            f"{split}/" if beside else "",
            tmp_path / "set" if beside else None,
        )
        if beside:  # one file for both
            (tmp_path / "set" / "metadata.jsonl").rename(tmp_path / split)
    if beside:
        (tmp_path / "set" / "metadata.jsonl").write_text(
            (tmp_path / "train").read_text() + (tmp_path / "test").read_text()
        )
    config = Config(data=DataConfig(data=str(tmp_path / "set")))
    train, test = open_images(
        Config(data=config.data, optim=type(config.optim)(batch_size=2, epochs=1, warmup_epochs=0))
    )
    assert train.classes == ("9", "10") and train.labels.tolist() == [1, 0, 1]
    assert test is not None and test.labels.tolist() == [1, 0, 1]


def test_numbers_in_a_class_folder_tree_go_before_the_folders(tmp_path: Path) -> None:
    write(tmp_path / "set", {"x/a.png": "p", "x/b.png": "q", "y/c.png": "q"}, "csv")
    assert opened(tmp_path / "set", tmp_path).classes == ("p", "q")


def test_labels_that_are_not_there(tmp_path: Path) -> None:
    """Captions alone change nothing; a label for some images only is said, and not used."""
    write(tmp_path / "set", {"x/a.png": "", "y/b.png": ""}, "csv")
    assert opened(tmp_path / "set", tmp_path).classes == ("x", "y")
    write(tmp_path / "set", {"x/a.png": "p", "y/b.png": ""}, "csv")
    index = opened(tmp_path / "set", tmp_path)
    assert index.classes == ("x", "y")
    assert index.notes[-1] == "metadata.csv not used: it has no label for 1 of 2 files"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"file_name": "a.png", "label": [1]}\n', "the label of 'a.png' is no class"),
        ("[1]\n", "no object"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path / "set", LABELS, "jsonl")
    (tmp_path / "set" / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match=rf"metadata\.jsonl cannot be read: .*{said}"):
        opened(tmp_path / "set", tmp_path)


def test_a_file_of_other_columns_is_none(tmp_path: Path) -> None:
    write(tmp_path / "set", {"x/a.png": "p", "y/b.png": "q"}, "csv")
    (tmp_path / "set" / "metadata.csv").write_text("id,label\n1,p\n")
    (tmp_path / "metadata.jsonl").write_text("no JSON")  # beside it: anything's
    assert opened(tmp_path / "set", tmp_path).classes == ("x", "y")
