"""`sdmp_kernels.timm.Mixup` against the real `timm.data.Mixup`: equal results for equal draws, equal laws of draws."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from global_random import untouched
from torch import Tensor

import sdmp_kernels.timm.mixup
from sdmp_kernels import MixPlan, Rule, TwoHot, draw_plan, mix, soft_cross_entropy
from sdmp_kernels.timm import Mixup

timm_mixup = pytest.importorskip("timm.data.mixup", reason="timm is not installed")
MODES = ("batch", "pair", "elem")
CLASSES = 7


class Recorded(timm_mixup.Mixup):
    """The real thing, keeping what it draws."""

    def _params_per_elem(self, batch_size: int) -> Any:
        lam, use_cutmix = super()._params_per_elem(batch_size)
        self.lam, self.use_cutmix = lam.copy(), use_cutmix
        return lam, use_cutmix

    def _params_per_batch(self) -> Any:
        lam, use_cutmix = super()._params_per_batch()
        self.lam, self.use_cutmix = np.array([lam]), np.array([use_cutmix])
        return lam, use_cutmix


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of every box that timm draws, in order."""
    drawn: list[tuple[int, int, int, int]] = []
    original = timm_mixup.cutmix_bbox_and_lam

    def record(*args: Any, **kwargs: Any) -> Any:
        (top, bottom, left, right), lam = original(*args, **kwargs)
        drawn.append((int(top), int(left), int(bottom - top), int(right - left)))
        return (top, bottom, left, right), lam

    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", record)
    return drawn


def as_plan(real: Recorded, boxes: list[tuple[int, int, int, int]], n: int, size: tuple[int, int]) -> MixPlan:
    """What the real Mixup drew for its last call, as a plan."""
    remaining = iter(boxes)
    units = []
    for lam, use_cutmix in zip(real.lam, real.use_cutmix, strict=True):
        if lam == 1:
            units.append((Rule.KEEP, 1.0, (0, 0, 0, 0)))
        elif use_cutmix:
            box = next(remaining)
            units.append((Rule.CUTMIX, 1 - box[2] * box[3] / (size[0] * size[1]), box))
        else:
            units.append((Rule.MIXUP, float(lam), (0, 0, 0, 0)))
    assert next(remaining, None) is None
    rows = units * n if real.mode == "batch" else units + units[::-1] if real.mode == "pair" else units
    lam = torch.tensor([row[1] for row in rows])
    return MixPlan(
        rule=torch.tensor([int(row[0]) for row in rows], dtype=torch.uint8),
        partner=torch.arange(n - 1, -1, -1),
        lam=lam,
        partner_lam=lam.flip(0),
        box=torch.tensor([row[2] for row in rows], dtype=torch.int32),
        size=size,
        mirrored=True,
        rules=tuple(Rule),
    )


def pictures(n: int = 8, size: tuple[int, int] = (16, 20), dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (n, 3, *size), dtype=dtype, generator=generator)
    return torch.rand((n, 3, *size), generator=generator).to(dtype)


def class_numbers(n: int = 8) -> Tensor:
    return torch.arange(n) * 3 % CLASSES


# ---- equal results for equal draws


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": 1.0},
        {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.7},
        {"mixup_alpha": 0.0, "cutmix_minmax": (0.2, 0.8)},
        {"mixup_alpha": 0.2, "cutmix_alpha": 0.2, "label_smoothing": 0.0, "switch_prob": 0.8},
    ],
    ids=["mixup", "cutmix", "both", "minmax", "hard"],
)
def test_same_draws_give_timms_pixels_and_targets(mode: str, options: dict[str, Any], boxes: list[Any]) -> None:
    real = Recorded(**options, mode=mode, num_classes=CLASSES)
    ours = Mixup(**options, mode=mode, num_classes=CLASSES)
    seen = set()
    for seed in range(10):
        np.random.seed(seed)  # noqa: NPY002  timm draws from numpy's global state
        boxes.clear()
        images = pictures()
        wanted, wanted_target = real(images.clone(), class_numbers())
        plan = as_plan(real, boxes, len(images), (16, 20))
        mixed, target = ours(images, class_numbers(), plan=plan)
        assert mixed is images, "in place, as timm"
        blended = plan.rule == Rule.MIXUP
        assert torch.equal(mixed[~blended], wanted[~blended]), "copied pixels are equal bit for bit"
        torch.testing.assert_close(mixed, wanted, atol=2.0**-22, rtol=0)
        torch.testing.assert_close(target, wanted_target, atol=2.0**-22, rtol=0)
        assert (target.dtype, target.shape) == (wanted_target.dtype, wanted_target.shape)
        seen |= set(plan.rule.tolist())
    assert seen - {Rule.KEEP}, "something was mixed at all"


@pytest.mark.parametrize("mode", MODES)
def test_uncorrected_lam(mode: str, boxes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"mixup_alpha": 0.5, "cutmix_alpha": 1.0, "correct_lam": False, "mode": mode, "num_classes": CLASSES}
    real, ours = Recorded(**options), Mixup(**options)
    differs = False
    for seed in range(10):
        np.random.seed(seed)  # noqa: NPY002
        boxes.clear()
        wanted, wanted_target = real(pictures(), class_numbers())
        plan = as_plan(real, boxes, 8, (16, 20))
        per_row = {"batch": np.repeat(real.lam, 8), "pair": np.concatenate([real.lam, real.lam[::-1]])}
        share = torch.from_numpy(per_row.get(mode, real.lam).astype(np.float32))
        differs |= not torch.allclose(share, plan.lam, atol=1e-3)
        monkeypatch.setattr(ours, "_draw", lambda n, size, drawn=(plan, share): drawn)
        mixed, target = ours(pictures(), class_numbers())
        torch.testing.assert_close(mixed, wanted, atol=2.0**-22, rtol=0)
        torch.testing.assert_close(target, wanted_target, atol=2.0**-22, rtol=0)
    assert differs, "a clipped box was among them"


@pytest.mark.skipif("multi_label" not in inspect.signature(timm_mixup.Mixup).parameters, reason="an older timm")
@pytest.mark.parametrize("mode", MODES)
def test_multi_label(mode: str, boxes: list[Any]) -> None:
    options = {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "mode": mode, "num_classes": CLASSES, "multi_label": True}
    labels = (torch.rand(8, CLASSES, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    np.random.seed(1)  # noqa: NPY002
    real = Recorded(**options)
    wanted, wanted_target = real(pictures(), labels)
    mixed, target = Mixup(**options)(pictures(), labels, plan=as_plan(real, boxes, 8, (16, 20)))
    torch.testing.assert_close(mixed, wanted, atol=2.0**-22, rtol=0)
    torch.testing.assert_close(target, wanted_target, atol=2.0**-22, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_labels_are_mixed_row_by_row(dtype: torch.dtype, smoothing: float) -> None:
    """One-hot rows give what their class numbers give; any other rows are a sum of such."""
    options = {"cutmix_alpha": 1.0, "mode": "elem", "num_classes": CLASSES, "label_smoothing": smoothing, "seed": 2}
    hard = torch.eye(CLASSES, dtype=dtype)[class_numbers()]
    _, wanted = Mixup(**options)(pictures(), class_numbers())
    _, got = Mixup(**options)(pictures(), hard)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    other = torch.eye(CLASSES)[class_numbers().flip(0) // 2]
    _, both = Mixup(**options)(pictures(), 0.25 * hard.float() + 0.75 * other)
    _, second = Mixup(**options)(pictures(), other)
    torch.testing.assert_close(both, 0.25 * got + 0.75 * second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ignored", [-100, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_labels_leave_the_others_their_share(ignored: int, smoothing: float) -> None:
    """The loss of a dense row is that of the known labels alone, each at its share, in float64."""
    options = {"cutmix_alpha": 1.0, "mode": "elem", "num_classes": CLASSES, "label_smoothing": smoothing, "seed": 2}
    labels = torch.tensor([0, ignored, 2, ignored, ignored, 5, ignored, 1])
    mixup = Mixup(**options, ignore_index=ignored)
    _, target = mixup(pictures(), labels)
    logits = torch.randn(8, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = -(target * logits.log_softmax(1)).sum(1)
    plan = mixup.last_plan
    assert plan is not None and isinstance(target, Tensor)
    cross = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing, ignore_index=ignored)
    lam = plan.lam.double()
    wanted = lam * cross(logits, labels) + (1 - lam) * cross(logits, labels[plan.partner])
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    assert (target[3] == 0).all() and (target[4] == 0).all(), "both sources have no label"
    _, two_hot = Mixup(**options, ignore_index=ignored, labels="two_hot")(pictures(), labels)
    assert isinstance(two_hot, TwoHot) and torch.equal(two_hot.first, labels)
    with pytest.raises(ValueError, match="class numbers in"):
        Mixup(**options, ignore_index=ignored)(pictures(), labels + 20)


def test_arguments_are_timms_in_timms_order() -> None:
    parameters = list(inspect.signature(Mixup).parameters.values())
    positional = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    theirs = list(inspect.signature(timm_mixup.Mixup).parameters.values())
    for one, other in zip(positional, theirs, strict=False):
        assert (one.name, one.default) == (other.name, other.default)
    assert len(positional) >= len(theirs)
    assert {p.name for p in parameters if p.kind == p.KEYWORD_ONLY} == {
        "resizemix_alpha",
        "labels",
        "seed",
        "ignore_index",
    }


@pytest.mark.parametrize("mode", MODES)
def test_switched_off_it_only_makes_targets(mode: str) -> None:
    real, ours = timm_mixup.Mixup(mode=mode, num_classes=CLASSES), Mixup(mode=mode, num_classes=CLASSES, seed=0)
    for mixup in (real, ours):
        mixup.mixup_enabled = False
    images = pictures()
    mixed, target = ours(images, class_numbers())
    assert mixed is images
    assert torch.equal(mixed, pictures())
    torch.testing.assert_close(target, real(pictures(), class_numbers())[1], atol=1e-7, rtol=0)
    assert ours.step == 0, "nothing was drawn"
    ours.mixup_enabled = True
    ours(images, class_numbers())
    assert not torch.equal(images, pictures())


def test_two_hot_labels_give_the_same_loss() -> None:
    timm_loss = pytest.importorskip("timm.loss")
    logits = torch.randn(9, CLASSES, generator=torch.Generator().manual_seed(0))
    options = {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "mode": "elem", "num_classes": CLASSES, "seed": 3}
    _, dense = Mixup(**options)(pictures(9), class_numbers(9))
    _, two_hot = Mixup(**options, labels="two_hot")(pictures(9), class_numbers(9))
    assert isinstance(two_hot, TwoHot)
    wanted = timm_loss.SoftTargetCrossEntropy()(logits, dense)
    torch.testing.assert_close(soft_cross_entropy(logits, two_hot, label_smoothing=0.1), wanted, atol=1e-6, rtol=1e-6)


# ---- equal laws of draws


def units(mixup: Mixup, n: int, size: tuple[int, int]) -> tuple[MixPlan, Tensor]:
    """A plan of n rows and the lam its labels take."""
    plan, share = mixup._draw(n, size)
    return plan, plan.lam if share is None else share


def timm_units(real: Any, n: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) lam and use_cutmix of the real Mixup's rows, corrected."""
    lam, use_cutmix = real._params_per_elem(n)
    for i in np.flatnonzero(use_cutmix & (lam != 1)):
        _, lam[i] = timm_mixup.cutmix_bbox_and_lam(
            (3, *size), lam[i], ratio_minmax=real.cutmix_minmax, correct_lam=real.correct_lam
        )
    return lam, use_cutmix


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's distance of two samples."""
    places = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": 0.4},
        {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.0, "cutmix_alpha": 0.3, "correct_lam": False},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_prob": 0.3, "prob": 0.8},
        {"mixup_alpha": 0.0, "cutmix_minmax": (0.25, 0.75)},
        {"mixup_alpha": 1.0, "cutmix_minmax": (0.25, 0.75)},
    ],
)
def test_lam_is_drawn_by_timms_law(options: dict[str, Any]) -> None:
    n, size = 6000, (30, 41)
    np.random.seed(0)  # noqa: NPY002
    theirs, use_cutmix = timm_units(timm_mixup.Mixup(**options, mode="elem"), n, size)
    plan, ours = units(Mixup(**options, mode="elem", seed=1), n, size)
    # Two samples of one law are further apart than this once in a thousand times.
    assert distance(theirs, ours.numpy()) < 1.95 * (2 / n) ** 0.5
    their_share = float((use_cutmix & (theirs != 1)).mean())
    our_share = float(((plan.rule == Rule.CUTMIX) & (ours != 1)).float().mean())
    assert abs(their_share - our_share) < 4 * (0.5 / n) ** 0.5


@pytest.mark.parametrize("options", [{"cutmix_alpha": 1.0}, {"cutmix_minmax": (0.2, 0.9)}])
def test_boxes_are_drawn_by_timms_law(options: dict[str, Any]) -> None:
    n, size = 6000, (30, 41)
    np.random.seed(0)  # noqa: NPY002
    theirs = []
    for lam in np.random.beta(1, 1, n):  # noqa: NPY002
        (top, bottom, left, right), _ = timm_mixup.cutmix_bbox_and_lam(
            (3, *size), lam, ratio_minmax=options.get("cutmix_minmax")
        )
        theirs.append((top, left, bottom - top, right - left))
    plan, _ = units(Mixup(0.0, mode="elem", seed=1, **options), n, size)
    for field in range(4):
        assert distance(np.array(theirs)[:, field], plan.box[:, field].numpy()) < 1.95 * (2 / n) ** 0.5


def test_an_unclipped_box_follows_from_the_drawn_lam() -> None:
    plan, drawn = units(Mixup(0.0, 1.0, mode="elem", correct_lam=False, seed=0), 500, (64, 48))
    for box, lam in zip(plan.box.tolist(), drawn.double().tolist(), strict=True):
        for axis, side in enumerate(plan.size):
            cut = side * np.sqrt(1 - lam)
            start, length = box[axis], box[2 + axis]
            assert length <= np.floor(cut + 1e-4)
            if start > 0 and start + length < side:
                assert length in (np.floor(cut - 1e-4), np.floor(cut + 1e-4)), "floor(side * sqrt(1 - lam))"


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, (0, 1, 0, 0)),
        ({"cutmix_alpha": 1.0}, (0, 0.5, 0.5, 0)),
        ({"cutmix_alpha": 1.0, "switch_prob": 0.2, "prob": 0.5}, (0.5, 0.4, 0.1, 0)),
        ({"resizemix_alpha": 1.0}, (0, 0.5, 0, 0.5)),
        ({"cutmix_alpha": 1.0, "resizemix_alpha": 1.0}, (0, 0.5, 0.25, 0.25)),
        ({"cutmix_alpha": 1.0, "resizemix_alpha": 1.0, "switch_prob": 2 / 3}, (0, 1 / 3, 1 / 3, 1 / 3)),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "resizemix_alpha": 1.0}, (0, 0, 0.5, 0.5)),
        ({"mixup_alpha": 0.0, "resizemix_alpha": 1.0, "switch_prob": 0.0}, (0, 0, 0, 1)),
        ({"cutmix_alpha": 1.0, "prob": 0.0}, (1, 0, 0, 0)),
    ],
)
def test_how_often_each_rule_is_used(options: dict[str, Any], shares: tuple[float, ...]) -> None:
    n = 8000
    elem, _ = units(Mixup(**options, mode="elem", seed=0), n, (16, 16))
    batch = Mixup(**options, seed=0)
    batches = torch.tensor([int(batch.draw(1, (16, 16)).rule[0]) for _ in range(200)])
    for rule, share in enumerate(shares):
        for got, trials in ((elem.rule, n), (batches, 200)):
            assert abs(float((got == rule).float().mean()) - share) <= 4 * (share * (1 - share) / trials) ** 0.5
        assert (rule in elem.rules) == (share > 0)


def test_resizemix_boxes_lie_inside_and_lam_within_its_range() -> None:
    plan, lam = units(Mixup(0.0, resizemix_alpha=1.0, mode="elem", seed=0), 4000, (500, 500))
    assert bool((plan.rule == Rule.RESIZEMIX).all())
    assert 0.099 < float(lam.min()) < 0.11
    assert 0.89 < float(lam.max()) < 0.903
    assert abs(float(lam.mean()) - 0.5) < 0.02


@pytest.mark.parametrize("n", [1, 2, 7, 8])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_shares(mode: str, n: int) -> None:
    mixup = Mixup(1.0, 1.0, mode=mode, resizemix_alpha=1.0, seed=4)
    distinct = set()
    for _ in range(30):
        plan = mixup.draw(n, (40, 40))
        rows = list(map(tuple, torch.cat([plan.rule[:, None], plan.lam[:, None], plan.box], 1).tolist()))
        if mode == "batch":
            assert len(set(rows)) == 1
        elif mode == "pair":
            assert rows == rows[::-1]
        distinct.add(len(set(rows)))
    assert max(distinct) == {"batch": 1, "pair": (n + 1) // 2, "elem": n}[mode]


# ---- what timm gets wrong


@pytest.mark.parametrize("mode", MODES)
def test_odd_batches(mode: str) -> None:
    with pytest.raises(AssertionError, match="Batch size should be even"):
        timm_mixup.Mixup(mode=mode, num_classes=CLASSES)(pictures(7), class_numbers(7))
    mixed, target = Mixup(1.0, 1.0, mode=mode, num_classes=CLASSES, seed=0)(pictures(7), class_numbers(7))
    assert torch.equal(mixed[3], pictures(7)[3]), "the middle row is its own partner"
    torch.testing.assert_close(target.sum(1), torch.ones(7))
    smoothed = 0.1 / CLASSES
    assert target[3, class_numbers(7)[3]] == pytest.approx(0.9 + smoothed)
    assert not torch.equal(mixed, pictures(7))
    empty, nothing = Mixup(mode=mode, num_classes=CLASSES)(pictures(0), class_numbers(0))
    assert (len(empty), nothing.shape) == (0, (0, CLASSES))


def test_uint8_images_get_right_pixels_and_targets(boxes: list[Any]) -> None:
    real = Recorded(mode="elem", num_classes=CLASSES, label_smoothing=0.0)
    np.random.seed(0)  # noqa: NPY002
    images = pictures(dtype=torch.uint8)
    _, theirs = real(images.clone(), class_numbers())
    plan = as_plan(real, boxes, 8, (16, 20))
    exact = torch.zeros(8, CLASSES).scatter_add_(1, class_numbers()[:, None], plan.lam[:, None])
    exact.scatter_add_(1, class_numbers().flip(0)[:, None], 1 - plan.lam[:, None])
    assert not torch.allclose(theirs, exact, atol=0.05), "timm turns lam into uint8"
    mixed, target = Mixup(mode="elem", num_classes=CLASSES, label_smoothing=0.0)(images, class_numbers(), plan=plan)
    torch.testing.assert_close(target, exact, atol=1e-7, rtol=0)
    lam = plan.lam.double().view(-1, 1, 1, 1)
    source = pictures(dtype=torch.uint8).double()
    blend = lam * source + (1 - lam) * source.flip(0)
    assert mixed.dtype == torch.uint8
    assert float((mixed.double() - blend).abs().max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_get_exact_targets(dtype: torch.dtype, boxes: list[Any]) -> None:
    real = Recorded(mode="elem", num_classes=CLASSES, label_smoothing=0.0)
    np.random.seed(0)  # noqa: NPY002
    images = pictures(dtype=dtype)
    _, theirs = real(images.clone(), class_numbers())
    plan = as_plan(real, boxes, 8, (16, 20))
    weight = plan.lam.gather(0, torch.arange(8))
    different = class_numbers() != class_numbers().flip(0)
    rows = torch.arange(8)[different]
    assert not torch.equal(theirs[rows, class_numbers()[rows]], weight[rows]), "timm rounds lam to the images' dtype"
    mixed, target = Mixup(mode="elem", num_classes=CLASSES, label_smoothing=0.0)(images, class_numbers(), plan=plan)
    assert target.dtype == torch.float32
    assert torch.equal(target[rows, class_numbers()[rows]], weight[rows])
    lam = plan.lam.double().view(-1, 1, 1, 1)
    source = pictures(dtype=dtype).double()
    blend = lam * source + (1 - lam) * source.flip(0)
    assert float((mixed.double() - blend).abs().max()) <= torch.finfo(dtype).eps / 4 + 1e-6, "rounded once, below 1"


def test_equal_classes_of_a_pair_add_up() -> None:
    _, target = Mixup(mode="elem", num_classes=CLASSES, label_smoothing=0.0)(pictures(), torch.full((8,), 2))
    torch.testing.assert_close(target[:, 2], torch.ones(8))


# ---- draws as state


@pytest.mark.parametrize("mode", MODES)
def test_no_global_random_state_is_touched(mode: str) -> None:
    with untouched():
        mixup = Mixup(1.0, 1.0, mode=mode, resizemix_alpha=1.0, num_classes=CLASSES)
        for _ in range(3):
            mixup(pictures(), class_numbers())


def test_draws_depend_on_seed_and_step_alone() -> None:
    options: dict[str, Any] = {"cutmix_alpha": 1.0, "mode": "elem", "num_classes": CLASSES}
    first, second = Mixup(**options, seed=9), Mixup(**options, seed=9)
    one = [first(pictures(), class_numbers())[0] for _ in range(3)]
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    two = [second(pictures(), class_numbers())[0] for _ in range(3)]
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], one[1])
    resumed = Mixup(**options, seed=9)
    resumed.step = 2
    assert torch.equal(resumed(pictures(), class_numbers())[0], one[2])
    for clone in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert clone.step == 3
        assert torch.equal(clone.draw(8, (9, 9)).lam, Mixup.draw(copy.deepcopy(first), 8, (9, 9)).lam)
    assert not torch.equal(Mixup(**options, seed=10)(pictures(), class_numbers())[0], one[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 7, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "resizemix_alpha": 0.5},
        {"mixup_alpha": 0.0, "cutmix_alpha": 0.3, "prob": 0.6, "label_smoothing": 0.0},
    ],
)
def test_one_compiled_call_gives_what_many_steps_give(
    mode: str, n: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, for all that later calls depend on, too; skipped where there is no compiled code to compare."""
    at_once, stepwise = (Mixup(**options, mode=mode, num_classes=CLASSES, seed=2**64 - 3) for _ in range(2))
    if at_once._at_once(pictures(n), class_numbers(n)) is None:
        pytest.skip("no compiled kernels")
    at_once.step = 0
    monkeypatch.setattr(stepwise, "_at_once", lambda *_: None)
    for _ in range(6):
        (mixed, target), (wanted, wanted_target) = (m(pictures(n), class_numbers(n)) for m in (at_once, stepwise))
        assert torch.equal(mixed, wanted)
        assert torch.equal(target, wanted_target)
        plan, wanted_plan = at_once.last_plan, stepwise.last_plan
        for name in ("rule", "partner", "lam", "partner_lam", "box"):
            assert torch.equal(getattr(plan, name), getattr(wanted_plan, name))
        assert (plan.rules, at_once.step) == (wanted_plan.rules, stepwise.step)


def test_a_refused_call_draws_nothing() -> None:
    mixup = Mixup(num_classes=CLASSES)
    with pytest.raises(ValueError, match="class numbers"):
        mixup(pictures(), class_numbers() + CLASSES)
    assert mixup.step == 0


def test_the_seed_of_its_own_can_be_given_again() -> None:
    by_default = Mixup(mode="elem")
    assert torch.equal(by_default.draw(8, (9, 9)).lam, Mixup(mode="elem", seed=by_default.seed).draw(8, (9, 9)).lam)


class Drawing(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Draws where a collate function would: in a worker."""

    def __init__(self, mixup: Mixup) -> None:
        self.mixup = mixup

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return self.mixup.draw(4, (9, 9)).lam


def test_workers_and_epochs_draw_apart() -> None:
    loader = torch.utils.data.DataLoader(Drawing(Mixup(mode="elem", seed=0)), batch_size=None, num_workers=2)
    drawn = [tuple(lam.tolist()) for _ in range(2) for lam in loader]
    assert len(set(drawn)) == 8


def test_a_plan_is_replayed() -> None:
    mixup = Mixup(1.0, 1.0, mode="elem", resizemix_alpha=1.0, num_classes=CLASSES, seed=5)
    mixed, target = mixup(pictures(), class_numbers())
    assert isinstance(mixup.last_plan, MixPlan)
    again, target_again = Mixup(num_classes=CLASSES)(pictures(), class_numbers(), plan=mixup.last_plan)
    assert torch.equal(mixed, again)
    assert torch.equal(target, target_again)
    anyone = draw_plan(8, (16, 20), partner=torch.tensor([1, 2, 3, 4, 5, 6, 7, 1]), per="sample", step=0)
    _, target = Mixup(num_classes=CLASSES, label_smoothing=0.0)(pictures(), class_numbers(), plan=anyone)
    for i, row in enumerate(target):
        assert row[class_numbers()[i]] == pytest.approx(float(anyone.lam[i]))
        assert row[class_numbers()[anyone.partner[i]]] == pytest.approx(1 - float(anyone.lam[i]))


@pytest.mark.parametrize("mode", MODES)
def test_a_call_is_one_fused_call(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original: Callable[..., Any] = sdmp_kernels.timm.mixup.mix
    monkeypatch.setattr(sdmp_kernels.timm.mixup, "mix", lambda *a, **k: calls.append(k) or original(*a, **k))
    images = pictures()
    Mixup(1.0, 1.0, mode=mode, resizemix_alpha=1.0)(images, class_numbers())
    assert len(calls) == 1
    assert calls[0]["out"] is images


# ---- features


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["mixup", "cutmix", "resizemix"])
def test_gradients_reach_the_layer_through_features_mixed_in_place(mode: str, rule: str) -> None:
    torch.nn.init.trunc_normal_(weight := torch.empty(4, 3, 1, 1), generator=torch.Generator().manual_seed(1))
    alphas = {"mixup": (1.0, 0.0, 0.0), "cutmix": (0.0, 1.0, 0.0), "resizemix": (0.0, 0.0, 1.0)}[rule]
    mixup = Mixup(*alphas[:2], resizemix_alpha=alphas[2], mode=mode, num_classes=CLASSES, seed=2)
    grads = []
    for place in ("in place", "aside"):
        leaf = weight.clone().requires_grad_()
        features = torch.nn.functional.conv2d(pictures(), leaf)
        if place == "in place":
            mixed, _ = mixup(features, class_numbers())
            assert mixed is features
        else:
            mixed = mix(features, mixup.last_plan)
        mixed.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("shape", [(8,), (8, 6), (8, 5, 6), (8, 3, 2, 5, 6), (8, 2, 3, 2, 5, 6)])
@pytest.mark.parametrize("mode", MODES)
def test_features_of_any_rank_are_blended_as_timm_does(
    shape: tuple[int, ...], mode: str, boxes: list[tuple[int, int, int, int]]
) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    real = Recorded(1.0, num_classes=CLASSES, mode=mode)
    np.random.seed(5)  # noqa: NPY002
    expected, target = real(images.clone(), class_numbers())
    plan = as_plan(
        real, boxes, 8, (shape[-2], shape[-1]) if len(shape) > 2 else (1, shape[-1] if len(shape) > 1 else 1)
    )
    mixed, target_again = Mixup(num_classes=CLASSES)(given := images.clone(), class_numbers(), plan=narrowed(plan))
    assert mixed is given
    assert torch.allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(target_again, target, atol=1e-6)
    blended, _ = Mixup(mode=mode, num_classes=CLASSES, seed=0)(images.clone(), class_numbers())
    assert not torch.equal(blended, images), "what it draws itself is mixed, too"


def narrowed(plan: MixPlan) -> MixPlan:
    """A plan that says that only the rules it holds may occur."""
    return dataclasses.replace(plan, rules=tuple(Rule(value) for value in plan.rule.unique().tolist()))


@pytest.mark.parametrize("permuted", [False, True])
def test_frames_of_a_video_are_cut_alike(permuted: bool) -> None:
    clips = torch.rand(8, 3, 4, 16, 20, generator=torch.Generator().manual_seed(0))
    x = clips.transpose(1, 2).contiguous().transpose(1, 2) if permuted else clips.clone()
    mixup = Mixup(0.0, 1.0, mode="elem", num_classes=CLASSES, seed=3)
    mixed, _ = mixup(x, class_numbers())
    assert mixed is x
    for frame in range(4):
        assert torch.equal(mixed[:, :, frame], mix(clips[:, :, frame].contiguous(), mixup.last_plan))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_labels_of_any_width(dtype: torch.dtype) -> None:
    expected = Mixup(num_classes=CLASSES, seed=0)(pictures(), class_numbers())[1]
    got = Mixup(num_classes=CLASSES, seed=0)(pictures(), class_numbers().to(dtype))[1]
    assert torch.equal(expected, got)
    column = Mixup(num_classes=CLASSES, seed=0)(pictures(), class_numbers().to(dtype)[:, None])[1]
    assert torch.equal(expected, column)


def test_channels_last_images_stay_so() -> None:
    images = pictures().contiguous(memory_format=torch.channels_last)
    mixed, _ = Mixup(1.0, 1.0, mode="elem", seed=0)(images, class_numbers())
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed, Mixup(1.0, 1.0, mode="elem", seed=0)(pictures(), class_numbers())[0])


# ---- what is refused

CONSTRUCTOR_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mixup_alpha": -1}, ValueError, r"mixup_alpha must be a number in \[0, 1e6\], 0 to switch it off, got -1"),
    ({"cutmix_alpha": "1"}, TypeError, "cutmix_alpha must be a number .*, got str"),
    ({"resizemix_alpha": float("nan")}, ValueError, "resizemix_alpha must be a number .*, got nan"),
    ({"cutmix_minmax": 0.5}, TypeError, r"cutmix_minmax must be \(low, high\) within \[0, 1\] or None, got 0.5"),
    ({"cutmix_minmax": (0.5, 0.2)}, ValueError, r"cutmix_minmax\[1\] must be a share in \[0.5, 1\], got 0.2"),
    ({"cutmix_minmax": (-0.1, 0.2)}, ValueError, r"cutmix_minmax\[0\] must be a share in \[0, 1\], got -0.1"),
    ({"prob": 1.1}, ValueError, r"prob must be a probability in \[0, 1\], got 1.1"),
    ({"switch_prob": -0.1}, ValueError, r"switch_prob must be a probability in \[0, 1\], got -0.1"),
    ({"mode": "half"}, ValueError, "mode='half' is unknown: expected one of batch, pair, elem"),
    ({"label_smoothing": 2}, ValueError, r"label_smoothing must be a number in \[0, 1\], got 2"),
    ({"num_classes": 0}, ValueError, "num_classes must be a number of classes, 1 or more, got 0"),
    ({"labels": "two-hot"}, ValueError, "labels='two-hot' is unknown: did you mean 'two_hot'"),
    ({"labels": "two_hot", "multi_label": True}, ValueError, "labels='two_hot' needs class numbers, but multi_label"),
    ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\*\*64\), or None, got -1"),
    ({"seed": 0.5}, TypeError, "seed must be an integer .*, got float"),
]


@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTOR_ERRORS)
def test_refuses_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Mixup(**options)


CALL_ERRORS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"cutmix_alpha": 1.0}, {"x": pictures()[0]}, ValueError, r"x must have shape \(N, C, H, W\), got \(3, 16, 20\)"),
    (
        {"resizemix_alpha": 1.0},
        {"x": torch.rand(8, 9)},
        ValueError,
        r"got \(8, 9\); what has no height .* cutmix_alpha=0",
    ),
    (
        {},
        {"x": torch.zeros(8, 24, 20, 3).byte()},
        ValueError,
        r"x must have .* looks like \(N, H, W, C\); give x.permute",
    ),
    ({}, {"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(N, C, H, W\), got \(\)"),
    ({}, {"x": torch.rand(8, 1, 4, 4).expand(8, 3, 4, 4)}, ValueError, "x is an expanded tensor .* give x.contiguous"),
    ({}, {"x": torch.rand(8, 3, 4, 4).requires_grad_()}, ValueError, "x is a leaf that requires a gradient"),
    ({}, {"x": torch.rand(8, 3, 4, 4).requires_grad_()[:]}, ValueError, "x is a leaf that requires a gradient"),
    ({}, {"plan": draw_plan(8, (16, 20), step=0), "x": torch.rand(8, 20)}, ValueError, "x must have shape"),
    ({}, {"x": pictures().int()}, TypeError, "x must be uint8, float16, .*, got int32"),
    ({}, {"x": np.zeros((8, 3, 16, 20))}, TypeError, "x must be a torch.Tensor .*, got ndarray"),
    ({}, {"target": [1] * 8}, TypeError, r"target must be a tensor of class numbers of shape \(N,\), got list"),
    ({}, {"target": torch.zeros(8, 6)}, ValueError, r"target must have shape \(8, 7\) where labels are soft, got"),
    ({"labels": "two_hot"}, {"target": torch.zeros(8, 7)}, ValueError, "needs class numbers, but target has rows"),
    ({}, {"target": torch.zeros(8)}, TypeError, "target must hold integer class numbers, got float32"),
    ({}, {"target": class_numbers(7)}, ValueError, r"target must have shape \(8,\), one class number per image, got"),
    ({}, {"target": class_numbers() + 1}, ValueError, r"target must hold class numbers in \[0, 7\), got 1 to 7"),
    ({}, {"target": class_numbers() - 1}, ValueError, r"target must hold class numbers in \[0, 7\), got -1 to 5"),
    ({"multi_label": True}, {}, ValueError, r"target must have shape \(8, 7\) with multi_label=True, got \(8,\)"),
    ({"multi_label": True}, {"target": None}, TypeError, r"target must be a tensor of shape \(N, 7\), got NoneType"),
    ({}, {"plan": "last"}, TypeError, "plan must be a MixPlan, got str; make one with draw or draw_plan"),
    ({}, {"plan": draw_plan(7, (16, 20), step=0)}, ValueError, "plan has 7 rows but x 8; draw it with n=8"),
    ({}, {"plan": draw_plan(8, (20, 16), step=0)}, ValueError, r"plan.size is \(20, 16\) but images are \(16, 20\)"),
    (
        {"correct_lam": False},
        {"plan": draw_plan(8, (16, 20), step=0)},
        ValueError,
        "plan cannot be replayed with correct_lam",
    ),
    ({"mixup_alpha": 0.0}, {}, ValueError, "mixup_alpha, cutmix_alpha and resizemix_alpha are all 0 .* give one of"),
]


@pytest.mark.parametrize(("options", "call", "error", "message"), CALL_ERRORS)
def test_refuses_wrong_calls_and_writes_nothing(
    options: dict[str, Any], call: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"x": pictures(), "target": class_numbers()} | call
    before = copy.deepcopy(arguments["x"].detach() if isinstance(arguments["x"], Tensor) else arguments["x"])
    with pytest.raises(error, match=message):
        Mixup(**{"num_classes": CLASSES} | options)(**arguments)
    assert bool((torch.as_tensor(arguments["x"]) == torch.as_tensor(before)).all())


def test_needs_torch_alone() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['timm', 'torchvision', 'triton', 'PIL', 'nvidia'])); "
    use = "import sdmp_kernels.timm, sdmp_kernels.v2, torch; x = torch.rand(3, 3, 8, 8); y = torch.arange(3); "
    calls = "sdmp_kernels.timm.Mixup(mode='elem')(x, y); sdmp_kernels.v2.CutMix(num_classes=3)(x, y)"
    subprocess.run([sys.executable, "-c", blocked + use + calls], check=True)
