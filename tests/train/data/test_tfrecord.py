"""TFRecords, written here as their format is described, byte by byte."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from loaded import assert_same, batches

from sdmp_train.data import DataError, Index, kind_of, open_source
from sdmp_train.data import walks as module
from sdmp_train.data.tfrecord import crc32c, is_tfrecord
from sdmp_train.verify import verify_data


def crc_by_bits(data: bytes) -> int:
    """CRC-32C by its polynomial 0x1EDC6F41, bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc_by_bits(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def numbers(*values: int, packed: bool = True) -> bytes:
    held = field(1, b"".join(map(varint, values))) if packed else b"".join(b"\x08" + varint(v) for v in values)
    return field(3, held)


def example(features: dict[str, bytes]) -> bytes:
    """tf.train.Example; the values are Features."""
    return field(1, b"".join(field(1, field(1, name.encode()) + field(2, held)) for name, held in features.items()))


def record(data: bytes) -> bytes:
    length = len(data).to_bytes(8, "little")
    return length + masked(length) + data + masked(data)


def imagenet(image: bytes, label: int) -> bytes:
    """As ImageNet's records are: other fields around, floats among them."""
    floats = field(2, field(1, b"\0\0\x80\x3f" * 2))
    return example(
        {
            "image/height": numbers(480),
            "image/object/bbox/xmin": floats,
            "image/encoded": field(1, field(1, image)),
            "image/class/label": numbers(label),
            "image/class/text": field(1, field(1, b"tench, Tinca tinca")),
        }
    )


def tfds(image: bytes, label: int) -> bytes:
    """As TensorFlow Datasets': the label not packed, the value before the name."""
    label_entry = field(1, field(2, numbers(label, packed=False)) + field(1, b"label"))
    return field(1, field(1, field(1, b"image") + field(2, field(1, field(1, image)))) + label_entry)


@pytest.fixture
def records(index: Index, tmp_path: Path) -> Path:
    """The 30 images in three files, and six of them in two of another split."""
    root = tmp_path / "records"
    root.mkdir()
    for name, count, rows in (("train", 3, range(30)), ("validation", 2, range(0, 30, 5))):
        for shard in range(count):
            data = [record(imagenet(index.read(row), int(index.labels[row]))) for row in rows[shard::count]]
            (root / f"{name}-{shard:05d}-of-{count:05d}").write_bytes(b"".join(data))
    return root


def opened(place: Path | str, tmp_path: Path, **options: object) -> Index:
    return open_source(place, cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 9, 511, 512, 513, 2000])
def test_the_check_sum(length: int) -> None:
    data = bytes((7 * i + i // 256) % 256 for i in range(length))
    assert crc32c(data) == crc_by_bits(data)
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's


def test_the_bytes_of_a_list_in_their_order(index: Index, records: Path, tmp_path: Path) -> None:
    order = [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]
    (tmp_path / "list.txt").write_text("".join(f"{index.path(row)} {index.labels[row]}\n" for row in order))
    source, expected = opened(records, tmp_path), opened(tmp_path / "list.txt", tmp_path)
    assert kind_of(records) == "shards"
    assert [source.read(row) for row in range(30)] == [index.read(row) for row in order]
    assert source.classes == expected.classes == ("0", "1", "2")
    assert "shards of another split not used: 2" in source.notes
    for loader in ("torchvision", "resident"):
        assert_same(batches(source, loader), batches(expected))
    assert_same(batches(source, start_step=4), batches(expected)[4:])


def test_splits_by_their_names(index: Index, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = opened(records, tmp_path, split="val")
    assert [test.read(row) for row in range(6)] == [index.read(row) for row in (0, 10, 20, 5, 15, 25)]
    assert len(opened(records, tmp_path, split=None)) == 36
    verify_data(str(records))
    assert capsys.readouterr().out.splitlines()[0].startswith("train: 30 images, 3 classes")


def test_they_are_walked_once(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(records, tmp_path).fingerprint
    monkeypatch.setattr(module, "open_regular", None)
    assert opened(records, tmp_path).fingerprint == before


def test_behind_a_url(index: Index, tmp_path: Path) -> None:
    data = b"".join(record(tfds(index.read(row), -row)) for row in range(3))
    fsspec.filesystem("memory").pipe_file("/records/set-train.tfrecord-00000-of-00001", data)
    source = opened("memory://records", tmp_path)
    assert [source.read(row) for row in range(3)] == [index.read(row) for row in range(3)]
    assert source.classes == ("-1", "-2", "0")


def test_names() -> None:
    assert all(
        map(is_tfrecord, ("a.tfrecord", "a.TFRecords", "a-train.tfrecord-00001-of-00010", "train-00000-of-01024"))
    )
    assert not any(map(is_tfrecord, (".a.tfrecord", "a.tfrecord.gz", "train-00000-of-00002.parquet", "train", "a.tar")))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:-10], r"2 of 10 files|\.tfrecord' is cut: record 1 ends behind it"),
        (lambda data: data + b"\x01" * 20, "is damaged: no record begins at byte"),
        (lambda data: b"\x1f\x8b" + data, "cannot be read as an uncompressed TFRecord file"),
        (lambda data: data + record(example({"image/height": numbers(3)})), r"00000002' is no tf\.train\.Example with"),
        (lambda data: data + record(b"\x0a\xff\xff"), r"00000002' is no tf\.train\.Example with"),
        (lambda data: data + record(imagenet(b"no image", 1)), r"00000002\.image' is not an image of a known format"),
    ],
)
def test_what_cannot_be_used(index: Index, tmp_path: Path, spoil, said: str) -> None:
    data = b"".join(record(imagenet(index.read(row), row)) for row in range(2))
    (tmp_path / "a.tfrecord").write_bytes(spoil(data))
    with pytest.raises(DataError, match=said):
        opened(tmp_path / "a.tfrecord", tmp_path)


def test_a_flipped_bit_is_found_where_every_file_is_decoded_first(index: Index, tmp_path: Path) -> None:
    """No decoder can tell, the check sum can."""
    first, second = (record(imagenet(index.read(row), row)) for row in range(2))
    place = tmp_path / "a.tfrecord"
    for at in range(len(first) // 2, len(first) - 10, 100):
        spoilt = bytearray(first)
        spoilt[at] ^= 4
        place.write_bytes(bytes(spoilt) + second)
        index_of_whole = opened(place, tmp_path, on_bad="list", check="decode")
        assert len(index_of_whole) == 1 and "the check sum of its record is another" in index_of_whole.faults
