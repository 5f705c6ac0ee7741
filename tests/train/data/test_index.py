"""Folders, good and bad, and the cache of their headers."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdmp_train.data.index as index_module
from sdmp_train.data import DataError, Index, TooManyBadFiles, open_folder
from sdmp_train.data.channels import decode, size_of
from sdmp_train.data.images import MAX_PIXELS, decode_rgb
from sdmp_train.data.index import find_bad
from sdmp_train.text import printable


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the pictures that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def save(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)
    return path


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_rows_sizes_and_classes(index: Index, folder: Path) -> None:
    assert len(index) == 30
    assert index.classes == ("apple", "pear", "plum")
    assert index.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    for row in range(30):
        with Image.open(index.path(row)) as image:
            assert image.size == (index.widths[row], index.heights[row])
            assert Path(index.path(row)).parent == folder / index.classes[index.labels[row]]
    assert "30 images, 3 classes" in index.summary()


def test_order_is_folder_by_folder_and_name_by_name(tmp_path: Path, cache: Path) -> None:
    for name in ("b/2.jpg", "b/10.jpg", "a-b/1.png", "a/z.jpg", "a/deep/er/1.webp"):
        save(tmp_path / "data" / name)
    index = open_folder(tmp_path / "data", cache_dir=cache)
    assert list(index.paths) == ["a/deep/er/1.webp", "a/z.jpg", "a-b/1.png", "b/10.jpg", "b/2.jpg"]
    assert [index.classes[label] for label in index.labels] == ["a", "a", "a-b", "b", "b"]


def test_images_outside_class_folders_mean_no_classes(tmp_path: Path, cache: Path) -> None:
    for name in ("1.jpg", "a/2.jpg"):
        save(tmp_path / "data" / name)
    index = open_folder(tmp_path / "data", cache_dir=cache)
    assert index.classes == ()
    assert index.labels.tolist() == [-1, -1]


def test_splits(tmp_path: Path, cache: Path) -> None:
    for name in ("train/a/1.jpg", "train/b/2.jpg", "test/a/3.jpg"):
        save(tmp_path / "data" / name)
    assert open_folder(tmp_path / "data", cache_dir=cache).classes == ("a", "b")
    assert list(open_folder(tmp_path / "data", split="val", cache_dir=cache).paths) == ["a/3.jpg"]
    assert open_folder(tmp_path / "data", split=None, cache_dir=cache).classes == ("test", "train")
    with pytest.raises(DataError, match="holds none of the folders val, validation, test"):
        open_folder(tmp_path / "data" / "train", split="val", cache_dir=cache)


def test_odd_names(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "data"
    names = [b"line\nbreak.JPG", b"not-utf8-\xff.jpeg", "ünï.png".encode(), b".hidden.jpg", b"._mac.jpg"]
    for name in names:
        save(root / os.fsdecode(name))
    save(root / "folder.jpg" / "inside.jpg")
    for _ in range(2):  # read, then from the cache
        index = open_folder(root, cache_dir=cache)
        assert {os.fsencode(name) for name in index.paths} == {*names[:3], b"folder.jpg/inside.jpg"}
        assert all(os.path.exists(index.path(row)) for row in range(len(index)))


def test_links(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "data"
    save(root / "a" / "1.jpg")
    save(tmp_path / "elsewhere" / "2.jpg")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root)
    index = open_folder(root, cache_dir=cache)
    assert list(index.paths) == ["a/1.jpg", "b/2.jpg"]
    (root / "a" / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    with pytest.raises(DataError, match=r"dangling\.jpg.*leads nowhere"):
        open_folder(root, cache_dir=cache)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"there is no folder .*data; the nearest that exists is"),
        (lambda root: root.write_text("x"), "is a file, not a folder"),
        (lambda root: root.mkdir(), "is empty"),
        (lambda root: (root.mkdir(), (root / "notes.txt").write_text("x")), r"looked for \.jpg .* found 1 \.txt"),
        (lambda root: (root.mkdir(), (root / "images.tar").write_text("x")), r"found 1 \.tar; unpack it first"),
        (lambda root: (root.mkdir(), (root / "a.parquet").write_text("x")), r"1 \.parquet; write it out as tar shards"),
        (lambda root: (root.mkdir(), (root / "README").write_text("x")), "found 1 no suffix"),
    ],
)
def test_what_is_no_folder_of_images_is_said(tmp_path: Path, cache: Path, make, message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        open_folder(tmp_path / "data", cache_dir=cache)
    assert caught.value.exit_code == 2


def test_an_archive_is_told_to_be_unpacked(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "data.tar").write_bytes(b"x")
    with pytest.raises(DataError, match="unpack it first"):
        open_folder(tmp_path / "data.tar", cache_dir=cache)


def test_classes_that_would_vanish_stop_by_name(own: Path, cache: Path) -> None:
    (own / "quince").mkdir()
    (own / "cherry").symlink_to(own / "nowhere")
    for i in range(3):
        (own / "pear" / f"{i}.heic").write_bytes(b"x")
        save(own / "fig" / f"{i}.png").rename(own / "fig" / f"{i}.heic")
    with pytest.raises(DataError) as caught:
        open_folder(own, cache_dir=cache)
    for said in (
        "'quince' is empty",
        "'fig' holds no usable image, only 3 .heic",
        "'cherry' is, or holds only, a link",
    ):
        assert said in str(caught.value)
    index = open_folder(own, on_bad="skip", cache_dir=cache)
    assert index.classes == ("apple", "pear", "plum")
    assert "7 files passed over: 6 .heic, 1 dead link (in cherry, fig, pear)" in index.summary()
    assert "no image in cherry" in index.summary()
    assert "quince (is empty)" in index.summary()


def test_papers_beside_classes_are_said_and_stop_nothing(own: Path, cache: Path) -> None:
    for name in ("meta/a.json", "meta/b.txt", "pear/0.xml", "README.md"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("x")
    index = open_folder(own, cache_dir=cache)
    assert len(index) == 30
    assert "4 files passed over" in index.summary()
    assert "no image in meta" in index.summary()


def test_papers_beside_one_folder_of_images(tmp_path: Path, cache: Path) -> None:
    save(tmp_path / "data" / "images" / "1.jpg")
    (tmp_path / "data" / "videos").mkdir()
    assert len(open_folder(tmp_path / "data", cache_dir=cache)) == 1
    (tmp_path / "data" / "raws").mkdir()
    (tmp_path / "data" / "raws" / "1.nef").write_bytes(b"x")
    with pytest.raises(DataError, match=r"'raws' holds no usable image, only 1 \.nef"):
        open_folder(tmp_path / "data", cache_dir=cache)


def test_files_without_a_suffix_are_told_by_their_content(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "data"
    for i, suffix in enumerate(("jpg", "png", "webp", "gif", "tif")):
        save(root / f"{i}.{suffix}").rename(root / str(i))
    (root / "README").write_text("BM, P6 and II begin pictures too")
    (root / "torn").write_bytes((root / "1").read_bytes()[:20])
    for _ in range(2):
        index = open_folder(root, on_bad="skip", max_bad_frac=0.2, cache_dir=cache)
        assert list(index.paths) == ["0", "1", "2", "3", "4"]
        assert "1 file passed over: 1 no suffix" in index.summary()
        assert [os.path.basename(bad.path) for bad in index.bad] == ["torn"]


def test_folders_of_runs_and_of_systems_are_no_data(own: Path, cache: Path) -> None:
    before = open_folder(own, cache_dir=cache)
    for name in (".sdmp-run.json", "config.yaml", "mix.png"):
        (save(own / "runs" / "new" / "mix.png").parent / name).touch()
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/x"):
        save(own / "old" / "mix.png").parent.joinpath(name).parent.mkdir(exist_ok=True)
        (own / "old" / name).touch()
    save(own / "__MACOSX" / "a.png")
    (own / "lost+found").mkdir()
    after = open_folder(own, cache_dir=cache)
    assert after.fingerprint == before.fingerprint
    assert after.notes == ()
    with pytest.raises(DataError, match="folder of a run"):
        open_folder(own / "old", cache_dir=cache)


def test_only_regular_files_are_opened(own: Path, cache: Path) -> None:
    """A FIFO would wait for a writer for ever."""
    os.mkfifo(own / "pear" / "fifo.jpg")
    os.mkfifo(own / "pear" / "fifo")
    (own / "pear" / "self.jpg").symlink_to(own / "pear" / "self.jpg")
    (own / "pear" / "null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        try:
            os.chdir(own / "pear")  # the path of a socket may not be long
            listener.bind("socket.jpg")
        finally:
            os.chdir(here)
        index = open_folder(own, on_bad="skip", max_bad_frac=0.2, cache_dir=cache)
    reasons = {os.path.basename(bad.path): bad.reason for bad in index.bad}
    assert set(reasons) == {"fifo.jpg", "self.jpg", "null.jpg", "socket.jpg"}
    assert reasons["fifo.jpg"] == "is a FIFO, not a regular file"
    assert reasons["null.jpg"] == "is a device, not a regular file"
    with pytest.raises(ValueError, match="FIFO"):
        decode_rgb(str(own / "pear" / "fifo.jpg"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_closed_folder_is_listed(own: Path, cache: Path) -> None:
    check_closed_folder(own, cache)


def test_a_folder_that_cannot_be_listed_is_left_out(own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str):
        if os.path.basename(path) == "plum":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    check_closed_folder(own, cache)


def check_closed_folder(own: Path, cache: Path) -> None:
    (own / "plum").chmod(0)
    try:
        with pytest.raises(DataError, match=r"1 folder .*\n.*plum' may not be read by this user"):
            open_folder(own, cache_dir=cache)
        index = open_folder(own, on_bad="skip", cache_dir=cache)
    finally:
        (own / "plum").chmod(0o755)
    assert index.classes == ("apple", "pear")
    assert [(os.path.basename(bad.path), bad.reason) for bad in index.bad] == [("plum", "may not be read by this user")]


def test_names_are_printed_without_what_a_terminal_obeys(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "da\x1b[2Jta"
    save(root / os.fsdecode(b"b\xe4r\n") / "1.png")
    summary = open_folder(root, cache_dir=cache).summary()
    assert "da\\x1b[2Jta" in summary
    assert printable(os.fsdecode(b"b\xe4r\n\x9b")) == "b\\xe4r\\n\\x9b"
    assert printable("ünï \u202e") == "ünï \\u202e"


BAD_HEADERS = {
    "empty.jpg": (b"", "not an image"),
    "text.jpg": (b"hello" * 20, "not an image"),
    "gif.jpg": (b"GIF89a" + bytes(40), "not an image"),
    "large.png": (bomb(10000, 9500), "claims 10000 x 9500 pixels, more than the limit"),
    "bomb.png": (bomb(30000, 30000), "claims far more pixels"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
@pytest.mark.parametrize("place", ["apple", "plum"])
def test_bad_headers_stop_by_name(own: Path, cache: Path, name: str, place: str) -> None:
    content, reason = BAD_HEADERS[name]
    (own / place / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"1 of 31 files.*\n.*{name}.*{reason}.*\n.*--bad-images skip"):
        open_folder(own, cache_dir=cache)


def test_bad_files_are_left_out_and_listed(own: Path, cache: Path, index: Index) -> None:
    for name, (content, _) in BAD_HEADERS.items():
        (own / "pear" / name).write_bytes(content)
    skipped = open_folder(own, on_bad="skip", max_bad_frac=0.2, cache_dir=cache)
    assert list(skipped.paths) == list(index.paths)
    assert [os.path.basename(bad.path) for bad in skipped.bad] == sorted(BAD_HEADERS)
    with pytest.raises(TooManyBadFiles, match=r"14\.3%, more than the 5\.0%") as caught:
        open_folder(own, on_bad="skip", max_bad_frac=0.05, cache_dir=cache)
    assert caught.value.exit_code == 4


def test_nothing_usable_is_refused_even_when_skipping(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_text("no")
    with pytest.raises(TooManyBadFiles, match="No usable image"):
        open_folder(tmp_path / "data", on_bad="skip", max_bad_frac=1.0, cache_dir=cache)


def test_truncation_is_found_by_decoding(own: Path, cache: Path) -> None:
    victims = {}
    for percent in range(30, 100, 5):
        path = own / "apple" / f"cut{percent}.jpg"
        whole = (own / "apple" / "0.jpg").read_bytes()
        path.write_bytes(whole[: len(whole) * percent // 100])
        victims[path.name] = path
    (own / "apple" / "cut-2-bytes.jpg").write_bytes((own / "apple" / "0.jpg").read_bytes()[:-2])
    checked = open_folder(own, check="decode", on_bad="skip", max_bad_frac=0.5, cache_dir=cache)
    assert len(checked) == 30
    assert {os.path.basename(bad.path) for bad in checked.bad} == {*victims, "cut-2-bytes.jpg"}
    assert all("truncated" in bad.reason for bad in checked.bad)


def test_pixel_limit(own: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="claims 200 x 150 pixels, more than the limit of 20,000"):
        open_folder(own, max_pixels=20_000, cache_dir=cache)
    assert len(open_folder(own, cache_dir=cache)) == 30
    with pytest.raises(DataError, match="more than the limit"):  # also of what the cache knows
        open_folder(own, max_pixels=20_000, cache_dir=cache)
    assert Image.MAX_IMAGE_PIXELS >= MAX_PIXELS


def test_second_opening_reads_only_what_changed(own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def spy(path: str, channels: int, max_pixels: int) -> tuple[int, int]:
        read.append(os.path.basename(path))
        return size_of(path, channels, max_pixels)

    monkeypatch.setattr(index_module, "size_of", spy)
    first = open_folder(own, cache_dir=cache)
    assert len(read) == 30
    read.clear()
    second = open_folder(own, cache_dir=cache)
    assert read == []
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.heights, first.heights)
    save(own / "pear" / "0.jpg", (17, 19))
    save(own / "pear" / "new.png", (5, 5))
    (own / "plum" / "3.jpg").unlink()
    third = open_folder(own, cache_dir=cache)
    assert sorted(read) == ["0.jpg", "new.png"]
    row = list(third.paths).index("pear/0.jpg")
    assert (third.widths[row], third.heights[row]) == (17, 19)
    assert third.fingerprint != first.fingerprint


def test_decode_check_is_remembered(own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def spy(path: str, channels: int) -> Image.Image:
        decoded.append(path)
        return decode(path, channels)

    monkeypatch.setattr(index_module, "decode", spy)
    open_folder(own, cache_dir=cache)
    assert decoded == []
    open_folder(own, check="decode", cache_dir=cache)
    assert len(decoded) == 30
    open_folder(own, check="decode", cache_dir=cache)
    assert len(decoded) == 30


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
def test_a_broken_cache_is_rebuilt(own: Path, cache: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    whole = open_folder(own, cache_dir=cache)
    (file,) = (cache / "index").iterdir()
    file.write_bytes(content)
    assert open_folder(own, cache_dir=cache).fingerprint == whole.fingerprint
    assert "cannot be read" in caplog.text
    caplog.clear()
    open_folder(own, cache_dir=cache)
    assert caplog.text == ""


def store_columns(file: Path, **changes: object) -> None:
    with np.load(file) as stored:
        columns = {**stored, **changes}
    np.savez(file, **columns)


def lie_about_length(file: Path) -> None:
    """The header of a column claims 10 ** 12 rows; the archive's checksums are right."""
    with zipfile.ZipFile(file) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    members["heights.npy"] = members["heights.npy"].replace(b"(30,), }          ", b"(1000000000000,), }")
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "spoil",
    [
        lie_about_length,
        lambda file: store_columns(file, heights=np.full(30, -8, np.int32)),
        lambda file: store_columns(file, widths=np.zeros(30, np.int32)),
        lambda file: store_columns(file, bytes=np.full(30, -1, np.int64)),
        lambda file: store_columns(file, mtimes=np.zeros(29, np.int64)),
        lambda file: store_columns(file, heights=np.full(30, 8, np.float64)),
        lambda file: store_columns(file, names=np.zeros(3, np.uint8)),
        lambda file: np.savez_compressed(file, names=np.zeros(1 << 22, np.uint8)),
        lambda file: np.savez(file, names=np.array([{}], dtype=object)),
        lambda file: (file.unlink(), os.mkfifo(file)),
    ],
    ids=["length", "negative", "zero", "bytes", "short", "type", "names", "packed", "object", "fifo"],
)
def test_a_cache_that_lies_is_rebuilt(
    own: Path, cache: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    whole = open_folder(own, cache_dir=cache)
    (file,) = (cache / "index").iterdir()
    spoil(file)
    assert open_folder(own, cache_dir=cache).fingerprint == whole.fingerprint
    assert "cannot be read" in caplog.text


def test_no_home_costs_a_notice(own: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert len(open_folder(own)) == 30
    assert "no home folder" in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_notice(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "occupied").write_text("a file where the cache folder should be")
    assert len(open_folder(own, cache_dir=tmp_path / "occupied")) == 30
    assert "cannot be written" in caplog.text


def test_cache_leaves_no_drafts(own: Path, cache: Path) -> None:
    open_folder(own, cache_dir=cache)
    assert [file.suffix for file in (cache / "index").iterdir()] == [".npz"]


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert index_module.cache_folder(None) == tmp_path / "sdmp"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert index_module.cache_folder(None) == Path.home() / ".cache" / "sdmp"


def test_subset(index: Index) -> None:
    part = index.subset(np.array([29, 3]))
    assert [part.path(0), part.path(1)] == [index.path(29), index.path(3)]
    assert part.labels.tolist() == [2, 0]
    assert part.classes == index.classes
    assert part.widths.tolist() == [index.widths[29], index.widths[3]]


def test_find_bad_names_damaged_and_changed_files(own: Path, cache: Path) -> None:
    index = open_folder(own, cache_dir=cache)
    damaged, changed = Path(index.path(4)), Path(index.path(7))
    damaged.write_bytes(damaged.read_bytes()[:200])
    save(changed, (3, 3))
    bad = find_bad(index, range(len(index)))
    assert [file.path for file in bad] == [str(damaged), str(changed)]
    assert "3 x 3 pixels now" in bad[1].reason


def test_progress_is_told(own: Path, cache: Path) -> None:
    told: list[tuple[int, int]] = []
    open_folder(own, cache_dir=cache, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (30, 30)


def test_one_process_at_a_time_decodes_and_the_next_finds_its_work(
    own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def slow(path: str, channels: int) -> Image.Image:
        decoded.append(path)
        time.sleep(0.01)
        return decode(path, channels)

    monkeypatch.setattr(index_module, "decode", slow)
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(open_folder, own, check="decode", cache_dir=cache, workers=1) for _ in range(3)]
        assert [len(future.result()) for future in found] == [30, 30, 30]
    assert len(decoded) == 30


@pytest.mark.parametrize(("name", "value"), [("split", "tset"), ("on_bad", "ignore")])
def test_bad_choices_are_refused(own: Path, cache: Path, name: str, value: str) -> None:
    (own / "apple" / "bad.jpg").write_text("x")
    with pytest.raises(ValueError, match=name):
        open_folder(own, cache_dir=cache, **{name: value})
