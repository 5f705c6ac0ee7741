"""The prefetching route against timm's and against float64, for equal draws."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import float64
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import sdmp_kernels.timm as ours
from sdmp_kernels import Erasure, TwoHot

timm_loader = pytest.importorskip("timm.data.loader", reason="timm is not installed")
timm_mixup = pytest.importorskip("timm.data.mixup", reason="timm is not installed")
CLASSES, CPU = 5, torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(n: int = 8) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(n)
    return [(rng.integers(0, 256, (3, 12, 10), dtype=np.uint8), i % CLASSES) for i in range(n)]


def bytes_of(batch: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.stack([b[0] for b in batch])), torch.tensor([b[1] for b in batch])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": 1.0},
        {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.7},
    ],
    ids=["mixup", "cutmix", "both"],
)
@pytest.mark.parametrize("n", [8, 7])
def test_what_a_model_gets_is_the_plan_in_float64(mode: str, options: dict[str, Any], n: int):
    collate = ours.FastCollateMixup(**options, mode=mode, num_classes=CLASSES, seed=1)
    loader = ours.PrefetchLoader(DataLoader(pictures(n), n, collate_fn=collate), device=CPU)
    raw, labels = bytes_of(pictures(n))
    for _ in range(4):
        ((images, target),) = list(loader)
        plan = collate.last_plan
        assert plan is not None
        wanted = float64.normalised(float64.mixed(raw, plan), MEAN, STD)
        torch.testing.assert_close(images.double(), wanted, atol=2e-6, rtol=0)
        assert images.dtype == torch.float32
        torch.testing.assert_close(target.double(), float64.target(labels, plan, CLASSES, 0.1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("cutmix", [False, True])
def test_for_equal_draws_timms_pixels_to_half_a_grey_level(mode: str, cutmix: bool, monkeypatch: pytest.MonkeyPatch):
    """timm rounds to bytes between mixing and normalising; nothing else differs."""
    options = {
        "mixup_alpha": 0.0 if cutmix else 1.0,
        "cutmix_alpha": float(cutmix),
        "mode": mode,
        "num_classes": CLASSES,
    }
    collate = ours.FastCollateMixup(**options, seed=2)
    ((images, target),) = list(ours.PrefetchLoader(DataLoader(pictures(), 8, collate_fn=collate), device=CPU))
    plan = collate.last_plan
    assert plan is not None
    rows = {"batch": 1, "pair": 4, "elem": 8}[mode]
    # float32, as timm draws them; what its cutmix takes for lam is looked up in the plan by the row's turn.
    lam = plan.lam.numpy()[:rows].copy()
    turn = iter(np.flatnonzero(lam != 1))

    def box(*_: object, **__: object) -> Any:
        top, left, height, width = plan.box[int(next(turn))].tolist()
        return (top, top + height, left, left + width), 1 - height * width / 120

    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", box)
    theirs = timm_mixup.FastCollateMixup(**options)
    flags = np.full(rows, cutmix)
    monkeypatch.setattr(theirs, "_params_per_elem", lambda n: (lam, flags))
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (float(lam[0]), cutmix))
    loader = timm_loader.PrefetchLoader(DataLoader(pictures(), 8, collate_fn=theirs), device=CPU)
    ((wanted, wanted_target),) = list(loader)
    step = 1 / 255 / torch.tensor(STD)[:, None, None]
    assert (((images - wanted).abs() / step) <= (1e-3 if cutmix else 0.501)).all()
    torch.testing.assert_close(target, wanted_target.to(target.dtype), atol=1e-6, rtol=0)


def test_arguments_are_timms_in_timms_order():
    for name in ("FastCollateMixup", "PrefetchLoader", "create_loader"):
        theirs = getattr(timm_mixup if "Mixup" in name else timm_loader, name)
        if name == "create_loader":
            continue  # takes what the installed timm takes
        parameters = [p for p in inspect.signature(getattr(ours, name)).parameters.values() if p.kind != p.KEYWORD_ONLY]
        for one, other in zip(parameters, inspect.signature(theirs).parameters.values(), strict=True):
            assert (one.name, one.default) == (other.name, other.default)


def test_without_mixing_it_normalises_as_timm():
    theirs = timm_loader.PrefetchLoader(DataLoader(pictures(), 4, collate_fn=timm_loader.fast_collate), device=CPU)
    mine = ours.PrefetchLoader(DataLoader(pictures(), 4, collate_fn=timm_loader.fast_collate), device=CPU)
    assert len(mine) == len(theirs) == 2
    for (images, target), (wanted, wanted_target) in zip(mine, theirs, strict=True):
        torch.testing.assert_close(images, wanted, atol=2e-6, rtol=0)
        assert torch.equal(target, wanted_target)
    assert not mine.mixup_enabled


def test_a_mean_for_another_number_of_channels_is_averaged_as_by_timm():
    data = [(np.full((1, 4, 4), 100, dtype=np.uint8), 0)] * 2
    for loader in (timm_loader.PrefetchLoader, ours.PrefetchLoader):
        ((images, _),) = list(loader(DataLoader(data, 2, collate_fn=timm_loader.fast_collate), channels=1, device=CPU))
        assert images.mean().item() == pytest.approx((100 / 255 - np.mean(MEAN)) / np.mean(STD), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images(dtype: torch.dtype):
    collate = ours.FastCollateMixup(num_classes=CLASSES, mode="elem", seed=1)
    loader = ours.PrefetchLoader(DataLoader(pictures(), 8, collate_fn=collate), device=CPU, img_dtype=dtype)
    ((images, _),) = list(loader)
    assert images.dtype == dtype and collate.last_plan is not None
    wanted = float64.normalised(float64.mixed(bytes_of(pictures())[0], collate.last_plan), MEAN, STD)
    assert ((images.double() - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs().clamp(min=0.1)).all()


def test_mixing_ends_at_once_also_where_workers_persist():
    collate = ours.FastCollateMixup(num_classes=CLASSES, mode="elem", labels="two_hot")
    inner = DataLoader(pictures(), 8, collate_fn=collate, num_workers=1, persistent_workers=True)
    loader = ours.PrefetchLoader(inner, device=CPU)
    raw, labels = bytes_of(pictures())
    plain = float64.normalised(raw, MEAN, STD)
    for enabled in (True, False, True):
        loader.mixup_enabled = enabled
        assert loader.mixup_enabled is collate.mixup_enabled is enabled
        ((images, target),) = list(loader)
        assert isinstance(target, TwoHot)
        assert torch.allclose(images.double(), plain, atol=2e-6) is not enabled
        assert bool((target.weight == 1).all()) is not enabled
        assert torch.equal(target.first, labels)


def test_workers_that_are_spawned_get_no_plan():
    collate = ours.FastCollateMixup(num_classes=CLASSES, seed=7)
    list(ours.PrefetchLoader(DataLoader(pictures(), 8, collate_fn=collate), device=CPU))
    copied = pickle.loads(pickle.dumps(collate))
    assert collate.last_plan is not None and copied.last_plan is None
    assert (copied.seed, copied.step) == (7, 1) == (collate.seed, collate.step)


def test_draws_go_on_over_epochs_and_workers():
    collate = ours.FastCollateMixup(num_classes=CLASSES, mode="batch", seed=0)
    loader = ours.PrefetchLoader(DataLoader(pictures(), 4, collate_fn=collate, num_workers=2), device=CPU)
    shares = []
    for _ in range(2):
        for _batch in loader:
            assert collate.last_plan is not None
            shares.append(float(collate.last_plan.lam[0]))
    assert len(set(shares)) == 4


class Calls(TorchDispatchMode):
    """The names of the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("mixing", [True, False])
def test_mixing_normalising_and_erasing_are_one_pass(mode: str, mixing: bool, erasures: list[Erasure]):
    collate = ours.FastCollateMixup(cutmix_alpha=1.0, num_classes=CLASSES, mode="elem", seed=3)
    loader = ours.PrefetchLoader(
        DataLoader(pictures(), 8, collate_fn=collate if mixing else timm_loader.fast_collate),
        device=CPU,
        re_prob=0.9,
        re_mode=mode,
        re_count=3,
    )
    with Calls() as calls:
        ((images, _),) = list(loader)
    assert [name for name in calls.names if name.startswith("sdmp::")] == ["sdmp::mix"]
    assert not {"aten::index_put_", "aten::masked_fill_", "aten::where.self"} & set(calls.names)
    pixels = bytes_of(pictures())[0].double()
    if mixing:
        assert collate.last_plan is not None
        pixels = float64.mixed(pixels, collate.last_plan)
    (erased,) = erasures
    wanted = float64.erased(float64.normalised(pixels, MEAN, STD), erased)
    torch.testing.assert_close(images.double(), wanted, atol=2e-6, rtol=0)
    assert (erased.boxes[:, 1, 2] > 0).any(), "some image has several boxes"


def test_create_loader_puts_them_together(tmp_path: Any):
    image = pytest.importorskip("PIL.Image")
    for i, (pixels, label) in enumerate(pictures()):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / str(label) / f"{i}.png")
    from timm.data import create_dataset

    def make(**options: Any) -> Any:
        data = create_dataset("", root=str(tmp_path), split="", is_training=True)
        size = (3, 8, 8)
        return ours.create_loader(data, size, 4, is_training=True, num_workers=0, device=CPU, **options)

    collate = ours.FastCollateMixup(num_classes=CLASSES, mode="elem")
    loader = make(collate_fn=collate, re_prob=0.5, re_mode="pixel", re_count=2, re_split=True, img_dtype=torch.bfloat16)
    assert type(loader) is ours.PrefetchLoader and loader.mixup_enabled and loader.img_dtype == torch.bfloat16
    assert repr(loader.random_erasing) == "RandomErasing(p=0.5, mode=pixel, count=(1, 2))"
    assert loader.random_erasing is not None and loader.random_erasing.num_splits == 2
    batches = list(loader)
    assert [images.shape for images, _ in batches] == [(4, 3, 8, 8)] * 2 == [(4, 3, 8, 8)] * len(loader)
    assert batches[0][1].shape == (4, CLASSES)
    assert not isinstance(make(use_prefetcher=False), ours.PrefetchLoader)
    with pytest.raises(ValueError, match="collate_fn=FastCollateMixup needs use_prefetcher=True"):
        make(use_prefetcher=False, collate_fn=collate)


def test_refuses_images_that_are_no_bytes():
    collate = ours.FastCollateMixup(num_classes=CLASSES)
    with pytest.raises(TypeError, match=r"images must be \(C, H, W\) uint8, .* use_prefetcher=True"):
        collate([(torch.rand(3, 4, 4), 0)] * 2)


def test_timms_own_prefetcher_does_not_take_unmixed_batches_for_mixed_ones():
    collate = ours.FastCollateMixup(num_classes=CLASSES)
    with pytest.raises(ValueError, match="too many values to unpack"):
        list(timm_loader.PrefetchLoader(DataLoader(pictures(), 8, collate_fn=collate), device=CPU))
