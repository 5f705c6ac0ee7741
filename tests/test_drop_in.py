"""What the drop-in classes share: whose draws are whose, wherever and however often an object is made."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from global_random import untouched
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from sdmp_kernels import _drop_in
from sdmp_kernels.timm import Mixup
from sdmp_kernels.v2 import CutMix, MixUp, ResizeMix

CLASSES = 8
IMAGES = [(torch.zeros(3, 6, 6), i % CLASSES) for i in range(32)]
MAKERS: dict[str, Callable[[], Any]] = {
    "timm.Mixup": lambda: Mixup(1.0, num_classes=CLASSES),
    "timm.Mixup elem": lambda: Mixup(1.0, 1.0, num_classes=CLASSES, mode="elem"),
    "v2.MixUp": lambda: MixUp(num_classes=CLASSES),
    "v2.CutMix": lambda: CutMix(num_classes=CLASSES),
    "v2.ResizeMix": lambda: ResizeMix(num_classes=CLASSES),
}


@pytest.fixture
def torch_seed() -> Iterator[Callable[[int], object]]:
    """torch.manual_seed, undone after the test."""
    state, seed = torch.get_rng_state(), torch.initial_seed()
    yield torch.manual_seed
    torch.manual_seed(seed)
    torch.set_rng_state(state)


def fingerprint(made: Any) -> tuple[int, ...]:
    """The first 64 Mixup shares, or boxes, that an object draws."""
    plan = made.draw(64, (300, 400))
    return tuple(plan.box.flatten().tolist()) + tuple((plan.lam * 2**24).long().tolist())


class RemadeForEveryBatch:
    """A collate function that makes its transform anew, as much public code does."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, rows: list[Any]) -> tuple[int, Tensor]:
        made = MAKERS[self.name]()
        return made.seed, made(*default_collate(rows))[1]


# ---- made anew


@pytest.mark.parametrize("name", list(MAKERS))
def test_objects_made_one_after_the_other_draw_apart(name: str) -> None:
    with untouched():
        drawn = [fingerprint(MAKERS[name]()) for _ in range(20)]
    assert len(set(drawn)) == 20


def test_objects_of_different_classes_draw_apart() -> None:
    shares = [tuple(made().draw(4, (8, 8)).lam.tolist()) for made in (MixUp, MixUp, lambda: Mixup(1.0, mode="batch"))]
    assert len(set(shares)) == 3
    assert len({made().seed for made in MAKERS.values()}) == len(MAKERS)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["timm.Mixup", "v2.MixUp"])
def test_made_for_every_batch_it_draws_afresh(name: str, workers: int) -> None:
    loader = DataLoader(IMAGES, batch_size=4, collate_fn=RemadeForEveryBatch(name), num_workers=workers)
    made = [made for _ in range(2) for made in loader]
    assert len({seed for seed, _ in made}) == 16, "in two epochs of eight batches"
    assert len({float(target.max()) for _, target in made}) > 8


def test_workers_started_afresh_draw_apart() -> None:
    loader = DataLoader(
        IMAGES[:8],
        batch_size=2,
        collate_fn=RemadeForEveryBatch("v2.MixUp"),
        num_workers=2,
        multiprocessing_context="spawn",
    )
    assert len({seed for seed, _ in loader}) == 4, "each started process counts from 0, but has its own torch seed"


def test_persistent_workers_go_on() -> None:
    class Kept:
        def __init__(self) -> None:
            self.made = MixUp(num_classes=CLASSES)

        def __call__(self, rows: list[Any]) -> Tensor:
            return self.made(*default_collate(rows))[1]

    loader = DataLoader(IMAGES, batch_size=4, collate_fn=Kept(), num_workers=2, persistent_workers=True)
    assert len({tuple(target.flatten().tolist()) for _ in range(2) for target in loader}) == 16


@pytest.mark.parametrize("name", list(MAKERS))
def test_copies_of_a_template_draw_apart(name: str) -> None:
    template = MAKERS[name]()
    drawn = [fingerprint(copy.deepcopy(template)) for _ in range(6)] + [fingerprint(template)]
    assert len(set(drawn)) == 7
    template = MixUp(seed=4)
    assert fingerprint(copy.deepcopy(template)) == fingerprint(template), "a seed that was given is copied"


def test_objects_made_in_threads_draw_apart() -> None:
    with ThreadPoolExecutor(8) as pool:
        seeds = list(pool.map(lambda _: MixUp().seed, range(400)))
    assert len(set(seeds)) == 400


# ---- made again


def test_a_program_started_again_draws_the_same(
    torch_seed: Callable[[int], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for seed in (7, 7, 8, 5, 5 + (3 << 32)):
        monkeypatch.setattr(_drop_in, "_MADE", itertools.count())
        torch_seed(seed)
        runs.append([MixUp().seed for _ in range(6)])
    assert runs[0] == runs[1]
    assert len(set(itertools.chain(*runs[1:]))) == 24, "no two torch seeds share one, wide ones neither"


def test_an_object_with_a_seed_moves_no_other(
    torch_seed: Callable[[int], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_seed(3)
    seeds = []
    for extra in (0, 5):
        monkeypatch.setattr(_drop_in, "_MADE", itertools.count())
        for _ in range(extra):
            Mixup(seed=1)
        seeds.append(MixUp().seed)
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("name", list(MAKERS))
def test_the_seed_and_step_repeat_an_object(name: str) -> None:
    made = MAKERS[name]()
    first, second = fingerprint(made), fingerprint(made)
    assert first != second
    again = MAKERS[name]()
    again._draws.seed, again.step = made.seed, 1
    assert fingerprint(again) == second
    assert fingerprint(pickle.loads(pickle.dumps(made))) == fingerprint(made)
