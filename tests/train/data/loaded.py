"""What loaders give, and whether it is the same; members of tar files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

import torch

from sdmp_kernels.views import byol_views
from sdmp_train.data import Batch, Index, make_loader


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def batches(index: Index, loader: str = "torchvision", **changes: object) -> list[Batch]:
    arguments = {"batch_size": 8, "steps": 5, "seed": 5, "device": "cpu", "workers": 0, **changes}
    with make_loader(index, byol_views(48), loader=loader, **arguments) as made:
        return list(made)


def assert_same(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
