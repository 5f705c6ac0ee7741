"""The losses against timm's with the dense target of the same plan, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdmp_kernels import TwoHot
from sdmp_kernels.timm import BinaryCrossEntropy, SoftTargetCrossEntropy

theirs = pytest.importorskip("timm.loss", reason="timm is not installed")
N, K = 9, 6


def logits(dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3).to(dtype)


def two_hot() -> TwoHot:
    first = torch.arange(N) % K
    second = first.flip(0)  # the middle row's two columns are one
    return TwoHot(first, second, torch.linspace(0, 1, N))


def dense(smoothing: float) -> Tensor:
    return two_hot().dense(K).double() * (1 - smoothing) + smoothing / K


def both(mine: torch.nn.Module, target: Any, real: torch.nn.Module, dense_target: Tensor) -> None:
    """Values and gradients agree."""
    a, b = logits().requires_grad_(), logits().requires_grad_()
    got, wanted = mine(a, target), real(b, dense_target)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    upstream = torch.linspace(0.5, 2, got.numel(), dtype=torch.float64).view(got.shape)
    (ga,), (gb,) = torch.autograd.grad(got, a, upstream), torch.autograd.grad(wanted, b, upstream)
    torch.testing.assert_close(ga, gb, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_target_cross_entropy(smoothing: float):
    both(SoftTargetCrossEntropy(smoothing), two_hot(), theirs.SoftTargetCrossEntropy(), dense(smoothing))
    both(SoftTargetCrossEntropy(), dense(smoothing), theirs.SoftTargetCrossEntropy(), dense(smoothing))
    labels = torch.arange(N) % K
    both(SoftTargetCrossEntropy(smoothing), labels, torch.nn.CrossEntropyLoss(label_smoothing=smoothing), labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"reduction": "sum"},
        {"sum_classes": True},
        {"target_threshold": 0.3},
        {"target_threshold": 0.01, "sum_classes": True},
        {"weight": torch.linspace(0.1, 2, K)},
        {"pos_weight": torch.linspace(0.5, 3, K), "weight": torch.linspace(2, 0.1, K)},
        {"pos_weight": 2.0, "target_threshold": 0.5},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_binary_cross_entropy(options: dict[str, Any], smoothing: float):
    mine, real = (kind(smoothing=smoothing, **options) for kind in (BinaryCrossEntropy, theirs.BinaryCrossEntropy))
    both(mine, two_hot(), real, dense(smoothing))
    both(mine, torch.arange(N) % K, real, torch.arange(N) % K)
    rows = (torch.rand(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    both(mine, rows, real, rows)


def test_dense_targets_are_smoothed_where_timm_smooths_them():
    rows = torch.eye(K, dtype=torch.float64)[torch.arange(N) % K]
    both(BinaryCrossEntropy(0.2, smooth_dense=True), rows, theirs.BinaryCrossEntropy(0.2, smooth_dense=True), rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [SoftTargetCrossEntropy, BinaryCrossEntropy])
@pytest.mark.parametrize("target", [two_hot(), dense(0.1).float()], ids=["two-hot", "dense"])
def test_half_logits_give_float32(kind: Any, dtype: torch.dtype, target: Any):
    loss = kind(smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16):  # which would leave log_softmax in bfloat16
        got = loss(logits(dtype), target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), loss(logits(dtype).double(), target).double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [SoftTargetCrossEntropy, BinaryCrossEntropy])
def test_refuses_labels_that_do_not_fit(kind: Any):
    with pytest.raises(ValueError, match=r"target must hold class numbers in \[0, 6\), got 6 to 6"):
        kind()(logits(), torch.full((N,), K))
    with pytest.raises(TypeError, match="target must hold integer class numbers"):
        kind()(logits(), torch.zeros(N))


def test_ignored_labels_and_class_weights_are_those_of_the_op() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, weight = torch.tensor([0, 3, -1, 4, 2, -1]), torch.rand(5, dtype=torch.float64) + 0.5
    loss = SoftTargetCrossEntropy(ignore_index=-1, class_weight=weight)
    expected = torch.nn.functional.cross_entropy(x, labels, weight=weight, ignore_index=-1)
    torch.testing.assert_close(loss(x, labels), expected)
    torch.testing.assert_close(loss(x, TwoHot(labels, labels, torch.ones(6))), expected)
    mixed = loss(x, TwoHot(labels, labels.flip(0), torch.full((6,), 0.25)))
    assert mixed.isfinite() and not torch.allclose(mixed, expected)
