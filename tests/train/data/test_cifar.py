"""CIFAR's binary versions: read as they are, and refused where they are damaged."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_archives import NAMES, files, written
from PIL import Image

from sdmp_kernels.views import byol_views
from sdmp_train.data import DataError, kind_of, make_loader, open_source


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [10, 100])
def test_records(tmp_path: Path, kind: int, packed: bool) -> None:
    path = written(tmp_path, kind, packed)
    _, pixels, labels = files(kind)
    assert kind_of(path) == "cifar"
    splits = {name: open_source(path, split=name) for name in ("train", "val", None)}
    assert [len(index) for index in splits.values()] == [len(pixels) - 4, 4, len(pixels)]
    whole = splits[None]
    assert whole.classes == tuple(NAMES[kind]) and whole.labels.tolist() == labels.tolist()
    for row in range(len(pixels)):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(whole.read(row)))), pixels[row])
    assert splits["val"].read(0) == whole.read(len(pixels) - 4)
    part = whole.subset(np.array([3, 1]))
    assert part.read(1) == whole.read(1) and part.labels.tolist() == labels[[3, 1]].tolist()


def test_the_views_are_those_of_the_same_images_in_files(tmp_path: Path) -> None:
    records = written(tmp_path, 10)
    _, pixels, labels = files(10)
    (tmp_path / "png").mkdir()
    for row, picture in enumerate(pixels[:-4]):
        Image.fromarray(picture).save(tmp_path / "png" / f"{row:02d}.png")
    text = "".join(f"png/{row:02d}.png {NAMES[10][labels[row]]}\n" for row in range(20))
    (tmp_path / "list.txt").write_text(text)
    found = []
    for source in (open_source(records), open_source(tmp_path / "list.txt", cache_dir=tmp_path / ".cache")):
        for loader in ("torchvision", "resident"):
            with make_loader(
                source, byol_views(32), batch_size=6, steps=4, seed=1, device="cpu", loader=loader, workers=0
            ) as made:
                found.append([torch.stack(batch.views) for batch in made])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_a_changed_pixel_changes_the_fingerprint(tmp_path: Path) -> None:
    before = open_source(written(tmp_path, 10)).fingerprint
    data = bytearray((tmp_path / "data_batch_3.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "data_batch_3.bin").write_bytes(data)
    assert before != open_source(tmp_path).fingerprint


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("data_batch_2.bin", b"1" * 5000, "data_batch_2.bin in .* is cut: 5,000 bytes"),
        ("data_batch_2.bin", bytes([10]) + bytes(3072), "holds class 10, but only 10 have names"),
        ("data_batch_2.bin", None, "lacks data_batch_2.bin"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    written(tmp_path, 10)
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        open_source(tmp_path)


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, 10, packed=True)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"cannot be read|lacks"):
        open_source(path)


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-100-python.tar.gz", "batches", "sets"])
def test_the_version_for_python_is_refused_and_the_other_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    files = {"batches": ["data_batch_1", "test_batch", "batches.meta"], "sets": ["train", "test", "meta"]}.get(name)
    if files is None:
        path.write_bytes(b"pickles")
    else:
        path.mkdir()
        for file in files:
            (path / file).write_bytes(b"pickles")
    other = "cifar-100-binary.tar.gz" if "100" in name or name == "sets" else "cifar-10-binary.tar.gz"
    with pytest.raises(DataError, match=rf"The binary version is read, {other} from the same page"):
        open_source(path)
