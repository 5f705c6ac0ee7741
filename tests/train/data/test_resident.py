"""Images kept on the device: the same batches as from files, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from file_kinds import smooth_picture
from loaded import assert_same

from sdmp_kernels.views import ViewRecipe, byol_views, dino_views
from sdmp_train.data import Batch, DataError, Index, eval_loader, make_loader, open_folder, resident
from sdmp_train.data.images import decode_rgb

CPU = torch.device("cpu")


def batches(index: Index, loader: str, recipes: Sequence[ViewRecipe] | None = None, **changes: object) -> list[Batch]:
    arguments = {"batch_size": 8, "steps": 5, "seed": 5, "device": "cpu", "workers": 0, **changes}
    with make_loader(index, recipes or byol_views(64), loader=loader, **arguments) as made:
        return list(made)


@pytest.mark.parametrize("recipes", [byol_views((48, 80)), dino_views(64, 32, 2)], ids=["byol", "dino"])
def test_the_bytes_are_those_of_decoding_anew(index: Index, recipes: Sequence[ViewRecipe]) -> None:
    assert_same(batches(index, "resident", recipes), batches(index, "torchvision", recipes))


def test_images_lie_one_after_another(index: Index) -> None:
    images = resident.Images(index, CPU, 3)
    assert len(images.pixels) == images.offsets[-1] == sum(3 * index.heights.astype(int) * index.widths)
    for row, image in enumerate(images.take(np.arange(len(index))).unbind()):
        assert image.data_ptr() == images.pixels.data_ptr() + images.offsets[row]
        np.testing.assert_array_equal(image.numpy(), np.asarray(decode_rgb(index.path(row))))


@pytest.mark.parametrize("start", [1, 3, 4])
def test_resuming_gives_the_batches_of_the_unbroken_run(index: Index, start: int) -> None:
    assert_same(batches(index, "resident")[start:], batches(index, "resident", start_step=start))


def test_ranks_partition_the_global_batch(index: Index) -> None:
    parts = [batches(index, "resident", batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(batches(index, "resident")):
        assert torch.equal(torch.cat([part[step].views[0] for part in parts]), batch.views[0])


def test_no_file_is_read_once_it_is_open(tmp_path: Path) -> None:
    for i in range(6):
        smooth_picture(np.random.default_rng(i), 40, 30).save(tmp_path / f"{i}.png")
    index = open_folder(tmp_path, cache_dir=tmp_path / ".cache")
    expected = batches(index, "torchvision", batch_size=3)
    with make_loader(
        index, byol_views(64), batch_size=3, steps=5, seed=5, device="cpu", loader="resident", workers=2
    ) as made:
        for path in tmp_path.glob("*.png"):
            path.unlink()
        assert made.name == "resident"
        next(iter(made))
        assert_same(list(made), expected)
        assert "stay on cpu" in made.why
    with pytest.raises(DataError, match="6 image files could not be decoded"):
        list(made)  # closed: the images are gone, and their files too


def test_damaged_files_are_all_named_before_the_first_step(tmp_path: Path) -> None:
    for i in range(6):
        smooth_picture(np.random.default_rng(i), 40, 30).save(tmp_path / f"{i}.tif")
    index = open_folder(tmp_path, cache_dir=tmp_path / ".cache")
    for name in ("1.tif", "4.tif"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"(?s)2 image files could not be decoded:.*1\.tif.*4\.tif"):
        make_loader(index, byol_views(64), batch_size=2, steps=1, seed=0, device="cpu", loader="resident")


def test_a_set_that_does_not_fit_is_refused_before_it_is_decoded(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    many = np.full(len(index), 2**15, dtype=np.int32)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2 * 2**30)
    with pytest.raises(DataError, match=r"30 decoded images take 90\.00 GiB, but 2\.00 GiB are free on cpu"):
        batches(replace(index, heights=many, widths=many), "resident")
    needed = int(resident.Images(index, CPU, 1).offsets[-1])
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2 * needed)
    resident.check_memory(index, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(DataError, match="in each of 2 processes"):
        resident.check_memory(index, CPU)


def test_free_memory_is_within_what_the_machine_has() -> None:
    free = resident.free_bytes(CPU)
    if free is None:
        pytest.skip("this system does not say how much memory is free")
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < free <= int(total.split()[1]) * 1024


def test_evaluation_decodes_each_image_once_by_pillow(index: Index) -> None:
    with eval_loader(index, 24, batch_size=8, device="cpu", loader="resident", workers=0) as made:
        assert made.name == "torchvision"
        assert torch.cat([batch.ids for batch in made]).tolist() == list(range(30))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("one_size", [True, False])
def test_a_gpu_serves_one_size_and_many(tmp_path: Path, one_size: bool) -> None:
    """The backends of augment may differ by one level of rounding."""
    for i in range(16):
        side = 48 if one_size else 40 + i
        smooth_picture(np.random.default_rng(i), side, 48).save(tmp_path / f"{i}.png")
    index = open_folder(tmp_path, cache_dir=tmp_path / ".cache")
    ours, theirs = batches(index, "resident", device="cuda"), batches(index, "torchvision")
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.views, b.views, strict=True):
            assert x.is_cuda
            assert (x.cpu().int() - y.int()).abs().max() <= 1
