"""Both loaders: the same views, from (seed, step) alone, whatever carries them out."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import signal
import tarfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from file_kinds import HEIGHT, WIDTH, kinds, smooth_picture, without_segment
from loaded import assert_same
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from sdmp_kernels import _backends, augment, draw_views
from sdmp_train.data import (
    Batch,
    DataError,
    EvalView,
    Index,
    ViewRecipe,
    byol_views,
    dino_views,
    eval_loader,
    make_loader,
    open_folder,
    steps_per_epoch,
)
from sdmp_train.data import torchvision as portable
from sdmp_train.data.choice import choose_loader
from sdmp_train.data.images import decode_rgb

HAVE_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAVE_DALI, reason="DALI is not installed")
LOADERS = [pytest.param("dali", marks=needs_dali), "torchvision"]
SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "imagenet-sample.tar"

CROP = ViewRecipe(32)


def batches(index: Index, recipes: Sequence[ViewRecipe | EvalView] = (CROP,), **changes: object) -> list[Batch]:
    arguments = {"batch_size": 8, "steps": 3, "seed": 5, "device": "cpu", "workers": 0, **changes}
    with make_loader(index, recipes, **arguments) as loader:
        return list(loader)


# What a batch is


@pytest.mark.parametrize("loader", LOADERS)
def test_batch(index: Index, loader: str) -> None:
    recipes = (CROP, ViewRecipe(16, flip_prob=0))
    for batch in batches(index, recipes, loader=loader):
        assert [tuple(view.shape) for view in batch.views] == [(8, 3, 32, 32), (8, 3, 16, 16)]
        for view in batch.views:
            assert view.dtype == torch.uint8
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert batch.ids.dtype == batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == index.labels[batch.ids.numpy()].tolist()
        assert batch.valid.dtype == torch.bool and batch.valid.tolist() == [True] * len(batch.ids)


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_may_be_kept(index: Index, loader: str) -> None:
    """Held while 40 more are made, and after the loader is gone, they do not change."""
    with make_loader(index, (CROP,), batch_size=8, steps=40, seed=5, device="cpu", loader=loader, workers=0) as made:
        kept, copies = [], []
        for batch in made:
            kept.append(batch.views[0])
            copies.append(batch.views[0].clone())
    del made
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("loader", LOADERS)
def test_views_are_cut_from_the_image_they_are_named_after(index: Index, loader: str) -> None:
    for batch in batches(index, (EvalView(24, 24),), loader=loader):
        for row, view in zip(batch.ids.tolist(), batch.views[0], strict=True):
            image = Image.open(index.path(row)).convert("RGB")
            expected = tv.pil_to_tensor(tv.center_crop(tv.resize(image, [24]), [24, 24]))
            assert (view.float() - expected.float()).abs().mean() < 0.6


@pytest.mark.parametrize("loader", LOADERS)
def test_a_view_is_the_drawn_crop(index: Index, loader: str) -> None:
    recipe = ViewRecipe(24)
    for step, batch in enumerate(batches(index, (recipe,), loader=loader)):
        rows = batch.ids.numpy()
        drawn = draw_views(recipe, index.heights[rows], index.widths[rows], seed=5, step=step, view=0)
        assert drawn.flip.any()
        for i, row in enumerate(rows):
            expected = tv.resized_crop(decode_rgb(index.path(int(row))), *drawn.box[i].tolist(), size=[24, 24])
            expected = tv.horizontal_flip(expected) if drawn.flip[i] else expected
            assert (batch.views[0][i].float() - tv.pil_to_tensor(expected).float()).abs().mean() < 0.6


# The two loaders agree


def both(index: Index, recipes: Sequence[ViewRecipe | EvalView], **changes: object) -> list[list[Batch]]:
    return [batches(index, recipes, loader=name, **changes) for name in ("dali", "torchvision")]


@needs_dali
@pytest.mark.parametrize(
    "recipes",
    [
        byol_views(64),
        byol_views((48, 80)),
        dino_views(64, 32, 2),
        (EvalView(24, 29), EvalView((16, 40), 20, "bicubic")),
    ],
    ids=["byol", "rectangular", "dino", "evaluation"],
)
def test_both_loaders_give_the_same_bytes(index: Index, recipes: tuple[ViewRecipe | EvalView, ...]) -> None:
    """On a CPU: the same pixels from either decoder, and one op that makes the views."""
    assert_same(*both(index, recipes))


@needs_dali
def test_both_loaders_give_the_same_bytes_on_photographs(tmp_path: Path) -> None:
    if not SAMPLE.exists():
        pytest.skip(f"needs {SAMPLE.name} in the shared data folder")
    with tarfile.open(SAMPLE) as archive:
        members = [member for member in archive.getmembers() if member.isfile()][::12]
        archive.extractall(tmp_path / "photos", members=members, filter="data")
    photos = open_folder(tmp_path / "photos", cache_dir=tmp_path / "cache")
    assert_same(*both(photos, byol_views(224), batch_size=5, steps=2))


@pytest.mark.parametrize("loader", LOADERS)
def test_views_are_those_of_augment(index: Index, loader: str) -> None:
    recipes = byol_views(64)
    for step, batch in enumerate(batches(index, recipes, loader=loader)):
        rows = batch.ids.numpy()
        images = [torch.from_numpy(np.array(decode_rgb(index.path(int(row))))) for row in rows]
        for number, recipe in enumerate(recipes):
            drawn = draw_views(recipe, index.heights[rows], index.widths[rows], seed=5, step=step, view=number)
            assert torch.equal(batch.views[number], augment(images, drawn, 64))


@needs_dali
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("recipes", [byol_views(64), byol_views(32), dino_views(64, 32, 2)], ids=["64", "32", "dino"])
def test_gpu_views_agree_and_may_be_kept(index: Index, recipes: tuple[ViewRecipe, ...]) -> None:
    """NVJPEG's inverse transform rounds differently from libjpeg's, and DALI rounds its crops before the colours."""
    expected = batches(index, recipes, loader="torchvision", steps=12)
    kept = batches(index, recipes, loader="dali", steps=12, device="cuda", workers=2)
    for ours, theirs in zip(kept, expected, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        for x, y in zip(ours.views, theirs.views, strict=True):
            assert x.is_cuda
            assert x.is_contiguous(memory_format=torch.channels_last)
            each = (x.cpu().float() - y.float()).abs().mean((1, 2, 3))
            assert each.mean() < 2.5
            assert each.max() < 4.0


# Nothing but (seed, step) matters


@pytest.mark.parametrize("loader", LOADERS)
def test_same_seed_same_batches(index: Index, loader: str) -> None:
    recipes = byol_views(64)
    assert_same(batches(index, recipes, loader=loader), batches(index, recipes, loader=loader))
    other = batches(index, recipes, loader=loader, seed=6)
    assert not torch.equal(batches(index, recipes, loader=loader)[0].views[0], other[0].views[0])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_second_iteration_starts_over(index: Index, loader: str) -> None:
    with make_loader(index, (CROP,), batch_size=8, steps=3, seed=5, device="cpu", loader=loader, workers=0) as made:
        assert len(made) == 3
        first = list(made)
        half_way = iter(made)
        next(half_way)
        assert_same(first, list(made))
        with pytest.raises(StopIteration):
            next(half_way)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("start", [1, 3, 4])
def test_resuming_gives_the_batches_of_the_unbroken_run(index: Index, loader: str, start: int) -> None:
    """30 images in batches of 8 are 3 steps per epoch, so the runs cross epochs."""
    recipes = byol_views(64)
    whole = batches(index, recipes, loader=loader, steps=5)
    assert_same(whole[start:], batches(index, recipes, loader=loader, steps=5, start_step=start))


@pytest.mark.parametrize("loader", LOADERS)
def test_ranks_partition_the_global_batch(index: Index, loader: str) -> None:
    recipes = byol_views(64)
    whole = batches(index, recipes, loader=loader, batch_size=8)
    parts = [batches(index, recipes, loader=loader, batch_size=2, rank=rank, world_size=4) for rank in range(4)]
    for step, batch in enumerate(whole):
        for view in range(2):
            assert torch.equal(torch.cat([part[step].views[view] for part in parts]), batch.views[view])
        assert torch.equal(torch.cat([part[step].ids for part in parts]), batch.ids)


@pytest.mark.parametrize(
    ("loader", "counts"), [pytest.param("dali", (1, 3), marks=needs_dali), ("torchvision", (0, 2))]
)
def test_worker_counts_are_irrelevant(index: Index, loader: str, counts: tuple[int, int]) -> None:
    recipes = byol_views(64)
    left, right = (batches(index, recipes, loader=loader, workers=count) for count in counts)
    assert_same(left, right)


def test_absent_kernels_are_said_once_by_all_processes(index: Index, monkeypatch, capfd) -> None:
    monkeypatch.setattr(_backends, "native_library", lambda device_type: "not built")
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: os.write(2, f"{message}\n".encode()))
    _backends._say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(2):
            batches(index, loader="torchvision", workers=2)
    assert capfd.readouterr().err.count("without compiled kernels") == 1


@pytest.mark.parametrize("loader", LOADERS)
def test_global_generators_are_neither_read_nor_moved(index: Index, loader: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    batches(index, byol_views(64), loader=loader)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2] == after[2]


def test_an_epoch_sees_every_image_at_most_once(index: Index) -> None:
    rows = [batch.ids for batch in batches(index, loader="torchvision", steps=6)]
    for epoch in (rows[:3], rows[3:]):
        assert len(set(torch.cat(epoch).tolist())) == 24
    assert not torch.equal(torch.cat(rows[:3]), torch.cat(rows[3:]))


def test_steps_per_epoch() -> None:
    assert steps_per_epoch(30, 8) == 3
    with pytest.raises(DataError, match="30 images, fewer than the batch size of 32"):
        steps_per_epoch(30, 32)
    with pytest.raises(ValueError, match="global_batch_size"):
        steps_per_epoch(30, 0)


# Evaluation


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_eval_sees_every_image_once_in_order(index: Index, loader: str, world_size: int) -> None:
    seen, sizes = [], []
    for rank in range(world_size):
        with eval_loader(
            index, 24, batch_size=4, device="cpu", loader=loader, workers=0, rank=rank, world_size=world_size
        ) as made:
            got = list(made)
            assert len(got) == len(made)
        seen += [batch.ids for batch in got]
        sizes.append(sum(len(batch.ids) for batch in got))
        assert all(len(batch.views[0]) == len(batch.ids) for batch in got)
        assert all(len(batch.ids) == 4 for batch in got[:-1])
    assert torch.cat(seen).tolist() == list(range(30))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("loader", LOADERS)
def test_small_images_are_not_touched_by_evaluation(tmp_path: Path, loader: str) -> None:
    """CIFAR: 32 px files at size 32 come out bit for bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    with eval_loader(
        open_folder(tmp_path, cache_dir=tmp_path / "cache"), 32, batch_size=3, device="cpu", loader=loader, workers=0
    ) as made:
        (batch,) = made
    np.testing.assert_array_equal(batch.views[0].permute(0, 2, 3, 1).numpy(), pixels)
    assert batch.labels.tolist() == [-1, -1, -1]


# File types


@pytest.fixture(scope="module")
def guises(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The golden corpus: one picture in every guise that has a meaning as RGB, and two that are narrow."""
    folder = tmp_path_factory.mktemp("guises")
    for name, (_, save) in kinds().items():
        save(folder / name)
    return open_folder(folder, check="decode", cache_dir=folder / ".cache")


def test_every_kind_of_file_is_an_image(guises: Index) -> None:
    assert set(guises.paths) == set(kinds())
    for row in range(len(guises)):
        image = decode_rgb(guises.path(row))
        assert image.size == (guises.widths[row], guises.heights[row])


def test_who_decodes_is_as_documented(guises: Index) -> None:
    found = {guises.paths[row]: "pillow" if guises.pillow[row] else "dali" for row in range(len(guises))}
    assert found == {name: who for name, (who, _) in kinds().items()}


@needs_dali
def test_every_kind_of_file_means_the_same_to_both(guises: Index) -> None:
    views = {}
    for name in ("dali", "torchvision"):
        # 36 px is their own height, so that nothing is resampled but the two narrow ones.
        with eval_loader(guises, HEIGHT, batch_size=len(guises), device="cpu", loader=name, workers=2) as made:
            views[name] = next(iter(made)).views[0].float()
    different = (views["dali"] != views["torchvision"]).flatten(1).any(1)
    assert [guises.paths[int(row)] for row in different.nonzero()] == []


@needs_dali
def test_every_kind_of_file_is_cropped_alike(guises: Index) -> None:
    assert_same(*both(guises, (CROP,), batch_size=len(guises), steps=2))


@pytest.mark.parametrize("loader", LOADERS)
def test_orientation_is_ignored(guises: Index, loader: str) -> None:
    """In every format, also where Pillow turns the picture on its own (TIFF)."""
    names = list(guises.paths)
    with eval_loader(guises, 24, batch_size=len(names), device="cpu", loader=loader, workers=0) as made:
        view = next(iter(made)).views[0]
    turned = [name for name in names if name.startswith("turned")]
    assert len(turned) >= 13
    for name in turned:
        assert guises.widths[names.index(name)] == WIDTH
        plain = next(other for other in ("plain", "lossy") if f"{other}.{name.rsplit('.', 1)[1]}" in names)
        expected = view[names.index(f"{plain}.{name.rsplit('.', 1)[1]}")]
        assert torch.equal(view[names.index(name)], expected), name


def test_an_orientation_in_xmp_is_ignored_too(tmp_path: Path) -> None:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={700: packet})
    index = open_folder(tmp_path, cache_dir=tmp_path / ".cache")
    assert (index.heights[0], index.widths[0]) == (4, 9)
    np.testing.assert_array_equal(np.asarray(decode_rgb(index.path(0))), pixels)


@pytest.mark.parametrize("loader", LOADERS)
def test_no_ink_is_white_with_or_without_an_adobe_marker(tmp_path: Path, loader: str) -> None:
    Image.new("CMYK", (32, 32)).save(tmp_path / "marked.jpg", quality=100)
    data = without_segment(0xEE)((tmp_path / "marked.jpg").read_bytes())
    (tmp_path / "unmarked.jpg").write_bytes(data)
    index = open_folder(tmp_path, cache_dir=tmp_path / ".cache")
    with eval_loader(index, 32, batch_size=2, device="cpu", loader=loader, workers=0) as made:
        assert int(next(iter(made)).views[0].min()) >= 254


@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_file_that_pillow_decodes_is_named(tmp_path: Path, loader: str) -> None:
    for i in range(6):
        smooth_picture(np.random.default_rng(i), 40, 30).save(tmp_path / f"{i}.tif")
    index = open_folder(tmp_path, cache_dir=tmp_path / ".cache")
    victim = tmp_path / "4.tif"
    victim.write_bytes(victim.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"1 image file could not be decoded:\n.*4\.tif"):
        batches(index, batch_size=6, loader=loader)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(decode_rgb(str(tmp_path / "deep.png")))[0, :, 0].tolist() == [0, 1, 128, 255]


# Damage


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("position", [0, 7, 29])
def test_a_damaged_file_is_named(tmp_path: Path, index: Index, loader: str, workers: int, position: int) -> None:
    for row in range(len(index)):
        copy = tmp_path / "own" / index.paths[row]
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(Path(index.path(row)).read_bytes())
    own = open_folder(tmp_path / "own", cache_dir=tmp_path / "cache")
    victim = Path(own.path(position))
    victim.write_bytes(victim.read_bytes()[:-20])
    with (
        eval_loader(own, 16, batch_size=8, device="cpu", loader=loader, workers=workers) as made,
        pytest.raises(DataError, match=rf"1 image file could not be decoded:\n.*{victim.name}.*truncated") as caught,
    ):
        list(made)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("what", ["removed", "resized"])
def test_a_file_that_changed_after_indexing_is_named(tmp_path: Path, loader: str, what: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    own = open_folder(tmp_path, cache_dir=tmp_path / "cache")
    if what == "removed":
        (tmp_path / "a.png").unlink()
    else:
        Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    reason = "is gone" if what == "removed" else "64 x 64|changed its size"
    with pytest.raises(DataError, match=rf"a\.png.*({reason})"):
        batches(own, batch_size=1, loader=loader, steps=1)


# Choice, refusals, workers


def test_choice_is_explained(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"batch_size": 8, "steps": 1, "seed": 0, "device": "cpu"}
    if HAVE_DALI:
        made = make_loader(index, (CROP,), **common)
        assert made.name == "dali"
        missing = {"augment": {"cpu": "torch (cpp: not built; a C++ compiler builds it)"}}
        monkeypatch.setattr("sdmp_train.data.choice.backends", lambda: missing)
        why = choose_loader("auto", torch.device("cpu"), 3).why
        assert why == "DALI is installed; it decodes on the CPU, and augment (torch) makes the views"
    asked = make_loader(index, (CROP,), loader="torchvision", **common)
    assert asked.name == "torchvision"
    assert "was asked for" in asked.why
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fallback = make_loader(index, (CROP,), **common)
    assert fallback.name == "torchvision"
    assert "DALI is not installed" in fallback.why
    with pytest.raises(DataError, match="loader='dali' cannot be used: DALI is not installed"):
        make_loader(index, (CROP,), loader="dali", **common)


def test_other_devices_get_torchvision(index: Index) -> None:
    made = make_loader(index, (CROP,), batch_size=8, steps=1, seed=0, device="mps")
    assert (made.name, made.why.split(";")[0]) == ("torchvision", "DALI does not serve mps devices")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 31}, "30 images, fewer"),
        ({"seed": -1}, "seed"),
        ({"start_step": 4}, "start_step"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"loader": "ffcv"}, "loader"),
        ({"workers": -1}, "workers"),
        ({"recipes": ()}, "recipes"),
    ],
)
def test_bad_arguments_are_refused_by_name(index: Index, changes: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        batches(index, **changes)


def test_a_recipe_of_another_type_is_refused(index: Index) -> None:
    with pytest.raises(TypeError, match="recipes"):
        batches(index, recipes=("byol",))


def children() -> Iterator[int]:
    """Processes whose parent is this one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                yield int(entry.name)


def test_a_signal_before_a_worker_is_set_up_waits_and_is_dropped(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window between fork and set-up, in which a worker used to die of it, and the run with the worker."""
    set_up = portable._ignore_signals

    def struck(worker: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        set_up(worker)

    monkeypatch.setattr(portable, "_ignore_signals", struck)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert len(batches(index, loader="torchvision", workers=2)) == 3
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked


class Garbage:
    """Part of a cycle, so that only the collector finds it; notes the processes that do."""

    def __init__(self, notes: Path) -> None:
        self.itself, self.notes = self, notes

    def __del__(self) -> None:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_workers_do_not_collect_the_garbage_they_are_born_with(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DALI pipeline among it would wait for ever for threads that a forked process does not have."""
    notes = tmp_path / "collected"
    set_up = portable._ignore_signals

    def collect(worker: int) -> None:
        set_up(worker)
        gc.collect()

    monkeypatch.setattr(portable, "_ignore_signals", collect)
    gc.disable()
    try:
        Garbage(notes)
        assert len(batches(index, loader="torchvision", workers=2)) == 3
    finally:
        gc.enable()
    gc.collect()
    assert notes.read_text().split() == [str(os.getpid())]


def test_a_batch_that_shared_memory_cannot_hold_is_an_error(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no endless wait for a batch that a thread of the decoding process could not hand on."""

    def full(count: int) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(DataError, match="/dev/shm has no room"):
        batches(index, loader="torchvision", workers=1)
    assert len(batches(index, loader="torchvision", workers=0)) == 3


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_ignore_signals_and_end_with_the_loader(index: Index) -> None:
    before = set(children())
    made = make_loader(index, (CROP,), batch_size=8, steps=50, seed=0, device="cpu", loader="torchvision", workers=2)
    iterator = iter(made)
    next(iterator)
    workers = set(children()) - before
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    for _ in range(20):
        next(iterator)
    made.close()
    made.close()
    until = time.monotonic() + 20
    while set(children()) - before and time.monotonic() < until:
        time.sleep(0.05)
    assert set(children()) - before == set()
    with pytest.raises(StopIteration):
        next(iterator)


# Other sources than folders


class Shard:
    """Images in memory, as an archive would hold them: none is a file of its own."""

    def __init__(self, index: Index) -> None:
        self.files = [Path(index.path(row)).read_bytes() for row in range(len(index))]
        self.heights, self.widths, self.labels = index.heights, index.widths, index.labels
        self.classes, self.pillow, self.fingerprint = index.classes, index.pillow, index.fingerprint

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> bytes:
        return self.files[row]

    def name(self, row: int) -> str:
        return f"shard 0, image {row}"

    def file(self, row: int) -> str | None:
        return None


@pytest.mark.parametrize("loader", LOADERS)
def test_a_source_without_files_gives_the_batches_of_the_folder(index: Index, guises: Index, loader: str) -> None:
    for folder in (index, guises):
        assert_same(batches(Shard(folder), loader=loader), batches(folder, loader=loader))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_image_of_a_source_is_called_by_its_name(index: Index, loader: str) -> None:
    shard = Shard(index)
    shard.files[11] = shard.files[11][:-20]
    with pytest.raises(DataError, match=r"shard 0, image 11' .*truncated"):
        batches(shard, loader=loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_row_is_valid(index: Index, loader: str) -> None:
    for batch in batches(index, loader=loader):
        assert batch.valid.dtype == torch.bool
        assert batch.valid.tolist() == [True] * 8
