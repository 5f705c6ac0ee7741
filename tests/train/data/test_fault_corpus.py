"""Files as they go wrong: one outcome for each, whatever loader meets it, at the start and in mid-run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_corpus import encoded, faults, table
from file_kinds import HEIGHT, WIDTH, kinds, smooth_picture
from torch import Tensor

from sdmp_train.data import Index, ViewRecipe, make_loader, open_folder
from sdmp_train.data.decoders import looks_whole

HAVE_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
OTHERS = [
    pytest.param("dali", marks=pytest.mark.skipif(not HAVE_DALI, reason="DALI is not installed")),
    "resident",
]
DOCS = Path(__file__).parents[3] / "docs" / "data.md"
FAULTS = faults()
FILES = [name for name in FAULTS if name != "folder.jpg"]


FOUND = {
    "read": ("read",),
    "passed": ("read",),
    "header": ("header",),
    "decode": ("header", "decode"),
    "either": ("read", "decode"),
}
"""By outcome, when a file may be found bad at the start."""


def bad_names(index: Index) -> set[str]:
    return {os.path.basename(file.path) for file in index.bad}


def test_every_outcome_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, fault in FAULTS.items():
        fault.write(tmp_path / "images" / name)
    by_header, by_decoding = (
        bad_names(open_folder(tmp_path / "images", on_bad="list", check=check, cache_dir=tmp_path))
        for check in ("header", "decode")
    )
    for name, fault in FAULTS.items():
        found = "header" if name in by_header else "decode" if name in by_decoding else "read"
        assert found in FOUND[fault.outcome], name
    flips = [name for name in FAULTS if name.startswith("flip")]
    assert 0 < len(by_decoding.intersection(flips)) < len(flips), "some are found, and some cannot be"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The index of good images, in whose place the faults have come since."""
    root = tmp_path_factory.mktemp("faults")
    good = encoded(smooth_picture(np.random.default_rng(3), WIDTH, HEIGHT), "JPEG")
    for name in FILES:
        (root / name).write_bytes(good)
    index = open_folder(root, cache_dir=tmp_path_factory.mktemp("cache"))
    for name in FILES:
        (root / name).unlink()
        FAULTS[name].write(root / name)
    return index


def outcomes(index: Index, loader: str) -> dict[str, tuple[bool, Tensor]]:
    """File name -> whether its row is an image, and its view."""
    options = {"batch_size": len(index) // 3, "steps": 3, "seed": 0, "workers": 2, "fill": (124, 116, 104)}
    with make_loader(index, [ViewRecipe(24)], device="cpu", loader=loader, **options) as made:
        return {
            index.paths[row]: (bool(valid), view)
            for batch in made
            for row, valid, view in zip(batch.ids.tolist(), batch.valid, batch.views[0], strict=True)
        }


def test_every_outcome_in_mid_run(damaged: Index) -> None:
    found = outcomes(damaged, "torchvision")
    assert len(found) > 0.95 * len(FILES)
    for name, (valid, view) in found.items():
        assert valid == (FAULTS[name].outcome == "read") or FAULTS[name].outcome == "either", name
        assert valid or (view == torch.tensor([124, 116, 104])[:, None, None]).all()


@pytest.mark.parametrize("loader", OTHERS)
def test_every_loader_has_the_same_outcomes(damaged: Index, loader: str) -> None:
    expected = outcomes(damaged, "torchvision")
    for name, (valid, view) in outcomes(damaged, loader).items():
        assert valid == expected[name][0], name
        assert torch.equal(view, expected[name][1]), name


def test_the_table_is_that_of_the_docs() -> None:
    missing = [row for row in table() if row not in DOCS.read_text(encoding="utf-8")]
    assert missing == [], "write it with: python tests/train/data/fault_corpus.py FOLDER"


@pytest.mark.parametrize("name", [name for name, (who, _) in kinds().items() if who == "dali"])
def test_what_is_whole_looks_whole_and_stays_with_dali(tmp_path: Path, name: str) -> None:
    kinds()[name][1](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert looks_whole(data)
    assert not looks_whole(data[: len(data) // 2])
    assert not looks_whole(data[:30])


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.outcome == "header"])
def test_what_has_no_header_never_looks_whole(tmp_path: Path, name: str) -> None:
    FAULTS[name].write(tmp_path / name)
    assert not (tmp_path / name).exists() or not looks_whole((tmp_path / name).read_bytes()) or name == "bomb.png"
