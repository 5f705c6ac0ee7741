"""A folder of smooth pictures of many sizes, in three classes, and its index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from file_kinds import smooth_picture

from sdmp_train.data import Index, open_folder

SIZES = ((96, 64), (64, 96), (80, 80), (120, 50), (33, 47), (200, 150))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 files, ten per class, of the six sizes above in turn."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("apple", "pear", "plum")):
        (root / name).mkdir()
        for i in range(10):
            width, height = SIZES[(10 * number + i) % len(SIZES)]
            smooth_picture(rng, width, height).save(root / name / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def index(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return open_folder(folder, cache_dir=tmp_path_factory.mktemp("cache"))
