"""`mix` on the backend that serves this machine's CPU: what it promises, pixel by pixel.

`test_every_op.py` compares every backend with the reference; here the promises are stated without one.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from global_random import untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdmp_kernels import Erasure, MixPlan, Rule, draw_plan, mix, use_backend
from sdmp_kernels.ops.mix import op

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
shapes = st.tuples(st.integers(0, 7), st.integers(1, 4), st.integers(1, 19), st.integers(1, 19))
rules = st.lists(st.sampled_from(["keep", "mixup", "cutmix", "resizemix"]), min_size=1, max_size=4, unique=True)
seeds = st.integers(0, 10_000)


def drawn(
    shape: tuple[int, ...], names: list[str], seed: int, *, flip: bool = True, rows: int | None = None
) -> MixPlan:
    """A plan of one rule per row; without `flip` its partners are any rows, also of `rows` other images."""
    plan = draw_plan(shape[0], shape[2:], rules=names, per="sample", seed=seed, step=0)
    if flip:
        return plan
    high = max(shape[0] if rows is None else rows, 1)
    vector = torch.randint(0, high, (shape[0],), generator=torch.Generator().manual_seed(seed))
    return replaced(plan, partner=vector, mirrored=False)


def replaced(plan: MixPlan, **changes: Any) -> MixPlan:
    fields = ("rule", "partner", "lam", "partner_lam", "box", "size", "mirrored", "rules")
    return MixPlan(**{name: getattr(plan, name) for name in fields} | changes)


def hand(
    rule: Rule, *, n: int = 2, size: tuple[int, int] = (6, 8), lam: float = 1.0, box: Any = (0, 0, 0, 0)
) -> MixPlan:
    """n rows of one rule with the same box."""
    if rule in (Rule.CUTMIX, Rule.RESIZEMIX):
        lam = 1 - box[2] * box[3] / (size[0] * size[1])
    return MixPlan(
        rule=torch.full((n,), int(rule), dtype=torch.uint8),
        partner=torch.arange(n - 1, -1, -1),
        lam=torch.full((n,), lam),
        partner_lam=torch.full((n,), lam),
        box=torch.tensor([box] * n, dtype=torch.int32).view(n, 4),
        size=size,
        mirrored=True,
        rules=(rule,),
    )


def pictures(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, layout: str = "contiguous") -> Tensor:
    """Images of any dtype and layout, floats in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        values = torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    else:
        values = torch.rand(shape, dtype=torch.float64, generator=generator).to(dtype)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.zeros(shape[0] * 2 + 1, shape[1], shape[2] + 2, shape[3] + 3, dtype=dtype)
        view = wide[1::2][: shape[0], :, 1:-1, 2:-1]
        return view.copy_(values)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    return values


def distinct(shape: tuple[int, ...]) -> Tensor:
    """Images whose float32 values all differ, each row's in a range of its own."""
    n = int(np.prod(shape[1:]))
    return torch.stack([torch.arange(n).float() + 2 * n * i + 1 for i in range(shape[0])] or [torch.zeros(0, n)]).view(
        shape
    )


def mask(plan: MixPlan, i: int) -> Tensor:
    """(H, W) True inside the box of row i."""
    inside = torch.zeros(plan.size, dtype=torch.bool)
    top, left, height, width = plan.box[i].tolist()
    inside[top : top + height, left : left + width] = True
    return inside


def formula(images: Tensor, partners: Tensor, plan: MixPlan) -> Tensor:
    """What a user would write with PyTorch's operators, row by row; differentiable."""
    rows = []
    for i, (rule, j) in enumerate(zip(plan.rule.tolist(), plan.partner.tolist(), strict=True)):
        own, other, lam, inside = images[i], partners[j], plan.lam[i].to(images.dtype), mask(plan, i)
        if rule == Rule.MIXUP:
            rows.append(lam * own + (1 - lam) * other)
        elif rule == Rule.RESIZEMIX and inside.any():
            top, left, height, width = plan.box[i].tolist()
            small = F.interpolate(other[None], (height, width), mode="bilinear", align_corners=False)[0]
            pad = (left, plan.size[1] - left - width, top, plan.size[0] - top - height)
            rows.append(torch.where(inside, F.pad(small, pad), own))
        else:
            rows.append(torch.where(inside, other, own))
    return torch.stack(rows) if rows else images


def rounding(size: tuple[int, ...]) -> float:
    """How far float32 may be from exact, for values within 0 and 1.

    ResizeMix's source position along a side S has three roundings (the scale, the product, the half taken off), each
    at most S * 2**-24, and the result moves by no more than the position does; the blend itself adds two ulps.
    """
    return 2.0**-22 + 1.5 * 2.0**-23 * sum(size)


# ---- which pixels change, and into what


@PROPERTY
@given(shapes, seeds, st.booleans(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
def test_cutmix_copies_the_partner_inside_the_box_and_nothing_else(
    shape: tuple[int, ...], seed: int, flip: bool, dtype: torch.dtype, layout: str
) -> None:
    images = pictures(shape, dtype, seed, layout)
    before = images.clone()
    plan = drawn(shape, ["cutmix", "keep"], seed, flip=flip)
    mixed = mix(images, plan)
    assert torch.equal(images, before), "inputs are not changed"
    assert mixed.dtype == dtype
    for i, j in enumerate(plan.partner.tolist()):
        inside = mask(plan, i)
        assert torch.equal(mixed[i][:, inside], images[j][:, inside])
        assert torch.equal(mixed[i][:, ~inside], images[i][:, ~inside])


@PROPERTY
@given(shapes, rules, seeds, st.booleans())
def test_the_pixels_change_exactly_as_planned(shape: tuple[int, ...], names: list[str], seed: int, flip: bool) -> None:
    """The paper's released code mixes no pixel at all; this is the test that would have told."""
    images = distinct(shape)
    plan = drawn(shape, names, seed, flip=flip)
    changed = (mix(images, plan) != images).flatten(1).sum(1)
    for i, (rule, j) in enumerate(zip(plan.rule.tolist(), plan.partner.tolist(), strict=True)):
        area = {Rule.KEEP: 0, Rule.MIXUP: plan.size[0] * plan.size[1]}.get(Rule(rule), int(plan.box[i, 2:].prod()))
        if i != j:
            assert int(changed[i]) == area * shape[1]
            if rule not in (Rule.KEEP, Rule.MIXUP):
                weight = torch.tensor(1 - area / (plan.size[0] * plan.size[1])).float()
                assert plan.lam[i] == weight, "the label's weight is the share of pixels that stayed"
        elif rule != Rule.RESIZEMIX:
            assert int(changed[i]) == 0


@PROPERTY
@given(shapes, seeds, st.booleans(), st.sampled_from(LAYOUTS))
def test_mixup_is_the_weighted_mean(shape: tuple[int, ...], seed: int, flip: bool, layout: str) -> None:
    images = pictures(shape, torch.float32, seed, layout)
    plan = drawn(shape, ["mixup"], seed, flip=flip)
    lam = plan.lam.double().view(-1, 1, 1, 1)
    exact = lam * images.double() + (1 - lam) * images[plan.partner].double()
    # Each of the two products, 1 - lam and the sum is rounded: at most two ulps of values below 1.
    torch.testing.assert_close(mix(images, plan).double(), exact, atol=2.0**-23, rtol=0)


@PROPERTY
@given(shapes, seeds, st.booleans(), st.sampled_from(LAYOUTS))
def test_resizemix_is_interpolate(shape: tuple[int, ...], seed: int, flip: bool, layout: str) -> None:
    images = pictures(shape, torch.float32, seed, layout)
    plan = drawn(shape, ["resizemix"], seed, flip=flip)
    mixed = mix(images, plan)
    for i, j in enumerate(plan.partner.tolist()):
        inside = mask(plan, i)
        assert torch.equal(mixed[i][:, ~inside], images[i][:, ~inside])
        top, left, height, width = plan.box[i].tolist()
        if inside.any():
            patch = F.interpolate(images[j][None].contiguous(), (height, width), mode="bilinear", align_corners=False)
            got = mixed[i][:, top : top + height, left : left + width]
            torch.testing.assert_close(got, patch[0], atol=2 * rounding(plan.size), rtol=0)


def test_resizemix_of_a_whole_image_box_is_the_partner() -> None:
    images = pictures((2, 3, 6, 8), torch.float32)
    assert torch.equal(mix(images, hand(Rule.RESIZEMIX, box=(0, 0, 6, 8))), images.flip(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["mixup", "resizemix"])
def test_half_images_are_mixed_in_float32_and_rounded_once(dtype: torch.dtype, rule: str) -> None:
    images = pictures((6, 3, 17, 13), dtype)
    plan = drawn(images.shape, [rule], 3)
    exact = formula(images.double(), images.double(), plan)
    mixed = mix(images, plan).double()
    # Half an ulp of the result, and float32's own error before it.
    ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact.clamp_min(1e-4))))
    assert bool(((mixed - exact).abs() <= 0.5 * ulp + rounding(plan.size)).all())


def test_uint8_is_rounded_to_nearest_even() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    pair = torch.stack([values, torch.full_like(values, 7)]).view(2, 1, 16, 16)
    mixed = mix(pair, hand(Rule.MIXUP, size=(16, 16), lam=0.5))
    exact = [(v + 7) / 2 for v in range(256)]
    assert mixed[0].flatten().tolist() == [round(v) for v in exact], "Python rounds ties to even too"


@PROPERTY
@given(shapes, seeds, st.sampled_from(LAYOUTS))
def test_uint8_is_within_half_of_exact(shape: tuple[int, ...], seed: int, layout: str) -> None:
    images = pictures(shape, torch.uint8, seed, layout)
    plan = drawn(shape, ["mixup", "resizemix"], seed)
    mixed = mix(images, plan)
    assert mixed.dtype == torch.uint8
    exact = formula(images.double(), images.double(), plan)
    assert bool(((mixed.double() - exact).abs() <= 0.5 + 255 * rounding(plan.size)).all())


# ---- what must not leak


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_copied_pixels_are_bit_for_bit_whatever_the_partner_holds(dtype: torch.dtype, poison: float) -> None:
    images = pictures((4, 3, 6, 8), dtype)
    poisoned = torch.full_like(images, poison)
    for plan in (
        hand(Rule.KEEP, n=4),
        hand(Rule.MIXUP, n=4, lam=1.0),
        hand(Rule.CUTMIX, n=4, box=(2, 3, 0, 0)),
        hand(Rule.CUTMIX, n=4, box=(2, 3, 0, 4)),
        hand(Rule.RESIZEMIX, n=4, box=(2, 3, 4, 0)),
    ):
        assert torch.equal(mix(images, plan, partners=poisoned), images)
        in_place = images.clone()
        assert torch.equal(mix(in_place, plan, partners=poisoned, out=in_place), images)
    for rule in (Rule.CUTMIX, Rule.RESIZEMIX):
        plan = hand(rule, n=4, box=(1, 2, 3, 4))
        inside = mask(plan, 0)
        assert torch.equal(mix(images, plan, partners=poisoned)[..., ~inside], images[..., ~inside])
        assert torch.isfinite(mix(poisoned, plan, partners=images)[..., inside]).all()
    cut = hand(Rule.CUTMIX, n=4, box=(1, 2, 3, 4))
    inside = mask(cut, 0)
    assert torch.equal(mix(poisoned, cut, partners=images)[..., inside], images.flip(0)[..., inside])


def test_a_row_that_is_its_own_mixup_partner_is_bit_for_bit() -> None:
    images = pictures((5, 3, 6, 8), torch.float32)
    images[2, 0, 0, 0] = float("inf")
    images[2, 1, 0, 0] = float("nan")
    plan = drawn(images.shape, ["mixup"], 0)
    assert plan.partner[2] == 2
    assert torch.equal(mix(images, plan)[2].view(torch.int32), images[2].view(torch.int32))
    everyone = replaced(plan, partner=torch.arange(5), mirrored=False)
    assert torch.equal(mix(images, everyone).view(torch.int32), images.view(torch.int32))


# ---- ways to call it


@PROPERTY
@given(shapes, rules, seeds, st.booleans(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans())
def test_in_place_equals_out_of_place(
    shape: tuple[int, ...], names: list[str], seed: int, flip: bool, dtype: torch.dtype, layout: str, clean: bool
) -> None:
    images = pictures(shape, dtype, seed, layout)
    original = images.clone()
    plan = drawn(shape, names, seed, flip=flip)
    expected = mix(images, plan)
    if clean:
        kept = torch.empty_like(images)
        result = mix(images, plan, clean=True, out=(kept, images))
        assert result[0] is kept
        assert result[1] is images
        assert torch.equal(kept, original)
    else:
        assert mix(images, plan, out=images) is images
    assert torch.equal(images, expected)


@PROPERTY
@given(shapes, rules, seeds, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_out_is_written_whatever_its_layout(
    shape: tuple[int, ...], names: list[str], seed: int, dtype: torch.dtype, layout: str, out_layout: str
) -> None:
    images = pictures(shape, dtype, seed, layout)
    plan = drawn(shape, names, seed)
    out = pictures(shape, dtype, seed + 1, out_layout)
    strides = out.stride()
    assert mix(images, plan, out=out) is out
    assert out.stride() == strides
    assert torch.equal(out, mix(images, plan))


@PROPERTY
@given(shapes, rules, seeds, st.sampled_from(DTYPES), st.booleans())
def test_clean_returns_both_from_one_call(
    shape: tuple[int, ...], names: list[str], seed: int, dtype: torch.dtype, normalise: bool
) -> None:
    images = pictures(shape, dtype, seed)
    plan = drawn(shape, names, seed)
    scale = {"mean": [0.5] * shape[1], "std": [0.25] * shape[1]} if normalise else {}
    kept, mixed = mix(images, plan, clean=True, **scale)
    assert torch.equal(mixed, mix(images, plan, **scale))
    zeros = {"rule": torch.zeros_like(plan.rule), "box": torch.zeros_like(plan.box)}
    nothing = replaced(plan, lam=torch.ones_like(plan.lam), rules=(Rule.KEEP,), **zeros)
    assert torch.equal(kept, mix(images, nothing, **scale))
    if not normalise:
        assert torch.equal(kept, images)
    if images.numel():
        assert len({t.untyped_storage().data_ptr() for t in (kept, mixed, images)}) == 3
    pair = (torch.empty_like(kept), torch.empty_like(mixed))
    result = mix(images, plan, clean=True, out=pair, **scale)
    assert result[0] is pair[0]
    assert result[1] is pair[1]
    assert torch.equal(pair[0], kept)
    assert torch.equal(pair[1], mixed)


@PROPERTY
@given(shapes, rules, seeds, st.integers(1, 9), st.sampled_from([torch.uint8, torch.float32]), st.sampled_from(LAYOUTS))
def test_partners_are_the_images_that_come_in(
    shape: tuple[int, ...], names: list[str], seed: int, rows: int, dtype: torch.dtype, layout: str
) -> None:
    images, others = pictures(shape, dtype, seed), pictures((rows, *shape[1:]), dtype, seed + 1, layout)
    plan = drawn(shape, names, seed, flip=False, rows=rows)
    mixed = mix(images, plan, partners=others)
    # One set of images that holds both says the same.
    both = torch.cat([images, others])
    whole = replaced(plan, partner=plan.partner + shape[0])
    padded = [torch.cat([t, t.new_zeros(rows, *t.shape[1:])]) for t in (whole.rule, whole.partner, whole.box)]
    ones = torch.cat([plan.lam, torch.ones(rows)])
    fields = {"rule": padded[0], "partner": padded[1], "box": padded[2], "lam": ones, "partner_lam": ones}
    joint = MixPlan(**fields, size=plan.size, mirrored=False, rules=tuple(Rule))
    assert torch.equal(mixed, mix(both, joint)[: shape[0]])
    if shape[0] == rows:
        overlapping = others.clone()
        mix(images, plan, partners=overlapping, out=overlapping)
        assert torch.equal(overlapping, mixed), "the partners may be what is written"
        kept, again = others.clone(), torch.empty_like(mixed)
        mix(images, plan, partners=kept, clean=True, out=(kept, again))
        assert torch.equal(again, mixed)
        assert torch.equal(kept, images)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_of_the_images_is_kept(layout: str, dtype: torch.dtype) -> None:
    images = pictures((4, 3, 8, 6), dtype, layout=layout)
    kept, mixed = mix(images, drawn(images.shape, ["mixup", "cutmix"], 0), clean=True)
    for result in (kept, mixed):
        assert result.shape == images.shape
        assert result.stride() == torch.empty_like(images).stride()
    if layout == "channels_last":
        assert mixed.is_contiguous(memory_format=torch.channels_last)
    normalised = mix(images, drawn(images.shape, ["cutmix"], 0), mean=MEAN, std=STD, dtype=torch.float32)
    assert normalised.stride() == torch.empty_like(images).stride()


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 8, 8), (3, 1, 1, 1), (5, 2, 1, 7), (3, 7, 5, 3)])
@pytest.mark.parametrize("name", ["keep", "mixup", "cutmix", "resizemix"])
def test_empty_one_and_odd_batches(shape: tuple[int, ...], name: str) -> None:
    images = pictures(shape, torch.float32)
    plan = drawn(shape, [name], 1)
    mixed = mix(images, plan)
    assert mixed.shape == shape
    torch.testing.assert_close(mixed, formula(images, images, plan), atol=2 * rounding(plan.size), rtol=0)


def test_no_channels() -> None:
    assert mix(torch.zeros(2, 0, 6, 8), hand(Rule.RESIZEMIX, box=(1, 1, 2, 2))).shape == (2, 0, 6, 8)


def test_one_pixel_is_still_mixed() -> None:
    images = pictures((4, 3, 1, 1), torch.float32)
    assert torch.equal(mix(images, hand(Rule.CUTMIX, n=4, size=(1, 1), box=(0, 0, 1, 1))), images.flip(0))


# ---- normalisation and dtypes


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("result", [None, torch.float16, torch.bfloat16, torch.float32])
def test_normalised_values(source: torch.dtype, result: torch.dtype | None) -> None:
    images = pictures((5, 3, 9, 7), source)
    plan = drawn(images.shape, ["keep", "mixup", "cutmix", "resizemix"], 4)
    mixed = mix(images, plan, mean=MEAN, std=STD, dtype=result)
    assert mixed.dtype == (result or (torch.float32 if source == torch.uint8 else source))
    unit = images.double() / (255 if source == torch.uint8 else 1)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    exact = (formula(unit, unit, plan) - mean) / std
    # Half an ulp of a result below 4, and float32's error amplified by 1 / std.
    tolerance = 2 * torch.finfo(mixed.dtype).eps + rounding(plan.size) / min(STD) + 1e-6
    torch.testing.assert_close(mixed.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
def test_without_normalisation_values_are_only_cast(source: torch.dtype, result: torch.dtype) -> None:
    images = pictures((4, 3, 6, 8), source)
    if source != torch.uint8:
        images = images * 300 - 20
    mixed = mix(images, hand(Rule.CUTMIX, n=4, box=(1, 1, 3, 5)), dtype=result)
    assert mixed.dtype == result
    expected = images.clone()
    expected[..., 1:4, 1:6] = images.flip(0)[..., 1:4, 1:6]
    if result == torch.uint8 and source != torch.uint8:
        expected = expected.double().round().clamp(0, 255)
    assert torch.equal(mixed, expected.to(result))


def test_out_decides_the_dtype() -> None:
    images = pictures((4, 3, 6, 8), torch.uint8)
    out = torch.empty(4, 3, 6, 8, dtype=torch.bfloat16)
    plan = drawn(images.shape, ["mixup"], 0)
    assert mix(images, plan, mean=MEAN, std=STD, out=out) is out
    assert torch.equal(out, mix(images, plan, mean=MEAN, std=STD, dtype=torch.bfloat16))


def test_a_std_whose_inverse_is_no_number_is_refused() -> None:
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="std must be at least 1e-30"):
        mix(images, drawn(images.shape, ["mixup"], 0), mean=MEAN, std=(0.2, 1e-50, 0.2), dtype=torch.float32)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_mean_and_std_in_any_sequence(kind: Any) -> None:
    images, plan = pictures((2, 3, 6, 8), torch.uint8), hand(Rule.MIXUP, lam=0.5)
    expected = mix(images, plan, mean=MEAN, std=STD)
    torch.testing.assert_close(mix(images, plan, mean=kind(MEAN), std=kind(STD)), expected, atol=1e-6, rtol=0)


# ---- gradients


@pytest.mark.parametrize("names", [["mixup"], ["cutmix"], ["resizemix"], ["keep", "mixup", "cutmix", "resizemix"]])
@pytest.mark.parametrize("kind", ["flip", "any", "partners"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_plain_formula(names: list[str], kind: str, dtype: torch.dtype) -> None:
    shape = (5, 3, 9, 7)
    images = pictures(shape, dtype).requires_grad_()
    partners = pictures((4, *shape[1:]), dtype, 1).requires_grad_() if kind == "partners" else None
    plan = drawn(shape, names, 2, flip=kind == "flip", rows=4 if partners is not None else None)
    leaves = [images] if partners is None else [images, partners]
    kept, mixed = mix(images, plan, partners=partners, mean=MEAN, std=STD, clean=True)
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (MEAN, STD))
    plain = (formula(images, images if partners is None else partners, plan) - mean) / std
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    got = torch.autograd.grad([mixed, kept], leaves, upstream)
    wanted = torch.autograd.grad([plain, (images - mean) / std], leaves, upstream)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, atol=2e-5 if dtype == torch.float32 else 1e-12, rtol=1e-5)


def test_gradient_of_one_output_alone() -> None:
    images, plan = pictures((4, 3, 6, 8), torch.float32).requires_grad_(), hand(Rule.CUTMIX, n=4, box=(1, 2, 3, 4))
    kept, mixed = mix(images, plan, clean=True)
    assert torch.equal(torch.autograd.grad(kept.sum(), images, retain_graph=True)[0], torch.ones_like(images))
    # A swap of boxes: every source pixel is seen once.
    assert torch.equal(torch.autograd.grad(mixed.sum(), images)[0], torch.ones_like(images))


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("names", [["mixup"], ["cutmix", "keep"], ["resizemix"], ["mixup", "cutmix", "resizemix"]])
@pytest.mark.parametrize("dtype", DTYPES[:4])
@pytest.mark.parametrize("in_place", [False, True])
def test_plain_calls_skip_the_operators_and_change_nothing(
    backend: str | None, names: list[str], dtype: torch.dtype, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures((6, 3, 9, 8), dtype, 1)
    plan = drawn(images.shape, names, 2)
    with use_backend(backend, "mix"):
        plainly = images.clone()
        version = plainly._version
        result = mix(plainly, plan, out=plainly if in_place else None)
        assert (plainly._version > version) == in_place
        monkeypatch.setattr(op, "mix_plain", lambda *_: None)
        given = images.clone()
        assert torch.equal(result, mix(given, plan, out=given if in_place else None))


def test_which_calls_are_plain() -> None:
    """Whatever a caller could notice goes the way of the operators."""
    images = pictures((4, 3, 8, 8), torch.float32)
    plan = drawn(images.shape, ["mixup"], 0)
    assert op.mix_plain(images, plan, None) is not None
    assert op.mix_plain(images, plan, images) is images
    other = drawn((4, 3, 8, 9), ["mixup"], 0)
    shifted = torch.zeros(images.numel() + 8)[8:].view(images.shape)
    for source, chosen, out in (
        (images, other, None),
        (images[:2], plan, None),
        (images.double(), plan, None),
        (images.transpose(2, 3), plan, None),
        (images, plan, images.double()),
        (images, plan, images[:2]),
        (images, plan, images.transpose(2, 3)),
        (shifted, plan, shifted.as_strided(images.shape, images.stride(), 0)),
        (images.clone().requires_grad_(), plan, None),
        (images, plan, images.clone().requires_grad_()),
    ):
        assert op.mix_plain(source, chosen, out) is None
    with torch.no_grad():
        assert op.mix_plain(images.clone().requires_grad_(), plan, None) is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert op.mix_plain(images, plan, None) is None
    assert torch.func.vmap(lambda x: torch.full_like(x, op.mix_plain(x, plan, None) is None))(images[None]).all()


def test_no_global_random_state_is_touched() -> None:
    images = pictures((4, 3, 6, 8), torch.float32)
    with untouched():
        mix(images, draw_plan(4, (6, 8), step=0))


# ---- what is refused

IMAGES = pictures((4, 3, 6, 8), torch.float32)
PLAN = drawn((4, 3, 6, 8), ["mixup", "cutmix", "resizemix"], 0)
LOOSE = drawn((4, 3, 6, 8), ["mixup", "cutmix", "resizemix"], 0, flip=False)
NORMAL = {"mean": MEAN, "std": STD}


def sentinel(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape or (4, 3, 6, 8), 77, dtype=dtype)


def erasure(box: list[int], boxes: torch.dtype = torch.int32, rows: int = 5, channels: int = 3) -> Erasure:
    return Erasure(torch.tensor([[box]] * 4, dtype=boxes), torch.zeros(rows, channels), per_pixel=True)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": np.zeros((4, 3, 6, 8))}, TypeError, "images must be a torch.Tensor of shape (N, C, H, W), got ndarray"),
    ({"images": IMAGES[0]}, ValueError, "images must have shape (N, C, H, W), got (3, 6, 8)"),
    ({"images": IMAGES.int()}, TypeError, "images must be uint8, float16, bfloat16, float32, float64, got int32"),
    ({"images": IMAGES.bool()}, TypeError, "images must be uint8, float16, bfloat16, float32, float64, got bool"),
    ({"plan": None}, TypeError, "plan must be a MixPlan, got NoneType; draw one with draw_plan"),
    ({"plan": draw_plan(3, (6, 8), step=0)}, ValueError, "plan has 3 rows but images 4; draw the plan with n=4"),
    (
        {"plan": draw_plan(4, (8, 6), step=0)},
        ValueError,
        "plan.size is (8, 6) but images are (6, 8); draw the plan with size",
    ),
    (
        {"images": IMAGES.permute(0, 2, 3, 1)},
        ValueError,
        "images must have shape (N, C, H, W), but (4, 6, 8, 3) looks like (N, H, W, C); give images.permute(0, 3, 1, 2)",
    ),
    (
        {"images": torch.zeros(4, 32, 40, 3, dtype=torch.uint8), "plan": draw_plan(4, (40, 3), step=0)},
        ValueError,
        "images must have shape (N, C, H, W), but (4, 32, 40, 3) looks like (N, H, W, C)",
    ),
    (
        {"mean": (123.675, 116.28, 103.53), "std": (58.4, 57.1, 57.4)},
        ValueError,
        "mean must be on the 0 to 1 scale, also for uint8 images, got [123.675, 116.28, 103.53]; divide mean and std by",
    ),
    ({"plan": PLAN.to("meta")}, ValueError, "plan is on meta but images are on cpu; use plan.to(images.device)"),
    ({"images": IMAGES.to("meta")}, ValueError, "plan is on cpu but images are on meta"),
    ({"partners": [IMAGES]}, TypeError, "partners must be a torch.Tensor of shape (M, C, H, W), got list"),
    ({"partners": IMAGES.half()}, TypeError, "partners must be float32, got float16"),
    ({"partners": IMAGES[:, :2]}, ValueError, "partners must have shape (M, 3, 6, 8), got (4, 2, 6, 8)"),
    ({"partners": IMAGES[:3]}, ValueError, "plan is mirrored, so partners must have 4 rows, got 3"),
    ({"partners": IMAGES.to("meta")}, ValueError, "partners is on meta but images is on cpu; move one with"),
    ({"plan": LOOSE, "partners": IMAGES[:1]}, ValueError, "plan.partner holds row 3, but there are only 1 partners"),
    (
        {"plan": replaced(LOOSE, partner=torch.tensor([0, 9, 0, 0]))},
        ValueError,
        "plan.partner holds row 9, but there are only 4 partners",
    ),
    ({"mean": MEAN}, ValueError, "mean and std go together, but only mean was given"),
    ({"std": STD}, ValueError, "mean and std go together, but only std was given"),
    ({"erase": torch.zeros(4, 1, 5)}, TypeError, "erase must be an Erasure, got Tensor"),
    ({"erase": erasure([0, 0, 1, 1, 0], boxes=torch.float32)}, TypeError, "erase.boxes must be int32, got float32"),
    ({"erase": erasure([0, 0, 1, 1])}, ValueError, "erase.boxes must have shape (4, R, 5), got (4, 1, 4)"),
    (
        {"erase": erasure([0, 0, 1, 1, 0], channels=2)},
        ValueError,
        "erase.fill must have shape (F, 3) and a row or more",
    ),
    ({"erase": erasure([0, 0, 1, 1, 0], rows=0)}, ValueError, "erase.fill must have shape (F, 3) and a row or more"),
    ({"erase": erasure([0, 0, 7, 1, 0])}, ValueError, "erase.boxes must lie within the images, (6, 8), but one does"),
    ({"erase": erasure([0, 0, 1, 1, -1])}, ValueError, "erase.boxes must lie within the images, (6, 8), but one does"),
    ({"erase": erasure([0, 0, 2, 2, 2])}, ValueError, "erase.boxes need 6 rows of erase.fill, which has 5"),
    (
        {"erase": erasure([0, 0, 1, 1, 0])._replace(fill=torch.zeros(5, 3, requires_grad=True))},
        ValueError,
        "erase.fill requires a gradient, which none comes to; give erase.fill.detach()",
    ),
    (
        {"erase": erasure([0, 0, 1, 1, 0])._replace(fill=torch.zeros(5, 3, device="meta"))},
        ValueError,
        "is on meta but images is on cpu",
    ),
    (NORMAL | {"mean": 0.5}, TypeError, "mean must be a sequence of 3 numbers, got 0.5"),
    (NORMAL | {"mean": "abc"}, TypeError, "mean must be a sequence of 3 numbers, got 'abc'"),
    (NORMAL | {"mean": torch.tensor(0.5)}, TypeError, "mean must be a sequence of 3 numbers, got tensor(0.5000)"),
    (NORMAL | {"mean": (0.5, None, 0.5)}, TypeError, "mean[1] must be a finite number, got NoneType"),
    (NORMAL | {"std": (0.5, 0.5, "1")}, TypeError, "std[2] must be a finite number above 0, got str"),
    (NORMAL | {"mean": (0.5,)}, ValueError, "mean must have 3 values, one per channel, got 1"),
    (NORMAL | {"std": (1.0, 0.0, 1.0)}, ValueError, "std must hold finite numbers above 0, got [1.0, 0.0, 1.0]"),
    (NORMAL | {"std": (1.0, -1.0, 1.0)}, ValueError, "std must hold finite numbers above 0"),
    (NORMAL | {"mean": (float("inf"), 0.0, 0.0)}, ValueError, "mean must hold finite numbers, got [inf, 0.0, 0.0]"),
    (NORMAL | {"mean": (float("nan"), 0.0, 0.0)}, ValueError, "mean[0] must be a finite number, got nan"),
    ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got str"),
    ({"dtype": torch.int32}, TypeError, "dtype must be uint8, float16, bfloat16, float32 or float64, got torch.int32"),
    (NORMAL | {"dtype": torch.uint8}, ValueError, "dtype uint8 cannot hold normalised values; ask for a float dtype"),
    ({"clean": 1}, TypeError, "clean must be True or False, got int"),
    ({"clean": None}, TypeError, "clean must be True or False, got NoneType"),
    ({"clean": True, "out": sentinel()}, TypeError, "out must be a pair (clean, mixed) of tensors with clean=True"),
    ({"out": (sentinel(), sentinel())}, TypeError, "out must be one tensor with clean=False, got tuple"),
    ({"out": "images"}, TypeError, "out must be a torch.Tensor of shape (N, C, H, W), got str"),
    ({"out": sentinel(4, 3, 6)}, ValueError, "out must have shape (N, C, H, W), got (4, 3, 6)"),
    ({"out": sentinel(4, 3, 6, 7)}, ValueError, "out must have shape (4, 3, 6, 8), got (4, 3, 6, 7)"),
    ({"out": sentinel(dtype=torch.int64)}, TypeError, "dtype must be uint8, float16, bfloat16, float32 or float64"),
    ({"out": sentinel(), "dtype": torch.float16}, TypeError, "out must be float16, got float32; convert it first"),
    ({"out": sentinel().to("meta")}, ValueError, "out is on meta but images is on cpu"),
    ({"out": torch.zeros(1).expand(4, 3, 6, 8)}, ValueError, "out is an expanded tensor whose elements share memory"),
    ({"out": torch.zeros(999).as_strided((4, 3, 6, 8), (72, 48, 8, 1))}, ValueError, "out has elements that share"),
    (
        {"clean": True, "out": (None, sentinel())},
        TypeError,
        "out[0] must be a torch.Tensor of shape (N, C, H, W), got N",
    ),
    (
        {"clean": True, "out": (sentinel(), None)},
        TypeError,
        "out[1] must be a torch.Tensor of shape (N, C, H, W), got N",
    ),
    (
        {"clean": True, "out": (sentinel(4, 3, 6, 7), sentinel())},
        ValueError,
        "out[0] must have shape (4, 3, 6, 8), got (4, 3, 6, 7)",
    ),
    (
        {"out": sentinel().requires_grad_()},
        ValueError,
        "out cannot be given where gradients are wanted; leave it out, or use torch.no_grad()",
    ),
    ({"images": IMAGES.clone().requires_grad_(), "out": sentinel()}, ValueError, "out cannot be given where gradients"),
    ({"partners": IMAGES.clone().requires_grad_(), "out": sentinel()}, ValueError, "out cannot be given where gradie"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_refuses_a_wrong_argument_and_writes_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"images": IMAGES, "plan": PLAN} | changes
    tensors = [t for value in arguments.values() for t in (value if isinstance(value, tuple) else (value,))]
    tensors = [t for t in tensors if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(error, match=re.escape(message)):
        mix(**arguments)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old), "something was written"


def test_refuses_outputs_that_overlap_inputs() -> None:
    storage = torch.zeros(10, 3, 6, 8)
    images, before = storage[:4], storage.clone()
    with pytest.raises(ValueError, match="out overlaps images without being images; give images itself or a"):
        mix(images, PLAN, out=storage[2:6])
    for pair in ((storage[:4], storage[4:8]), (storage[2:6], storage[6:]), (storage[4:8], storage[5:9])):
        with pytest.raises(ValueError, match=r"out\[0\], the clean images, must not share memory with images or out"):
            mix(images, PLAN, clean=True, out=pair)
    assert torch.equal(storage, before)


def test_out_is_allowed_where_no_gradient_is_wanted() -> None:
    images = IMAGES.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(mix(images, PLAN, out=sentinel()), mix(IMAGES, PLAN))
