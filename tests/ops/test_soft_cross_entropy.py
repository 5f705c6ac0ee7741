"""`soft_cross_entropy`: what it promises beyond the op matrix, on every backend that runs on this machine's CPU."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.losses import LIMITS, each_backend, each_form, needs_interpreter, quiet_interpreter, two_hot  # noqa: F401  a fixture for all
from torch import Tensor

from sdmp_kernels import TwoHot, _backends, _launch, soft_cross_entropy, use_backend


def drawn(n: int, k: int, seed: int = 0) -> TwoHot:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, k, (2, n), generator=generator)
    return TwoHot(first, second, torch.rand(n, generator=generator))


def run(logits: Tensor, target: TwoHot, **options: Any) -> tuple[Tensor, Tensor]:
    """(losses, gradient of their sum)."""
    leaf = logits.detach().requires_grad_()
    losses = soft_cross_entropy(leaf, target, reduction="none", **options)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def exact(logits: Tensor, target: TwoHot, **options: Any) -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        return run(logits.double(), target, **options)


@st.composite
def extreme(draw: st.DrawFn) -> tuple[Tensor, TwoHot, torch.dtype]:
    """Rows of logits at the ends of the dtype's range, ties, and ordinary ones; weights at the ends of theirs."""
    dtype = draw(st.sampled_from(list(LIMITS)))
    top = LIMITS[dtype]
    n, k = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    value = st.sampled_from([0.0, 1.0, -1.0, 33.25, -33.25, 2e-7, top, -top, top / 2, -top / 2, top / 1024])
    rows = draw(st.lists(st.lists(value, min_size=k, max_size=k), min_size=n, max_size=n))
    columns = st.lists(st.integers(0, k - 1), min_size=n, max_size=n)
    weights = st.lists(st.sampled_from([0.0, 1.0, 0.5, 0.25, 1e-6, 0.999]), min_size=n, max_size=n)
    target = two_hot(draw(columns), draw(columns), draw(weights))
    return torch.tensor(rows, dtype=torch.float64).to(dtype), target, dtype


@each_backend
@each_form
@settings(derandomize=True, deadline=None, max_examples=80)
@given(extreme(), st.sampled_from([0.0, 0.125]))
def test_finite_wherever_the_exact_value_is(backend, form, made, smoothing):
    """Never NaN for finite logits; finite, and right to an ulp of the largest term, where float32 can say it."""
    logits, target, dtype = made
    if backend == "triton" and dtype == torch.bfloat16:
        dtype, logits = torch.float32, logits.float()
    with use_backend(backend):
        losses, grad = run(logits, target, form=form, label_smoothing=smoothing)
    truth, slope = exact(logits, target, form=form, label_smoothing=smoothing)
    assert not losses.isnan().any()
    assert not grad.isnan().any()
    sayable = truth <= LIMITS[torch.float32]
    assert losses[sayable].isfinite().all()
    term = logits.double().abs().amax(1) + math.log(max(2, logits.shape[1])) + 1
    assert ((losses.double() - truth).abs()[sayable] <= 2 * 2**-23 * term[sayable]).all()
    assert ((grad.double() - slope).abs() <= 2 * torch.finfo(dtype).eps).all()


@each_backend
def test_log_mixture_where_the_probability_underflows(backend):
    """-log(w p_a + (1 - w) p_b) with both probabilities around e^-2000, far below the smallest float32."""
    logits = torch.tensor([[2000.0, 0.0, -1.0]])
    with use_backend(backend):
        losses, grad = run(logits, two_hot([1], [2], [0.25]), form="log_mixture")
    mixture = math.log(0.25 + 0.75 * math.exp(-1))
    assert losses.item() == pytest.approx(2000 - mixture, rel=2e-7)
    share = 0.25 / (0.25 + 0.75 * math.exp(-1))
    assert torch.allclose(grad, torch.tensor([[1.0, -share, share - 1]]), atol=2e-7)


@each_backend
@each_form
def test_a_common_offset_costs_no_digits(backend, form):
    """Logits of 4096 and more: the loss is a matter of their differences alone."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-12, 12, (9, 33), generator=generator) / 4
    target = drawn(9, 33)
    with use_backend(backend):
        near = run(logits, target, form=form, label_smoothing=0.1)
        far = run(logits + 2.0**20, target, form=form, label_smoothing=0.1)
    for here, there in zip(near, far, strict=True):
        assert (here - there).abs().max() <= 2e-6


@each_backend
def test_minus_infinity_of_weight_zero_has_no_say(backend):
    """A masked class: no probability, no gradient, and no NaN as long as no weight is on it."""
    logits = torch.tensor([[1.0, 2.0, -math.inf, 0.5], [-math.inf, -math.inf, 0.0, 1.0]])
    target = two_hot([0, 3], [2, 1], [1.0, 1.0])
    with use_backend(backend):
        losses, grad = run(logits, target)
        mixed, _ = run(logits, target, form="log_mixture")
    kept = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -1e30]])
    expected = F.cross_entropy(kept, torch.tensor([0, 1]), reduction="none")
    assert torch.allclose(losses, expected)
    assert torch.allclose(mixed, expected)
    assert (grad[logits == -math.inf] == 0).all()
    assert grad.isfinite().all()


@each_backend
@each_form
def test_nan_is_not_hidden(backend, form):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = math.nan
    with use_backend(backend):
        losses, grad = run(logits, drawn(3, 40), form=form)
    assert losses.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().any()
    assert grad[[0, 2]].isfinite().all()


@each_backend
@each_form
def test_equals_cross_entropy_of_a_hard_label(backend, form):
    """Weight 1, weight 0 and two equal columns are all one-hot."""
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(3))
    label, other = torch.arange(6), torch.arange(6).flip(0) + 5
    expected = F.cross_entropy(logits, label, reduction="none", label_smoothing=0.2)
    options = {"form": form, "reduction": "none", "label_smoothing": 0.2}
    with use_backend(backend):
        for target in (
            TwoHot(label, other, torch.ones(6)),
            TwoHot(other, label, torch.zeros(6)),
            TwoHot(label, label, torch.linspace(0, 1, 6)),
        ):
            assert torch.allclose(soft_cross_entropy(logits, target, **options), expected, atol=1e-6)


@each_backend
def test_weights_in_float64_are_taken(backend):
    logits, target = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), drawn(5, 7)
    with use_backend(backend):
        single, double = (run(logits, target._replace(weight=target.weight.to(d))) for d in LIMITS_OF_WEIGHT)
    assert torch.allclose(single[0], double[0], atol=1e-6)
    assert torch.allclose(single[1], double[1], atol=1e-6)


LIMITS_OF_WEIGHT = (torch.float32, torch.float64)


@each_backend
@each_form
def test_columns_out_of_range_are_left_out(backend, form):
    """What a GPU does with columns it cannot check: their term is dropped, and nothing out of bounds is read."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    first, second = torch.tensor([6, 2, -1, 2**40]), torch.tensor([1, -7, 99, 3])
    weight = torch.tensor([0.25, 0.75, 0.5, 1.0])
    one = torch.ones(4)
    target, options = (first, second, weight, None), (0.0, form, -100, "none")
    with use_backend(backend):
        losses, _, _ = torch.ops.sdmp.soft_cross_entropy(logits, *target, *options, False, False)
        grad = torch.ops.sdmp.soft_cross_entropy_backward(one, logits, *target, *options)
    p = logits.softmax(1)
    kept = torch.tensor([0.75, 0.75, 0.0, 0.0])
    expected = -kept * torch.stack([p[0, 1], p[1, 2], p[2, 0], p[3, 3]]).log()
    assert torch.allclose(losses, expected, atol=1e-6)
    drop = torch.zeros(4, 6)
    drop[0, 1], drop[1, 2] = 1.0, 1.0
    assert torch.allclose(grad, kept[:, None] * (p - drop), atol=1e-6)


@each_backend
@each_form
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [False, True])
def test_hard_labels_are_as_in_cross_entropy(backend, form, smoothing, reduction, classes):
    """Ignored rows, class weights, smoothing and the mean, with their gradients, as PyTorch has them for labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 7, generator=generator)
    label = torch.tensor([3, -100, 0, 6, -100, 2])
    class_weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5, 1.0, 3.0]) if classes else None
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, label, weight=class_weight, **options)
    upstream = torch.linspace(-1, 2, 6) if reduction == "none" else torch.tensor(1.0)
    (slope,) = torch.autograd.grad(expected, leaf, upstream)
    if backend in ("cpp", "triton") and classes and smoothing:
        backend = "torch"
    with use_backend(backend):
        for target in (
            TwoHot(label, label, torch.full((6,), 0.3)),
            TwoHot(label, label.flip(0).clamp_min(0), torch.ones(6)),
        ):
            loss = soft_cross_entropy(leaf, target, form=form, class_weight=class_weight, **options)
            (grad,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
            (twice,) = torch.autograd.grad(2 * loss, leaf, upstream)
            assert torch.allclose(loss, expected, atol=1e-6)
            assert torch.allclose(grad, slope, atol=1e-6)
            assert torch.allclose(twice, 2 * slope, atol=1e-6)


@each_backend
def test_nothing_that_counts_is_as_in_cross_entropy(backend):
    label = torch.full((3,), -100)
    target = TwoHot(label, label, torch.ones(3))
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    with use_backend(backend):
        losses, grad = run(logits, target)
        assert soft_cross_entropy(logits, target).isnan()
        assert soft_cross_entropy(logits, target, reduction="sum") == 0
    assert (losses == 0).all()
    assert (grad == 0).all()


# In place.


@each_backend
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_gradient_goes_where_the_logits_are(backend, form, dtype, layout):
    """The same gradient, in the memory of the logits, whose values hold until the backward pass."""
    source = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = drawn(6, 50)
    options: dict[str, Any] = {"form": form, "label_smoothing": 0.1}
    leaf = source.clone().requires_grad_()
    with use_backend(backend):
        (expected,) = torch.autograd.grad(3 * soft_cross_entropy(leaf, target, **options), leaf)
        logits = 1 * leaf if layout == "contiguous" else (1 * leaf.t().contiguous()).t()
        loss = soft_cross_entropy(logits, target, **options, inplace_backward=True)
        assert torch.equal(logits, source)
        with torch.no_grad():
            assert torch.equal(loss, soft_cross_entropy(source, target, **options))
        before = logits.data_ptr(), logits._version
        (grad,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
        assert torch.allclose(grad, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
        assert torch.allclose(logits, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
        assert logits.data_ptr() == before[0]
        assert logits._version > before[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)


@each_backend
def test_autograd_notices_who_else_needs_the_logits(backend):
    leaf = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with use_backend(backend):
        logits = 2 * leaf
        squares = logits.square().sum()
        loss = soft_cross_entropy(logits, drawn(4, 9), inplace_backward=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.backward()
        with pytest.raises(ValueError, match="must not be a leaf"):
            soft_cross_entropy(leaf, drawn(4, 9), inplace_backward=True)
        with torch.no_grad():
            soft_cross_entropy(leaf, drawn(4, 9), inplace_backward=True)


@each_backend
def test_backward_twice_and_two_losses_of_one_tensor(backend):
    logits = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = logits.detach().clone()
    targets = drawn(5, 13, 1), drawn(5, 13, 2)
    with use_backend(backend):
        losses = [soft_cross_entropy(logits, target) for target in targets]
        total = losses[0] + 2 * losses[1]
        once = torch.autograd.grad(total, logits, retain_graph=True)[0]
        twice = torch.autograd.grad(total, logits)[0]
        alone = [torch.autograd.grad(soft_cross_entropy(logits, target), logits)[0] for target in targets]
    assert torch.equal(once, twice)
    assert torch.allclose(once, alone[0] + 2 * alone[1], atol=1e-7)
    assert torch.equal(logits.detach(), before)


@each_backend
def test_a_second_derivative_raises(backend):
    """Right or refused: it is not silently zero."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with use_backend(backend):
        loss = soft_cross_entropy(logits, drawn(3, 4))
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            grad.sum().backward()


@each_backend
def test_autocast_does_not_recast(backend):
    logits, target = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), drawn(4, 50)
    with use_backend(backend):
        plain = run(logits, target)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run(logits, target)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_the_mean_of_large_losses_does_not_overflow():
    top = LIMITS[torch.float32]
    logits = torch.tensor([[top / 2, -top / 2]] * 4)
    target = two_hot([1] * 4, [1] * 4, [1.0] * 4)
    assert soft_cross_entropy(logits, target).item() == pytest.approx(top, rel=1e-6)


def test_reductions():
    logits, target = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), drawn(5, 6)
    rows = soft_cross_entropy(logits, target, reduction="none")
    assert rows.shape == (5,)
    assert torch.allclose(soft_cross_entropy(logits, target, reduction="sum"), rows.sum())
    assert torch.allclose(soft_cross_entropy(logits, target), rows.mean())
    nothing = soft_cross_entropy(logits[:0], drawn(0, 6))
    assert nothing.isnan()
    assert soft_cross_entropy(logits[:0], drawn(0, 6), reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_result(dtype):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    losses, grad = run(logits, drawn(3, 5))
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype


def test_cpu_takes_cpp_and_every_kernel_runs_in_the_interpreter():
    expected = "torch" if _backends.unavailable("cpp", "cpu") else "cpp"
    assert _backends.backends()["soft_cross_entropy"]["cpu"].split()[0] == expected
    kernels = pytest.importorskip("sdmp_kernels.ops.soft_cross_entropy.triton").KERNELS
    if _backends.unavailable("triton", "cpu"):
        pytest.skip("no interpreter here")
    with _launch.recording() as names, use_backend("triton"):
        leaf = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        soft_cross_entropy(leaf, drawn(3, 5)).backward()
    assert names == set(kernels)


@needs_interpreter
def test_offsets_beyond_two_to_the_31():
    """Rows 2^20 elements apart: row 2048 starts at element 2^31. In its own process, which an overflow would kill."""
    code = """
import torch
from sdmp_kernels import TwoHot, soft_cross_entropy, use_backend
logits = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((2049, 6), (2**20, 1))
logits.copy_(torch.randn(2049, 6, generator=torch.Generator().manual_seed(0)))
target = TwoHot(torch.arange(2049) % 6, torch.arange(2049) % 5, torch.full((2049,), 0.25))
def run():
    leaf = logits.detach().requires_grad_()
    losses = soft_cross_entropy(leaf, target, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]
with use_backend("triton"):
    got = run()
with use_backend("reference"):
    expected = run()
print(*[float((a - b).abs().max()) for a, b in zip(got, expected)])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loss_error, grad_error = map(float, done.stdout.split())
    assert loss_error < 1e-6
    assert grad_error < 1e-3


GOOD = {"logits": torch.zeros(3, 4), "target": two_hot([0, 1, 2], [1, 2, 3], [0.5, 0.5, 0.5])}
T = GOOD["target"]
WRONG = [
    ({"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor of shape (N, K), got list"),
    ({"logits": torch.zeros(3)}, ValueError, "logits must have shape (N, K), got (3,)"),
    ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "logits must be float16, bfloat16, float32, float64"),
    ({"logits": torch.zeros(3, 0)}, ValueError, "logits must have at least one column, got shape (N, 0)"),
    ({"target": torch.zeros(3)}, TypeError, "target must be a TwoHot(first, second, weight), got Tensor"),
    ({"target": (T.first, T.second)}, TypeError, "target must be a TwoHot(first, second, weight), got tuple"),
    ({"target": T._replace(first=[0, 1, 2])}, TypeError, "target.first must be a torch.Tensor of shape (N,), got list"),
    ({"target": T._replace(first=T.first.int())}, TypeError, "target.first must be int64, got int32; convert it first"),
    ({"target": T._replace(second=T.second[None])}, ValueError, "target.second must have shape (N,), got (1, 3)"),
    ({"target": T._replace(weight=T.weight.half())}, TypeError, "target.weight must be float32, float64, got float16"),
    ({"target": T._replace(weight=T.weight.clone().requires_grad_())}, ValueError, "target.weight requires a gradient"),
    ({"target": T._replace(first=T.first[:2])}, ValueError, "target.first has 2 rows but there are 3 rows of logits"),
    (
        {"target": T._replace(second=torch.tensor([0, 1, 4]))},
        ValueError,
        "target.second must hold columns in [0, 4), got 0 to 4; check the offset the target was made with",
    ),
    (
        {"target": T._replace(first=torch.tensor([0, -1, 1]))},
        ValueError,
        "target.first must hold columns in [0, 4), got -1 to 1",
    ),
    (
        {"target": T._replace(weight=torch.tensor([0.5, 1.5, 0.0]))},
        ValueError,
        "target.weight must hold shares in [0, 1], got 0 to 1.5; give the share of `first`",
    ),
    ({"target": T._replace(weight=torch.tensor([0.5, math.nan, 0.0]))}, ValueError, "target.weight must hold shares"),
    (
        {"target": T._replace(weight=T.weight.to("meta"))},
        ValueError,
        "the logits is on cpu but target.weight is on meta; move one with .to(device)",
    ),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number in [0, 1], got 1.5"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be a number in [0, 1], got -0.1"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be a number in [0, 1], got nan"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number in [0, 1], got str"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got float"),
    ({"class_weight": [1.0] * 4}, TypeError, "class_weight must be a torch.Tensor of shape (K,), got list"),
    ({"class_weight": torch.ones(3)}, ValueError, "class_weight must have K = 4 numbers, got 3"),
    ({"class_weight": -torch.ones(4)}, ValueError, "class_weight must not be negative, got -1 among them"),
    ({"class_weight": torch.ones(4).requires_grad_()}, ValueError, "class_weight requires a gradient"),
    ({"form": "log_mix"}, ValueError, "form='log_mix' is unknown: did you mean 'log_mixture'?"),
    ({"reduction": "average"}, ValueError, "reduction='average' is unknown: expected one of mean, sum, none"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[message[:48] for _, _, message in WRONG])
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        soft_cross_entropy(**{**GOOD, **changes})


def test_a_backend_asked_for_by_name_runs_or_raises():
    if _backends.unavailable("triton", "cpu"):
        pytest.skip("no interpreter here")
    with use_backend("triton"), pytest.raises(RuntimeError, match="float64 is computed by the torch"):
        soft_cross_entropy(torch.zeros(3, 4, dtype=torch.float64), T)
    with use_backend("triton"), pytest.raises(RuntimeError, match="rounds bfloat16 wrongly"):
        soft_cross_entropy(torch.zeros(3, 4, dtype=torch.bfloat16), T)
