"""The list of images that a run keeps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from sdmp_train.data import open_folder
from sdmp_train.file_list import changed_files, file_list_name, store_file_list


def test_a_list_says_what_went_and_one_packed_to_fill_the_memory_is_not_read(image_folder: Path, tmp_path: Path):
    index = open_folder(image_folder, cache_dir=tmp_path / "cache")
    store_file_list(index, tmp_path)
    assert "1 went (bars/0.jpg)" in changed_files(index.fingerprint, index.subset(range(1, len(index))), tmp_path)
    path = tmp_path / file_list_name(index.fingerprint)
    lines = (json.dumps([f"{i:06}" + "x" * 60_000, 8, 8]).encode() + b"\n" for i in range(500))
    path.write_bytes(gzip.compress(b"".join(lines)))  # 30 MB of names in 50 kB
    assert "it is no list of images" in changed_files(index.fingerprint, index, tmp_path)
