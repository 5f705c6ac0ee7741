"""The embedded data set: complete, the same everywhere, and not to be told apart by colour."""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdmp_train.data import open_folder, shapes, shapes_folder


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """60 training and 20 validation pictures per class, with their labels."""
    parts = []
    for split, count in (("train", 60), ("val", 20)):
        parts.append(np.concatenate([shapes.draw(name, count, split) for name in shapes.CLASSES]))
        parts.append(np.repeat(np.arange(len(shapes.CLASSES)), count))
    return tuple(parts)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "TRAIN_PER_CLASS", 4)
    monkeypatch.setattr(shapes, "VAL_PER_CLASS", 2)


def test_folder_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    root = shapes_folder(tmp_path)
    train, val = (open_folder(root, split=split, cache_dir=tmp_path / "cache") for split in ("train", "val"))
    assert len(train) == 40
    assert len(val) == 20
    assert train.classes == val.classes == tuple(sorted(shapes.CLASSES))
    assert set(train.heights) == set(train.widths) == {64}
    assert json.loads((root / "about.json").read_text())["version"] == shapes.VERSION
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == [root.name]


def test_second_call_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    root = shapes_folder(tmp_path)
    monkeypatch.setattr(shapes, "_write", lambda folder: pytest.fail("drawn again"))
    assert shapes_folder(tmp_path) == root


def test_an_interrupted_drawing_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)

    def interrupted(folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (shapes_folder(tmp_path) / "val").is_dir()


def test_losing_the_race_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    real = shapes._write

    def slower(folder: Path) -> None:
        real(folder)
        with monkeypatch.context() as patch:
            patch.setattr(shapes, "_write", real)
            shapes_folder(tmp_path)

    monkeypatch.setattr(shapes, "_write", slower)
    root = shapes_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


def test_pictures_are_pinned() -> None:
    """The version number in the folder's name promises these pictures: mean of each quarter of the first per class."""
    for name, expected in QUARTERS.items():
        quarters = shapes.draw(name, 1)[0].reshape(2, 32, 2, 32, 3).mean((1, 3, 4)).ravel()
        # Processors differ in the last bit of a sine, which can move single pixels by one step.
        np.testing.assert_allclose(quarters, expected, atol=0.1)
    assert shapes.VERSION == 1


QUARTERS = {
    "bricks": [132.9, 123.7, 151.9, 143.6],
    "checks": [72.0, 73.0, 75.0, 76.5],
    "crosses": [158.5, 155.1, 155.8, 157.2],
    "discs": [92.5, 95.0, 110.8, 112.8],
    "net": [128.7, 122.8, 143.2, 137.7],
    "rings": [154.5, 151.1, 160.1, 160.5],
    "squares": [141.8, 142.2, 137.6, 137.5],
    "stripes": [170.9, 168.2, 171.2, 169.1],
    "triangles": [101.4, 79.5, 111.0, 89.8],
    "waves": [111.6, 111.6, 113.9, 112.1],
}


def test_a_picture_does_not_depend_on_how_many_are_drawn() -> None:
    np.testing.assert_array_equal(shapes.draw("rings", 5)[:2], shapes.draw("rings", 2))


def test_pictures_and_splits_differ(pictures) -> None:
    train, _, val, _ = pictures
    both = np.concatenate([train, val]).reshape(-1, 64 * 64 * 3)
    assert len(np.unique(both, axis=0)) == len(both)


def test_mean_colour_does_not_tell_classes_apart(pictures) -> None:
    """Nearest class mean and logistic regression on the mean RGB, both near the chance of 0.1."""
    train, train_label, val, val_label = pictures
    features, queries = (torch.tensor(x.mean((1, 2)) / 255, dtype=torch.float64) for x in (train, val))
    target = torch.tensor(train_label)
    centres = torch.stack([features[target == c].mean(0) for c in range(10)])
    nearest = torch.cdist(queries, centres).argmin(1).numpy()
    weight = torch.zeros(10, 4, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    optimiser = torch.optim.LBFGS([weight], max_iter=100)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(torch.cat([features, ones], 1) @ weight.T, target)
        loss.backward()
        return loss

    optimiser.step(closure)
    logistic = (torch.cat([queries, ones[: len(queries)]], 1) @ weight.T).argmax(1).numpy()
    # 200 guesses at 0.1: above 0.18 with chance 2e-4.
    assert (nearest == val_label).mean() < 0.18
    assert (logistic == val_label).mean() < 0.18


def test_raw_pixels_are_poor_neighbours(pictures) -> None:
    train, train_label, val, val_label = pictures

    def unit(images: np.ndarray) -> np.ndarray:
        flat = np.stack([np.asarray(Image.fromarray(x).resize((32, 32))) for x in images]).reshape(len(images), -1)
        flat = flat / 255 - 0.5
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    nearest = (unit(val) @ unit(train).T).argmax(1)
    assert (train_label[nearest] == val_label).mean() < 0.3


def test_the_pattern_is_what_tells_classes_apart(pictures) -> None:
    """Texture statistics that ignore colour, place, angle and sign do far better than chance.

    Features: how the energy of the grey picture's spectrum falls off when sorted, and its third and fourth moments.
    """
    train, train_label, val, val_label = pictures

    def features(images: np.ndarray) -> np.ndarray:
        grey = images @ np.array([0.299, 0.587, 0.114])
        grey = grey - grey.mean((1, 2), keepdims=True)
        grey = grey / grey.std((1, 2), keepdims=True)
        energy = np.sort(np.abs(np.fft.rfft2(grey)).reshape(len(images), -1), axis=1)[:, ::-1]
        strongest = np.log(energy[:, [0, 1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 80, 120]])
        moments = np.stack([np.abs((grey**3).mean((1, 2))), (grey**4).mean((1, 2))], axis=1)
        return np.concatenate([strongest, moments], axis=1)

    known, asked = features(train), features(val)
    mean, scale = known.mean(0), known.std(0)
    distance = np.linalg.norm(((asked - mean) / scale)[:, None] - ((known - mean) / scale)[None], axis=2)
    assert (train_label[distance.argmin(1)] == val_label).mean() > 0.5


def test_drawing_is_fast_enough() -> None:
    start = time.process_time()
    shapes.draw("waves", 50)
    whole = (time.process_time() - start) / 50 * 10 * (shapes.TRAIN_PER_CLASS + shapes.VAL_PER_CLASS)
    assert whole < 15


def _draw_in_another_process(name: str) -> bytes:
    return shapes.draw(name, 1).tobytes()


def test_other_processes_draw_the_same() -> None:
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(_draw_in_another_process, "net").result() == shapes.draw("net", 1).tobytes()
