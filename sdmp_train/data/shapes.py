"""The embedded data set: ten classes of drawn patterns, so that the whole job runs with no download.

A picture is a field of one repeated glyph (or a texture) at a random scale, angle and place, in two random colours on
uneven ground, with noise. What tells the classes apart survives a crop; what a pixel comparison sees (colour, place,
light on dark or dark on light) is random. Mean colour says nothing about the class, and nearest neighbours on raw
pixels do badly, so that what pretraining adds can be seen within minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .index import cache_folder

VERSION = 1
"""Part of the folder's name: raise it when a picture would come out differently."""
SIZE_PX = 64
TRAIN_PER_CLASS = 500
VAL_PER_CLASS = 100

_SEED = 20220
_STREAM = 0x53484150
_QUALITY = 90
_SPLITS = ("train", "val")

Plane = NDArray[np.floating]


def shapes_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The data set's folder, drawn on first use (a few seconds): `train/CLASS/*.jpg` and `val/CLASS/*.jpg`.

    `cache_dir`: where to keep it; default `$XDG_CACHE_HOME/sdmp` or `~/.cache/sdmp`. The folder appears complete or not
    at all, also when several processes draw it at once.
    """
    folder = cache_folder(cache_dir) / f"shapes-v{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            _write(draft)
            draft.chmod(0o755)
            _put_in_place(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def draw(class_name: str, count: int, split: str = "train") -> NDArray[np.uint8]:
    """(count, 64, 64, 3) pictures of a class; the first of a longer list are the same."""
    number, part = list(CLASSES).index(class_name), _SPLITS.index(split)
    pictures = np.empty((count, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    for i in range(count):
        key = [_SEED, i]
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, number, part, _STREAM]))
        pictures[i] = _picture(CLASSES[class_name], rng)
    return pictures


def _write(folder: Path) -> None:
    jobs = [
        (folder / split / name, name, split, count)
        for split, count in zip(_SPLITS, (TRAIN_PER_CLASS, VAL_PER_CLASS), strict=True)
        for name in CLASSES
    ]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: _write_class(*job), jobs))
    facts = {
        "version": VERSION,
        "classes": list(CLASSES),
        "size_px": SIZE_PX,
        "per_class": dict(zip(_SPLITS, (TRAIN_PER_CLASS, VAL_PER_CLASS), strict=True)),
    }
    (folder / "about.json").write_text(json.dumps(facts, indent=1) + "\n")


def _write_class(folder: Path, class_name: str, split: str, count: int) -> None:
    folder.mkdir(parents=True)
    for i, picture in enumerate(draw(class_name, count, split)):
        Image.fromarray(picture).save(folder / f"{i:04d}.jpg", quality=_QUALITY)


def _put_in_place(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        # Another process was faster; its folder is as good as ours.
        if not folder.is_dir():
            raise


def _picture(pattern: Callable[[Plane, Plane], Plane], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pattern values in [0, 1] blend two coloured grounds; noise on top."""
    u, v = _grid(rng)
    cover = pattern(u, v)[..., None]
    light, dark = _colours(rng)
    first, second = (light, dark) if rng.random() < 0.5 else (dark, light)
    ground = _slope(rng, 25)[..., None]
    picture = cover * first + (1 - cover) * second + ground + rng.normal(0, rng.uniform(2, 12), (SIZE_PX, SIZE_PX, 3))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _grid(rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Pattern coordinates of every pixel: one unit is one period, of 10 to 18 pixels, turned and moved at random."""
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(10, 18)
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX].astype(np.float32) / np.float32(period)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    shift = rng.uniform(0, 1, 2).astype(np.float32)
    return c * x - s * y + shift[0], s * x + c * y + shift[1]


def _colours(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two colours whose luma differs by 70 to 130, so that the pattern is still seen in grey."""
    difference = rng.uniform(70, 130)
    middle = rng.uniform(difference / 2 + 20, 235 - difference / 2)
    return _colour(rng, middle + difference / 2), _colour(rng, middle - difference / 2)


def _colour(rng: np.random.Generator, luma: float) -> NDArray[np.float64]:
    tint = rng.uniform(-60, 60, 3)
    return luma + tint - tint @ np.array([0.299, 0.587, 0.114])


def _slope(rng: np.random.Generator, height: float) -> NDArray[np.float64]:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX] / SIZE_PX - 0.5
    return height * rng.uniform(-1, 1) * 2 * (np.cos(angle) * x + np.sin(angle) * y)


def _cell(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    """Coordinates within the glyph's own square, -0.5 to 0.5; every other row is moved by half a period."""
    row = np.floor(v)
    u = u + 0.5 * (row % 2)
    return u - np.floor(u) - 0.5, v - row - 0.5


def _inside(distance: Plane) -> Plane:
    """1 inside (negative distance), 0 outside, with an edge about a pixel wide."""
    return np.clip(0.5 - distance * 12, 0, 1)


def _disc(u: Plane, v: Plane) -> Plane:
    u, v = _cell(u, v)
    return _inside(np.hypot(u, v) - 0.34)


def _ring(u: Plane, v: Plane) -> Plane:
    u, v = _cell(u, v)
    return _inside(np.abs(np.hypot(u, v) - 0.32) - 0.085)


def _square(u: Plane, v: Plane) -> Plane:
    u, v = _cell(u, v)
    return _inside(np.maximum(np.abs(u), np.abs(v)) - 0.3)


def _triangle(u: Plane, v: Plane) -> Plane:
    u, v = _cell(u, v)
    return _inside(np.maximum(np.abs(u) * 0.894 + v * 0.447 - 0.2, -v - 0.32))


def _cross(u: Plane, v: Plane) -> Plane:
    u, v = np.abs(_cell(u, v))
    return _inside(np.maximum(np.minimum(u, v) - 0.1, np.maximum(u, v) - 0.42))


def _stripes(u: Plane, v: Plane) -> Plane:
    return _inside(np.abs(2 * v - np.floor(2 * v) - 0.5) / 2 - 0.125)


def _waves(u: Plane, v: Plane) -> Plane:
    v = 1.6 * v + 0.45 * np.sin(2 * np.pi * u)
    return _inside(np.abs(v - np.floor(v) - 0.5) / 2 - 0.125)


def _checks(u: Plane, v: Plane) -> Plane:
    u, v = 1.4 * u, 1.4 * v
    # Negative product of the two signed distances to cell borders: alternates like a chessboard.
    across, down = (np.abs(t / 2 - np.floor(t / 2) - 0.5) - 0.25 for t in (u, v))
    return _inside(-np.sign(across * down) * np.minimum(np.abs(across), np.abs(down)) * 1.5)


def _net(u: Plane, v: Plane) -> Plane:
    across, down = (np.abs(t - np.floor(t) - 0.5) for t in (u, v))
    return _inside(np.minimum(across, down) - 0.09)


def _bricks(u: Plane, v: Plane) -> Plane:
    row = np.floor(1.8 * v)
    across = np.abs((u + 0.5 * (row % 2)) % 1 - 0.5)
    down = np.abs(1.8 * v - row - 0.5) / 1.8
    return 1 - _inside(np.minimum(0.5 - across, 0.278 - down) - 0.045)


CLASSES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "bricks": _bricks,
    "checks": _checks,
    "crosses": _cross,
    "discs": _disc,
    "net": _net,
    "rings": _ring,
    "squares": _square,
    "stripes": _stripes,
    "triangles": _triangle,
    "waves": _waves,
}
