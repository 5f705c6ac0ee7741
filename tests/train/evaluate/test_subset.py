"""Shares of the classes, and published lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdmp_train.config import ConfigError
from sdmp_train.data import Index, open_folder
from sdmp_train.evaluate.subset import some_images


@pytest.fixture
def images(tmp_path: Path) -> Index:
    """Classes of 10, 30 and 2 images; `0.png` is in each."""
    for name, count in (("a", 10), ("b", 30), ("c", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "data" / name / f"{number}.png")
            if number == 1:
                Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{name}_only.png")
    return open_folder(tmp_path / "data")


def test_a_fraction_of_every_class_drawn_from_the_seed(images: Index):
    some, why = some_images(images, 0.1, None, seed=0)
    assert np.bincount(some.labels).tolist() == [1, 3, 1]
    assert "5 of 45 images" in why and "10% of every class, drawn from seed 0" in why
    again, _ = some_images(images, 0.1, None, seed=0)
    assert list(again.paths) == list(some.paths)
    others = {tuple(some_images(images, 0.1, None, seed=seed)[0].paths) for seed in range(5)}
    assert len(others) > 1
    half, _ = some_images(images, 0.5, None, seed=0)
    assert np.bincount(half.labels).tolist() == [6, 16, 2]  # of 11, 31 and 3
    assert some.classes == images.classes
    for fraction in (None, 1.0):
        assert some_images(images, fraction, None, seed=0)[0] is images


def test_every_image_is_drawn_alike_often(images: Index):
    counts: dict[str, int] = {}
    for seed in range(300):
        for path in some_images(images, 0.1, None, seed=seed)[0].paths:
            counts[path] = counts.get(path, 0) + 1
    of_b = [count for path, count in counts.items() if path.startswith("b/")]
    assert len(of_b) == 31 and min(of_b) > 10 and max(of_b) < 60  # 900 draws of 31 images: 29 each


def test_a_list_by_path_or_by_name(images: Index, tmp_path: Path):
    listing = tmp_path / "1percent.txt"
    listing.write_text("# a comment\nb_only.png\n\na/0.png\n  c/1.png \nb_only.png\n")
    some, why = some_images(images, None, str(listing), seed=0)
    assert list(some.paths) == ["a/0.png", "b/b_only.png", "c/1.png"]
    assert "3 of 45 images, those listed in" in why


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/0.png\nnone.JPEG\n", r"1 of the 2 images .* are not under .*none\.JPEG"),
        ("", "0 of the 0 images"),
        ("0.png\n", r"3 images under .* are called so; expected CLASS/NAME"),
    ],
)
def test_lists_that_do_not_fit_are_refused(images: Index, tmp_path: Path, text: str, message: str):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        some_images(images, None, str(tmp_path / "list.txt"), seed=0)
    with pytest.raises(ConfigError, match="cannot be read"):
        some_images(images, None, str(tmp_path / "missing.txt"), seed=0)
