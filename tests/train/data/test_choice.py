"""The loader that `auto` takes: the faster one, by a measurement that is worth its second."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from file_kinds import smooth_picture
from test_loaders import assert_same, needs_dali

from sdmp_train.data import Batch, Choice, DataError, Index, Loader, byol_views, choice, make_loader, open_folder

CPU = torch.device("cpu")
SAID = r"the faster of two here \(images/s: dali (\d+), torchvision (\d+)\); "


@pytest.fixture
def index(tmp_path: Path) -> Index:
    for i in range(40):
        smooth_picture(np.random.default_rng(i), 40, 32).save(tmp_path / f"{i}.jpg")
    return open_folder(tmp_path, cache_dir=tmp_path / ".cache")


def opened(index: Index, steps: int, **changes: object) -> Loader:
    arguments = {"batch_size": 8, "seed": 5, "device": "cpu", "workers": 1, **changes}
    return make_loader(index, byol_views(32), steps=steps, **arguments)


@needs_dali
def test_the_faster_one_is_taken_and_both_rates_are_said(index: Index) -> None:
    with opened(index, steps=2500) as loader:
        dali, torchvision = map(int, re.match(SAID, loader.why).groups())
    assert min(dali, torchvision) > 0
    assert loader.name == ("dali" if dali >= torchvision else "torchvision")


@needs_dali
@pytest.mark.parametrize("slow", ["dali", "torchvision"])
def test_whichever_is_faster(slow: str, index: Index, monkeypatch) -> None:
    monkeypatch.setattr(choice, "images_per_second", lambda loader, *_, **__: 10.0 if loader.name == slow else 20.0)
    with opened(index, steps=2500) as loader:
        assert loader.name != slow
        rates = "dali 10, torchvision 20" if slow == "dali" else "dali 20, torchvision 10"
        assert f"(images/s: {rates})" in loader.why


@needs_dali
def test_a_measured_loader_gives_the_batches_of_the_named_one(index: Index) -> None:
    def first(loader: Loader) -> list[Batch]:
        with loader:
            batches = iter(loader)
            return [next(batches) for _ in range(7)]

    assert_same(first(opened(index, steps=2500)), first(opened(index, steps=2500, loader="torchvision")))


def test_few_images_are_not_worth_a_measurement(index: Index, monkeypatch) -> None:
    monkeypatch.setattr(choice, "images_per_second", None)
    with opened(index, steps=2499) as loader:
        assert loader.why == choice.choose_loader("auto", CPU).why


def test_without_dali_there_is_nothing_to_measure(index: Index, monkeypatch) -> None:
    monkeypatch.setattr(choice, "images_per_second", None)
    monkeypatch.setattr(choice, "dali_missing", lambda device, channels: "no DALI here")
    with opened(index, steps=10**6) as loader:
        assert (loader.name, loader.why) == ("torchvision", "no DALI here; Pillow decodes on the CPU")


@needs_dali
def test_a_damaged_file_does_not_end_the_measurement_in_an_error(index: Index, monkeypatch) -> None:
    def damaged(*_: object, **__: object) -> float:
        raise DataError("damaged")

    monkeypatch.setattr(choice, "images_per_second", damaged)
    with opened(index, steps=2500) as loader:
        assert loader.why == choice.choose_loader("auto", CPU).why


def test_a_choice_made_elsewhere_is_carried_out(index: Index) -> None:
    with opened(index, steps=10**6, loader=Choice("torchvision", "the first rank measured")) as loader:
        assert (loader.name, loader.why) == ("torchvision", "the first rank measured")


def test_batches_that_pay_for_starting_are_not_counted(monkeypatch) -> None:
    """A made-up clock: 10 s before each of the first three batches, 0.25 s before each later one, of 8 images."""
    now = [0.0]

    class Slow:
        def __iter__(self) -> Iterator[Batch]:
            for number in range(100):
                now[0] += 10 if number < 3 else 0.25
                yield Batch((), torch.arange(8), torch.arange(8))

    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
    assert choice.images_per_second(Slow(), CPU, skip=3) == 32
