"""The compiled kernels of the losses: gradients that exist before the backward pass, threads, memory, exponentials."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ops import matrix
from ops.losses import FORMS, Storages
from torch import Tensor

from sdmp_kernels import TwoHot, _backends, distillation, info_nce, soft_cross_entropy, use_backend
from sdmp_kernels.ops.case import two_hot
from sdmp_kernels.ops.info_nce import cases as info_nce_cases
from sdmp_kernels.ops.info_nce import native as info_nce_native

ROOT = Path(__file__).resolve().parents[2]
MISSING = _backends.unavailable("cpp", "cpu")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"cpp: {MISSING}")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    with use_backend("cpp", ("soft_cross_entropy", "info_nce", "distillation")):
        yield


def drawn(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, TwoHot]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, k, generator=generator)).to(dtype)
    return logits.requires_grad_(), two_hot(generator, n, k)


def exact(logits: Tensor, target: TwoHot, factors: Tensor, **options: object) -> Tensor:
    """The gradient of sum_i factors_i * loss_i in float64, by the definition."""
    leaf = logits.detach().double().requires_grad_()
    with use_backend("reference"):
        losses = soft_cross_entropy(leaf, target, reduction="none", **options)
        return torch.autograd.grad(losses, leaf, factors.double())[0]


@each_dtype
def test_a_graph_that_is_kept_gives_the_same_again_whatever_becomes_of_the_first(dtype):
    """The first gradient is overwritten, as clipping does: the second must not be the same memory."""
    logits, target = drawn(6, 40, dtype)
    loss = soft_cross_entropy(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = first.clone()
    first.fill_(math.nan)
    (second,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    assert torch.allclose(second.float(), 3 * expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    second.fill_(math.nan)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)


@each_dtype
@pytest.mark.parametrize("kept", [False, True])
def test_upstream_factors_of_any_kind(dtype, kept):
    """One for all, one per row, 1, 0, and none but the gradient's dtype rounds."""
    logits, target = drawn(7, 33, dtype)
    factors = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0, 3.0, 1e-3])
    for reduction, upstream, per_row in (
        ("none", factors, factors),
        ("sum", torch.tensor(-0.75), torch.full((7,), -0.75)),
        ("mean", torch.tensor(2.5), torch.full((7,), 2.5 / 7)),
        ("mean", torch.tensor(1.0), torch.full((7,), 1 / 7)),
    ):
        loss = soft_cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1)
        (got,) = torch.autograd.grad(loss, logits, upstream, retain_graph=kept)
        truth = exact(logits, target, per_row, label_smoothing=0.1)
        assert ((got.double() - truth).abs() <= 4 * torch.finfo(dtype).eps * per_row.abs()[:, None]).all()


def test_a_loss_scale_reaches_gradients_that_float16_cannot_hold_without_it():
    """The mean over many rows is smaller than 6e-8 until the scale is in it."""
    logits, target = drawn(512, 1000, torch.float16)
    (got,) = torch.autograd.grad(soft_cross_entropy(logits, target) * 2.0**16, logits)
    truth = exact(logits, target, torch.full((512,), 2.0**16 / 512))
    assert torch.allclose(got.double(), truth, rtol=2e-3, atol=2e-7)


@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_rows_with_nan_or_infinity_leave_the_others_alone(dtype, form):
    logits, target = drawn(5, 200, dtype)
    with torch.no_grad():
        clean = soft_cross_entropy(logits, target, form=form, reduction="none")
    (expected,) = torch.autograd.grad(soft_cross_entropy(logits, target, form=form, reduction="sum"), logits)
    spoilt = logits.detach().clone()
    spoilt[1, 199], spoilt[3, 0] = math.nan, math.inf
    spoilt.requires_grad_()
    losses = soft_cross_entropy(spoilt, target, form=form, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), spoilt)
    rest = [0, 2, 4]
    assert torch.equal(losses[rest], clean[rest])
    assert torch.equal(grad[rest], expected[rest])
    assert losses[[1, 3]].isnan().all()
    assert grad[[1, 3]].isnan().any(dim=1).all()


def test_without_a_gradient_nothing_of_the_size_of_the_logits_is_made():
    logits, target = drawn(64, 500)
    for wanted in (False, True):
        with torch.set_grad_enabled(wanted), Storages() as made:
            loss = soft_cross_entropy(logits, target)
        assert (max(made.sizes) >= logits.nbytes) == wanted
        assert loss.requires_grad == wanted


def test_the_gradient_is_handed_out_as_it_is():
    """Where the graph is not kept no second one is made, whatever the factor."""
    logits, target = drawn(64, 500)
    for factor in (1.0, 2.0):
        loss = factor * soft_cross_entropy(logits, target)
        with Storages() as made:
            loss.backward()
        assert max(made.sizes, default=0) < logits.nbytes


@pytest.mark.parametrize("k", [4096, 4099])
def test_large_gradients_past_the_cache_equal_small_ones(k):
    """From 16 MiB on whole lines are written past the cache, also in rows that begin within a line."""
    logits, target = drawn(1056, k)
    assert logits.nbytes >= 2**24
    (whole,) = torch.autograd.grad(soft_cross_entropy(logits, target, reduction="sum"), logits)
    part = TwoHot(*(t[:50] for t in target))
    (few,) = torch.autograd.grad(soft_cross_entropy(logits[:50], part, reduction="sum"), logits)
    assert torch.equal(whole[:50], few[:50])
    assert torch.allclose(whole.sum(1), torch.zeros(1056), atol=1e-5)


THREADS = """
import hashlib, sys, torch
from sdmp_kernels import TwoHot, distillation, info_nce, soft_cross_entropy
torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    logits = torch.randn(301, 1003, generator=generator).to(dtype).requires_grad_()
    target = TwoHot(*torch.randint(0, 1003, (2, 301), generator=generator), torch.rand(301, generator=generator))
    loss = soft_cross_entropy(logits, target, label_smoothing=0.1)
    loss.backward()
    digest.update(loss.detach().numpy().tobytes() + logits.grad.float().numpy().tobytes())
# Of the matrix products themselves this says nothing: few rows are one thread's.
q = torch.randn(20, 24, generator=generator).requires_grad_()
target = TwoHot(*torch.randint(0, 100, (2, 20), generator=generator), torch.rand(20, generator=generator))
loss = info_nce(q, torch.randn(100, 24, generator=generator), target, temperature=0.2)
loss.backward()
digest.update(loss.detach().numpy().tobytes() + q.grad.numpy().tobytes())
student, teacher = (torch.randn(3, 40, 2003, generator=generator) for _ in range(2))
student.requires_grad_()
own, other = torch.rand(2, 3, 3, 40, generator=generator).unbind(0)
loss, _ = distillation(student, teacher, own=own, other=other, teacher_mean=True)
loss.backward()
digest.update(loss.detach().numpy().tobytes() + student.grad.numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_number_of_threads_changes_no_bit():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", THREADS, count], env=environment, capture_output=True, text=True, check=True
        )
        for count in "12"
    ]
    assert runs[0].stdout == runs[1].stdout


def test_exponentials_are_right_to_a_few_units_in_the_last_place():
    """One logit of 0 and many below: each probability is the exponential over the sum, itself good to half a unit."""
    depths = torch.linspace(0, -80, 20001).double().float()
    logits = depths[None].clone().requires_grad_()
    target = TwoHot(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.ones(1))
    (grad,) = torch.autograd.grad(soft_cross_entropy(logits, target, reduction="sum"), logits)
    truth = torch.softmax(depths.double(), 0)[1:]
    # Two of the exponential, and half for the sum, the quotient and the product each.
    assert ((grad[0, 1:].double() - truth).abs() <= 3.5 * 2**-23 * truth).all()


@each_dtype
def test_far_below_the_largest_there_is_no_probability(dtype):
    low = float(torch.finfo(dtype).min)
    logits = torch.tensor([[0.0, -200.0, low, -math.inf]], dtype=dtype).requires_grad_()
    (grad,) = torch.autograd.grad(
        soft_cross_entropy(logits, TwoHot(torch.tensor([0]), torch.tensor([0]), torch.ones(1))), logits
    )
    assert grad.tolist() == [[0.0, 0.0, 0.0, 0.0]]


# ---- info_nce: both ways, whatever the size ----

CASES = [t for t in matrix.trials(with_grads=True) if t.op == "info_nce" and t.backend == "cpp"]


def by(monkeypatch: pytest.MonkeyPatch, way: str) -> list[bool]:
    """From now on every call is one call of the kernel for few rows, or goes through products of whole rows, or, where
    keys want no gradient, through the kernel that makes its own; returns whether that one did it, call by call.
    """
    done: list[bool] = []
    swept = info_nce_native._swept
    monkeypatch.setattr(info_nce_native, "_few", lambda q, k: way == "few")
    monkeypatch.setattr(info_nce_native, "_many", lambda q, keys: way == "sweep" and keys.excluded is None)
    monkeypatch.setattr(info_nce_native, "_swept", lambda *given: done.append(swept(*given)) or done[-1])
    return done


each_way = pytest.mark.parametrize("way", ["few", "rows", "sweep"])


@each_way
@pytest.mark.parametrize("trial", CASES, ids=str)
def test_few_rows_and_matrix_products_are_right_on_every_case(monkeypatch, trial, way):
    """Losses and gradients by the rule of the op matrix."""

    def upstream(t: Tensor) -> Tensor:
        return torch.linspace(-1.0, 2.0, max(t.numel(), 1), dtype=t.dtype)[: t.numel()].view(t.shape)

    with use_backend("reference", "info_nce"):
        truth = matrix.gradients(trial.cases.call, trial, matrix.upcast(trial, trial.inputs()), upstream)
    own = matrix.gradients(trial.cases.eager, trial, trial.inputs(), upstream)
    by(monkeypatch, way)
    inputs = trial.inputs()
    got = matrix.gradients(trial.cases.call, trial, inputs, upstream)
    with torch.no_grad():
        terms = float(trial.cases.largest_term(**inputs)), float(trial.cases.largest_grad_term(**inputs))
    for results, exact_results, plain_results, term in zip(got, truth, own, terms, strict=True):
        for result, right, plain in zip(results, exact_results, plain_results, strict=True):
            assert matrix.error(result, right) <= matrix.allowed(matrix.error(plain, right), result.dtype, term)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.2, 0.03], ids=["flat", "peaked"])
@each_dtype
def test_info_nce_in_blocks_of_keys(monkeypatch, form, temperature, dtype):
    """Targets in any block, of one column and of no weight; several key sets; rows apart by e^66."""
    generator = torch.Generator().manual_seed(0)
    lengths = (16, 37, 1030)
    q, *ks = (F.normalize(torch.randn(n, 24, generator=generator), dim=1).to(dtype) for n in (13, *lengths))
    targets = [two_hot(generator, 13, m) for m in lengths]
    for row in range(13):  # some are nearly certain of their target, rightly or wrongly
        q[row] = ks[1][targets[1].first[row]] * (1 if row % 3 else -1)
    for first, second, weight in targets:
        second[0], weight[1], weight[2], weight[3] = first[0], 1.0, 0.0, 1.0
    term_weight, options = [0.5, 1.0, 2.0], {"temperature": temperature, "form": form, "reduction": "none"}

    def results(call, cast):
        leaf = cast(q).requires_grad_()
        losses = call(leaf, [cast(k) for k in ks], targets, **options)
        total = sum(w * loss for w, loss in zip(term_weight, losses, strict=True))
        (grad,) = torch.autograd.grad(total.sum(), leaf)
        leaves = [cast(k).requires_grad_() for k in ks]
        losses = call(cast(q), leaves, targets, **{**options, "reduction": "sum"})
        return [*(loss.detach() for loss in losses), grad, *torch.autograd.grad(sum(losses), leaves)]

    done = by(monkeypatch, "sweep")
    got = results(info_nce, lambda t: t.clone())
    assert done == [True] * 3  # the keys' gradients go through products of whole rows
    own = results(info_nce_cases.eager, lambda t: t.clone())
    with use_backend("reference", "info_nce"):
        truth = results(info_nce, lambda t: t.double())
    for result, right, plain in zip(got, truth, own, strict=True):
        term = float(right.abs().max())
        assert matrix.error(result, right) <= matrix.allowed(matrix.error(plain, right), result.dtype, term)


@each_way
def test_info_nce_kept_graphs_and_gradients_that_are_overwritten(monkeypatch, way):
    by(monkeypatch, way)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(9, 16, generator=generator).requires_grad_(), torch.randn(30, 16, generator=generator)
    loss = info_nce(q, k, two_hot(generator, 9, 30), temperature=0.5)
    (first,) = torch.autograd.grad(loss, q, retain_graph=True)
    expected = first.clone()
    first.fill_(math.nan)
    (second,) = torch.autograd.grad(2 * loss, q, retain_graph=True)
    assert torch.equal(second, 2 * expected)
    assert torch.equal(torch.autograd.grad(loss, q)[0], expected)


@each_way
def test_info_nce_rows_with_nan_leave_the_others_alone(monkeypatch, way):
    by(monkeypatch, way)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(5, 16, generator=generator), torch.randn(30, 16, generator=generator)
    target = two_hot(generator, 5, 30)
    q[2, 3] = math.nan
    q.requires_grad_()
    losses = info_nce(q, k, target, temperature=0.5, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), q)
    assert losses.isnan().tolist() == grad.isnan().any(1).tolist() == [False, False, True, False, False]


@each_way
def test_info_nce_in_many_chunks(monkeypatch, way):
    """More logits than a chunk holds: rows of later chunks meet their own targets."""
    by(monkeypatch, way)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1100, 8, generator=generator).requires_grad_(), torch.randn(4000, 8, generator=generator)
    k.requires_grad_()
    target, factors = two_hot(generator, 1100, 4000), torch.rand(1100, generator=generator)
    found = []
    for backend in ("cpp", "torch"):
        with use_backend(backend, "info_nce"):
            losses = info_nce(q, k, target, temperature=0.5, reduction="none", form="log_mixture")
            found.append([losses.detach(), *torch.autograd.grad(losses, (q, k), factors)])
            loss = info_nce(q, k, target, temperature=0.5, reduction="sum")
            found[-1] += torch.autograd.grad(loss, (q, k))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_info_nce_of_keys_that_are_packed_by_every_task(monkeypatch, dtype):
    """More keys than are packed beforehand, and both operands in columns."""
    done = by(monkeypatch, "sweep")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(900, n, generator=generator).to(dtype).T.requires_grad_() for n in (400, 2100))
    target = two_hot(generator, 400, 2100)
    found = []
    for backend, single in (("cpp", dtype), ("torch", torch.float32)):
        with use_backend(backend, "info_nce"):
            loss = info_nce(q.to(single), k.detach().to(single), target, temperature=10.0)
            both = info_nce(q.to(single), k.to(single), target, temperature=10.0)
            found.append((loss.detach(), *torch.autograd.grad(loss, q), *torch.autograd.grad(both, (q, k))))
    assert done == [True]
    for a, b in zip(*found, strict=True):
        bound = (2 if dtype == torch.bfloat16 else 40) * torch.finfo(b.dtype).eps
        assert ((a - b).abs().max() <= bound * b.abs().max()).item()


# ---- distillation ----


def crops(dtype: torch.dtype = torch.float32, n: int = 5, k: int = 70) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    own, other = torch.rand(2, 3, 2, n, generator=generator).unbind(0)
    student = torch.randn(3, n, k, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(2, n, k, generator=generator).to(dtype)
    return {"student": student, "teacher": teacher, "own": own, "other": other}


@each_dtype
def test_distillation_kept_graphs_and_gradients_that_are_overwritten(dtype):
    given = crops(dtype)
    loss = distillation(**given)
    (first,) = torch.autograd.grad(loss, given["student"], retain_graph=True)
    expected = first.clone()
    first.fill_(math.nan)
    (second,) = torch.autograd.grad(2 * loss, given["student"], retain_graph=True)
    assert torch.allclose(second.float(), 2 * expected.float(), rtol=0, atol=1.2e-7)  # the smallest halves, twice
    assert torch.equal(torch.autograd.grad(loss, given["student"])[0], expected)


@pytest.mark.parametrize("kept", [False, True])
def test_distillation_with_a_factor_for_every_row(kept):
    given, factors = crops(), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    losses = distillation(**given, reduction="none")
    (got,) = torch.autograd.grad(losses, given["student"], factors, retain_graph=kept)
    with use_backend("reference"):
        losses = distillation(**given, reduction="none")
        (expected,) = torch.autograd.grad(losses, given["student"], factors)
    assert torch.allclose(got, expected, atol=2e-5)
    assert (got[:, 2] == 0).all()


def test_distillation_rows_with_nan_spoil_their_partner_and_nothing_else():
    given = crops()
    clean = distillation(**given, reduction="none").detach()
    given["teacher"][1, 0, 69] = math.nan
    losses = distillation(**given, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), given["student"])
    assert losses.isnan().tolist() == [True, False, False, False, True]
    assert torch.equal(losses[1:4], clean[1:4])
    assert grad[:, 1:4].isfinite().all()


def test_distillation_makes_a_gradient_only_where_one_is_wanted():
    given = crops(n=16, k=1000)
    for wanted in (False, True):
        with torch.set_grad_enabled(wanted), Storages() as made:
            distillation(**given)
        assert (max(made.sizes) >= given["student"].nbytes) == wanted
