"""`info_nce`: what it promises beyond the op matrix, on every backend that runs on this machine's CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import matrix
from ops.losses import LIMITS, each_backend, each_form, quiet_interpreter, two_hot  # noqa: F401  a fixture for all
from torch import Tensor

from sdmp_kernels import TwoHot, info_nce, use_backend
from sdmp_kernels.ops.info_nce import cases
from sdmp_kernels.ops.soft_cross_entropy.cases import two_hot as drawn_two_hot

Result = tuple[Tensor, list[Tensor]]


def drawn(n: int, m: int, seed: int = 0) -> TwoHot:
    return drawn_two_hot(torch.Generator().manual_seed(seed), n, m)


def unit(n: int, d: int, seed: int = 0) -> Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def run(q: Tensor, k: Any, target: Any, upstream: Tensor | None = None, call: Any = info_nce, **options: Any) -> Result:
    """(losses, [dq, dk of each key set]) for an upstream gradient of each loss, default 1."""
    options = {"temperature": 0.2, "reduction": "none", **options}
    leaves = [t.detach().clone().requires_grad_() for t in (q, *cases._sets(k))]
    keys = leaves[1] if isinstance(k, Tensor) else leaves[1:]
    losses = call(leaves[0], keys, target, **options)
    losses = losses if isinstance(k, Tensor) else torch.stack(losses)
    grads = torch.autograd.grad(losses, leaves, torch.ones_like(losses) if upstream is None else upstream)
    return losses.detach(), list(grads)


def exact(q: Tensor, k: Any, target: Any, upstream: Tensor | None = None, **options: Any) -> Result:
    """The reference in float64."""
    keys = k.double() if isinstance(k, Tensor) else [t.double() for t in k]
    with use_backend("reference"):
        return run(q.double(), keys, target, None if upstream is None else upstream.double(), **options)


def plain(q: Tensor, k: Any, target: Any, upstream: Tensor | None = None, **options: Any) -> Result:
    """What plain PyTorch returns at the dtype of q."""
    return run(q, k, target, upstream, cases.eager, **options)


def check(got: Result, truth: Result, own: Result, loss_term: float, grad_term: float) -> None:
    """The rule of the op matrix; an error of PyTorch's own that is not finite allows nothing."""
    for result, right, other, term in zip(
        (got[0], *got[1]),
        (truth[0], *truth[1]),
        (own[0], *own[1]),
        (loss_term, *[grad_term] * len(got[1])),
        strict=True,
    ):
        mistake = matrix.error(other, right)
        allowed = matrix.allowed(mistake if mistake < math.inf else 0.0, result.dtype, term)
        assert result.shape == right.shape
        assert matrix.error(result, right) <= allowed


VALUES = (0.0, 1.0, -1.0, 33.25, -33.25, 2e-7)


@st.composite
def extreme(draw: st.DrawFn, width: int) -> dict[str, Any]:
    """Queries and keys at the ends of the dtype's range, ties, and ordinary ones; weights at the ends of theirs."""
    dtype = draw(st.sampled_from(list(LIMITS)))
    top = LIMITS[dtype]
    n, m, d = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, width))
    value = st.sampled_from([*VALUES, top, -top, top / 2, -top / 2, top / 1024])
    q, k = (
        torch.tensor(draw(st.lists(st.lists(value, min_size=d, max_size=d), min_size=rows, max_size=rows))).double()
        for rows in (n, m)
    )
    columns = st.lists(st.integers(0, m - 1), min_size=n, max_size=n)
    weights = st.lists(st.sampled_from([0.0, 1.0, 0.5, 0.25, 1e-6, 0.999]), min_size=n, max_size=n)
    first = draw(columns)
    second = first if draw(st.booleans()) else draw(columns)
    target = two_hot(first, second, draw(weights))
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "target": target,
        "temperature": draw(st.sampled_from([0.03, 0.2, 1.0])),
    }


@each_backend
@each_form
@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(extreme(3))
def test_right(backend, form, made):
    q, k = made["q"], made["k"]
    if backend == "triton" and q.dtype == torch.bfloat16:
        made = {**made, "q": q.float(), "k": k.float()}
    with use_backend(backend):
        got = run(**made, form=form)
        q, k, T = made["q"], made["k"], made["temperature"]
        bare = info_nce(q, k, made["target"], temperature=T, form=form, reduction="none")
    truth, own = exact(**made, form=form), plain(**made, form=form)
    lt = 2 * float((q.double().abs() @ k.double().abs().T).max() / T) + math.log(2 * len(k))
    for i, (result, right, o, term) in enumerate(
        zip(
            (bare, got[0], *got[1]),
            (truth[0], truth[0], *truth[1]),
            (own[0], own[0], *own[1]),
            (lt, lt, 2 * float(k.double().abs().max()) / T, 2 * float(q.double().abs().max()) / T),
            strict=True,
        )
    ):
        assert not result.isnan().any()
        sayable = right.abs() <= torch.finfo(result.dtype).max
        assert result[sayable].isfinite().all(), (result, right)
        err = (result.double() - right).abs()[sayable]
        mistake = matrix.error(o[sayable], right[sayable])
        mistake = 0 if mistake == math.inf else mistake
        assert (err <= matrix.allowed(mistake, result.dtype, term)).all(), (i, result, right, o)
