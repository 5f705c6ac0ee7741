"""`sdmp_kernels.v2` against the real `torchvision.transforms.v2`: equal results for equal draws, equal laws."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from global_random import untouched
from torch import Tensor
from torch.nn.functional import one_hot

import sdmp_kernels.v2
from sdmp_kernels import MixPlan, Rule, TwoHot, draw_plan, mix
from sdmp_kernels.v2 import CutMix, MixUp, ResizeMix

real = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
tv_tensors = pytest.importorskip("torchvision.tv_tensors")
PIL = pytest.importorskip("PIL.Image")
CLASSES = 5
SIZE = (16, 20)
OURS = {"MixUp": MixUp, "CutMix": CutMix, "ResizeMix": ResizeMix}
NAMES = ("MixUp", "CutMix")


def pictures(n: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (n, 3, *SIZE), dtype=dtype, generator=generator)
    return torch.rand((n, 3, *SIZE), generator=generator).to(dtype)


def class_numbers(n: int = 7) -> Tensor:
    return torch.arange(n) * 3 % CLASSES


def recorded(name: str, seed: int, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The real transform, which keeps the parameters it draws."""
    torch.manual_seed(seed)
    transform = getattr(real, name)(**{"num_classes": CLASSES} | options)
    drawn: list[dict[str, Any]] = []
    original = transform.make_params
    transform.make_params = lambda inputs: drawn.append(original(inputs)) or drawn[-1]
    return transform, drawn


def as_plan(drawn: dict[str, Any], n: int = 7) -> MixPlan:
    """What the real transform drew, as a plan."""
    if "lam" in drawn:
        rule, lam, box = Rule.MIXUP, drawn["lam"], (0, 0, 0, 0)
    else:
        left, top, right, bottom = drawn["box"]
        rule, lam, box = Rule.CUTMIX, drawn["lam_adjusted"], (top, left, bottom - top, right - left)
    return MixPlan(
        rule=torch.full((n,), int(rule), dtype=torch.uint8),
        partner=(torch.arange(n) - 1) % n,
        lam=torch.full((n,), lam),
        partner_lam=torch.full((n,), lam),
        box=torch.tensor([box] * n, dtype=torch.int32),
        size=SIZE,
        mirrored=False,
        rules=(rule,),
    )


@pytest.fixture(autouse=True)
def keep_torchs_state() -> Any:
    """The real transforms draw from torch's global state; leave it to the other tests as it was."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# ---- equal results for equal draws


@pytest.mark.parametrize("name", NAMES)
def test_same_draws_give_torchvisions_pixels_and_labels(name: str) -> None:
    for seed in range(8):
        transform, drawn = recorded(name, seed, alpha=0.7)
        images, labels = pictures(), class_numbers()
        wanted, wanted_labels = transform(images, labels)
        mixed, mixed_labels = OURS[name](num_classes=CLASSES)(images, labels, plan=as_plan(drawn[0]))
        if name == "CutMix":
            assert torch.equal(mixed, wanted)
        torch.testing.assert_close(mixed, wanted, atol=2.0**-22, rtol=0)
        torch.testing.assert_close(mixed_labels, wanted_labels, atol=2.0**-22, rtol=0)
        assert mixed_labels.dtype == wanted_labels.dtype
        assert torch.equal(images, pictures()), "the inputs are not changed"
        assert torch.equal(labels, class_numbers())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_labels_that_are_rows_already(name: str, dtype: torch.dtype) -> None:
    transform, drawn = recorded(name, 3, num_classes=None)
    labels = one_hot(class_numbers(), CLASSES).to(dtype)
    _, wanted = transform(pictures(), labels)
    _, mixed = OURS[name]()(pictures(), labels, plan=as_plan(drawn[0]))
    assert mixed.dtype == wanted.dtype
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-22
    torch.testing.assert_close(mixed, wanted, atol=tolerance, rtol=0)
    assert torch.equal(labels, one_hot(class_numbers(), CLASSES).to(dtype))


def structures() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Samples as torchvision takes them, and the options they need."""
    images, labels, extra = pictures(), class_numbers(), torch.arange(3.0)
    return {
        "tuple": ((images, labels), {}),
        "list": ([images, labels], {}),
        "dict of labels": ((images, {"labels": labels, "ids": extra, "note": "x"}), {}),
        "dict of a label-like key": ((images, {"MyLabels": labels, "boxes": None}), {}),
        "dict": ({"image": images, "labels": labels, "path": ["a", "b"]}, {}),
        "nested": (
            {"a": [images, (extra, 3)], "y": {"t": labels}},
            {"labels_getter": lambda sample: sample["y"]["t"]},
        ),
        "image": ((tv_tensors.Image(images), labels, extra), {}),
        "two images": (
            {"one": tv_tensors.Image(images), "two": tv_tensors.Image(images.flip(1)), "labels": labels, "z": extra},
            {},
        ),
        "video": ((tv_tensors.Video(torch.stack([images, images.flip(2)], 1)), labels), {}),
        "images and video": (
            (tv_tensors.Image(images), {"labels": labels, "clip": tv_tensors.Video(images[:, None])}),
            {},
        ),
        "channels last": ((images.contiguous(memory_format=torch.channels_last), labels), {}),
    }


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal structures of equal classes, tensors at rounding level."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours.as_subclass(Tensor), theirs.as_subclass(Tensor), atol=2.0**-22, rtol=0)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("structure", "unpack"),
    [(key, False) for key in structures()] + [(key, True) for key, (s, _) in structures().items() if type(s) is tuple],
)
def test_structures(name: str, structure: str, unpack: bool) -> None:
    """A sample as one argument, and spread over several."""
    sample, options = structures()[structure]
    call = sample if unpack else (sample,)
    transform, drawn = recorded(name, 2, **options)
    wanted = transform(*call)
    before = copy.deepcopy(sample)
    ours = OURS[name](num_classes=CLASSES, **options)(*call, plan=as_plan(drawn[0]))
    assert_same(ours, wanted)
    assert_same(sample, before)


def test_arguments_are_torchvisions() -> None:
    for name in NAMES:
        theirs = inspect.signature(getattr(real, name)).parameters
        ours = inspect.signature(OURS[name]).parameters
        for argument in theirs:
            assert ours[argument].kind == theirs[argument].kind == inspect.Parameter.KEYWORD_ONLY
            assert ours[argument].default == theirs[argument].default
        assert set(ours) - set(theirs) == {"per", "labels", "seed", "ignore_index"}


def test_inside_torchvisions_containers() -> None:
    choice = real.RandomChoice(
        [MixUp(num_classes=CLASSES), CutMix(num_classes=CLASSES), ResizeMix(num_classes=CLASSES)]
    )
    images, labels = real.Compose([choice])(pictures(), class_numbers())
    assert images.shape == (7, 3, *SIZE)
    torch.testing.assert_close(labels.sum(1), torch.ones(7))
    assert "alpha=1.0, num_classes=5" in repr(choice)


# ---- what torchvision does not do


@pytest.mark.parametrize("name", list(OURS))
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_pixels_and_labels_follow_one_plan(name: str, per: str) -> None:
    one, other = (OURS[name](num_classes=CLASSES, per=per, seed=3) for _ in range(2))
    plan = other.draw(7, SIZE)
    images, labels = one(pictures(), class_numbers())
    assert torch.equal(images, mix(pictures(), plan))
    assert not torch.equal(images, pictures())
    hot = one_hot(class_numbers(), CLASSES)
    lam = plan.lam.view(-1, 1)
    torch.testing.assert_close(labels, lam * hot + (1 - lam) * hot.roll(1, 0), atol=1e-6, rtol=0)
    assert len(plan.lam.unique()) > 3 if per == "sample" else len(plan.lam.unique()) == 1
    assert torch.equal(plan.partner, (torch.arange(7) - 1) % 7)


def test_uint8_images() -> None:
    transform, drawn = recorded("MixUp", 0)
    with pytest.raises(RuntimeError, match="result type Float can't be cast"):
        transform(pictures(dtype=torch.uint8), class_numbers())
    mixed, _ = MixUp(num_classes=CLASSES)(pictures(dtype=torch.uint8), class_numbers(), plan=as_plan(drawn[0]))
    source, lam = pictures(dtype=torch.uint8).double(), float(as_plan(drawn[0]).lam[0])
    assert mixed.dtype == torch.uint8
    exact = lam * source + (1 - lam) * source.roll(1, 0)
    assert float((mixed.double() - exact).abs().max()) <= 0.5 + 1e-4


def test_labels_that_come_before_the_images() -> None:
    sample = {"labels": class_numbers(), "image": pictures()}
    theirs = recorded("MixUp", 0)[0](sample)
    assert torch.equal(theirs["image"], sample["image"]), "torchvision takes the labels for the image and mixes nothing"
    ours = MixUp(num_classes=CLASSES, seed=0)(sample)
    assert torch.equal(ours["image"], mix(pictures(), MixUp(seed=0).draw(7, SIZE)))


@pytest.mark.parametrize("name", list(OURS))
@pytest.mark.parametrize("n", [0, 1, 2])
def test_small_batches(name: str, n: int) -> None:
    images, labels = OURS[name](num_classes=CLASSES, seed=0)(pictures(n), class_numbers(n))
    assert images.shape == (n, 3, *SIZE)
    torch.testing.assert_close(labels.sum(1), torch.ones(n))
    if n == 1 and name != "ResizeMix":
        assert torch.equal(images, pictures(1))


@pytest.mark.parametrize("name", list(OURS))
def test_two_hot_labels(name: str) -> None:
    options = {"per": "sample", "seed": 6}
    _, dense = OURS[name](num_classes=CLASSES, **options)(pictures(), class_numbers())
    images, target = OURS[name](labels="two_hot", **options)(pictures(), class_numbers())
    assert isinstance(target, TwoHot)
    assert torch.equal(target.first, class_numbers())
    assert torch.equal(target.second, class_numbers().roll(1))
    again = torch.zeros(7, CLASSES).scatter_add_(1, target.first[:, None], target.weight[:, None])
    again.scatter_add_(1, target.second[:, None], 1 - target.weight[:, None])
    torch.testing.assert_close(again, dense, atol=1e-7, rtol=0)
    nested = OURS[name](labels="two_hot", **options)({"x": pictures(), "labels": class_numbers()})
    assert isinstance(nested["labels"], TwoHot)
    assert torch.equal(nested["x"], images)


def test_gradients_reach_the_images() -> None:
    images = pictures().requires_grad_()
    mixed, _ = CutMix(num_classes=CLASSES, seed=0)(images, class_numbers())
    assert torch.equal(torch.autograd.grad(mixed.sum(), images)[0], torch.ones_like(images))


# ---- equal laws of draws


def distance(a: Any, b: Any) -> float:
    """Kolmogorov and Smirnov's distance of two samples."""
    a, b = np.sort(np.asarray(a)), np.sort(np.asarray(b))
    places = np.concatenate([a, b])
    below = [np.searchsorted(x, places, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_lam_and_boxes_are_drawn_by_torchvisions_law(alpha: float) -> None:
    n = 3000
    torch.manual_seed(0)
    theirs, cut = real.MixUp(alpha=alpha, num_classes=2), real.CutMix(alpha=alpha, num_classes=2)
    image = [torch.zeros(1, 3, 30, 41)]
    lam = [theirs.make_params(image)["lam"] for _ in range(n)]
    boxes = [cut.make_params(image) for _ in range(n)]
    # Two samples of one law are further apart than this once in a thousand times.
    far = 1.95 * (2 / n) ** 0.5
    assert distance(lam, MixUp(alpha=alpha, per="sample", seed=1).draw(n, (30, 41)).lam) < far
    plan = CutMix(alpha=alpha, per="sample", seed=1).draw(n, (30, 41))
    assert distance([b["lam_adjusted"] for b in boxes], plan.lam) < far
    for field, value in enumerate((lambda b: b[1], lambda b: b[0], lambda b: b[3] - b[1], lambda b: b[2] - b[0])):
        assert distance([value(b["box"]) for b in boxes], plan.box[:, field]) < far


def test_a_batch_is_drawn_by_the_same_law() -> None:
    mixup = MixUp(alpha=0.5, seed=0)
    lam = [float(mixup.draw(4, (8, 8)).lam[0]) for _ in range(500)]
    assert distance(lam, MixUp(alpha=0.5, per="sample", seed=1).draw(3000, (8, 8)).lam) < 1.95 * (1 / 500) ** 0.5


def test_resizemix_is_drawn_as_draw_plan_does() -> None:
    plan = ResizeMix(per="sample", seed=1).draw(3000, (40, 40))
    like = draw_plan(3000, (40, 40), rules=["resizemix"], seed=2, step=0)
    assert distance(plan.lam, like.lam) < 1.95 * (2 / 3000) ** 0.5
    for field in range(4):
        assert distance(plan.box[:, field], like.box[:, field]) < 1.95 * (2 / 3000) ** 0.5


# ---- draws as state


@pytest.mark.parametrize("name", list(OURS))
def test_no_global_random_state_is_touched(name: str) -> None:
    with untouched():
        transform = OURS[name](num_classes=CLASSES)
        for _ in range(3):
            transform(pictures(), class_numbers())


def test_draws_depend_on_seed_and_step_alone() -> None:
    one, two = MixUp(num_classes=CLASSES, seed=1), MixUp(num_classes=CLASSES, seed=1)
    first = [one(pictures(), class_numbers())[0] for _ in range(3)]
    assert not torch.equal(first[0], first[1])
    two.step = 2
    assert torch.equal(two(pictures(), class_numbers())[0], first[2])
    by_default = MixUp()
    assert torch.equal(by_default.draw(4, (9, 9)).lam, MixUp(seed=by_default.seed).draw(4, (9, 9)).lam)


# ---- what is refused

CONSTRUCTOR_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"alpha": 0}, ValueError, "alpha must be a number above 0, got 0"),
    ({"alpha": -1.0}, ValueError, "alpha must be a number above 0, got -1.0"),
    ({"alpha": None}, TypeError, "alpha must be a number above 0, got NoneType"),
    ({"num_classes": 0}, ValueError, "num_classes must be a number of classes, or None, got 0"),
    ({"num_classes": 2.5}, TypeError, "num_classes must be a number of classes, or None, got float"),
    ({"labels_getter": "second"}, ValueError, "labels_getter must be 'default', a callable or None, got 'second'"),
    ({"per": "image"}, ValueError, "per='image' is unknown"),
    ({"labels": "onehot"}, ValueError, "labels='onehot' is unknown: did you mean"),
    ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\*\*64\), or None, got -1"),
]


@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTOR_ERRORS)
def test_refuses_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MixUp(**options)


def boxed() -> Any:
    return tv_tensors.BoundingBoxes(torch.zeros(7, 4), format="XYXY", canvas_size=SIZE)


CALL_ERRORS: list[tuple[dict[str, Any], tuple[Any, ...], type[Exception], str]] = [
    ({}, (), TypeError, "forward needs images and labels, but nothing was given"),
    ({}, (torch.zeros(7, 24, 20, 3).byte(), class_numbers()), ValueError, r"images must .* looks like \(N, H, W, C\)"),
    ({}, (pictures(), "cat"), ValueError, "labels were not found: .* got str; or give labels_getter a callable"),
    ({}, (pictures(), {"y": class_numbers()}), ValueError, "labels were not found: .* got dict"),
    ({}, (pictures(), {"labels": [1, 2]}), ValueError, "labels must be a tensor, got list; check labels_getter"),
    ({}, (pictures(),), ValueError, r"labels must have shape \(N,\) or \(N, num_classes\), got \(7, 3, 16, 20\)"),
    ({"labels_getter": None}, (pictures(), class_numbers()), ValueError, "labels_getter=None finds no labels"),
    (
        {"labels_getter": lambda sample: sample[1].clone()},
        (pictures(), class_numbers()),
        ValueError,
        "labels must be a tensor of the sample itself, but labels_getter returned another one",
    ),
    ({"num_classes": None}, (pictures(), class_numbers()), ValueError, "num_classes must be given where labels are"),
    ({}, (pictures(), torch.zeros(7, 4)), ValueError, "labels must have num_classes=5 columns, got 4"),
    ({"labels": "two_hot"}, (pictures(), torch.zeros(7, 5)), ValueError, "labels='two_hot' needs class numbers"),
    ({}, (pictures(), torch.zeros(7)), TypeError, "labels must hold integer class numbers, got float32"),
    ({}, (pictures(), class_numbers() + 1), ValueError, r"labels must hold class numbers in \[0, 5\), got 1 to 5"),
    ({"labels": "two_hot", "num_classes": None}, (pictures(), class_numbers() - 1), ValueError, "got -1 to 3"),
    ({}, (pictures()[0], class_numbers()), ValueError, r"images must be a batch of shape \(N, C, H, W\), got \(3, 16"),
    (
        {},
        (tv_tensors.Video(pictures()), class_numbers()),
        ValueError,
        r"images must be a batch of shape \(N, T, C, H, W\), got \(7, 3, 16, 20\)",
    ),
    ({}, (pictures(6), class_numbers()), ValueError, "images are 6 but labels 7; give one label per image"),
    ({}, ({"labels": class_numbers()},), TypeError, r"no images were found: give a tensor \(N, C, H, W\)"),
    (
        {},
        (tv_tensors.Image(pictures()), {"labels": class_numbers(), "b": tv_tensors.Image(pictures()[..., 1:])}),
        ValueError,
        r"images must be of one size to share a box, got \[\(16, 19\), \(16, 20\)\]",
    ),
    ({}, (pictures(), class_numbers(), PIL.new("RGB", (4, 4))), ValueError, "takes no PIL images, .* but got Image"),
    ({}, (pictures(), class_numbers(), boxed()), ValueError, "takes no .* bounding boxes, .* but got BoundingBoxes"),
    ({}, (pictures().int(), class_numbers()), TypeError, "images must be uint8, float16, .*, got int32"),
]


@pytest.mark.parametrize(("options", "call", "error", "message"), CALL_ERRORS)
def test_refuses_wrong_samples(
    options: dict[str, Any], call: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CutMix(**{"num_classes": CLASSES} | options)(*call)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ("last", TypeError, "plan must be a MixPlan, got str; make one with draw or draw_plan"),
        (draw_plan(6, SIZE, step=0), ValueError, "labels has 7 rows but the plan has 6"),
        (draw_plan(7, (20, 16), step=0), ValueError, r"plan.size is \(20, 16\) but images are \(16, 20\)"),
    ],
)
def test_refuses_a_plan_that_does_not_fit(plan: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sdmp_kernels.v2.MixUp(num_classes=CLASSES)(pictures(), class_numbers(), plan=plan)


def test_ignored_labels_leave_the_others_their_share() -> None:
    transform = MixUp(num_classes=4, per="sample", seed=1, ignore_index=-100)
    plan = transform.draw(4, (8, 8))
    labels = torch.tensor([0, -100, -100, 3])
    _, target = transform(torch.rand(4, 3, 8, 8), labels, plan=plan)
    wanted = torch.zeros(4, 4)
    for i, label in enumerate(labels.tolist()):
        for number, share in ((label, plan.lam[i]), (int(labels[i - 1]), 1 - plan.lam[i])):
            if number >= 0:
                wanted[i, number] += share
    torch.testing.assert_close(target, wanted, atol=1e-6, rtol=0)
    assert (target[2] == 0).all()
