"""Plans: what `draw_plan` promises, the targets a plan makes, and what a plan built by hand refuses.

The draws are pinned by `golden/plans.json`. Only where a change of the draws is wanted, `python tests/test_plan.py`
writes it anew, and the diff shows what moved.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from global_random import untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import sdmp_kernels.plan as plan_module
from sdmp_kernels import MixPlan, Rule, TwoHot, draw_plan, make_plan, mix
from sdmp_kernels._memory import moved

GOLDEN = Path(__file__).parent / "golden" / "plans.json"
TENSORS = ("rule", "partner", "lam", "partner_lam", "box")
NAMES = ("keep", "mixup", "cutmix", "resizemix")
needs_compiled = pytest.mark.skipif(plan_module.compiled_draws() is None, reason="no compiled kernels")
PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)


def draw_arguments(**fixed: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `draw_plan`, except those fixed here."""
    free: dict[str, Any] = {
        "n": st.integers(0, 9),
        "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
        "rules": st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
        "alpha": st.sampled_from([0.2, 1.0, 4.0, dict.fromkeys(NAMES, 0.5) | {"mixup": 2.0}]),
        "per": st.sampled_from(["batch", "sample"]),
        "prob": st.sampled_from([0.0, 0.4, 1.0]),
        "lam_range": st.sampled_from([(0.1, 0.9), (0.0, 1.0), (0.3, 0.3)]),
        "box": st.sampled_from(["inside", "clip"]),
        "shared_lam": st.booleans(),
        "seed": st.integers(0, 2**64 - 1),
        "step": st.integers(0, 2**40),
        "view": st.integers(0, 5),
    }
    return st.fixed_dictionaries({k: v for k, v in free.items() if k not in fixed}).map(lambda drawn: drawn | fixed)


def same(a: MixPlan, b: MixPlan, names: tuple[str, ...] = TENSORS) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def counted(plan: MixPlan) -> torch.Tensor:
    """lam as float32 of 1 - h*w/(H*W) in double precision."""
    area = plan.size[0] * plan.size[1]
    return (1 - plan.box[:, 2].long() * plan.box[:, 3].long() / torch.tensor(float(area), dtype=torch.float64)).float()


def by_hand(**changes: Any) -> MixPlan:
    """A valid plan of four rows, one of each rule, with some fields replaced."""
    fields = {
        "rule": torch.tensor([0, 1, 2, 3], dtype=torch.uint8),
        "partner": torch.tensor([3, 2, 1, 0]),
        "lam": torch.tensor([1.0, 0.25, 0.75, 0.5]),
        "partner_lam": torch.tensor([0.5, 0.75, 0.25, 1.0]),
        "box": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 2, 2], [0, 2, 4, 2]], dtype=torch.int32),
        "size": (4, 4),
        "mirrored": True,
        "rules": tuple(Rule),
    }
    return MixPlan(**(fields | changes))


# ---- what a drawn plan promises


@PROPERTY
@given(draw_arguments())
def test_rows_keep_every_promise(arguments: dict[str, Any]) -> None:
    plan = draw_plan(**arguments)
    n, (height, width) = arguments["n"], arguments["size"]
    assert len(plan) == n
    assert plan.size == (height, width)
    assert plan.mirrored
    assert torch.equal(plan.partner, torch.arange(n - 1, -1, -1))
    assert torch.equal(plan.partner_lam, plan.lam.flip(0))
    asked = {Rule[name.upper()] for name in arguments["rules"]} if arguments["prob"] > 0 else set()
    assert set(plan.rules) == asked | ({Rule.KEEP} if arguments["prob"] < 1 else set())
    assert {Rule(r) for r in plan.rule.tolist()} <= set(plan.rules)
    top, left, rows, columns = plan.box.long().unbind(1)
    assert bool((plan.box >= 0).all())
    assert bool((top + rows <= height).all())
    assert bool((left + columns <= width).all())
    boxed = (plan.rule == Rule.CUTMIX) | (plan.rule == Rule.RESIZEMIX)
    assert torch.equal(plan.lam[boxed], counted(plan)[boxed])
    assert not plan.box[~boxed].any()
    assert bool((plan.lam[plan.rule == Rule.KEEP] == 1).all())
    assert bool(((plan.lam >= 0) & (plan.lam <= 1)).all())


@PROPERTY
@given(draw_arguments())
def test_drawn_twice_is_the_same_and_touches_no_global_state(arguments: dict[str, Any]) -> None:
    with untouched():
        first = draw_plan(**arguments)
    np.random.seed(1)  # noqa: NPY002  another global state must not matter
    torch.manual_seed(1)
    assert same(first, draw_plan(**arguments))


@needs_compiled
@PROPERTY
@given(
    draw_arguments(alpha=0.3) | draw_arguments(),
    st.sampled_from(["local", "global"]),
    st.sampled_from([(0, 1), (1, 3)]),
)
def test_compiled_code_draws_the_numbers_of_numpy(arguments: dict[str, Any], flip: str, ranks: tuple[int, int]) -> None:
    """Bit for bit, where it draws at all: or a run on another machine would be another run."""
    arguments = arguments | {"flip": flip, "rank": ranks[0], "world_size": ranks[1]}
    compiled = draw_plan(**arguments)
    with mock.patch.object(plan_module, "compiled_draws", return_value=None):
        assert same(draw_plan(**arguments), compiled)


@needs_compiled
def test_which_laws_compiled_code_draws_by() -> None:
    def draws(rules: Any = ("mixup", "cutmix"), alpha: Any = 1.0, shared_lam: bool = False) -> bool:
        law = plan_module._law((8, 8), rules, alpha, "batch", 1.0, (0.1, 0.9), "inside", shared_lam, "local")
        return law.native() is not None

    each = {"mixup": 0.5, "cutmix": 1.0}
    assert draws()
    assert draws(alpha=0.05, shared_lam=True)
    assert draws(alpha=each)
    assert not draws(alpha=each, shared_lam=True)
    assert not draws(alpha=2.0)
    assert not draws(alpha=0.04)
    with FakeTensorMode():
        assert not draws()


@PROPERTY
@given(draw_arguments(per="sample"), st.permutations(NAMES))
def test_order_of_names_never_moves_a_draw(arguments: dict[str, Any], order: list[str]) -> None:
    spelled = [name for name in order if name in arguments["rules"]]
    weights = dict.fromkeys(spelled, 1 / len(spelled))
    assert same(draw_plan(**arguments), draw_plan(**arguments | {"rules": spelled}))
    assert same(draw_plan(**arguments), draw_plan(**arguments | {"rules": weights}))


@PROPERTY
@given(draw_arguments(), st.integers(6, 2**32 - 1))
def test_views_share_rule_and_drawn_lam(arguments: dict[str, Any], view: int) -> None:
    one, other = draw_plan(**arguments), draw_plan(**arguments | {"view": view})
    assert torch.equal(one.rule, other.rule)
    assert one.rules == other.rules
    if arguments["box"] == "inside":
        assert torch.equal(one.lam, other.lam)
        assert torch.equal(one.box[:, 2:], other.box[:, 2:])
    mixup = one.rule == Rule.MIXUP
    assert torch.equal(one.lam[mixup], other.lam[mixup])


def test_views_have_boxes_of_their_own() -> None:
    views = [draw_plan(64, (32, 32), rules=["cutmix"], view=view, step=0) for view in range(4)]
    for i, one in enumerate(views):
        for other in views[:i]:
            assert (one.box[:, :2] != other.box[:, :2]).any(1).float().mean() > 0.7


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"seed": 2**63}])
def test_seed_and_step_move_every_draw(change: dict[str, int]) -> None:
    arguments = {"n": 64, "size": (32, 32), "per": "sample", "step": 0}
    one, other = draw_plan(**arguments), draw_plan(**arguments | change)
    assert (one.rule != other.rule).float().mean() > 0.4
    assert (one.lam != other.lam).float().mean() > 0.9


@PROPERTY
@given(draw_arguments(n=8), st.sampled_from(["local", "global"]))
def test_world_size_moves_only_local_partners(arguments: dict[str, Any], flip: str) -> None:
    whole = draw_plan(**arguments)
    for world in (1, 2, 4, 8):
        n = 8 // world
        parts = [draw_plan(**arguments | {"n": n, "rank": r, "world_size": world, "flip": flip}) for r in range(world)]
        for name in ("rule", "lam", "box"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
        assert {p.rules for p in parts} == {whole.rules}
        for rank, part in enumerate(parts):
            assert torch.equal(part.partner, torch.arange(n - 1, -1, -1))
            source = parts[rank if flip == "local" else world - 1 - rank]
            assert torch.equal(part.partner_lam, source.lam[part.partner])
        if flip == "global":
            assert torch.equal(torch.cat([p.partner_lam for p in parts]), whole.partner_lam)


def test_global_flip_pairs_across_ranks() -> None:
    parts = [draw_plan(3, (8, 8), rank=r, world_size=4, flip="global", seed=5, step=0) for r in range(4)]
    everything = torch.cat([p.lam for p in parts])
    for rank, part in enumerate(parts):
        for i in range(3):
            row = rank * 3 + i
            assert part.partner_lam[i] == everything[11 - row]


@PROPERTY
@given(draw_arguments(), st.data())
def test_given_partners_replace_the_flip(arguments: dict[str, Any], data: st.DataObject) -> None:
    n = arguments["n"]
    rows = st.integers(0, max(n - 1, 0))
    vector = torch.tensor(data.draw(st.lists(rows, min_size=n, max_size=n)), dtype=torch.int64)
    plan = draw_plan(**arguments | {"partner": vector})
    assert not plan.mirrored
    assert torch.equal(plan.partner, vector)
    assert torch.equal(plan.partner_lam, plan.lam[vector])
    assert same(plan, draw_plan(**arguments), ("rule", "lam", "box"))
    given_rows = vector.tolist()
    vector.fill_(99)
    assert plan.partner.tolist() == given_rows, "the plan has a copy of its own"


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_any_number_of_rows(n: int) -> None:
    plan = draw_plan(n, (5, 3), per="sample", world_size=3, rank=2, step=0)
    assert [getattr(plan, name).shape for name in TENSORS] == [(n,), (n,), (n,), (n,), (n, 4)]
    assert [getattr(plan, name).dtype for name in TENSORS] == [
        torch.uint8,
        torch.int64,
        torch.float32,
        torch.float32,
        torch.int32,
    ]
    if n % 2:
        assert plan.partner[n // 2] == n // 2


def test_per_batch_draws_one_rule_and_per_sample_many() -> None:
    drawn = [draw_plan(16, (8, 8), step=step).rule.unique() for step in range(60)]
    assert all(len(rules) == 1 for rules in drawn)
    assert {int(rules[0]) for rules in drawn} == {1, 2, 3}
    assert len(draw_plan(64, (8, 8), per="sample", step=0).rule.unique()) == 3


def test_shared_lam_is_one_number_for_the_batch() -> None:
    for rule in ("mixup", "cutmix", "resizemix"):
        plan = draw_plan(32, (64, 64), rules=[rule], shared_lam=True, step=0)
        assert len(plan.lam.unique()) == 1
    boxes = draw_plan(32, (64, 64), rules=["cutmix"], shared_lam=True, step=0).box
    assert len(boxes[:, 0].unique()) > 5, "shared lam, but every sample has its own place"
    assert len(draw_plan(32, (64, 64), rules=["mixup"], step=0).lam.unique()) == 32


def test_pairs_draw_their_lam_independently() -> None:
    lam = draw_plan(20_000, (8, 8), rules=["mixup"], step=0).lam.double()
    correlation = np.corrcoef(lam.numpy(), lam.flip(0).numpy())[0, 1]
    assert abs(correlation) < 0.03


# ---- laws


def test_probabilities_of_rules() -> None:
    weights = {"mixup": 0.5, "cutmix": 0.3, "resizemix": 0.2, "keep": 0.0}
    n = 40_000
    rule = draw_plan(n, (8, 8), rules=weights, per="sample", step=0).rule
    for name, p in weights.items():
        share = float((rule == Rule[name.upper()]).float().mean())
        assert abs(share - p) <= 4 * (p * (1 - p) / n) ** 0.5
    batches = [int(draw_plan(1, (8, 8), rules=weights, step=s).rule) for s in range(2000)]
    assert abs(batches.count(Rule.MIXUP) / 2000 - 0.5) < 0.05
    uniform = draw_plan(n, (8, 8), per="sample", step=0).rule
    for rule_value in (1, 2, 3):
        assert abs(float((uniform == rule_value).float().mean()) - 1 / 3) < 0.01


def test_prob_is_the_chance_of_being_mixed() -> None:
    n = 40_000
    kept = draw_plan(n, (8, 8), prob=0.3, step=0).rule == Rule.KEEP
    assert abs(float(kept.float().mean()) - 0.7) <= 4 * (0.21 / n) ** 0.5
    assert bool((draw_plan(50, (8, 8), prob=0.0, step=0).rule == Rule.KEEP).all())
    assert not bool((draw_plan(50, (8, 8), prob=1.0, step=0).rule == Rule.KEEP).any())


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lam_follows_beta(alpha: float) -> None:
    n = 40_000
    lam = draw_plan(n, (8, 8), rules=["mixup"], alpha=alpha, seed=2, step=0).lam.double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(lam.mean()) - 0.5) <= 4 * (variance / n) ** 0.5
    assert abs(float(lam.var()) - variance) < 0.02 * variance + 4 * variance * (2 / n) ** 0.5


def test_alpha_of_each_rule() -> None:
    alpha = {"mixup": 50.0, "cutmix": 0.01}
    plan = draw_plan(20_000, (500, 500), rules=["mixup", "cutmix"], per="sample", alpha=alpha, step=0)
    assert float(plan.lam[plan.rule == Rule.MIXUP].std()) < 0.06
    lam = plan.lam[plan.rule == Rule.CUTMIX]
    assert float(((lam < 0.05) | (lam > 0.95)).float().mean()) > 0.9


@pytest.mark.parametrize("alpha", [1e-6, 1e6])
def test_extreme_alpha_stays_in_range(alpha: float) -> None:
    plan = draw_plan(500, (17, 5), per="sample", alpha=alpha, step=0)
    assert bool(((plan.lam >= 0) & (plan.lam <= 1)).all())


def test_resizemix_shares_stay_in_lam_range() -> None:
    plan = draw_plan(4000, (1000, 1000), rules=["resizemix"], lam_range=(0.2, 0.6), step=0)
    assert 0.199 < float(plan.lam.min()) < 0.21
    assert 0.59 < float(plan.lam.max()) < 0.603
    assert abs(float(plan.lam.mean()) - 0.4) < 0.01


@PROPERTY
@given(draw_arguments(rules=["resizemix"], prob=1.0, box="inside"), st.floats(0, 1))
def test_sides_are_the_floor_of_the_side_ratio(arguments: dict[str, Any], lam: float) -> None:
    plan = draw_plan(**arguments | {"lam_range": (lam, lam)})
    for axis, side in enumerate(plan.size):
        assert set(plan.box[:, 2 + axis].tolist()) <= {int(np.floor(side * np.sqrt(1 - lam)))}


def test_corner_is_uniform_over_all_places_ends_included() -> None:
    # Half of the area of 12 x 20: sides 8 and 14, so tops 0 to 4 and lefts 0 to 6.
    n = 35_000
    box = draw_plan(n, (12, 20), rules=["resizemix"], lam_range=(0.5, 0.5), step=0).box.numpy()
    for axis, places in ((0, 5), (1, 7)):
        counts = np.bincount(box[:, axis], minlength=places)
        assert len(counts) == places, "no place beyond the last"
        assert counts.min() > 0, "both ends occur"
        chi2 = ((counts - n / places) ** 2 / (n / places)).sum()
        assert chi2 < 25, counts
    joint = np.bincount(box[:, 0] * 7 + box[:, 1], minlength=35)
    assert ((joint - n / 35) ** 2 / (n / 35)).sum() < 80, "top and left are independent"


def timm_extents(side: int, lam: float) -> Counter[tuple[int, int]]:
    """How many of the equally likely centres give each (start, length) along one axis: timm's law, restated."""
    cut = int(side * np.sqrt(1 - lam))
    found: Counter[tuple[int, int]] = Counter()
    for centre in range(side):
        start, end = max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, side)
        found[start, end - start] += 1
    return found


@pytest.mark.parametrize("lam", [0.0, 0.21, 0.5, 0.77, 0.999, 1.0])
def test_clip_is_timms_law(lam: float) -> None:
    n = 6000
    box = draw_plan(n, (13, 24), rules=["resizemix"], lam_range=(lam, lam), box="clip", step=0).box
    for axis, side in enumerate((13, 24)):
        drawn = Counter(map(tuple, box[:, [axis, 2 + axis]].tolist()))
        wanted = timm_extents(side, lam)
        assert set(drawn) == set(wanted)
        chi2 = sum((drawn[key] - n * w / side) ** 2 / (n * w / side) for key, w in wanted.items())
        assert chi2 < 60, "at most 23 degrees of freedom: five standard deviations"


# ---- overlap and targets


def brute_overlap(plan: MixPlan, other: MixPlan) -> list[float]:
    """The definition in words: parts of query i that key row partner[i] holds too, each part by its smaller share."""
    result = []
    for i, f in enumerate(plan.partner.tolist()):
        own, key_own = float(plan.lam[i]), float(other.partner_lam[i])
        query = [(i, own), (f, 1 - own)]
        key = [(int(plan.partner[f]), 1 - key_own), (f, key_own)]
        # The query's own part meets the key's foreign one, and the other way round.
        result.append(sum(min(a, b) for (x, a), (y, b) in zip(query, key, strict=True) if x == y))
    return result


@PROPERTY
@given(draw_arguments(), st.booleans(), st.integers(0, 2**32), st.data())
def test_overlap_is_its_definition(arguments: dict[str, Any], flip: bool, seed: int, data: st.DataObject) -> None:
    n = arguments["n"]
    if not flip:
        rows = st.integers(0, max(n - 1, 0))
        vector = data.draw(st.lists(rows, min_size=n, max_size=n))
        arguments = arguments | {"partner": torch.tensor(vector, dtype=torch.int64)}
    plan, other = draw_plan(**arguments), draw_plan(**arguments | {"seed": seed})
    for keys in (plan, other):
        c = plan.overlap(keys)
        np.testing.assert_allclose(c.numpy(), brute_overlap(plan, keys), atol=2e-7)
        assert bool(((c >= 0) & (c <= 1)).all())
        target = plan.pair_target(other=keys)
        own = 1 - (plan.lam.double() - keys.lam.double()).abs()
        total = own + c.double()
        expected = torch.where(total > 0, own / torch.where(total > 0, total, 1.0), 0.5)
        torch.testing.assert_close(target.weight.double(), expected, atol=1e-6, rtol=0)


@PROPERTY
@given(draw_arguments())
def test_overlap_of_one_plan_has_a_closed_form(arguments: dict[str, Any]) -> None:
    plan = draw_plan(**arguments)
    closed = 1 - (plan.lam.double() + plan.lam.flip(0).double() - 1).abs()
    torch.testing.assert_close(plan.overlap().double(), closed, atol=2e-7, rtol=0)
    torch.testing.assert_close(plan.overlap(), plan.overlap().flip(0), atol=2e-7, rtol=0)


def test_overlap_counts_shared_pixels() -> None:
    """Two rows that are each other's partner, mixed by known shares: what both hold, source by source."""
    plan = by_hand(
        rule=torch.tensor([1, 1], dtype=torch.uint8),
        partner=torch.tensor([1, 0]),
        lam=torch.tensor([0.75, 0.5]),
        partner_lam=torch.tensor([0.5, 0.75]),
        box=torch.zeros(2, 4, dtype=torch.int32),
    )
    # Row 0 is 3/4 a + 1/4 b, row 1 is 1/2 b + 1/2 a: they share 1/2 of a and 1/4 of b.
    assert plan.overlap().tolist() == [0.75, 0.75]
    assert plan.pair_target().weight.tolist() == [pytest.approx(1 / 1.75)] * 2


def test_nothing_in_common_weighs_one_half() -> None:
    rows = {"partner": torch.tensor([1, 0]), "box": torch.zeros(2, 4, dtype=torch.int32)}
    mixup = torch.tensor([1, 1], dtype=torch.uint8)
    query = by_hand(rule=mixup, lam=torch.tensor([1.0, 1.0]), partner_lam=torch.tensor([1.0, 1.0]), **rows)
    keys = by_hand(rule=mixup, lam=torch.tensor([0.0, 0.0]), partner_lam=torch.tensor([0.0, 0.0]), **rows)
    # Query rows are a and b; key rows b and a: the own key shares nothing, the partner's key everything.
    assert query.pair_target(other=keys).weight.tolist() == [0.0, 0.0]
    # Key rows are b and b: row 0 shares nothing with either, row 1 everything with both.
    lopsided = by_hand(rule=mixup, lam=torch.tensor([0.0, 1.0]), partner_lam=torch.tensor([1.0, 0.0]), **rows)
    assert query.overlap(lopsided).tolist() == [0.0, 1.0]
    assert query.pair_target(other=lopsided).weight.tolist() == [0.5, 0.5]


@PROPERTY
@given(draw_arguments(), st.integers(0, 1000), st.none() | st.integers(0, 1000))
def test_targets_point_at_the_right_columns(arguments: dict[str, Any], offset: int, partner_offset: int | None) -> None:
    plan = draw_plan(**arguments)
    n = len(plan)
    there = offset if partner_offset is None else partner_offset
    for target in (plan.source_target(offset, partner_offset), plan.pair_target(offset, partner_offset)):
        assert torch.equal(target.first, offset + torch.arange(n))
        assert torch.equal(target.second, there + plan.partner)
        check_rows_sum_to_one(target)
    assert torch.equal(plan.source_target(offset).weight, plan.lam)


def check_rows_sum_to_one(target: TwoHot) -> None:
    columns = int(torch.cat([target.first, target.second]).max()) + 1 if len(target.first) else 1
    dense = torch.zeros(len(target.first), columns, dtype=torch.float64)
    dense.scatter_add_(1, target.first[:, None], target.weight.double()[:, None])
    dense.scatter_add_(1, target.second[:, None], 1 - target.weight.double()[:, None])
    assert bool((dense >= 0).all())
    torch.testing.assert_close(dense.sum(1), torch.ones(len(dense), dtype=torch.float64), atol=1e-12, rtol=0)
    assert target.first.dtype == target.second.dtype == torch.int64
    assert target.weight.dtype == torch.float32


@PROPERTY
@given(draw_arguments(n=7), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_label_target_with_colliding_classes(arguments: dict[str, Any], classes: list[int]) -> None:
    plan, labels = draw_plan(**arguments), torch.tensor(classes)
    target = plan.label_target(labels)
    assert target.first.tolist() == classes
    assert target.second.tolist() == classes[::-1]
    assert torch.equal(target.weight, plan.lam)
    check_rows_sum_to_one(target)


def test_label_target_with_labels_of_other_rows() -> None:
    plan = by_hand(partner=torch.tensor([4, 4, 0, 2]), mirrored=False)
    target = plan.label_target(torch.tensor([1, 2, 3, 4]), torch.tensor([10, 11, 12, 13, 14]))
    assert target.first.tolist() == [1, 2, 3, 4]
    assert target.second.tolist() == [14, 14, 10, 12]


def test_middle_row_of_an_odd_batch_has_one_column() -> None:
    plan = draw_plan(5, (8, 8), rules=["mixup"], step=0)
    for target in (plan.source_target(10), plan.pair_target(10), plan.label_target(torch.arange(5))):
        assert target.first[2] == target.second[2]
    assert plan.overlap()[2] == pytest.approx(1 - abs(2 * float(plan.lam[2]) - 1))


# ---- the record itself


def test_a_plan_cannot_be_changed() -> None:
    plan = by_hand()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.lam = torch.zeros(4)  # type: ignore[misc]
    assert plan != by_hand(), "plans are compared by identity, so that they can be keys"
    assert {plan: "found"}[plan] == "found"


def test_built_by_hand() -> None:
    plan = by_hand()
    assert len(plan) == 4
    assert plan.device == torch.device("cpu")
    assert plan.rules == (Rule.KEEP, Rule.MIXUP, Rule.CUTMIX, Rule.RESIZEMIX)
    assert by_hand(rules=[3, 2, 1, 0, 0]).rules == plan.rules, "rules come out sorted and once each"
    assert by_hand(size=torch.Size([4, 4])).size == (4, 4)
    beyond = by_hand(partner=torch.tensor([9, 0, 0, 0]), mirrored=False)
    assert beyond.partner[0] == 9, "partners may be another set of images"


HAND_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rule": [0, 1, 2, 3]}, TypeError, r"rule must be a torch.Tensor of shape \(N,\), got list"),
    ({"rule": torch.zeros(4)}, TypeError, "rule must be uint8, got float32; convert"),
    ({"partner": torch.zeros(4, dtype=torch.int32)}, TypeError, "partner must be int64, got int32"),
    ({"lam": torch.ones(4).double()}, TypeError, "lam must be float32, got float64"),
    ({"partner_lam": torch.ones(4).half()}, TypeError, "partner_lam must be float32, got float16"),
    ({"box": torch.zeros(4, 4)}, TypeError, "box must be int32, got float32"),
    ({"lam": torch.ones(4, 1)}, ValueError, r"lam must have shape \(N,\), got \(4, 1\)"),
    ({"box": torch.zeros(4, dtype=torch.int32)}, ValueError, r"box must have shape \(N, 4\), got \(4,\)"),
    ({"box": torch.zeros(4, 3, dtype=torch.int32)}, ValueError, r"box must have shape \(N, 4\), got \(4, 3\)"),
    ({"lam": torch.ones(3)}, ValueError, "lam has 3 rows but rule has 4; give every tensor N rows"),
    ({"partner": torch.zeros(5, dtype=torch.int64)}, ValueError, "partner has 5 rows but rule has 4"),
    ({"lam": torch.ones(4, device="meta")}, ValueError, r"lam is on meta but rule is on cpu; use MixPlan.to"),
    ({"size": 4}, TypeError, r"size must be \(H, W\) in pixels, got 4"),
    ({"size": (4, 4, 4)}, TypeError, r"size must be \(H, W\) in pixels, got \(4, 4, 4\)"),
    ({"size": (0, 4)}, ValueError, r"size\[0\] must be a height in pixels, 1 or more, got 0"),
    ({"size": (4, 4.5)}, TypeError, r"size\[1\] must be a width in pixels, 1 or more, got float"),
    ({"mirrored": 1}, TypeError, "mirrored must be True or False, got int"),
    ({"rules": "mixup"}, TypeError, "rules must be a tuple of Rule values, got 'mixup'"),
    ({"rules": 3}, TypeError, "rules must be a tuple of Rule values, got 3"),
    ({"rules": (0, 7)}, ValueError, r"rules must hold Rule values \(0 to 3\), got \(0, 7\)"),
    ({"rules": (Rule.KEEP, Rule.MIXUP)}, ValueError, r"rule holds \[2, 3\], but rules says only \(0, 1\) may occur"),
    ({"partner": torch.tensor([3, 2, -1, 0])}, ValueError, "partner must hold row numbers of 0 or more, got -1"),
    (
        {"partner": torch.tensor([0, 1, 2, 3])},
        ValueError,
        "mirrored is True but partner is not the flip N-1-i; give mirrored=False",
    ),
    ({"lam": torch.tensor([1.0, 1.5, 0.75, 0.5])}, ValueError, r"lam must hold shares in \[0, 1\], got 1.5"),
    ({"lam": torch.tensor([1.0, float("nan"), 0.75, 0.5])}, ValueError, r"lam must hold shares in \[0, 1\], got nan"),
    ({"partner_lam": torch.tensor([0.5, -0.25, 0.2, 1])}, ValueError, r"partner_lam must hold shares .*, got -0.25"),
    ({"lam": torch.tensor([0.5, 0.25, 0.75, 0.5])}, ValueError, "lam must be 1 for rows with KEEP"),
    (
        {"lam": torch.tensor([1.0, 0.25, 0.5, 0.5])},
        ValueError,
        r"lam of row 2 is 0.5, but its box leaves a share of 0.75: .* lam must be 1 - h\*w/\(H\*W\)",
    ),
    (
        {"box": torch.tensor([[0, 0, 1, 1], [0] * 4, [1, 1, 2, 2], [0, 2, 4, 2]], dtype=torch.int32)},
        ValueError,
        "box must be zeros for rows with KEEP or MIXUP",
    ),
    (
        {"box": torch.tensor([[0] * 4, [0] * 4, [3, 1, 2, 2], [0, 2, 4, 2]], dtype=torch.int32)},
        ValueError,
        r"box must lie inside the 4 x 4 image, but row 2 has \[3, 1, 2, 2\]",
    ),
    (
        {"box": torch.tensor([[0] * 4, [0] * 4, [1, 1, 2, 2], [0, -1, 4, 2]], dtype=torch.int32)},
        ValueError,
        r"box must lie inside .* row 3 has \[0, -1, 4, 2\]",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), HAND_ERRORS)
def test_refuses_a_wrong_plan(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        by_hand(**changes)


# ---- made by hand


@st.composite
def make_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `make_plan` for rows of 8 x 11 px: one rule or one per row, boxes given or not, partners or not."""
    n, size = draw(st.integers(0, 7)), (8, 11)
    rows = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    rule = draw(st.one_of(st.sampled_from(NAMES), rows.map(lambda r: torch.tensor(r, dtype=torch.uint8))))
    shares = st.floats(0, 1, width=32)
    arguments = {"rule": rule, "size": size, "lam": torch.tensor(draw(st.lists(shares, min_size=n, max_size=n)))}
    kinds = [Rule[rule.upper()]] * n if isinstance(rule, str) else [Rule(r) for r in rule.tolist()]
    if draw(st.booleans()):
        boxes = [[0] * 4] * n
        for i, kind in enumerate(kinds):
            if kind > Rule.MIXUP:
                top, left = draw(st.integers(0, size[0])), draw(st.integers(0, size[1]))
                boxes[i] = [top, left, draw(st.integers(0, size[0] - top)), draw(st.integers(0, size[1] - left))]
        arguments["box"] = torch.tensor(boxes, dtype=torch.int32).reshape(n, 4)
    if draw(st.booleans()):
        partners = draw(st.lists(st.integers(0, max(n - 1, 0)), min_size=n, max_size=n))
        arguments["partner"] = torch.tensor(partners, dtype=torch.int64)
    return arguments


@PROPERTY
@given(make_arguments())
def test_a_made_plan_keeps_every_promise(arguments: dict[str, Any]) -> None:
    with untouched():
        plan = make_plan(**arguments)
    n, (height, width) = len(arguments["lam"]), arguments["size"]
    assert same(plan, MixPlan(**vars(plan))), "and is accepted where every value is checked"
    rule = arguments["rule"]
    asked = [int(Rule[rule.upper()])] * n if isinstance(rule, str) else rule.tolist()
    assert plan.rule.tolist() == asked
    assert set(plan.rules) == ({Rule[rule.upper()]} if isinstance(rule, str) else {Rule(r) for r in asked})
    assert plan.mirrored == ("partner" not in arguments)
    assert torch.equal(plan.partner, arguments.get("partner", torch.arange(n - 1, -1, -1)))
    assert torch.equal(plan.partner_lam, plan.lam[plan.partner])
    for i, kind in enumerate(asked):
        given, box = float(arguments["lam"][i]), plan.box[i].tolist()
        if kind == Rule.MIXUP:
            assert float(plan.lam[i]) == given
        elif kind == Rule.KEEP:
            assert plan.lam[i] == 1
        else:
            side = (1 - given) ** 0.5
            h, w = int(height * side), int(width * side)
            centred = [(height - h) // 2, (width - w) // 2, h, w]
            assert box == (arguments["box"][i].tolist() if "box" in arguments else centred)
            assert torch.equal(plan.lam[i], counted(plan)[i])


@PROPERTY
@given(make_arguments())
def test_pixels_change_exactly_as_a_made_plan_says(arguments: dict[str, Any]) -> None:
    plan = make_plan(**arguments)
    n, (height, width) = len(plan), plan.size
    images = torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 2, height, width).contiguous()
    mixed = mix(images, plan)
    for i in range(n):
        partner, lam = int(plan.partner[i]), float(plan.lam[i])
        top, left, h, w = plan.box[i].tolist()
        expected = images[i].clone()
        if plan.rule[i] == Rule.MIXUP:
            expected = lam * images[i] + (1 - lam) * images[partner]
        expected[:, top : top + h, left : left + w] = float(images[partner, 0, 0, 0])
        assert torch.allclose(mixed[i], expected, rtol=1e-6, atol=0), "the partner's pixels in the box, none elsewhere"
        if plan.rule[i] > Rule.MIXUP and partner != i:
            own = (mixed[i] == images[i]).float().mean()
            assert float(own) == pytest.approx(lam, abs=1e-6), "the labels weigh what the pixels show"


def test_a_centred_box_is_in_the_middle() -> None:
    plan = make_plan("cutmix", torch.tensor([0.75, 0.0, 1.0, 0.999]), (8, 12))
    assert plan.box.tolist() == [[2, 3, 4, 6], [0, 0, 8, 12], [4, 6, 0, 0], [4, 6, 0, 0]]
    assert plan.lam.tolist() == [0.75, 0.0, 1.0, 1.0]
    assert make_plan("CutMix", torch.zeros(2), (4, 4)).rules == (Rule.CUTMIX,)
    assert make_plan("resizemix", torch.zeros(0), (4, 4)).rules == (Rule.RESIZEMIX,), "a name says it without a row"


def test_partners_of_another_set_of_images() -> None:
    partner, shares = torch.tensor([5, 0]), torch.tensor([0.25, 0.5])
    plan = make_plan("mixup", torch.tensor([0.5, 0.75]), (4, 4), partner=partner, partner_lam=shares)
    assert plan.partner.tolist() == [5, 0]
    assert torch.equal(plan.partner_lam, shares)
    partner.zero_()
    shares.zero_()
    assert plan.partner.tolist() == [5, 0] and plan.partner_lam.tolist() == [0.25, 0.5], "given tensors are copied"
    assert make_plan("mixup", torch.ones(2), (4, 4), device="meta").device.type == "meta"


MAKE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rule": "mixip"}, ValueError, "rule names an unknown rule 'mixip': did you mean 'mixup'"),
    ({"rule": 2}, TypeError, "rule must hold rule names such as 'mixup', got 2"),
    ({"rule": torch.ones(3)}, TypeError, "rule must be uint8, got float32"),
    ({"rule": torch.ones(2, dtype=torch.uint8)}, ValueError, "rule has 2 rows but lam has 3; give one per row"),
    ({"rule": torch.tensor([1, 4, 0], dtype=torch.uint8)}, ValueError, r"rule must hold Rule values \(0 to 3\), got 4"),
    ({"lam": 0.5}, TypeError, r"lam must be a torch.Tensor of shape \(N,\), got float"),
    ({"lam": torch.ones(3).double()}, TypeError, "lam must be float32, got float64"),
    ({"lam": torch.ones(3, 1)}, ValueError, r"lam must have shape \(N,\), got \(3, 1\)"),
    ({"lam": torch.tensor([0.5, 1.5, 0])}, ValueError, r"lam must hold shares in \[0, 1\], got 1.5"),
    ({"lam": torch.tensor([0.5, float("nan"), 0])}, ValueError, r"lam must hold shares in \[0, 1\], got nan"),
    ({"lam": torch.ones(3, requires_grad=True)}, ValueError, "lam requires a gradient, but a plan holds constants"),
    ({"lam": torch.ones(3, device="meta")}, ValueError, "lam is on meta, but plans are made on the host"),
    ({"size": (8, 0)}, ValueError, r"size\[1\] must be a width in pixels, 1 or more, got 0"),
    ({"box": torch.zeros(3, 4)}, TypeError, "box must be int32, got float32"),
    ({"box": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, r"box must have shape \(N, 4\), got \(3, 3\)"),
    ({"box": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, "box has 2 rows but lam has 3"),
    ({"box": torch.ones(3, 4, dtype=torch.int32)}, ValueError, "box must be zeros for rows with KEEP or MIXUP"),
    (
        {"rule": "cutmix", "box": torch.tensor([[0] * 4, [7, 0, 2, 1], [0] * 4], dtype=torch.int32)},
        ValueError,
        r"box must lie inside the 8 x 8 image, but row 1 has \[7, 0, 2, 1\]",
    ),
    (
        {"rule": "cutmix", "box": torch.tensor([[1, 1, 2**31 - 1, 1]] * 3, dtype=torch.int32)},
        ValueError,
        "box must lie inside .* row 0 has",
    ),
    ({"partner": torch.zeros(3)}, TypeError, "partner must be int64, got float32"),
    ({"partner": torch.tensor([0, -1, 0])}, ValueError, "partner must hold row numbers of 0 or more, got -1"),
    ({"partner": torch.tensor([0, 3, 0])}, ValueError, "partner holds row 3, but lam has only 3; give partner_lam"),
    ({"partner_lam": torch.ones(2)}, ValueError, "partner_lam has 2 rows but lam has 3"),
    ({"partner_lam": torch.full((3,), -0.5)}, ValueError, r"partner_lam must hold shares in \[0, 1\], got -0.5"),
    ({"device": "nowhere"}, RuntimeError, "nowhere"),
]


@pytest.mark.parametrize(("changes", "error", "message"), MAKE_ERRORS)
def test_refuses_to_make_a_wrong_plan(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with untouched(), pytest.raises(error, match=message):
        make_plan(**{"rule": "mixup", "lam": torch.ones(3), "size": (8, 8)} | changes)


DRAW_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n": -1}, ValueError, "n must be a number of rows, 0 or more, got -1"),
    ({"n": 2.0}, TypeError, "n must be a number of rows, 0 or more, got float"),
    ({"n": True}, TypeError, "n must be a number of rows, 0 or more, got bool"),
    ({"n": torch.tensor([1, 2])}, TypeError, r"n must be a number of rows, 0 or more, got tensor\(\[1, 2\]\)"),
    ({"size": 8}, TypeError, r"size must be \(H, W\) in pixels, got 8"),
    ({"size": (8, 0)}, ValueError, r"size\[1\] must be a width in pixels, 1 or more, got 0"),
    ({"size": (2**31, 1)}, ValueError, r"size\[0\] must be a height in pixels"),
    ({"rules": []}, ValueError, "rules is empty: name at least one of mixup, cutmix, resizemix, keep"),
    ({"rules": "mixup"}, TypeError, "rules must be a sequence of names or a mapping .*, got 'mixup'"),
    ({"rules": ["mixup", "mixup"]}, ValueError, "rules names a rule twice: .*; use a mapping"),
    ({"rules": ["mixip"]}, ValueError, "rules names an unknown rule 'mixip': did you mean 'mixup'"),
    ({"rules": ["rotate"]}, ValueError, "rules names an unknown rule 'rotate': expected one of keep, mixup, cutmix"),
    ({"rules": [1]}, TypeError, "rules must hold rule names such as 'mixup', got 1"),
    ({"rules": {"mixup": 0.5, "cutmix": 0.4}}, ValueError, "probabilities that add up to 1, got a sum of 0.9"),
    ({"rules": {"mixup": -1, "cutmix": 2}}, ValueError, r"rules\['mixup'\] must be a probability in \[0, 1\], got -1"),
    ({"rules": {"mixup": "all"}}, TypeError, r"rules\['mixup'\] must be a probability in \[0, 1\], got str"),
    ({"alpha": 0.0}, ValueError, "alpha must be a number above 0, got 0.0; leave a rule out of `rules`"),
    ({"alpha": -1}, ValueError, "alpha must be a number above 0, got -1"),
    ({"alpha": float("inf")}, ValueError, "alpha must be a number above 0, got inf"),
    ({"alpha": float("nan")}, ValueError, "alpha must be a number above 0, got nan"),
    ({"alpha": "1"}, TypeError, "alpha must be a number above 0, got str"),
    ({"alpha": np.ones(3)}, TypeError, "alpha must be a number above 0, got array"),
    ({"alpha": {"mixup": 1.0}}, ValueError, "alpha has no entry for cutmix, resizemix; give one per rule"),
    ({"alpha": {"mix": 1.0}}, ValueError, "alpha names an unknown rule 'mix': did you mean"),
    ({"per": "image"}, ValueError, "per='image' is unknown: expected one of batch, sample"),
    ({"per": None}, ValueError, "per=None is unknown"),
    ({"prob": 1.5}, ValueError, r"prob must be a probability in \[0, 1\], got 1.5"),
    ({"prob": float("nan")}, ValueError, r"prob must be a probability in \[0, 1\], got nan"),
    ({"prob": None}, TypeError, r"prob must be a probability in \[0, 1\], got NoneType"),
    ({"lam_range": 0.5}, TypeError, r"lam_range must be \(low, high\) within \[0, 1\], got 0.5"),
    ({"lam_range": (0.9, 0.1)}, ValueError, r"lam_range must be \(low, high\) with low <= high, got \(0.9, 0.1\)"),
    ({"lam_range": (-0.1, 0.5)}, ValueError, r"lam_range\[0\] must be a share in \[0, 1\], got -0.1"),
    ({"lam_range": (0.1, 1.1)}, ValueError, r"lam_range\[1\] must be a share in \[0, 1\], got 1.1"),
    ({"box": "clipped"}, ValueError, "box='clipped' is unknown: did you mean 'clip'"),
    ({"flip": "world"}, ValueError, "flip='world' is unknown: expected one of local, global"),
    ({"partner": [0, 1, 2]}, TypeError, r"partner must be a torch.Tensor of shape \(n,\), got list"),
    ({"partner": torch.zeros(3)}, TypeError, "partner must be int64, got float32"),
    ({"partner": torch.zeros(2, dtype=torch.int64)}, ValueError, "partner must have n=3 rows, got 2"),
    ({"partner": torch.tensor([0, 3, 1])}, ValueError, r"partner must hold row numbers in \[0, 3\), got 0 to 3"),
    ({"partner": torch.tensor([0, -1, 1])}, ValueError, r"partner must hold row numbers in \[0, 3\), got -1 to 1"),
    ({"partner": torch.arange(3), "flip": "global"}, ValueError, "partner and flip='global' exclude each other"),
    ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, ValueError, r"seed must be an integer in \[0, 2\*\*64\)"),
    ({"seed": 1.0}, TypeError, r"seed must be an integer in \[0, 2\*\*64\), got float"),
    ({"step": -3}, ValueError, r"step must be an integer in \[0, 2\*\*64\), got -3"),
    ({"view": -1}, ValueError, "view must be a view number, 0 or more, got -1"),
    ({"view": "query"}, TypeError, "view must be a view number, 0 or more, got str"),
    ({"world_size": 0}, ValueError, "world_size must be a number of ranks, 1 or more, got 0"),
    ({"rank": 2, "world_size": 2}, ValueError, r"rank must be a rank in \[0, world_size=2\), got 2"),
    ({"rank": -1}, ValueError, r"rank must be a rank in \[0, world_size=1\), got -1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), DRAW_ERRORS)
def test_refuses_a_wrong_draw(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with untouched(), pytest.raises(error, match=message):
        draw_plan(**{"n": 3, "size": (8, 8), "step": 0} | changes)


def test_what_is_checked_once_is_checked_by_type_too() -> None:
    for right, wrong in (({"alpha": 1}, {"alpha": True}), ({"rules": {"mixup": 1}}, {"rules": {"mixup": True}})):
        draw_plan(3, (8, 8), step=0, **right)
        with pytest.raises(TypeError, match="got bool"):
            draw_plan(3, (8, 8), step=0, **wrong)
    rules = ["mixup"]
    draw_plan(3, (8, 8), step=0, rules=rules)
    rules.append("mixip")
    with pytest.raises(ValueError, match="rules names an unknown rule 'mixip'"):
        draw_plan(3, (8, 8), step=0, rules=rules)


def test_a_drawn_plan_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_plan(3, (8, 8), step=0)
    for name in ("_check_values", "_check_rules", "_check_alpha"):
        monkeypatch.setattr(plan_module, name, None)
    assert len(draw_plan(3, (8, 8), step=1)) == 3


def test_refuses_to_draw_without_a_step() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'step'"):
        draw_plan(3, (8, 8))  # type: ignore[call-arg]
    assert inspect.signature(draw_plan).parameters["step"].default is inspect.Parameter.empty


def test_refuses_wrong_targets() -> None:
    plan = by_hand()
    with pytest.raises(ValueError, match="offset must be a column number, 0 or more, got -1"):
        plan.source_target(-1)
    with pytest.raises(TypeError, match="partner_offset must be a column number, 0 or more, got float"):
        plan.pair_target(0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels has 3 rows but the plan has 4; give one label per row"):
        plan.label_target(torch.arange(3))
    with pytest.raises(TypeError, match="labels must be int64, got float32"):
        plan.label_target(torch.zeros(4))
    with pytest.raises(TypeError, match="partner_labels must be int64, got int32"):
        plan.label_target(torch.arange(4), torch.arange(4, dtype=torch.int32))
    with pytest.raises(TypeError, match="other must be the MixPlan that mixed the keys, got int"):
        plan.overlap(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"other must mix the same rows .* it has 5 rows, mirrored=True"):
        plan.overlap(draw_plan(5, (4, 4), step=0))
    loose = by_hand(partner=torch.tensor([1, 2, 3, 0]), mirrored=False)
    with pytest.raises(ValueError, match="other must have the same partner vector as this plan"):
        loose.overlap(by_hand(partner=torch.tensor([1, 2, 3, 1]), mirrored=False))
    beyond = by_hand(partner=torch.tensor([9, 0, 0, 0]), mirrored=False)
    with pytest.raises(ValueError, match="partner holds row 9, but this plan has only 4 rows"):
        beyond.overlap()
    with pytest.raises(ValueError, match="partner holds row 9, but labels has only 4 rows"):
        beyond.label_target(torch.arange(4))


# ---- targets as others want them


def test_labels_become_a_two_hot_target() -> None:
    labels = torch.tensor([2, 0, 1])
    target = TwoHot.from_labels(labels)
    assert torch.equal(target.dense(4), torch.nn.functional.one_hot(labels, 4).float())
    assert target.first is labels and target.weight.dtype == torch.float32
    assert len(TwoHot.from_labels(labels[:0]).dense(3)) == 0
    for wrong, error, message in (
        ([0, 1], TypeError, r"labels must be a torch.Tensor of shape \(N,\), got list"),
        (labels.int(), TypeError, "labels must be int64, got int32"),
        (labels[None], ValueError, r"labels must have shape \(N,\), got \(1, 3\)"),
        (torch.tensor([0, -100]), ValueError, "labels must hold class numbers of 0 or more, got -100"),
    ):
        with pytest.raises(error, match=message):
            TwoHot.from_labels(wrong)  # type: ignore[arg-type]


@PROPERTY
@given(draw_arguments(), st.lists(st.integers(0, 4), min_size=9, max_size=9))
def test_a_dense_target_is_its_two_columns(arguments: dict[str, Any], classes: list[int]) -> None:
    plan = draw_plan(**arguments)
    target = plan.label_target(torch.tensor(classes[: len(plan)], dtype=torch.int64))
    dense = target.dense(5)
    assert dense.shape == (len(plan), 5)
    for i in range(len(plan)):
        expected = torch.zeros(5)
        expected[target.first[i]] += target.weight[i]
        expected[target.second[i]] += 1 - target.weight[i]
        assert torch.allclose(dense[i], expected, rtol=1e-6, atol=0)


def test_a_dense_target_needs_enough_columns() -> None:
    target = TwoHot(torch.tensor([0, 3]), torch.tensor([1, 1]), torch.tensor([0.5, 0.25]))
    with pytest.raises(ValueError, match="columns=3 is too few: first holds columns 0 to 3"):
        target.dense(3)
    with pytest.raises(ValueError, match="columns must be a number of columns, 1 or more, got 0"):
        target.dense(0)
    with pytest.raises(TypeError, match="columns must be a number of columns, 1 or more, got float"):
        target.dense(4.0)  # type: ignore[arg-type]


# ---- a plan among other people's tools


def test_a_plan_is_shown_in_one_line() -> None:
    assert repr(by_hand()) == "MixPlan(4 rows of 4 x 4 px, keep|mixup|cutmix|resizemix, the flip, cpu)"
    loose = make_plan("mixup", torch.zeros(2), (8, 9), partner=torch.tensor([1, 1]), device="meta")
    assert repr(loose) == "MixPlan(2 rows of 8 x 9 px, mixup, given partners, meta)"


def test_a_plan_is_a_pytree() -> None:
    plan = by_hand()
    leaves, spec = pytree.tree_flatten({"plan": plan, "images": torch.zeros(2)})
    assert len(leaves) == 6
    again = pytree.tree_unflatten(leaves, spec)["plan"]
    assert isinstance(again, MixPlan) and same(again, plan)
    assert (again.size, again.mirrored, again.rules) == (plan.size, plan.mirrored, plan.rules)
    shapes = pytree.tree_map(lambda tensor: tuple(tensor.shape), plan)
    assert shapes.box == (4, 4), "leaves may be anything: nothing is checked on the way"
    assert pytree.tree_map(lambda tensor: tensor.to("meta"), plan).device.type == "meta"
    assert same(copy.deepcopy(plan), plan)


def test_a_plan_is_handed_to_a_compiled_function_and_drawn_outside() -> None:
    def blend(images: torch.Tensor, plan: MixPlan) -> torch.Tensor:
        return images * plan.lam[:, None]

    def draw_and_blend(images: torch.Tensor, step: int) -> torch.Tensor:
        doubled = images * 2
        return blend(doubled, draw_plan(len(images), (4, 4), step=step))

    def make_and_blend(images: torch.Tensor) -> torch.Tensor:
        return blend(images, make_plan("cutmix", torch.full((3,), 0.4), (9, 9)))

    torch._dynamo.reset()
    images = torch.rand(3, 5)
    handed = torch.compile(blend, fullgraph=True, backend="eager")
    plan = draw_plan(3, (4, 4), step=0)
    assert torch.equal(handed(images, plan), blend(images, plan))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="decide on the host: call them outside the compiled"):
        torch.compile(draw_and_blend, fullgraph=True, backend="eager")(images, 0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="decide on the host: call them outside the compiled"):
        torch.compile(make_and_blend, fullgraph=True, backend="eager")(images)
    counter = CompileCounter()
    broken = torch.compile(draw_and_blend, backend=counter)
    for step in range(3):
        assert torch.equal(broken(images, step), draw_and_blend(images, step)), "every step has draws of its own"
    assert counter.frame_count >= 2, "what is before and after the draw is compiled all the same"
    torch._dynamo.reset()


def test_drawing_does_not_load_the_compiler() -> None:
    program = (
        "import sys, torch; from sdmp_kernels import draw_plan, make_plan; draw_plan(3, (8, 8), step=0); "
        "make_plan('mixup', torch.zeros(2), (4, 4)); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- moving and overwriting


def test_to_moves_every_tensor_by_one_buffer() -> None:
    plan = draw_plan(7, (9, 5), per="sample", partner=torch.tensor([1, 1, 1, 2, 3, 4, 6]), step=0)
    assert plan.to("cpu") is plan
    again = plan._with(moved(plan._tensors(), torch.device("cpu")))
    assert same(plan, again)
    assert len({getattr(again, name).untyped_storage().data_ptr() for name in TENSORS}) == 1
    elsewhere = plan.to("meta")
    assert elsewhere.device.type == "meta"
    for name in TENSORS:
        assert getattr(elsewhere, name).dtype == getattr(plan, name).dtype
        assert getattr(elsewhere, name).shape == getattr(plan, name).shape
    assert (elsewhere.size, elsewhere.mirrored, elsewhere.rules) == (plan.size, plan.mirrored, plan.rules)
    assert len(draw_plan(0, (4, 4), step=0).to("meta")) == 0
    one = MixPlan(
        rule=torch.zeros(9, dtype=torch.uint8)[::9],
        partner=torch.zeros(9, dtype=torch.int64)[::9],
        lam=torch.ones(1).expand(1),
        partner_lam=torch.ones(9)[::9],
        box=torch.zeros(9, 4, dtype=torch.int32)[::9],
        size=(4, 4),
        mirrored=True,
        rules=(Rule.KEEP,),
    )
    assert same(one, one._with(moved(one._tensors(), torch.device("cpu")))), "whatever the strides of a single row are"
    assert draw_plan(3, (4, 4), device="meta", step=0).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_to_a_gpu_and_back() -> None:
    plan = draw_plan(33, (9, 5), per="sample", step=0)
    there = draw_plan(33, (9, 5), per="sample", device="cuda", step=0)
    assert there.device.type == "cuda"
    assert same(plan, there.to("cpu"))
    for one, other in zip(plan.pair_target(), there.pair_target(), strict=True):
        assert torch.equal(one, other.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_pinned() -> None:
    plan = draw_plan(33, (9, 5), per="sample", step=0)
    pinned = plan.pin_memory()
    assert all(getattr(pinned, name).is_pinned() for name in TENSORS)
    assert same(pinned, plan)
    assert same(pinned.to("cuda", non_blocking=False).to("cpu"), plan)


@pytest.mark.parametrize(
    ("target", "asked", "waits"), [("meta", True, False), ("meta", False, True), ("cpu", True, True)]
)
def test_a_copy_waits_where_the_host_reads_it(
    target: str, asked: bool, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = by_hand() if target != "cpu" else by_hand().to("meta")
    asked_of_torch = []
    original = torch.Tensor.to

    def record(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked_of_torch.append(kwargs["non_blocking"])
        return torch.zeros_like(tensor, device="cpu") if target == "cpu" else original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", record)
    with contextlib.suppress(ValueError):  # zeros are no plan that was drawn
        plan.to(target, non_blocking=asked)
    assert asked_of_torch == [not waits]


def test_only_plans_on_the_cpu_are_pinned() -> None:
    with pytest.raises(ValueError, match="only a plan on the CPU can be pinned, but this one is on meta"):
        by_hand().to("meta").pin_memory()


def test_copy_overwrites_in_place() -> None:
    static = draw_plan(6, (8, 8), step=0)
    addresses = [getattr(static, name).data_ptr() for name in TENSORS]
    newer = draw_plan(6, (8, 8), step=1)
    assert not same(static, newer)
    assert static.copy_(newer) is static
    assert same(static, newer)
    assert [getattr(static, name).data_ptr() for name in TENSORS] == addresses


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        ("plan", TypeError, "other must be a MixPlan, got str"),
        (
            draw_plan(6, (8, 9), step=0),
            ValueError,
            r"size is \(8, 8\) here and \(8, 9\) in other; draw both with the same",
        ),
        (draw_plan(6, (8, 8), partner=torch.arange(6), step=0), ValueError, "mirrored is True here and False in other"),
        (
            draw_plan(6, (8, 8), rules=["mixup"], step=0),
            ValueError,
            "host fields agree, but rules is .* here and .* in other",
        ),
        (draw_plan(5, (8, 8), step=0), ValueError, "plans of one length, but this one has 6 rows and other 5"),
    ],
)
def test_copy_refuses_what_differs_on_the_host(other: Any, error: type[Exception], message: str) -> None:
    static, before = draw_plan(6, (8, 8), step=0), draw_plan(6, (8, 8), step=0)
    with pytest.raises(error, match=message):
        static.copy_(other)
    assert same(static, before)


# ---- pinned draws

GOLDEN_ARGUMENTS: list[dict[str, Any]] = [
    {"n": 4, "size": [224, 224]},
    {"n": 4, "size": [224, 224], "view": 1},
    {"n": 6, "size": [32, 48], "per": "sample", "seed": 7, "step": 123},
    {"n": 3, "size": [32, 32], "per": "sample", "seed": 7, "step": 9, "rank": 1, "world_size": 2, "flip": "global"},
    {"n": 5, "size": [96, 96], "rules": ["cutmix"], "box": "clip", "alpha": 0.3, "seed": 2**63, "step": 1},
    {"n": 5, "size": [64, 64], "rules": {"mixup": 0.5, "resizemix": 0.5}, "per": "sample", "prob": 0.7, "alpha": 2.5},
    {"n": 4, "size": [64, 64], "rules": ["resizemix"], "shared_lam": True, "lam_range": [0.2, 0.8], "step": 4},
]


def golden_rows(arguments: dict[str, Any]) -> dict[str, Any]:
    plan = draw_plan(**{"step": 0} | arguments | {"size": tuple(arguments["size"])})
    return {name: getattr(plan, name).tolist() for name in TENSORS} | {"rules": [int(r) for r in plan.rules]}


def write_golden() -> None:
    """Pin today's draws. Run by hand only, when a change of the draws is wanted and written into the change log."""
    records = [{"arguments": arguments, "plan": golden_rows(arguments)} for arguments in GOLDEN_ARGUMENTS]
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


@pytest.mark.parametrize("compiled", [True, False])
def test_draws_are_pinned(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(plan_module, "compiled_draws", lambda: None)
    records = json.loads(GOLDEN.read_text())
    assert [record["arguments"] for record in records] == GOLDEN_ARGUMENTS
    for record in records:
        assert golden_rows(record["arguments"]) == record["plan"], record["arguments"]


if __name__ == "__main__":
    write_golden()


def test_keeping_rows_keeps_those_that_they_would_come_into():
    plan = draw_plan(6, (8, 8), rules=("cutmix",), per="sample", partner=torch.tensor([1, 2, 3, 4, 5, 0]), step=0)
    lost = torch.tensor([False, False, True, False, False, False])
    kept = plan.keeping(lost)
    assert kept.rule.tolist() == [2, 0, 0, 2, 2, 2] and Rule.KEEP in kept.rules
    assert kept.lam[[1, 2]].tolist() == [1, 1] and kept.box[[1, 2]].abs().sum() == 0
    assert torch.equal(kept.lam[[0, 3, 4, 5]], plan.lam[[0, 3, 4, 5]])
    assert torch.equal(kept.partner_lam, kept.lam[kept.partner])
    assert kept.source_target().dense(6)[1].tolist() == [0, 1, 0, 0, 0, 0]


def test_keeping_rows_whose_partners_are_on_another_rank():
    here, there = (draw_plan(3, (8, 8), flip="global", step=4, rank=rank, world_size=2) for rank in (0, 1))
    lost_here, lost_there = torch.tensor([True, False, False]), torch.tensor([True, False, False])
    one, other = here.keeping(lost_here, lost_there), there.keeping(lost_there, lost_here)
    assert [(p.rule == 0).tolist() for p in (one, other)] == [[True, False, True]] * 2
    assert torch.equal(one.partner_lam, other.lam.flip(0)) and torch.equal(other.partner_lam, one.lam.flip(0))
    assert torch.equal(one.pair_target().weight[[0, 2]], torch.ones(2))


def test_keeping_refuses_what_it_cannot_know():
    plan = draw_plan(4, (8, 8), partner=torch.tensor([1, 0, 3, 2]), step=0)
    rows = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="partner_rows are for partners by the flip"):
        plan.keeping(rows, rows)
    with pytest.raises(ValueError, match="rows has 3 rows but the plan has 4"):
        plan.keeping(rows[:3])
    with pytest.raises(TypeError, match="rows"):
        plan.keeping(rows.float())
