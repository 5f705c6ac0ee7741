"""Random erasing against timm's: equal results for equal boxes, equal laws of boxes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from sdmp_kernels import mix
from sdmp_kernels._drop_in import keep_plan
from sdmp_kernels.timm import RandomErasing
from sdmp_kernels.timm.erasing import filled

theirs = pytest.importorskip("timm.data.random_erasing", reason="timm is not installed")


def erase(images: Tensor, boxes: np.ndarray, mode: str, seed: int) -> None:
    erased = filled(boxes, images.shape[1], mode, seed, images.device)
    mix(images, keep_plan(len(images), (images.shape[2], images.shape[3])), erase=erased, out=images)


def test_same_boxes_same_pixels():
    boxes = RandomErasing(0.7, max_count=3).draw(np.random.default_rng(0), 40, (24, 20))
    images = torch.rand(40, 3, 24, 20) + 1
    wanted = images.clone()
    for i, row in enumerate(boxes):
        for top, left, height, width in row:
            wanted[i, :, top : top + height, left : left + width] = 0
    for memory in (torch.contiguous_format, torch.channels_last):
        got = images.clone(memory_format=memory)
        erase(got, boxes, "const", 0)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", ["rand", "pixel"])
def test_colours(mode: str):
    boxes = np.array([[[2, 3, 8, 9]], [[0, 0, 0, 0]], [[0, 0, 12, 5]]])
    images = torch.full((3, 64, 16, 16), 7.0)
    erase(images, boxes, mode, 1)
    first, last = images[0, :, 2:10, 3:12], images[2, :, :12, :5]
    assert (images == 7).sum() == 3 * 64 * 256 - 64 * (72 + 60)
    flat = torch.cat([first.flatten(), last.flatten()])
    assert abs(flat.mean()) < 0.35 and 0.75 < flat.std() < 1.25
    constant = (first == first[:, :1, :1]).all()
    assert bool(constant) is (mode == "rand")
    assert not torch.equal(first[:, 0, 0], last[:, 0, 0])


@pytest.mark.parametrize("options", [{"probability": 0.3}, {"probability": 1.0, "max_count": 3, "num_splits": 2}])
def test_laws_of_boxes(options: dict):
    """The share of images erased, the share of pixels and its spread, and where they are, are timm's."""
    n, size, rounds = 40, (20, 28), 50
    random.seed(0)
    real = theirs.RandomErasing(**options, device="cpu")
    mine = RandomErasing(**options, seed=0)
    found = []
    for erasing in (real, mine):
        erased = torch.stack([erasing(torch.ones(n, 1, *size))[:, 0] == 0 for _ in range(rounds)]).float()
        found.append((erased, erased.mean((2, 3))))
    (real_pixels, real_share), (pixels, share) = found
    for measure in (lambda s: (s > 0).float(), lambda s: s, lambda s: s**2):
        a, b = measure(real_share), measure(share)
        error = (a.var() / a.numel() + b.var() / b.numel()).sqrt()
        assert abs(a.mean() - b.mean()) < 4 * error + 1e-9
    torch.testing.assert_close(pixels.mean((0, 1)), real_pixels.mean((0, 1)), atol=0.05, rtol=0)
    clean = share[:, : n // 2]
    assert bool((clean == 0).all()) is ("num_splits" in options)


def test_draws_are_its_own():
    images = torch.ones(8, 3, 16, 16)
    again = [RandomErasing(0.5, seed=4)(images.clone()) for _ in range(2)]
    assert torch.equal(*again)
    erasing = RandomErasing(0.5, seed=4)
    assert not torch.equal(erasing(images.clone()), erasing(images.clone()))
    one = torch.ones(3, 16, 16)
    assert RandomErasing(1.0)(one) is one and (one == 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, "probability must be"),
        ({"mode": "blur"}, "mode='blur' is unknown"),
        ({"min_count": 0}, "min_count"),
    ],
)
def test_refuses(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RandomErasing(**options)
    with pytest.raises(TypeError, match="images must be float16"):
        RandomErasing()(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
