"""RandAugment and random erasing on the host: timm's own, seeded per image, whoever carries them out."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdmp_train.data import DataError, RandAugmentErase, crop_flip_view, make_loader, open_folder
from sdmp_train.data.host import host_seeds, posterize, seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(px: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (px, px, 3), dtype=np.uint8)


def test_randaugment_is_timms_with_its_own_arguments():
    """The transform that timm's factory builds for DeiT, applied with the same generators."""
    from timm.data import create_transform

    chain = create_transform(
        32, is_training=True, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", re_count=1, mean=MEAN, std=STD,
    )  # fmt: skip
    kinds = [type(part).__name__ for part in chain.transforms]
    assert kinds[2:] == ["RandAugment", "MaybeToTensor", "Normalize", "RandomErasing"]
    host = RandAugmentErase(32, MEAN, STD, erase_prob=0.0)
    changed = 0
    for seed in range(20):
        with seeded(seed):
            theirs = np.asarray(chain.transforms[2](Image.fromarray(photo())))
        with seeded(seed):
            ours = host(photo())
        assert np.array_equal(theirs, ours)
        changed += not np.array_equal(ours, photo())
    assert changed > 10  # either of two operations, each with chance 0.5


def test_posterize_is_timms_and_black_without_a_bit():
    """Pillow refuses 0 bits, which timm asks for at the highest magnitude; older ones made black of it."""
    from timm.data import auto_augment

    image = Image.fromarray(photo())
    for bits in (1, 4, 8):
        assert np.array_equal(posterize(image, bits), auto_augment.posterize(image, bits))
    assert not np.asarray(posterize(image, 0)).any() and posterize(image, 0).size == image.size
    highest = RandAugmentErase(32, MEAN, STD, randaugment="rand-m10-n12-p1.0-inc1", erase_prob=0.0)
    for seed in range(20):
        with seeded(seed):
            highest(photo())


class Failing:
    def __call__(self, view: np.ndarray) -> np.ndarray:
        raise ValueError("not an image's fault")


def test_an_error_of_the_transform_is_raised_and_no_process_outlives_the_loader(image_folder: Path):
    """Nor where the error's traceback is kept: the program's exit would wait for them."""
    with pytest.raises(ValueError, match="not an image's fault") as kept:
        batches(image_folder, host=Failing(), workers=2)
    assert kept.traceback and multiprocessing.active_children() == []


def test_erasing_is_timms_but_for_pixels_that_no_uint8_holds():
    from timm.data.random_erasing import RandomErasing

    host = RandAugmentErase(32, MEAN, STD, randaugment=None, erase_prob=1.0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    view = photo()
    normalised = (torch.from_numpy(view).permute(2, 0, 1).float() / 255 - mean) / std
    for seed in range(5):
        with seeded(seed):
            theirs = RandomErasing(1.0, mode="pixel", device="cpu")(normalised.clone())
        with seeded(seed):
            ours = torch.from_numpy(host(view)).permute(2, 0, 1)
        expected = ((theirs * std + mean) * 255).clamp(0, 255)
        assert float((ours.float() - expected).abs().max()) <= 0.501
        same = theirs == normalised
        assert int((~same).sum()) > 0 and torch.equal(ours[same], torch.from_numpy(view).permute(2, 0, 1)[same])


def test_the_share_of_erased_images_is_the_one_asked_for():
    host = RandAugmentErase(32, MEAN, STD, randaugment=None, erase_prob=0.25)
    erased = 0
    for seed in host_seeds(seed=0, step=0, first_row=0, rows=400):
        with seeded(seed):
            erased += not np.array_equal(host(photo()), photo())
    assert 70 <= erased <= 130


def test_global_generators_are_as_they_were():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with seeded(7):
        first = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
    with seeded(7):
        assert first == (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def batches(folder: Path, **options):
    settings = {"batch_size": 4, "steps": 3, "seed": 5, "device": "cpu", "workers": 0, "loader": "torchvision"}
    host = RandAugmentErase(32, MEAN, STD)
    with make_loader(open_folder(folder), [crop_flip_view(32)], **{"host": host, **settings, **options}) as loader:
        return list(loader)


def test_views_follow_from_seed_step_and_row_alone(image_folder: Path):
    """Whatever the workers, the ranks and where it begins; and without a host transform they are others."""
    plain = batches(image_folder)
    views = [batch.views[0] for batch in plain]
    for again in (batches(image_folder, workers=2), batches(image_folder, loader="auto")):
        assert all(torch.equal(a, b.views[0]) for a, b in zip(views, again, strict=True))
    assert torch.equal(batches(image_folder, start_step=2)[0].views[0], views[2])
    halves = [batches(image_folder, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    for number, view in enumerate(views):
        assert torch.equal(torch.cat([half[number].views[0] for half in halves]), view)
    without = [batch.views[0] for batch in batches(image_folder, host=None)]
    assert not any(torch.equal(a, b) for a, b in zip(views, without, strict=True))
    assert views[0].is_contiguous(memory_format=torch.channels_last)


def test_dali_is_refused_by_name(image_folder: Path):
    with pytest.raises(DataError, match="loader='dali' cannot be used"):
        batches(image_folder, loader="dali")


def test_repeated_augmentation_shows_fewer_images_in_more_views(image_folder: Path):
    repeated = batches(image_folder, host=None, batch_size=6, steps=12, repeats=3)
    plain = batches(image_folder, host=None, batch_size=6, steps=12)
    for first in (0, 6):  # six steps are an epoch
        ids = torch.cat([batch.ids for batch in repeated[first : first + 6]])
        order = torch.cat([batch.ids for batch in plain[first : first + 6]])
        assert torch.equal(ids, order.repeat_interleave(3)[:36])
    view = repeated[0].views[0]
    assert not torch.equal(view[0], view[1])  # the same image, cut anew
    with pytest.raises(ValueError, match="repeats must be 1 or more"):
        batches(image_folder, repeats=0)
