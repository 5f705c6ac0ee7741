"""The same images as a folder, a list and shards, resident or not: the same batches, bit for bit."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from cifar_archives import written
from loaded import add, assert_same, batches
from tiny_runs import same_ends

from sdmp_train.commands import pretrain
from sdmp_train.config import Config, DataConfig, OptimConfig
from sdmp_train.data import DataError, Index, kind_of, open_source
from sdmp_train.data.folders import split_of
from sdmp_train.data.index import find_bad
from sdmp_train.splits import describe_split, open_images
from sdmp_train.verify import verify_data

SOURCES = ("list", "shards", "shard", "remote")


@pytest.fixture(scope="module")
def places(folder: Path, index: Index, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    """The 30 images of `folder` in its order: listed, in three shards with .cls members, here and behind a URL, in one
    shard as a tree."""
    root = tmp_path_factory.mktemp("sources")
    (root / "list.txt").write_text("".join(f"{folder}/{name}\t{name.split('/')[0]}\n" for name in index.paths))
    (root / "shards").mkdir()
    for first in range(0, 30, 10):
        with tarfile.open(root / "shards" / f"{first:06d}.tar", "w") as archive:
            for row in range(first, first + 10):
                add(archive, f"{row:06d}.jpg", index.read(row))
                add(archive, f"{row:06d}.cls", index.paths[row].split("/")[0].encode())
    with tarfile.open(root / "tree.tar", "w") as archive:
        for row in range(30):
            add(archive, index.paths[row], index.read(row))
    memory = fsspec.filesystem("memory")
    for shard in (root / "shards").iterdir():
        memory.pipe_file(f"/sources/{shard.name}", shard.read_bytes())
    local = {"list": root / "list.txt", "shards": root / "shards", "shard": root / "tree.tar"}
    return {**local, "remote": "memory://sources"}


@pytest.fixture
def sources(places: dict[str, Path | str], tmp_path: Path) -> dict[str, Index]:
    return {name: open_source(place, cache_dir=tmp_path) for name, place in places.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_and_loader_gives_the_bytes_of_the_folder(
    index: Index, sources: dict[str, Index], name: str
) -> None:
    expected, source = batches(index), sources[name]
    assert source.classes == index.classes
    for loader, workers in (("torchvision", 0), ("torchvision", 2), ("resident", 2)):
        assert_same(batches(source, loader, workers=workers), expected)


@pytest.mark.parametrize("name", SOURCES)
def test_dali_decodes_them_too(index: Index, sources: dict[str, Index], name: str) -> None:
    pytest.importorskip("nvidia.dali")
    assert not sources[name].pillow.any()
    assert_same(batches(sources[name], "dali", workers=2), batches(index))


@pytest.fixture(scope="module")
def every_place(
    places: dict[str, Path | str], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path | str]:
    """Those, a folder, and CIFAR in its archive and unpacked: 20 and 22 images to train on."""
    packed = written(tmp_path_factory.mktemp("cifar-10"), 10, packed=True)
    unpacked = written(tmp_path_factory.mktemp("cifar-100"), 100, each=22)
    return {**places, "folder": folder, "cifar-10": packed, "cifar-100": unpacked}


EVERY = (*SOURCES, "folder", "cifar-10", "cifar-100")


@pytest.mark.parametrize("loader", ["torchvision", "resident", "dali"])
@pytest.mark.parametrize("name", EVERY)
def test_resume_and_ranks(every_place: dict[str, Path | str], tmp_path: Path, name: str, loader: str) -> None:
    """20, 22 or 30 images in batches of 8: two or three steps an epoch on every rank, the rest sit it out."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    source = open_source(every_place[name], cache_dir=tmp_path)
    per_epoch = len(source) // 8
    steps, start = 2 * per_epoch, per_epoch + 1
    whole = batches(source, loader, steps=steps)
    assert_same(batches(source, loader, start_step=start, steps=steps), whole[start:])
    parts = [batches(source, loader, steps=steps, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert {len(part) for part in parts} == {steps}
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].ids for part in parts]), batch.ids)
    for epoch in (whole[:per_epoch], whole[per_epoch:]):
        assert len(set(torch.cat([batch.ids for batch in epoch]).tolist())) == 8 * per_epoch


@pytest.mark.parametrize("name", ["shards", "cifar-100", "resident"])  # folder: test_pretrain.py; a URL: test_remote.py
def test_a_run_that_is_stopped_in_mid_epoch_ends_as_the_unbroken_one(
    tiny: Config, every_place: dict[str, Path | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = every_place["folder" if name == "resident" else name]
    data = replace(tiny.data, data=str(place), loader="resident" if name == "resident" else "torchvision")
    whole = replace(tiny, data=data)
    assert pretrain(whole, tmp_path / "whole") == 0
    assert (
        pretrain(replace(whole, run=replace(whole.run, max_steps=3 if "cifar" in name else 4)), tmp_path / "parts") == 0
    )
    assert pretrain(whole, tmp_path / "parts", resume=True) == 0
    assert same_ends(tmp_path / "whole", tmp_path / "parts")


def test_kinds(places: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    found = {name: kind_of(place) for name, place in places.items()}
    assert found == {"list": "lists", "shards": "shards", "shard": "shards", "remote": "shards"}
    assert kind_of(folder) == kind_of(tmp_path) == kind_of(tmp_path / "absent") == "folder"
    (tmp_path / "a.tar").touch()
    assert kind_of(tmp_path) == "shards"
    (tmp_path / "class").mkdir()
    assert kind_of(tmp_path) == "folder"  # which names the archive and says to unpack it


@pytest.mark.parametrize("name", SOURCES)
def test_a_subset_is_those_rows(sources: dict[str, Index], name: str) -> None:
    source = sources[name]
    part = source.subset(torch.tensor([7, 29, 0]).numpy())
    assert [part.read(row) for row in range(3)] == [source.read(row) for row in (7, 29, 0)]
    assert [part.name(row) for row in range(3)] == [source.name(row) for row in (7, 29, 0)]
    assert part.fingerprint != source.fingerprint


@pytest.mark.parametrize("name", ["list", "shards"])
def test_no_split_of_their_own(places: dict[str, Path], name: str) -> None:
    with pytest.raises(DataError, match="no test split; give one with --test-data"):
        open_source(places[name], split="val")


def test_shards_that_name_their_splits(places: dict[str, Path | str], tmp_path: Path) -> None:
    """As those of ImageNet on the Hub, all in one folder."""
    names = ("set-train-0000.tar", "set-train-0001.tar", "set-validation-00.tar")
    apple, pear, _ = sorted(Path(places["shards"]).iterdir())
    for shard, name in zip((apple, pear, apple), names, strict=True):
        (tmp_path / name).write_bytes(shard.read_bytes())
    train, test, whole = (
        open_source(tmp_path, split=split, cache_dir=tmp_path / ".c") for split in ("train", "val", None)
    )
    assert [len(train), len(test), len(whole)] == [20, 10, 30]
    assert train.notes == ("shards of another split not used: 1",) and test.paths[0].startswith(
        "set-validation-00.tar/"
    )
    assert {split_of(name) for name in ("a-train-b-test.tar", "trainer-1.tar", "000.tar")} == {None}
    config = Config(
        data=DataConfig(data=str(tmp_path), image_px=32), optim=OptimConfig(batch_size=8, epochs=1, warmup_epochs=0)
    )
    bank, queries = open_images(config)
    assert (len(bank), bank.classes) == (20, ("apple", "pear"))
    assert queries is not None and queries.labels.tolist() == [0] * 10
    assert "queries from" in describe_split(config.data, bank, queries)
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).unlink()
    assert len(open_source(tmp_path, cache_dir=tmp_path / ".c")) == 10, "the only split there is"


# Lists


def listed(tmp_path: Path, text: str) -> Index:
    (tmp_path / "list.txt").write_text(text)
    return open_source(tmp_path / "list.txt", cache_dir=tmp_path / ".cache")


def test_lines_of_a_list(tmp_path: Path, index: Index) -> None:
    for name in ("a b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(index.read(0))
    assert listed(tmp_path, "c.jpg\r\n\na b.jpg\n").classes == ()
    numbers = listed(tmp_path, "\ufeffc.jpg 10\na b.jpg\t9\n")
    assert (numbers.classes, numbers.labels.tolist()) == (("9", "10"), [1, 0])
    assert list(numbers.paths) == ["c.jpg", "a b.jpg"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("c.jpg\nc.jpg\n", "line 2 of .* names c.jpg again"),
        ("c.jpg 1\nd.jpg\n", "some name a class and some none, as line 2"),
        ("c.jpg\0\n", "bytes that are no text"),
        ("c.jpg\nd.jpg\n", r"1 of 2 files under .* is not a readable image:\n.*d\.jpg. is gone"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, index: Index, text: str, said: str) -> None:
    (tmp_path / "c.jpg").write_bytes(index.read(0))
    with pytest.raises(DataError, match=said):
        listed(tmp_path, text)


# Shards


def test_a_shard_that_cannot_be_used(tmp_path: Path, places: dict[str, Path]) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match=r"a\.tar cannot be read as an uncompressed tar file"):
        open_source(tmp_path / "a.tar", cache_dir=tmp_path / ".cache")
    whole = places["shard"].read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.tar.*is cut"):
        open_source(tmp_path / "a.tar", cache_dir=tmp_path / ".cache")
    index = open_source(tmp_path / "a.tar", on_bad="list", cache_dir=tmp_path / ".cache")
    assert 5 < len(index) < 30 and find_bad(index, range(len(index))) == []


def test_a_member_that_is_no_image_is_named(tmp_path: Path, index: Index) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "x/good.jpg", index.read(0))
        add(archive, "x/bad.jpg", b"no image")
        add(archive, "x/._good.jpg", b"what macOS adds")
        add(archive, "x/good.json", b"{}")
    with pytest.raises(DataError, match=r"(?s)1 of 2 files.*a\.tar/x/bad\.jpg"):
        open_source(tmp_path / "a.tar", cache_dir=tmp_path / ".cache")
    found = open_source(tmp_path / "a.tar", on_bad="list", cache_dir=tmp_path / ".cache")
    assert list(found.paths) == ["a.tar/x/good.jpg"] and found.read(0) == index.read(0)


def test_a_shard_cut_after_it_was_indexed_is_named(tmp_path: Path, places: dict[str, Path]) -> None:
    (tmp_path / "a.tar").write_bytes(places["shard"].read_bytes())
    index = open_source(tmp_path / "a.tar", cache_dir=tmp_path / ".cache")
    (tmp_path / "a.tar").write_bytes(places["shard"].read_bytes()[: int(index.places[20, 1])])
    with pytest.raises(DataError, match=r"a\.tar/.*is cut: the shard ends"):
        batches(index)


def test_verify_takes_any_source_and_fits_on_a_screen(
    tmp_path: Path, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in range(30):
        (tmp_path / f"{row}.jpg").write_bytes(index.read(row))
    (tmp_path / "list.txt").write_text("".join(f"{row}.jpg class{row:02d}\n" for row in range(30)))
    verify_data(str(tmp_path / "list.txt"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("30 images, 30 classes")
    assert lines[12:] == ["         1  class11", "  and 18 more classes of 1 to 1 images", "every image decodes"]
