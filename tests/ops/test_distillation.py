"""`distillation`: what it promises beyond the op matrix, on every backend that runs on this machine's CPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import matrix
from ops.losses import LIMITS, Storages, each_backend, needs_interpreter, quiet_interpreter  # noqa: F401  a fixture for all
from torch import Tensor

from sdmp_kernels import MixPlan, _backends, _launch, distillation, draw_plan, use_backend
from sdmp_kernels.ops.distillation import cases
from sdmp_kernels.ops.distillation.op import OP

Result = tuple[Tensor, Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(views: int, crops: int, n: int, k: int, seed: int = 0) -> dict[str, Any]:
    """Random logits of the size that DINO's have, weights of both kinds and a centre."""
    own, other = torch.rand(2, views, crops, n, generator=torch.Generator().manual_seed(seed)).unbind(0)
    student, teacher, center = (
        drawn(views, n, k, seed=seed + 1),
        drawn(crops, n, k, seed=seed + 2),
        drawn(k, seed=seed + 3),
    )
    return {"student": student / 4, "teacher": teacher / 4, "own": own, "other": other, "center": center / 16}


def uneven(n: int) -> Tensor:
    """An upstream gradient for every row, 0 among them for some n."""
    return torch.linspace(-1.0, 2.0, n)


def run(
    student: Tensor,
    teacher: Tensor,
    upstream: Tensor | None = None,
    call: Callable[..., Any] = distillation,
    **options: Any,
) -> Result:
    """(losses, gradient of the student) for one upstream gradient per row, default 1."""
    leaf = student.detach().requires_grad_()
    losses = call(leaf, teacher, reduction="none", **options)
    (grad,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses) if upstream is None else upstream.to(losses))
    return losses.detach(), grad


def exact(student: Tensor, teacher: Tensor, upstream: Tensor | None = None, **options: Any) -> Result:
    """The double loop over cross-entropies, in float64."""
    return run(student.double(), teacher.double(), upstream, cases.eager, **options)


def check(
    backend: str, upstream: Tensor | None = None, call: Callable[..., Any] = distillation, **inputs: Any
) -> Result:
    """The rule of the op matrix, against the double loop: what `backend` returns, once it is found right."""
    with use_backend(backend):
        got = run(upstream=upstream, call=call, **inputs)
    truth = exact(upstream=upstream, **inputs)
    terms = cases.largest_term(**inputs, reduction="none"), cases.largest_grad_term(**inputs, reduction="none")
    for result, right, own, term in zip(got, truth, plain_errors(truth, upstream, **inputs), terms, strict=True):
        assert result.shape == right.shape
        assert matrix.error(result, right) <= matrix.allowed(own, result.dtype, term)
    return got


def plain_errors(truth: Result, upstream: Tensor | None, **inputs: Any) -> list[float]:
    """PyTorch's own error of (losses, gradient), in float32 also for half logits; none where it is not finite.

    The largest over a few orders of the columns, which mean nothing: few rows of few columns are often right by luck.
    """
    single = {**inputs, "student": inputs["student"].float(), "teacher": inputs["teacher"].float()}
    errors = [0.0, 0.0]
    for seed in range(8):
        order = torch.randperm(single["student"].shape[2], generator=torch.Generator().manual_seed(seed))
        shuffled = {n: single[n][..., order] for n in ("student", "teacher", "center") if single.get(n) is not None}
        losses, grad = run(upstream=upstream, call=cases.eager, **{**single, **shuffled})
        found = matrix.error(losses, truth[0]), matrix.error(grad, truth[1][..., order])
        errors = [max(most, e if e < math.inf else 0.0) for most, e in zip(errors, found, strict=True)]
    return errors


# What it computes.


def dino(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """DINO's loss as Caron et al. 2021 write it: the mean over all pairs of different crops, and over rows."""
    terms = []
    for t, target in enumerate(F.softmax((teacher - center) / 0.04, dim=-1)):
        for v, crop in enumerate(student):
            if v != t:
                terms.append(-(target * F.log_softmax(crop / 0.1, dim=-1)).sum(-1).mean())
    assert len(terms) == 18
    return torch.stack(terms).mean()


@each_backend
def test_equals_dinos_double_loop(backend):
    """Ten student crops, the first two of them the teacher's."""
    student, teacher, center = drawn(10, 5, 40), drawn(2, 5, 40, seed=1), drawn(40, seed=2) / 10
    own = torch.full((10, 2), 1 / 18)
    own[0, 0] = own[1, 1] = 0
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = student.to(dtype).requires_grad_()
        loss = dino(leaf, teacher.to(dtype), center.to(dtype))
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    leaf = student.clone().requires_grad_()
    with use_backend(backend):
        loss = distillation(leaf, teacher, own=own, center=center)
    got = loss.detach(), *torch.autograd.grad(loss, leaf)
    given = {"student": student, "teacher": teacher, "own": own, "center": center}
    terms = cases.largest_term(**given), cases.largest_grad_term(**given)
    for result, truth, plain, term in zip(got, *results, terms, strict=True):
        assert result.shape == truth.shape
        assert matrix.error(result, truth) <= matrix.allowed(matrix.error(plain, truth), torch.float32, term)


def sdmp(student: Tensor, teacher: Tensor, plan: MixPlan) -> Tensor:
    """(N,) Eq. 9 as method.md 4.2 reads it: 6 clean and 4 mixed student crops, 2 clean and 2 mixed teacher crops."""

    def entropy(target: Tensor, log_p: Tensor) -> Tensor:
        return -(target * log_p).sum(-1)

    p, log_p = F.softmax(teacher / 0.04, dim=-1), F.log_softmax(student / 0.1, dim=-1)
    lam, c = plan.lam.to(student.dtype), plan.overlap().to(student.dtype)
    flipped = p.flip(1)
    clean = [entropy(p[t], log_p[v]) for t in (0, 1) for v in range(6) if v != t]
    source, mixing = [], []
    for v in range(6, 10):
        for t in (0, 1):
            source.append(entropy(lam[:, None] * p[t] + (1 - lam)[:, None] * flipped[t], log_p[v]))
        for t in (2, 3):
            mixing.append(entropy(p[t], log_p[v]) / (1 + c) + entropy(flipped[t], log_p[v]) * c / (1 + c))
    return sum(torch.stack(terms).mean(0) for terms in (clean, source, mixing))


def sdmp_weights(plan: MixPlan) -> tuple[Tensor, Tensor]:
    """own, other (10, 4, N) of the same."""
    own, other = torch.zeros(2, 10, 4, len(plan), dtype=torch.float64).unbind(0)
    own[:6, :2] = (1 - torch.eye(6, 2))[..., None] / 10
    for t, target in ((0, plan.source_target()), (2, plan.pair_target())):
        own[6:, t : t + 2] = target.weight / 8
        other[6:, t : t + 2] = (1 - target.weight) / 8
    return own, other


@each_backend
@pytest.mark.parametrize("n", [4, 5])
def test_equals_the_papers_equations_7_to_9(backend, n):
    plan = draw_plan(n, (96, 96), per="sample", seed=3, step=0)
    student, teacher = drawn(10, n, 24), drawn(4, n, 24, seed=1)
    own, other = sdmp_weights(plan)
    given = {"student": student, "teacher": teacher, "own": own, "other": other}
    truth, plain = (
        run(student.to(d), teacher.to(d), uneven(n), lambda s, t, reduction: sdmp(s, t, plan))
        for d in (torch.float64, torch.float32)
    )
    with use_backend(backend):
        got = run(upstream=uneven(n), **given)
    terms = cases.largest_term(**given, reduction="none"), cases.largest_grad_term(**given, reduction="none")
    for result, right, mine, term in zip(got, truth, plain, terms, strict=True):
        assert matrix.error(result, right) <= matrix.allowed(matrix.error(mine, right), torch.float32, term)


@each_backend
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 11])
def test_any_number_of_rows_and_any_upstream_gradient(backend, n):
    check(backend, uneven(n), **made(2, 2, n, 101))


@each_backend
def test_no_rows(backend):
    inputs = made(2, 2, 0, 5)
    inputs["student"].requires_grad_()
    with use_backend(backend):
        assert distillation(**inputs, reduction="none").shape == (0,)
        assert distillation(**inputs).isnan()
        total, mean = distillation(**inputs, reduction="sum", teacher_mean=True)
    assert total == 0
    assert mean.shape == (5,)
    assert mean.isnan().all()
    (grad,) = torch.autograd.grad(total, inputs["student"])
    assert grad.shape == (2, 0, 5)


@each_backend
@pytest.mark.parametrize("n", [4, 5])
def test_the_flip_equals_that_partner_vector(backend, n):
    inputs = made(3, 2, n, 21)
    flip = check(backend, uneven(n), **inputs)
    vector = check(backend, uneven(n), **inputs, partner=torch.arange(n - 1, -1, -1))
    terms = cases.largest_term(**inputs, reduction="none"), cases.largest_grad_term(**inputs, reduction="none")
    for one, other, term in zip(flip, vector, terms, strict=True):
        assert matrix.error(one, other) <= matrix.allowed(0.0, one.dtype, term)


@each_backend
@pytest.mark.parametrize("partner", [(0, 1, 2, 3, 4), (1, 2, 3, 4, 0), (2, 2, 2, 2, 2), (3, 0, 0, 4, 1)], ids=str)
def test_any_partner_vector(backend, partner):
    """Itself, a cycle, one for all, neither onto nor one to one."""
    check(backend, uneven(5), **made(2, 2, 5, 13), partner=torch.tensor(partner))


@each_backend
def test_the_middle_row_is_its_own_partner(backend):
    """Of an odd number of rows; and the only one."""
    for n in (1, 5):
        inputs = made(3, 2, n, 21)
        alone = {**inputs, "own": inputs["own"] + inputs["other"], "other": None}
        for mixed, single in zip(check(backend, **inputs), check(backend, **alone), strict=True):
            middle = mixed[..., n // 2, :] if mixed.ndim == 3 else mixed[n // 2]
            again = single[..., n // 2, :] if single.ndim == 3 else single[n // 2]
            torch.testing.assert_close(middle, again, rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_any_dtype_per_crop_or_per_row(backend, dtype):
    inputs = made(2, 2, 3, 9)
    inputs = {n: t.to(dtype) if n in ("own", "other", "center") else t for n, t in inputs.items()}
    flat = {**inputs, "own": inputs["own"][..., 0], "other": inputs["other"][..., 0]}
    full = {**inputs, **{n: flat[n][..., None].expand(2, 2, 3) for n in ("own", "other")}}
    got = check(backend, **flat)
    for one, other in zip(got, check(backend, **full), strict=True):
        assert torch.equal(one, other)


@each_backend
def test_weights_of_zero(backend):
    """A crop without weight has no gradient; without any weight there is no loss."""
    inputs = made(3, 2, 4, 17)
    inputs["own"][1], inputs["other"][1] = 0, 0
    inputs["own"][:, :, 2], inputs["other"][:, :, 2] = 0, 0
    losses, grad = check(backend, **inputs)
    assert (grad[1] == 0).all()
    assert losses[2] == 0
    assert (grad[:, 2] == 0).all()


@each_backend
@pytest.mark.parametrize(
    "temperatures", [(0.01, 0.01), (50.0, 300.0), (1e-20, 0.1), (1e20, 1e20), (0.1, 1e-20)], ids=str
)
def test_temperatures(backend, temperatures):
    student, teacher = temperatures
    check(backend, **made(2, 2, 3, 11), student_temperature=student, teacher_temperature=teacher)


@each_backend
def test_ties(backend):
    """All logits equal: log K, whatever they are, and no gradient."""
    for value in (0.0, -2.5, LIMITS[torch.float32]):
        inputs = {
            **made(2, 2, 3, 20),
            "student": torch.full((2, 3, 20), value),
            "teacher": torch.full((2, 3, 20), -value),
        }
        del inputs["center"]
        with use_backend(backend):
            losses, grad = run(**inputs)
        total = (inputs["own"] + inputs["other"]).sum((0, 1))
        assert torch.allclose(losses, total * math.log(20), rtol=1e-6)
        assert grad.abs().max() <= 10 * 2**-23 * total.max()


# The ends of the range.


@st.composite
def extreme(draw: st.DrawFn) -> dict[str, Any]:
    """Rows of logits at the ends of the dtype's range, ties, and ordinary ones; weights at the ends of theirs."""
    dtype = draw(st.sampled_from(list(LIMITS)))
    top = LIMITS[dtype]
    views, crops, n, k = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    value = st.sampled_from([0.0, 1.0, -1.0, 33.25, -33.25, 2e-7, top, -top, top / 2, -top / 2, top / 1024])
    weight = st.sampled_from([0.0, 1.0, 0.5, 0.25, 1e-6, 0.999])

    def filled(values: st.SearchStrategy[float], *shape: int) -> Tensor:
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float64).view(shape)

    inputs: dict[str, Any] = {
        "student": filled(value, views, n, k).to(dtype),
        "teacher": filled(value, crops, n, k).to(dtype),
        "own": filled(weight, views, crops, n).float(),
    }
    kind = draw(st.sampled_from(["own", "flip", "any"]))
    if kind != "own":
        inputs["other"] = filled(weight, views, crops, n).float()
    if kind == "any":
        inputs["partner"] = torch.tensor(draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    if draw(st.booleans()):
        inputs["center"] = filled(value, k).to(dtype)
    inputs["student_temperature"] = draw(st.sampled_from([0.01, 0.1, 30.0]))
    inputs["teacher_temperature"] = draw(st.sampled_from([0.01, 0.04, 30.0]))
    return inputs


def centre(inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    teacher = inputs["teacher"].to(dtype)
    return teacher - inputs["center"].to(dtype) if "center" in inputs else teacher


def exact_and_bounds(inputs: dict[str, Any]) -> tuple[Result, Result]:
    """(losses, gradient) in float64, and what float32 may err of each where it can centre the logits exactly.

    A probability e^x is known to 1 + |x| ulps, since its exponent is rounded too; a distance, a weight, a logarithm
    and their products to one each.
    """
    student, centered, own = inputs["student"].double(), centre(inputs, torch.float64), inputs["own"].double()
    log_p = F.log_softmax(centered / inputs["teacher_temperature"], dim=-1)
    wide = log_p.exp() * (4 - log_p.clamp_min(-1e4))
    other = inputs["other"].double() if "other" in inputs else torch.zeros_like(own)
    rows = inputs.get("partner", torch.arange(student.shape[1] - 1, -1, -1))
    target = torch.einsum("vtn,tnk->vnk", own, wide) + torch.einsum("vtn,tnk->vnk", other, wide[:, rows])
    distance = (student.amax(-1, keepdim=True) - student) / inputs["student_temperature"]
    log_s = F.log_softmax(student / inputs["student_temperature"], dim=-1)
    total = (own + other).sum(1)
    loss = ((target * distance).sum(-1) + 4 * total * (distance.neg().logsumexp(-1) + 1)).sum(0)
    slope = total[..., None] * log_s.exp() * (4 - log_s.clamp_min(-1e4)) + target
    return exact(**inputs), (loss * 2**-23, slope * 2**-23 / inputs["student_temperature"])


@each_backend
@settings(derandomize=True, deadline=None, max_examples=40)
@given(extreme())
def test_finite_wherever_the_exact_value_is(backend, inputs):
    """Never NaN for finite logits; finite, and right to a few ulps of every term, where float32 can say it."""
    if backend == "triton" and inputs["student"].dtype == torch.bfloat16:
        inputs = {**inputs, "student": inputs["student"].float(), "teacher": inputs["teacher"].float()}
    with use_backend(backend):
        got = run(**inputs)
    truth, bounds = exact_and_bounds(inputs)
    exactly_centred = torch.equal(centre(inputs, torch.float32).double(), centre(inputs, torch.float64))
    for result, right, bound in zip(got, truth, bounds, strict=True):
        limits = torch.finfo(result.dtype)
        assert not result.isnan().any()
        sayable = right.abs() <= limits.max * (1 - 2**-9)
        assert result[sayable].isfinite().all()
        rounded = right.abs() * limits.eps + limits.tiny
        assert not exactly_centred or ((result.double() - right).abs() <= bound + rounded)[sayable].all()


@each_backend
def test_a_common_offset_costs_no_digits(backend):
    """The loss is a matter of differences alone: of a student's row, and of a teacher's from the centre."""
    inputs = made(2, 2, 3, 33)
    for name in ("student", "teacher", "center"):
        inputs[name] = (inputs[name] * 8).round() / 4
    near = check(backend, **inputs)
    with use_backend(backend):
        far = run(**{**inputs, "student": inputs["student"] + 2.0**20, "teacher": inputs["teacher"] - 2.0**20})
    for here, there in zip(near, far, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=2e-6)


@each_backend
@pytest.mark.parametrize("masked", [slice(2, 4), slice(512, 1024)], ids=["some", "a chunk"])
def test_a_teachers_minus_infinity_is_probability_zero(backend, masked):
    inputs = made(1, 2, 2, 6 if masked.stop < 10 else 1030)
    inputs["teacher"][:, :, masked] = -math.inf
    losses, grad = check(backend, **inputs)
    assert losses.isfinite().all()
    assert (grad[:, :, masked] > 0).all()
    with use_backend(backend):
        _, mean = distillation(**inputs, teacher_mean=True)
    assert (mean[masked] == -math.inf).all()
    assert mean.isfinite().sum() == len(mean) - len(mean[masked])


@each_backend
def test_a_students_minus_infinity_is_what_the_formula_gives(backend):
    """An infinite loss where the target has weight, and none of it in other rows."""
    inputs = made(2, 1, 3, 5)
    inputs["student"][0, 1, 2] = -math.inf
    with use_backend(backend):
        losses, _ = run(**inputs, teacher_temperature=1.0)
    assert losses[1] == math.inf
    assert losses[[0, 2]].isfinite().all()


@each_backend
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_is_not_hidden(backend, where):
    inputs = made(2, 2, 5, 40)
    inputs[where][1, 1, 7] = math.nan
    with use_backend(backend):
        losses, grad = run(**inputs)
    touched = [False, True, False, where == "teacher", False]
    assert losses.isnan().tolist() == touched
    assert grad.isnan().any(-1).any(0).tolist() == touched


def test_the_mean_of_large_losses_does_not_overflow():
    top = LIMITS[torch.float32]
    student = torch.tensor([top / 2, -top / 2]).expand(1, 4, 2)
    teacher = torch.tensor([0.0, 1.0]).expand(1, 4, 2)
    options = {"own": torch.ones(1, 1), "student_temperature": 1.0, "teacher_temperature": 0.001}
    assert distillation(student, teacher, **options).item() == pytest.approx(top, rel=1e-6)


# The mean of the teacher.


@each_backend
@pytest.mark.parametrize("wanted", [True, (2,), [2, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_mean_is_that_of_the_raw_rows(backend, wanted, dtype, small_chunks):
    inputs = made(2, 3, 7, 45)
    small_chunks(3 * 2 * 45)
    inputs["teacher"] = teacher = (3 * inputs["teacher"] + 5).to(dtype).requires_grad_()
    inputs["student"].requires_grad_()
    with use_backend(backend):
        loss, mean = distillation(**inputs, teacher_mean=wanted)
        alone = distillation(**inputs)
    chosen = teacher.detach() if wanted is True else teacher.detach()[list(wanted)]
    truth, plain = (chosen.to(d).mean((0, 1)) for d in (torch.float64, torch.float32))
    assert mean.dtype == torch.float32
    assert matrix.error(mean, truth) <= matrix.allowed(
        matrix.error(plain, truth), torch.float32, float(chosen.abs().max())
    )
    assert torch.equal(loss, alone)
    assert loss.requires_grad
    assert not mean.requires_grad


@each_backend
def test_the_mean_of_the_largest_logits_does_not_overflow(backend):
    top = LIMITS[torch.float32]
    inputs = {**made(1, 2, 6, 5), "teacher": torch.full((2, 6, 5), top)}
    with use_backend(backend):
        _, mean = distillation(**inputs, teacher_mean=True)
    assert torch.allclose(mean, torch.tensor(top), rtol=1e-6)


# Gradients.


@each_backend
def test_constants_get_no_gradient(backend):
    inputs = made(2, 2, 3, 7)
    for name in ("student", "teacher", "own", "other", "center"):
        inputs[name].requires_grad_()
    with use_backend(backend):
        distillation(**inputs).backward()
    assert inputs.pop("student").grad.abs().max() > 0
    assert all(constant.grad is None for constant in inputs.values())


@each_backend
def test_backward_twice_and_two_losses_of_one_tensor(backend):
    inputs, again = made(2, 2, 5, 13), made(2, 2, 5, 13, seed=9)
    again["student"] = inputs["student"]
    before = {name: t.clone() for name, t in inputs.items()}
    student = inputs["student"].requires_grad_()
    with use_backend(backend):
        total = distillation(**inputs) + 2 * distillation(**again)
        once = torch.autograd.grad(total, student, retain_graph=True)[0]
        twice = torch.autograd.grad(total, student)[0]
        alone = [torch.autograd.grad(distillation(**given), student)[0] for given in (inputs, again)]
    assert torch.equal(once, twice)
    assert torch.equal(once, alone[0] + 2 * alone[1])
    assert all(torch.equal(inputs[name], t) for name, t in before.items())


@each_backend
def test_a_second_derivative_raises(backend):
    """Right or refused: it is not silently zero."""
    inputs = made(2, 2, 3, 4)
    student = inputs["student"].requires_grad_()
    with use_backend(backend):
        (grad,) = torch.autograd.grad(distillation(**inputs), student, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            grad.sum().backward()


@each_backend
def test_autocast_does_not_recast(backend):
    inputs = made(2, 2, 4, 50)
    with use_backend(backend):
        plain = run(**inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_reductions():
    inputs = made(2, 2, 5, 6)
    rows = distillation(**inputs, reduction="none")
    assert rows.shape == (5,)
    torch.testing.assert_close(distillation(**inputs, reduction="sum"), rows.sum())
    torch.testing.assert_close(distillation(**inputs), rows.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_of_the_result(dtype):
    inputs = made(2, 2, 3, 5)
    inputs |= {"student": inputs["student"].to(dtype), "teacher": inputs["teacher"].to(dtype)}
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    losses, grad = run(**inputs)
    assert losses.dtype == wanted
    assert distillation(**inputs, teacher_mean=[0])[1].dtype == wanted
    assert grad.dtype == dtype


# Memory.


@each_backend
def test_no_probabilities_are_kept_for_the_backward_pass(backend):
    """Of what is saved, only the arguments themselves, and the gradient where it exists already, have as many elements
    as a crop's probabilities.
    """
    inputs = made(2, 3, 4, 64)
    inputs["student"].requires_grad_()
    kept: list[Tensor] = []
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        distillation(**inputs, teacher_mean=True)
    assert len(kept) >= len(inputs)
    addresses = {t.data_ptr() for t in inputs.values()}
    new = [t for t in kept if t.data_ptr() not in addresses]
    assert new, "the rows' statistics are among them, or the gradient"
    gradient = inputs["student"].numel() if backend in ("cpp", "triton") else 0
    assert sum(t.numel() for t in new) <= 2 * (2 + 3) * 4 + gradient


@pytest.mark.parametrize("partner", [None, torch.arange(16).roll(3)], ids=["flip", "any"])
def test_nothing_as_large_as_the_logits_is_allocated(partner):
    """By the torch backend, but for the gradient: neither (V, N, K) nor (T, N, K), at sizes of several chunks."""
    views, crops, n, k = 4, 2, 16, 2**17
    student, teacher = (torch.zeros(count, n, k) for count in (views, crops))
    own, other = torch.rand(2, views, crops, n).unbind(0)
    backend = OP.module("torch")
    given = (student, teacher, own, other, partner, torch.zeros(k))
    with Storages() as forward:
        losses, student_stats, teacher_stats, _ = backend.forward(*given, 0.1, 0.04, [0])
    with Storages() as backward:
        gradient = backend.backward(torch.ones(n), *given, student_stats, teacher_stats, 0.1, 0.04)
    torch.testing.assert_close(losses, (own + other).sum((0, 1)) * math.log(k))
    assert gradient.abs().max() <= 1e-6
    assert max(forward.sizes) < 4 * crops * n * k
    largest = sorted(backward.sizes)
    assert largest[-1] == 4 * views * n * k
    assert largest[-2] < 4 * crops * n * k


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets how many elements the torch backend works on at a time; fresh memory is full of NaN, not of luck."""
    chunks = OP.module("torch")._CHUNK
    torch.use_deterministic_algorithms(True)
    yield lambda elements: monkeypatch.setitem(chunks, "cpu", elements)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 6, 100], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("form", ["own", "flip", "any"])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 11])
def test_rows_and_crops_in_chunks(rows, form, n, small_chunks):
    """Every way in which the torch backend cuts them: fewer rows than crops have room for, pairs, all at once."""
    inputs = made(3, 2, n, 16)
    if form == "own":
        inputs["other"] = None
    if form == "any":
        inputs["partner"] = torch.arange(n).roll(1)
    small_chunks(3 * 16 * rows if rows else 16)
    check("torch", uneven(n), **inputs)


def test_chunks_are_closed_under_the_flip(small_chunks):
    kinds = set()
    for n in range(1, 12):
        for rows in (2, 4, 6):
            small_chunks(3 * 16 * rows)
            inputs = made(3, 2, n, 16)
            found = []
            for chunk in OP.module("torch")._Chunks(inputs["student"], inputs["teacher"], True, None):
                taken = torch.arange(n)[chunk]
                assert torch.equal(taken.flip(0), n - 1 - taken)
                kinds.add(("step" if chunk.step else "slice") if isinstance(chunk, slice) else "indices")
                found += taken.tolist()
            assert sorted(found) == list(range(n))
    assert kinds == {"slice", "step", "indices"}


# Bounds.


def surrounded(values: Tensor, beside: float) -> tuple[Tensor, Tensor]:
    """(a copy within a larger buffer, the buffer): 64 elements of `beside` on either side."""
    room = torch.full((values.numel() + 128,), beside, dtype=values.dtype)
    return room[64:-64].view(values.shape).copy_(values), room


@each_backend
@pytest.mark.parametrize("form", ["own", "flip", "any"])
@pytest.mark.parametrize("k", [37, 64])
def test_nothing_beside_the_arguments_is_read(backend, form, k):
    """Each of them lies in a buffer of NaN, and the partners among rows that do not exist."""
    inputs: dict[str, Any] = made(2, 2, 5, k)
    if form == "own":
        del inputs["other"]
    if form == "any":
        inputs["partner"] = torch.tensor([4, 2, 2, 0, 3])
    apart = {n: surrounded(t, math.nan if t.is_floating_point() else 10**12)[0] for n, t in inputs.items()}
    upstream = surrounded(uneven(5), math.nan)[0]
    with use_backend(backend):
        expected, got = run(upstream=uneven(5), **inputs), run(upstream=upstream, **apart)
        mean, again = (distillation(**given, teacher_mean=[1])[1] for given in (inputs, apart))
    for result, plain in zip((*got, again), (*expected, mean), strict=True):
        assert result.isfinite().all()
        assert torch.equal(result, plain)


@needs_interpreter
@pytest.mark.parametrize("form", ["own", "flip", "any"])
@pytest.mark.parametrize("k", [37, 64])
def test_kernels_write_nothing_beside_the_results(form, k):
    kernels = OP.module("triton")
    inputs = made(2, 2, 5, k)
    other = None if form == "own" else inputs["other"]
    partner = torch.tensor([4, 2, 2, 0, 3]) if form == "any" else None
    arguments = (inputs["student"], inputs["teacher"], inputs["own"], other, partner, inputs["center"], 0.1, 0.04)
    chip_of = importlib.import_module("sdmp_kernels.ops.loss_launches").chip_of
    expected = [inputs["student"].new_empty(shape) for shape in ((5,), inputs["student"].shape, (k,))]
    chip = chip_of(torch.device("cpu"))

    def write(losses: Tensor, gradient: Tensor, mean: Tensor) -> None:
        wanted = kernels.Wanted(0.5, uneven(5), losses, gradient, mean, [0])
        for call in kernels.calls_of(chip, kernels._Given(*arguments), wanted):
            call.launch(torch.device("cpu"))

    write(*expected)
    results, rooms = zip(*(surrounded(torch.full_like(t, math.nan), -77.0) for t in expected), strict=True)
    write(*results)
    for result, right, room in zip(results, expected, rooms, strict=True):
        assert torch.equal(result, right)
        assert (room[:64] == -77).all()
        assert (room[-64:] == -77).all()


STRAYS = [4, -1, 1, 10**12, -(10**12)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_partners_out_of_range_are_left_out(backend):
    check_strays(backend)


def check_strays(backend: str) -> None:
    """What a GPU does with partners it cannot check: their terms are dropped, and nothing out of bounds is read."""
    inputs = made(2, 2, 5, 9)
    partner = torch.tensor(STRAYS)
    dropped = {**inputs, "other": inputs["other"] * ((partner >= 0) & (partner < 5)), "partner": partner.clamp(0, 4)}
    arguments = [inputs[name] for name in ("student", "teacher", "own", "other")]

    def unchecked(student: Tensor, *_: Any, **__: Any) -> Tensor:
        constants = (*arguments[1:], partner, inputs["center"], 0.1, 0.04, [], "none")
        return torch.ops.sdmp.distillation(student, *constants, True, False)[0]

    check(backend, uneven(5), unchecked, **dropped)


CHILD = """
import json, torch
from ops import matrix, test_distillation as tests
from sdmp_kernels import distillation, use_backend

far = 2**31 + 8


def view(shape, strides):
    # Gigabytes of address space of which a few pages are ever touched.
    last = sum((n - 1) * s for n, s in zip(shape, strides))
    return torch.empty(last + 1, dtype=torch.float16).as_strided(shape, strides)


def right(name, strides, partner=None):
    inputs = tests.made(2, 2, 2, 2)
    inputs |= {n: inputs[n].half() for n in ("student", "teacher")}
    inputs[name] = view((2, 2, 2), strides).copy_(inputs[name])
    tests.check("triton", **inputs, partner=partner)
    with use_backend("triton"):
        _, mean = distillation(**inputs, partner=partner, teacher_mean=True)
    return matrix.error(mean, inputs["teacher"].double().mean((0, 1))) <= 1e-6


some = torch.tensor([1, 1])
tests.check_strays("triton")
answers = {
    f"{name} {what} far apart, {form}": right(name, strides, partner)
    for name in ("student", "teacher")
    for what, strides in (("crops", (far, 8, 1)), ("rows", (8, far, 1)), ("columns", (8, 2, far)))
    for form, partner in (("flip", None), ("any", some))
}
print(json.dumps(answers))
"""


@needs_interpreter
def test_far_offsets_and_strays_in_a_process_of_their_own():
    """Offsets past 2^31, and partners that no check has seen: an error here is a crash, so in a child process."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == 12
    assert all(answers.values()), answers


# What runs.


def test_cpu_takes_cpp():
    expected = "torch" if _backends.unavailable("cpp", "cpu") else "cpp"
    assert _backends.backends()["distillation"]["cpu"].split()[0] == expected


@needs_interpreter
def test_every_kernel_runs_in_the_interpreter():
    multiplied = importlib.import_module("sdmp_kernels.ops.loss_launches").multiplied
    inputs = made(2, 2, 3, 5)
    inputs["student"].requires_grad_()
    with use_backend("triton"), _launch.recording() as names:
        distillation(**inputs, teacher_mean=True)[0].backward()
        # On a CPU the gradient is multiplied by PyTorch.
        gradient, factors = drawn(2, 3, 5), torch.tensor([1.0, 2.0, 0.5])
        got = [multiplied(gradient, by, None, torch.empty_like(gradient)) for by in (factors, torch.tensor(3.0))]
        kept = gradient.clone()
        got.append(multiplied(kept, factors, None, kept))
    assert names == set(OP.module("triton").KERNELS)
    for result, by in zip(got, (factors[:, None], 3.0, factors[:, None]), strict=True):
        assert torch.equal(result, gradient * by)


@needs_interpreter
def test_groups_of_pairs_that_fit_into_the_cache():
    """However many launches that makes, losses and gradients are the same, and each pair is in one of them."""
    chip = importlib.import_module("sdmp_kernels.ops.loss_launches").Chip
    inputs = made(2, 2, 9, 64)
    tensors = (inputs[name] for name in ("student", "teacher", "own", "other"))
    given = OP.module("triton")._Given(*tensors, None, None, 0.1, 0.04)
    results = []
    for cache, groups in ((1, 5), (2**13, 3), (2**30, 1)):
        losses, gradient = torch.full((9,), math.nan), torch.full((2, 9, 64), math.nan)
        wanted = OP.module("triton").Wanted(1.0, None, losses, gradient, losses[:0], [])
        calls = OP.module("triton").calls_of(chip("cpu", 1, cache), given, wanted)
        assert len(calls) == 2 + 3 * groups
        for call in calls:
            call.launch(torch.device("cpu"))
        results.append((losses, gradient))
    truth = exact(**{name: inputs[name] for name in ("student", "teacher", "own", "other")})
    assert torch.allclose(results[0][0].double(), truth[0], rtol=1e-5)
    assert torch.allclose(results[0][1].double(), truth[1], atol=1e-5)
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])


# Lists of crops, and in place.


@each_backend
@pytest.mark.parametrize("how", ["chunks", "apart", "strided", "one"])
def test_lists_of_crops_equal_the_tensor_of_them(backend, how):
    """Parts of one tensor are read where they lie, others copied; each crop gets its gradient."""
    inputs = made(3, 2, 4, 20)
    if how == "one":
        inputs |= {"student": inputs["student"][:1], "own": inputs["own"][:1], "other": inputs["other"][:1]}
    with use_backend(backend):
        expected = run(**inputs, upstream=uneven(4))
        source = inputs["student"].clone().requires_grad_()
        if how == "chunks":
            flat = source.view(-1, 20)
            crops = list(flat.chunk(len(source)))
        elif how == "strided":
            crops = list((1 * source.permute(2, 1, 0).contiguous()).permute(2, 1, 0).unbind(0))
        else:
            crops = [1 * crop for crop in source.unbind(0)]
        with Storages() as made_here:
            teacher = list(inputs["teacher"].unbind(0))
            rest = {name: inputs[name] for name in ("own", "other", "center")}
            losses = distillation(crops, teacher, reduction="none", **rest)
        (grad,) = torch.autograd.grad(losses, source, uneven(4))
    assert torch.equal(losses, expected[0])
    assert torch.equal(grad, expected[1])
    assert made_here.sizes


def test_chunks_of_one_tensor_are_not_copied():
    inputs = made(4, 2, 64, 100)
    flat = inputs["student"].view(-1, 100)
    with torch.no_grad(), Storages() as seen:
        distillation(flat.chunk(4), list(inputs["teacher"]), own=inputs["own"])
    assert max(seen.sizes) < flat.nbytes
    with torch.no_grad(), Storages() as seen:
        distillation([t.clone() for t in flat.chunk(4)], list(inputs["teacher"]), own=inputs["own"])
    assert max(seen.sizes) >= flat.nbytes


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_gradient_goes_where_the_students_logits_are(backend, dtype, layout):
    inputs = made(3, 2, 5, 40)
    source = inputs.pop("student").to(dtype)
    leaf = source.clone().requires_grad_()
    with use_backend(backend):
        (expected,) = torch.autograd.grad(3 * distillation(leaf, **inputs), leaf)
        student = 1 * leaf if layout == "contiguous" else (1 * leaf.transpose(0, 2).contiguous()).transpose(0, 2)
        loss = distillation(student, **inputs, inplace_backward=True)
        assert torch.equal(student, source)
        place = student.data_ptr()
        (grad,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
        assert torch.allclose(grad, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.allclose(student, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert student.data_ptr() == place
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)
        with pytest.raises(ValueError, match="must not be a leaf"):
            distillation(leaf, **inputs, inplace_backward=True)


def test_a_backend_asked_for_by_name_runs_or_raises():
    with (
        pytest.raises(RuntimeError, match="none of distillation has a cuda backend"),
        use_backend("cuda", "distillation"),
    ):
        pass
    if _backends.unavailable("triton", "cpu"):
        pytest.skip("no interpreter here")
    inputs = made(2, 2, 3, 5)
    for dtype, why in (
        (torch.float64, "float64 is computed by the torch"),
        (torch.bfloat16, "rounds bfloat16"),
    ):
        cast = {**inputs, "student": inputs["student"].to(dtype), "teacher": inputs["teacher"].to(dtype)}
        with use_backend("triton"), pytest.raises(RuntimeError, match=why):
            distillation(**cast)


@needs_interpreter
def test_as_many_teacher_crops_as_triton_serves():
    """16, or 8 with partners; one more is refused by name, and the automatic choice takes another backend."""
    for most, mixed in ((16, False), (8, True)):
        inputs, more = made(1, most, 2, 5), made(1, most + 1, 2, 5)
        if not mixed:
            inputs["other"] = more["other"] = None
        check("triton", **inputs)
        words = f"triton serves up to 16 teacher crops, 8 with `other`, got {most + 1}"
        with use_backend("triton"), pytest.raises(RuntimeError, match=re.escape(words)):
            distillation(**more)
        check("torch", **more)
        assert torch.equal(distillation(**more), distillation(**more))


@needs_interpreter
def test_more_rows_than_triton_counts_are_refused():
    """Two statistics for each of 2^30 rows: one more than 32 bits number."""
    student = torch.zeros(1, 1, 1).expand(4, 2**28, 1)
    with use_backend("triton"), pytest.raises(RuntimeError, match="counts the rows of all crops"):
        distillation(student, student[:1], own=torch.ones(4, 1))


def test_the_launch_table_has_every_bucket():
    for arch in ("sm_80", "sm_90", "cpu"):
        for bucket in ("4", "8", "16"):
            for kernel in ("student", "gradient"):
                assert set(_launch.constants(arch, f"distillation.{kernel}.{bucket}")) == {"block", "num_warps"}
        for kernel, more in (("teacher", {"block", "programs"}), ("merge", {"tile"}), ("mean", {"block", "rows"})):
            assert set(_launch.constants(arch, f"distillation.{kernel}")) == {"num_warps", *more}
        assert set(_launch.constants(arch, "distillation.loss")) == {"num_warps", "elements"}


# Wrong arguments.

GOOD: dict[str, Any] = {"student": torch.zeros(3, 4, 5), "teacher": torch.zeros(2, 4, 5), "own": torch.ones(3, 2)}
OTHER = torch.ones(3, 2)
ROWS = torch.arange(4)
WEIGHTS = "(V, T) = (3, 2) or (V, T, N) = (3, 2, 4)"
TEMPERATURE = "must be a temperature in [1e-20, 1e20], got"
WRONG = [
    ({"student": [[0.0]]}, TypeError, "student[0] must be a torch.Tensor of shape (N, K), got list"),
    ({"student": []}, TypeError, "student must be a tensor or a non-empty list of crops, got list"),
    (
        {"student": [torch.zeros(4, 5), torch.zeros(4, 6)]},
        ValueError,
        "student[1] is (4, 6) of torch.float32 on cpu, but student[0] is (4, 5) of torch.float32 on cpu",
    ),
    (
        {"student": [torch.zeros(4, 5)] * 2, "inplace_backward": True},
        ValueError,
        "inplace_backward=True writes over one tensor of student logits, got a sequence of crops",
    ),
    ({"student": torch.zeros(4, 5)}, ValueError, "student must have shape (V, N, K), got (4, 5)"),
    (
        {"student": torch.zeros(3, 4, 5, dtype=torch.int64)},
        TypeError,
        "student must be float16, bfloat16, float32, float64, got int64; convert it first",
    ),
    ({"teacher": None}, TypeError, "teacher must be a tensor or a non-empty list of crops, got NoneType"),
    ({"teacher": torch.zeros(4, 5)}, ValueError, "teacher must have shape (T, N, K), got (4, 5)"),
    (
        {"teacher": torch.zeros(2, 4, 5).bool()},
        TypeError,
        "teacher must be float16, bfloat16, float32, float64, got bool",
    ),
    (
        {"student": torch.zeros(0, 4, 5)},
        ValueError,
        "student must have at least one crop and one column, got shape (0, 4, 5)",
    ),
    (
        {"student": torch.zeros(3, 4, 0)},
        ValueError,
        "student must have at least one crop and one column, got shape (3, 4, 0)",
    ),
    (
        {"teacher": torch.zeros(0, 4, 5)},
        ValueError,
        "teacher must have at least one crop and one column, got shape (0, 4, 5)",
    ),
    (
        {"teacher": torch.zeros(2, 3, 5)},
        ValueError,
        "student and teacher must have the same N rows and K columns, got (3, 4, 5) and (2, 3, 5); stack the crops",
    ),
    ({"teacher": torch.zeros(2, 4, 6)}, ValueError, "student and teacher must have the same N rows and K columns"),
    (
        {"teacher": torch.zeros(2, 4, 5, dtype=torch.float64)},
        TypeError,
        "student and teacher must both be float64 or neither, got torch.float32 and torch.float64; convert one of them",
    ),
    (
        {"teacher": torch.zeros(2, 4, 5, device="meta")},
        ValueError,
        "student is on cpu but teacher is on meta; move one with .to(device)",
    ),
    ({"own": 0.5}, TypeError, "own must be a torch.Tensor of shape (V, T) or (V, T, N), got float"),
    ({"own": torch.ones(3)}, ValueError, "own must have shape (V, T) or (V, T, N), got (3,)"),
    ({"own": torch.ones(2, 3)}, ValueError, f"own must have shape {WEIGHTS}, got (2, 3)"),
    ({"own": torch.ones(3, 2, 1)}, ValueError, f"own must have shape {WEIGHTS}, got (3, 2, 1)"),
    ({"own": torch.ones(3, 2).long()}, TypeError, "own must be float16, bfloat16, float32, float64, got int64"),
    ({"own": torch.ones(3, 2, device="meta")}, ValueError, "student is on cpu but own is on meta; move one"),
    ({"other": [1.0]}, TypeError, "other must be a torch.Tensor of shape (V, T) or (V, T, N), got list"),
    ({"other": torch.ones(3, 2, 5)}, ValueError, f"other must have shape {WEIGHTS}, got (3, 2, 5)"),
    ({"other": torch.ones(3, 2).int()}, TypeError, "other must be float16, bfloat16, float32, float64, got int32"),
    ({"other": torch.ones(3, 2, device="meta")}, ValueError, "student is on cpu but other is on meta; move one"),
    ({"partner": ROWS}, ValueError, "partner is given but other is not, so it has no use; give the weights `other`"),
    ({"other": OTHER, "partner": [0, 1, 2, 3]}, TypeError, "partner must be a torch.Tensor of shape (N,), got list"),
    ({"other": OTHER, "partner": ROWS[None]}, ValueError, "partner must have shape (N,), got (1, 4)"),
    ({"other": OTHER, "partner": ROWS.int()}, TypeError, "partner must be int64, got int32; convert it first"),
    (
        {"other": OTHER, "partner": ROWS[:3]},
        ValueError,
        "partner has 3 rows but student has 4; give one partner per row",
    ),
    ({"other": OTHER, "partner": ROWS.to("meta")}, ValueError, "student is on cpu but partner is on meta; move one"),
    ({"other": OTHER, "partner": ROWS + 1}, ValueError, "partner must hold rows in [0, 4), got 1 to 4"),
    ({"other": OTHER, "partner": ROWS - 2}, ValueError, "partner must hold rows in [0, 4), got -2 to 1"),
    ({"center": 0.0}, TypeError, "center must be a torch.Tensor of shape (K,), got float"),
    ({"center": torch.zeros(1, 5)}, ValueError, "center must have shape (K,), got (1, 5)"),
    ({"center": torch.zeros(5).int()}, TypeError, "center must be float16, bfloat16, float32, float64, got int32"),
    ({"center": torch.zeros(1)}, ValueError, "center has 1 columns but student has 5; give it shape (K,)"),
    ({"center": torch.zeros(5, device="meta")}, ValueError, "student is on cpu but center is on meta; move one"),
    *(
        ({name: value}, error, f"{name} {TEMPERATURE} {got}")
        for name in ("student_temperature", "teacher_temperature")
        for value, error, got in (
            (0.0, ValueError, "0.0"),
            (-0.1, ValueError, "-0.1"),
            (9e-21, ValueError, "9e-21"),
            (2e20, ValueError, "2e+20"),
            (math.nan, ValueError, "nan"),
            ("a", TypeError, "str"),
            (True, TypeError, "bool"),
        )
    ),
    ({"teacher_mean": 1}, TypeError, "teacher_mean must be True, False or teacher indices, got int"),
    ({"teacher_mean": "01"}, TypeError, "teacher_mean must be True, False or teacher indices, got str"),
    ({"teacher_mean": torch.tensor([0])}, TypeError, "teacher_mean must be True, False or teacher indices, got Tensor"),
    ({"teacher_mean": [0, 2]}, ValueError, "teacher_mean must be the index of a teacher, in [0, 2), got 2"),
    ({"teacher_mean": [-1]}, ValueError, "teacher_mean must be the index of a teacher, in [0, 2), got -1"),
    ({"teacher_mean": [True, False]}, TypeError, "teacher_mean must be the index of a teacher, in [0, 2), got bool"),
    ({"teacher_mean": [0.0]}, TypeError, "teacher_mean must be the index of a teacher, in [0, 2), got float"),
    ({"teacher_mean": []}, ValueError, "teacher_mean must name at least one teacher, each once, got []"),
    ({"teacher_mean": (1, 1)}, ValueError, "teacher_mean must name at least one teacher, each once, got [1, 1]"),
    ({"reduction": "average"}, ValueError, "reduction='average' is unknown: expected one of mean, sum, none"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[message[:64] for _, _, message in WRONG])
def test_wrong_arguments_are_named(changes, error, message):
    distillation(**GOOD)
    with pytest.raises(error, match=re.escape(message)):
        distillation(**{**GOOD, **changes})
