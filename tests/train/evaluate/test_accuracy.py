"""Counting right answers."""

from __future__ import annotations

from pathlib import Path

import torch

from sdmp_train.config import Config
from sdmp_train.data import open_folder
from sdmp_train.distributed import World
from sdmp_train.evaluate.accuracy import accuracies, in_words, top_counts
from sdmp_train.log import Log
from sdmp_train.stop import StopRequest


def test_top_5_of_five_classes_says_nothing():
    found = {"top1": 0.5, "top5": 0.9}
    assert [in_words(found, classes) for classes in (5, 6)] == [" 50.00% top-1", " 50.00% top-1  90.00% top-5"]


def test_top_counts_against_a_sort():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 2, 9, generator=generator)
    labels = torch.randint(0, 9, (40,), generator=generator)
    places = (scores > scores.gather(2, labels.view(-1, 1, 1).expand(-1, 2, 1))).sum(-1)  # how many are above
    expected = torch.stack([(places < 1).sum(0), (places < 5).sum(0)], dim=1)
    assert torch.equal(top_counts(scores, labels), expected)
    assert (expected[:, 0] < expected[:, 1]).all() and (expected[:, 1] < 40).all()


def test_every_image_counts_once(tiny: Config, image_folder: Path):
    """A classifier that says the first class is right for a third of the images, whatever the batches."""
    index = open_folder(image_folder)
    always = torch.tensor([2.0, 1.0, 0.0])
    for batch_size in (5, 36):
        found = accuracies(
            lambda images: torch.stack([always, always.flip(0)]).expand(len(images), 2, 3),
            index,
            tiny.data,
            world=World(torch.device("cpu")),
            batch_size=batch_size,
            log=Log(quiet=True),
            stop=StopRequest(),
        )
        assert torch.equal(found, torch.tensor([[1 / 3, 1.0], [1 / 3, 1.0]], dtype=torch.float64))
