"""Bank and queries: the test split that is there is used, or it is said why not; nothing falls back in silence."""

from __future__ import annotations

import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdmp_train.config import Config, ConfigError, DataConfig, OptimConfig
from sdmp_train.data import DataError
from sdmp_train.evaluate.subject import labelled_images
from sdmp_train.splits import describe_split, measured_images, open_images, reporting
from sdmp_train.verify import verify_data

CLASSES = ("bébé", "cat", "dog")
COUNT = 5


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def fill(folder: Path, classes: tuple[str, ...] = CLASSES) -> None:
    for name in classes:
        for i in range(COUNT):
            save(folder / unicodedata.normalize("NFC", name) / f"{i}.png", i)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with train/ and val/."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "val"):
        fill(tmp_path / "data" / split)
    return tmp_path / "data"


def measured(root: Path, **changes: object) -> tuple[int, int, str]:
    """Number of bank images and of queries, and what is said of them."""
    data = DataConfig(data=str(root), **changes)
    train, test = measured_images(data)
    return len(train), len(test) if test is not None else 0, describe_split(data, train, test)


def test_the_test_split_is_used_and_said(root: Path) -> None:
    assert measured(root) == (
        15,
        15,
        f"bank from {root / 'train'}, queries from {root / 'val'}: the test split of {root}",
    )


def test_a_damaged_file_in_the_test_split_is_named(root: Path) -> None:
    (root / "val" / "cat" / "9.png").write_text("x")
    with pytest.raises(DataError, match=r"9\.png' is not an image"):
        labelled_images(DataConfig(data=str(root)), None)
    with pytest.raises(DataError, match=r"9\.png' is not an image"):
        open_images(config(root))


def config(root: Path, **changes: object) -> Config:
    return Config(data=DataConfig(data=str(root), **changes), optim=OptimConfig(batch_size=4))


def test_classes_in_common_are_used_and_the_others_counted(root: Path) -> None:
    shutil.rmtree(root / "val" / "dog")
    fill(root / "val", ("yak", "zebra"))
    _, queries = labelled_images(DataConfig(data=str(root)), None)
    assert queries.classes == tuple(sorted(CLASSES))
    assert {queries.classes[label] for label in queries.labels} == {"bébé", "cat"}
    said = measured(root)[2]
    assert "10 images of 2 classes (yak, zebra) left out" in said
    assert "1 of the bank's 3 classes have no query" in said


def test_names_in_another_unicode_form_are_the_same(root: Path) -> None:
    (root / "val" / "bébé").rename(root / "val" / unicodedata.normalize("NFD", "bébé"))
    _, queries = labelled_images(DataConfig(data=str(root)), None)
    for row in range(len(queries)):
        folder = Path(queries.path(row)).parent.name
        assert unicodedata.normalize("NFC", folder) == queries.classes[queries.labels[row]]
    assert len(queries) == 15


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda val: None, "it holds no images"),
        (lambda val: [save(val / f"{i}.png") for i in range(3)], "no class folders, and no list names val_annotations"),
        (lambda val: fill(val, ("yak", "zebra")), r"its classes \(yak, zebra\) are none of the bank's"),
    ],
    ids=["empty", "flat", "other classes"],
)
def test_a_test_split_that_cannot_be_used_is_refused_with_the_reason(root: Path, spoil, reason: str) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    spoil(root / "val")
    with pytest.raises(ConfigError, match=rf"val cannot be measured on: .*{reason}.*--test-data"):
        labelled_images(DataConfig(data=str(root)), None)
    index, test = open_images(config(root))
    assert len(index) == 15
    assert test is not None
    assert len(test) == 0
    assert "no bank and queries" in describe_split(config(root).data, index, test)
    assert measured(root / "train")[1] == 0


def test_without_a_test_split_every_fifth_image_is_a_query_and_said_so(root: Path) -> None:
    bank, queries = labelled_images(DataConfig(data=str(root / "train")), None)
    assert (len(bank), len(queries)) == (12, 3)
    assert "every fifth image a query" in measured(root / "train")[2]
    assert "looked for val, validation, test" in measured(root / "train")[2]


def test_a_test_folder_that_is_named_goes_before_the_split(root: Path, tmp_path: Path) -> None:
    fill(tmp_path / "own", ("cat",))
    assert measured(root, test_data=str(tmp_path / "own"))[1] == 5
    assert "named by --test-data" in measured(root, test_data=str(tmp_path / "own"))[2]
    _, queries = labelled_images(DataConfig(data=str(root)), str(tmp_path / "own"))
    assert len(queries) == 5
    _, test = open_images(config(root, test_data=str(tmp_path / "own")))
    assert test is not None
    assert len(test) == 5


def test_a_test_split_is_not_opened_where_nothing_is_measured(root: Path) -> None:
    (root / "val" / "cat" / "9.png").write_text("x")
    settings = config(root)
    unmeasured = Config(settings.data, optim=settings.optim, run=type(settings.run)(knn_max_images=0))
    assert open_images(unmeasured)[1] is None


def flat(root: Path, pattern: str = "{}.png") -> list[str]:
    """val/ without class folders; returns the class of each of its 15 images by number."""
    shutil.rmtree(root / "val")
    order = [CLASSES[i % 3] for i in range(15)]
    for i in range(15):
        save(root / "val" / pattern.format(f"{i + 1:08}"), i)
    return order


def tiny_imagenet(root: Path) -> None:
    order = flat(root, "images/val_{}.png")
    lines = [f"val_{i + 1:08}.png\t{name}\t0\t0\t62\t62\n" for i, name in enumerate(order)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def kaggle(root: Path) -> None:
    order = flat(root, "ILSVRC2012_val_{}.png")
    lines = [f"ILSVRC2012_val_{i + 1:08},{name} 85 1 499 272\n" for i, name in enumerate(order)]
    (root.parent / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))


def caffe(root: Path) -> None:
    order = flat(root)
    numbers = [sorted(CLASSES).index(name) for name in order]
    (root / "val.txt").write_text("".join(f"{i + 1:08}.png {number}\n" for i, number in enumerate(numbers)))


def synset_labels(root: Path) -> None:
    order = flat(root, "ILSVRC2012_val_{}.png")
    (root / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(order) + "\n")


def development_kit(root: Path) -> None:
    order = flat(root, "ILSVRC2012_val_{}.png")
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    numbers = {"dog": 1, "bébé": 2, "cat": 3}  # not the order of the names
    (kit / "map_clsloc.txt").write_text("".join(f"{name} {number} x\n" for name, number in numbers.items()))
    truth = "".join(f"{numbers[name]}\n" for name in order)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


@pytest.mark.parametrize("write", [tiny_imagenet, kaggle, caffe, synset_labels, development_kit])
def test_flat_folders_with_a_list_are_read(root: Path, write) -> None:
    write(root)
    _, queries = labelled_images(DataConfig(data=str(root)), None)
    assert len(queries) == 15
    assert queries.classes == tuple(sorted(CLASSES))
    names = [queries.classes[label] for label in queries.labels]
    assert names == [CLASSES[i % 3] for i in range(15)]
    assert "classes read from" in measured(root)[2]


@pytest.mark.parametrize("write", [tiny_imagenet, kaggle, caffe])
def test_lists_may_begin_with_a_mark_end_lines_otherwise_and_come_in_any_order(root: Path, write) -> None:
    write(root)
    (path,) = [*root.rglob("val*.txt"), *root.parent.glob("LOC*.csv")]
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("ImageId")]
    lines = [*head, *reversed(lines[len(head) :])]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    _, queries = labelled_images(DataConfig(data=str(root)), None)
    assert [queries.classes[label] for label in queries.labels] == [CLASSES[i % 3] for i in range(15)]


def test_lists_may_have_no_head_and_name_files_by_their_paths(root: Path) -> None:
    kaggle(root)
    path = root.parent / "LOC_val_solution.csv"
    path.write_text(path.read_text().partition("\n")[2])
    assert measured(root)[1] == 15
    path.unlink()
    tiny_imagenet(root)
    path = root / "val" / "val_annotations.txt"
    path.write_text("".join(f"images/{line}\n" for line in path.read_text().splitlines()))
    assert measured(root)[1] == 15


def test_the_list_of_another_split_is_not_taken(root: Path) -> None:
    order = flat(root)
    lines = [f"{i + 1:08}.png\t{name}\n" for i, name in enumerate(order)]
    (root / "train_annotations.txt").write_text("".join(reversed(lines)).replace("cat", "dog"))
    with pytest.raises(ConfigError, match="no list names"):
        labelled_images(DataConfig(data=str(root)), None)
    (root / "val_annotations.txt").write_text("".join(lines))
    _, queries = labelled_images(DataConfig(data=str(root)), None)
    assert [queries.classes[label] for label in queries.labels] == order


def test_images_that_a_list_leaves_out_are_left_out(root: Path) -> None:
    tiny_imagenet(root)
    path = root / "val" / "val_annotations.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    assert measured(root)[1] == 9
    assert "6 images left out" in measured(root)[2]


@pytest.mark.parametrize("content", ["no tabs here\n", "\0\n", "1.png\n"])
def test_a_list_that_makes_no_sense_is_named(root: Path, content: str) -> None:
    flat(root)
    (root / "val" / "val_annotations.txt").write_text(content)
    with pytest.raises(DataError, match=r"annotations .*val_annotations\.txt' cannot be read"):
        labelled_images(DataConfig(data=str(root)), None)


def test_what_takes_long_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    said: list[str] = []
    told: list[int] = []
    report = reporting(said.append, lambda done, total: told.append(done))
    for done in range(1, 13):
        clock[0] = done
        report(1000 * done, 12000)
    assert said == ["data     5,000 of 12,000 files looked at", "data     10,000 of 12,000 files looked at"]
    assert len(told) == 12


def test_verify_refuses_where_nothing_is_an_image(root: Path) -> None:
    for path in (root / "train").rglob("*.png"):
        path.write_text("x")
    with pytest.raises(DataError, match=r"15 of 15 files .*") as caught:
        verify_data(str(root / "train"))
    assert caught.value.exit_code == 2


def test_verify_names_a_class_that_would_vanish(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train" / "fig").mkdir()
    (root / "train" / "fig" / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"'fig' holds no usable image, only 1 \.heic"):
        verify_data(str(root / "train"))
    assert "1 file passed over: 1 .heic (in fig)" in capsys.readouterr().out
