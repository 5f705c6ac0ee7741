"""Shards behind a URL: what it may name, lost connections, stores that do not answer, what is remembered."""

from __future__ import annotations

import logging
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from loaded import add, assert_same, batches
from tiny_runs import same_ends

from sdmp_train.cli import main
from sdmp_train.commands import pretrain
from sdmp_train.config import Config
from sdmp_train.data import DataError, Index, kind_of, open_source, place_of
from sdmp_train.data import remote as module
from sdmp_train.data.remote import is_url, read_range

GREY = (124, 116, 104)


class Flaky(MemoryFileSystem):
    """A store in memory whose connections are lost when told so."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    reads: ClassVar[list[str]] = []
    errors: ClassVar[list[Exception]] = []
    """Raised one after another by the next reads."""
    down_after: ClassVar[float] = float("inf")
    """Reads after which nothing answers any more."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        Flaky.reads.append(path)
        if len(Flaky.reads) > Flaky.down_after:
            raise ConnectionError("no route to host")
        if Flaky.errors:
            raise Flaky.errors.pop(0)
        return super().cat_file(path, start, end, **kwargs)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The store, empty, and no waiting between attempts."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for name in ("_down", "_said"):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(module, "PAUSES", (0.0, 0.0))
    Flaky.store.clear()
    Flaky.reads.clear()
    Flaky.errors.clear()
    yield
    Flaky.down_after = float("inf")


@pytest.fixture
def local(index: Index, tmp_path: Path) -> Path:
    """The 30 images in three shards in a folder; and the same ones under flaky://set."""
    (tmp_path / "shards").mkdir()
    for first in range(0, 30, 10):
        path = tmp_path / "shards" / f"{first:06d}.tar"
        with tarfile.open(path, "w") as archive:
            for row in range(first, first + 10):
                add(archive, f"{row:06d}.jpg", index.read(row))
                add(archive, f"{row:06d}.cls", index.paths[row].split("/")[0].encode())
        put(path.name, path.read_bytes())
    return tmp_path / "shards"


def put(name: str, data: bytes) -> None:
    fsspec.filesystem("flaky").pipe_file(f"/set/{name}", data)


def opened(tmp_path: Path, url: str = "flaky://set", **options: object) -> Index:
    return open_source(url, cache_dir=tmp_path / "cache", **options)


# What a URL may name


@pytest.mark.parametrize(
    "url",
    [
        "flaky://set",
        "flaky://set/",
        "flaky://set/*.tar",
        "flaky://set/0000{0..2}0.tar",
    ],
)
def test_the_rows_are_those_of_the_same_shards_in_a_folder(local: Path, tmp_path: Path, url: str) -> None:
    here, there = open_source(local, cache_dir=tmp_path / "cache"), opened(tmp_path, url)
    assert list(there.paths) == list(here.paths) and there.classes == here.classes
    assert there.fingerprint == here.fingerprint
    assert there.name(3).endswith("//set/000000.tar/000003.jpg")
    assert all(there.read(row) == here.read(row) for row in range(30))
    assert_same(batches(there), batches(here))


def test_one_shard(local: Path, tmp_path: Path) -> None:
    assert list(opened(tmp_path, "flaky://set/000010.tar").paths) == [
        f"000010.tar/{row:06d}.jpg" for row in range(10, 20)
    ]


def test_shards_of_several_folders_are_named_by_them(local: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        put(f"part-{number}/a.tar", (local / f"0000{number}0.tar").read_bytes())
    found = opened(tmp_path, "flaky://set/part-{1..2}/a.tar")
    assert (found.paths[0], found.paths[10]) == ("part-1/a.tar/000010.jpg", "part-2/a.tar/000020.jpg")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("flaky://nothing", "flaky://nothing cannot be listed: is not there"),
        ("flaky://set/000099.tar", r"000099\.tar cannot be listed: is not there"),
        ("flaky://set/9*.tar", r"9\*\.tar cannot be listed: is not there"),
        ("flaky://set/papers", "papers holds no shards"),
        ("nosuch://set", "cannot be listed: Protocol not known: nosuch"),
    ],
)
def test_what_cannot_be_used(local: Path, tmp_path: Path, url: str, said: str) -> None:
    put("papers/a.txt", b"a")
    with pytest.raises(DataError, match=said):
        opened(tmp_path, url)


def test_which_texts_are_urls(local: Path, tmp_path: Path) -> None:
    assert all(map(is_url, ("s3://a/b", "https://a/b.tar", "filecache::s3://a/b", "hf://datasets/a/b")))
    assert not any(map(is_url, ("a/b", "/a/b", "C:\\a", "file:///a", "a:b", "")))
    assert place_of("s3://a/b") == "s3://a/b" and place_of(f"file://{local}") == local
    assert kind_of(place_of(f"file://{local}")) == "shards"
    with pytest.raises(DataError, match="no test split; give one with --test-data"):
        open_source("flaky://set", split="val")


# Connections


def test_a_lost_connection_is_one_line_and_another_attempt(
    local: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, expected = opened(tmp_path), open_source(local, cache_dir=tmp_path / "cache").read(7)
    Flaky.errors += [ConnectionResetError("Connection reset by peer"), TimeoutError()]
    with caplog.at_level(logging.WARNING):
        assert source.read(7) == expected
    assert [record.getMessage() for record in caplog.records] == [
        "flaky://set does not answer (Connection reset by peer); trying again in 0 s"
    ]
    assert not caplog.records[0].exc_info


def test_bytes_that_have_not_come_are_asked_for_again(monkeypatch: pytest.MonkeyPatch, local: Path) -> None:
    whole = (local / "000000.tar").read_bytes()
    honest, lengths = MemoryFileSystem.cat_file, [10, 100]
    monkeypatch.setattr(
        MemoryFileSystem, "cat_file", lambda self, path, start, end: honest(self, path, start, end)[: lengths.pop(0)]
    )
    assert read_range("flaky://set/000000.tar", 512, 100) == whole[512:612] and not lengths


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "gone"), PermissionError(13, "closed"), RuntimeError("no password")]
)
def test_what_another_attempt_would_not_mend_is_not_tried_again(local: Path, error: Exception) -> None:
    Flaky.errors.append(error)
    with pytest.raises((OSError, ValueError), match=str(error.args[-1])):
        read_range("flaky://set/000000.tar", 0, 10)
    assert len(Flaky.reads) == 1


def test_a_refused_connection_that_comes_as_a_missing_file(local: Path) -> None:
    """As fsspec's web file system raises it."""
    error = FileNotFoundError("http://host/a.tar")
    assert not module.is_lost_connection(error)
    error.__cause__ = ConnectionRefusedError(111, "refused")
    Flaky.errors.append(error)
    assert len(read_range("flaky://set/000000.tar", 0, 10)) == 10 and len(Flaky.reads) == 2


@pytest.mark.parametrize("loader", ["torchvision", "processes", "resident", "dali"])
@pytest.mark.parametrize("fill", [None, GREY])
def test_a_store_that_does_not_answer_makes_no_file_damaged(
    local: Path, tmp_path: Path, loader: str, fill: tuple[int, ...] | None
) -> None:
    """Whatever is done with damaged files: the loader fails, in a few lines, and nothing comes out grey."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    source = opened(tmp_path)
    Flaky.down_after = len(Flaky.reads)
    workers = 2 if loader == "processes" else 0
    with pytest.raises(DataError, match=r"'flaky://set/.*cannot be reached: .*Go on once the store answers") as caught:
        batches(source, "torchvision" if loader == "processes" else loader, fill=fill, workers=workers)
    assert len(str(caught.value).splitlines()) == 1


def test_a_store_that_is_down_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch, local: Path, tmp_path: Path
) -> None:
    Flaky.down_after = 0
    for _ in range(5):
        with pytest.raises(OSError, match="cannot be reached"):
            read_range("flaky://set/000000.tar", 0, 10)
    assert len(Flaky.reads) == 3, "the attempts of the first one"
    Flaky.down_after, now = float("inf"), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + module.REST + 1)
    assert len(read_range("flaky://set/000000.tar", 0, 10)) == 10


def test_a_store_that_is_down_from_the_start(local: Path, tmp_path: Path) -> None:
    Flaky.down_after = 0
    with pytest.raises(DataError, match=r"the shard flaky://set/0000\d0\.tar cannot be reached: .*Go on once"):
        opened(tmp_path, on_bad="skip")


def test_a_shard_cut_after_it_was_indexed_is_named(local: Path, tmp_path: Path) -> None:
    source = opened(tmp_path)
    put("000010.tar", (local / "000010.tar").read_bytes()[:20000])
    with pytest.raises(DataError, match=r"000010\.tar/.*is cut: it ends \d+ bytes too early"):
        batches(source)


# What is remembered


def test_a_shard_is_read_once_and_again_when_it_changes(local: Path, tmp_path: Path) -> None:
    first = opened(tmp_path)
    read = set(Flaky.reads)
    assert read == {f"/set/0000{number}0.tar" for number in range(3)}
    Flaky.reads.clear()
    assert opened(tmp_path).fingerprint == first.fingerprint and not Flaky.reads
    assert opened(tmp_path, on_bad="skip", check="decode").fingerprint == first.fingerprint and set(Flaky.reads) == read
    Flaky.reads.clear()
    assert len(opened(tmp_path, check="decode")) == len(opened(tmp_path)) == 30 and not Flaky.reads
    put("000010.tar", (local / "000000.tar").read_bytes())
    assert len(opened(tmp_path)) == 30 and set(Flaky.reads) == {"/set/000010.tar"}


@pytest.mark.parametrize("change", ["cut", "places", "names", "kinds"])
def test_what_is_remembered_is_not_believed(
    local: Path, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = opened(tmp_path).fingerprint
    for path in (tmp_path / "cache" / "shards").iterdir():
        text = path.read_text()
        changed = {
            "cut": text[:-20],
            "places": text.replace(", 512, ", ", 99999999, "),
            "names": text.replace("00001.jpg", "00002.jpg")
            .replace("00011.jpg", "00012.jpg")
            .replace("21.jpg", "22.jpg"),
            "kinds": text.replace(", 512, ", ", [], "),
        }[change]
        assert changed != text
        path.write_text(changed)
    Flaky.reads.clear()
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path).fingerprint == expected
    assert len(caplog.records) == 3 and len(set(Flaky.reads)) == 3


def test_a_member_that_is_no_image_is_named_and_may_be_left_out(
    local: Path, tmp_path: Path, index: Index, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "x/bad.jpg", b"no image")
        add(archive, "x/cut.jpg", index.read(0)[:-300])
        add(archive, "x/good.jpg", index.read(0))
    put("000030.tar", path.read_bytes())
    for _ in range(2):  # the second time from what is remembered
        with pytest.raises(DataError, match=r"(?s)1 of 33 files under flaky://set.*set/000030\.tar/x/bad\.jpg"):
            opened(tmp_path)
    assert len(opened(tmp_path, on_bad="skip", check="decode", max_bad_frac=0.1)) == 31
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert main(["verify", "flaky://set"]) == 2
    assert "2 of 33 files" in capsys.readouterr().err


# A run


def test_a_run_whose_store_goes_away_is_saved_and_goes_on_as_if_nothing_had_been(
    tiny: Config, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = replace(tiny, data=replace(tiny.data, data=str(local), bad_images="skip"))
    there = replace(here, data=replace(here.data, data="flaky://set"))
    assert pretrain(here, tmp_path / "a") == 0
    Flaky.down_after = 60  # three shards are decoded, a picture is made, and some batches of 8 come
    with pytest.raises(DataError, match="cannot be reached"):
        pretrain(there, tmp_path / "b")
    Flaky.down_after = float("inf")
    monkeypatch.setattr(module, "_down", {})
    assert pretrain(there, tmp_path / "b", resume=True) == 0
    assert same_ends(tmp_path / "a", tmp_path / "b")
