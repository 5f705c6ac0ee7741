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
from ops.losses import FORMS, Storages
from torch import Tensor

from sdmp_kernels import TwoHot, _backends, soft_cross_entropy, use_backend
from sdmp_kernels.ops.case import two_hot

ROOT = Path(__file__).resolve().parents[2]
MISSING = _backends.unavailable("cpp", "cpu")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"cpp: {MISSING}")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    with use_backend("cpp", "soft_cross_entropy"):
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
from sdmp_kernels import TwoHot, soft_cross_entropy
torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    logits = torch.randn(301, 1003, generator=generator).to(dtype).requires_grad_()
    target = TwoHot(*torch.randint(0, 1003, (2, 301), generator=generator), torch.rand(301, generator=generator))
    loss = soft_cross_entropy(logits, target, label_smoothing=0.1)
    loss.backward()
    digest.update(loss.detach().numpy().tobytes() + logits.grad.float().numpy().tobytes())
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
