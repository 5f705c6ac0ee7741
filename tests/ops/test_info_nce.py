"""`info_nce`: what it promises beyond the op matrix, on every backend that runs on this machine's CPU."""

from __future__ import annotations

import math
import re
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ops import matrix
from ops.losses import FORMS, LIMITS, Storages, each_backend, each_form, needs_interpreter, two_hot
from ops.losses import quiet_interpreter as quiet_interpreter  # a fixture for all
from torch import Tensor

from sdmp_kernels import TwoHot, _backends, _launch, draw_plan, info_nce, use_backend
from sdmp_kernels.ops.case import two_hot as drawn_two_hot
from sdmp_kernels.ops.info_nce import cases
from sdmp_kernels.ops.info_nce.arguments import KeySet, Problem
from sdmp_kernels.ops.info_nce.op import OP

Result = tuple[Tensor, list[Tensor]]


def drawn(n: int, m: int, seed: int = 0) -> TwoHot:
    return drawn_two_hot(torch.Generator().manual_seed(seed), n, m)


def unit(n: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def run(q: Tensor, k: Any, target: Any, upstream: Tensor | None = None, call: Any = info_nce, **options: Any) -> Result:
    """(losses, [dq, dk of every key set]) for one upstream gradient per loss, default 1."""
    options = {"temperature": 0.2, "reduction": "none", **options}
    leaves = [t.detach().requires_grad_() for t in (q, *cases._sets(k))]
    losses = call(leaves[0], leaves[1] if isinstance(k, Tensor) else leaves[1:], target, **options)
    losses = losses if isinstance(losses, Tensor) else torch.stack(losses)
    given = torch.ones_like(losses) if upstream is None else upstream.to(losses)
    return losses.detach(), list(torch.autograd.grad(losses, leaves, given))


def exact(q: Tensor, k: Any, target: Any, upstream: Tensor | None = None, **options: Any) -> Result:
    """The definition, in float64."""
    with use_backend("reference"):
        return run(
            q.double(), k.double() if isinstance(k, Tensor) else [t.double() for t in k], target, upstream, **options
        )


def own_errors(q: Tensor, k: Tensor, target: TwoHot, truth: Result, upstream: Tensor | None = None, **options: Any):
    """Errors of the literal Algorithm 1 in (losses, dq, dk); in float32 where it overflows at the dtype of q."""
    for dtype in (q.dtype, torch.float32):
        losses, grads = run(q.to(dtype), k.to(dtype), target, upstream, cases.eager, **options)
        errors = [matrix.error(a, b) for a, b in zip((losses, *grads), (truth[0], *truth[1]), strict=True)]
        if max(errors) < math.inf:
            return errors
    raise AssertionError("plain PyTorch overflows in float32: no error of its own to compare with")


# What it computes.

ORDINARY = (0.0, 1.0, -1.0, 33.25, -33.25, 2e-7)
# Not beyond: one product of finite numbers that overflows to minus infinity is not noticed.
FURTHEST = {torch.float16: 65504.0, torch.bfloat16: 2.0**50, torch.float32: 2.0**50}


@st.composite
def extreme(draw: st.DrawFn) -> dict[str, Any]:
    """Queries and keys far out, ties, and ordinary ones; weights at the ends of their range."""
    dtype = draw(st.sampled_from(list(FURTHEST)))
    top = FURTHEST[dtype]
    n, m, d = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    value = st.sampled_from([*ORDINARY, top, -top, top / 2, -top / 2, top / 1024])
    rows = st.lists(value, min_size=d, max_size=d)
    q, k = (torch.tensor(draw(st.lists(rows, min_size=r, max_size=r)), dtype=torch.float64).to(dtype) for r in (n, m))
    columns = st.lists(st.integers(0, m - 1), min_size=n, max_size=n)
    weights = st.lists(st.sampled_from([0.0, 1.0, 0.5, 0.25, 1e-6, 0.999]), min_size=n, max_size=n)
    first = draw(columns)
    target = two_hot(first, first if draw(st.booleans()) else draw(columns), draw(weights))
    return {"q": q, "k": k, "target": target, "temperature": draw(st.sampled_from([0.03, 0.2, 1.0]))}


@each_backend
@each_form
@settings(derandomize=True, deadline=None, max_examples=40, database=None, phases=[Phase.generate])
@given(extreme())
def test_right_and_finite_wherever_the_exact_value_is(backend, form, made):
    """Losses with and without a gradient wanted, and both gradients, by the rule of the op matrix."""
    made = {**made, "form": form}
    if backend == "triton" and made["q"].dtype == torch.bfloat16:
        made |= {"q": made["q"].float(), "k": made["k"].float()}
    with use_backend(backend):
        losses, grads = run(**made)
        bare = info_nce(**made, reduction="none")
    truth = exact(**made)
    own = own_errors(**made, truth=truth)
    double = {**made, "q": made["q"].double(), "k": made["k"].double()}
    terms = [cases.largest_term(**double), *[cases.largest_grad_term(**double)] * 2]
    for result, right, error, term in zip(
        (losses, bare, *grads), (truth[0], truth[0], *truth[1]), (own[0], *own), (terms[0], *terms), strict=True
    ):
        assert not result.isnan().any()
        sayable = right.abs() <= LIMITS[result.dtype]
        assert matrix.error(result[sayable], right[sayable]) <= matrix.allowed(error, result.dtype, term)


# What the first few of a program's keys are anchors for, by what is done to all of them: (queries, first, others) times.
FROM_ANCHORS = {
    "as usual": (1.0, 1.0, 1.0),
    "far above, within reach": (1.0, 1.0, 3.0),
    "out of reach": (1.0, 1.0, 12.0),
    "far below": (1.0, 12.0, 1.0),
    "anchors far out": (200.0, 1.0, 1.0),
}


@needs_interpreter
@pytest.mark.parametrize("factors", FROM_ANCHORS.values(), ids=FROM_ANCHORS)
def test_logits_far_from_those_of_the_first_keys(factors):
    given, first, others = factors
    made = {"q": given * unit(8, 16), "k": unit(120, 16, seed=1), "target": drawn(8, 120), "temperature": 0.05}
    # Each of six programs has its first keys.
    made["k"] *= torch.where(torch.arange(120) % 20 < 4, first, others)[:, None]
    with use_backend("triton"):
        losses, (dq, dk) = run(**made)
        with anchors(0):
            sought = run(**made)
    truth = exact(**made)
    errors = own_errors(**made, truth=truth)
    terms = [cases.largest_term(**made), *[cases.largest_grad_term(**made)] * 2]
    bounds = [matrix.allowed(own, torch.float32, term) for own, term in zip(errors, terms, strict=True)]
    # The gradient of the keys makes all logits anew, and where they are large it is off by that, with anchors or without.
    bounds[2] = max(bounds[2], 1.05 * matrix.error(sought[1][1], truth[1][1]))
    for result, right, bound in zip((losses, dq, dk), (truth[0], *truth[1]), bounds, strict=True):
        assert matrix.error(result, right) <= bound


def anchors(anchor: int) -> AbstractContextManager[None]:
    """Launches with the interpreter's constants, but for the number of keys from which on there are anchors."""
    table = {**_launch.table(_launch.DEFAULT_ARCH), **_launch.table("cpu")}
    return _launch.table_in_force(
        {key: given | ({"anchor": anchor} if "anchor" in given else {}) for key, given in table.items()}
    )


@needs_interpreter
@pytest.mark.parametrize("terms", [1, 2])
def test_tiles_whose_sums_are_out_of_reach_are_made_again(terms):
    """Those alone: the others come out as they were, and what was made again as if there were no anchors."""
    n, m = 35, 100
    q, k = unit(n, 16), unit(m, 16, seed=1)
    q[7:9] *= 150
    target = drawn(n, m)
    sets = [KeySet(k, *target, None, 1.0)] * terms
    problem = Problem(q, sets, 0.2, "ce", 1.0, False)
    triton = OP.module("triton")

    def calls(anchor):
        out = (q.new_empty(terms, n), q.new_empty(terms, 4, n, dtype=torch.float64), q.new_empty(terms, n, 16))
        with anchors(anchor):
            return triton.forward_calls("cpu", 1, problem, True, *out)

    def launched(call):
        call.launch(q.device)
        names = call.kernel.arg_names
        return [call.args[names.index(name)].clone() for name in ("peak_ptr", "total_ptr", "acc_ptr")]

    anchored, again, _ = calls(1)
    plain, _ = calls(0)
    sought = launched(plain)
    before = launched(anchored)
    after = launched(again)
    lost = before[0].isnan()
    assert lost[:, :32].all() and not lost[:, 32:].any()
    for name, first, then, right in zip(("peak", "total", "acc"), before, after, sought, strict=True):
        made_again = lost if name != "acc" else lost.reshape(-1, n)
        assert torch.equal(then[made_again], right[made_again]), name
        assert torch.equal(then[~made_again], first[~made_again]), name
        assert not torch.equal(first[~made_again], right[~made_again]), name


@each_backend
def test_log_mixture_where_the_probability_underflows(backend):
    """-log(w p_a + (1 - w) p_b) with both probabilities around e^-2000, far below the smallest float32."""
    q, k = torch.tensor([[2000.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]])
    with use_backend(backend):
        losses, (dq, dk) = run(q, k, two_hot([1], [2], [0.25]), form="log_mixture", temperature=1.0)
    assert losses.item() == pytest.approx(2000 - math.log(0.25 + 0.75 * math.exp(-1)), rel=2e-7)
    share = 0.25 / (0.25 + 0.75 * math.exp(-1))
    assert torch.allclose(dq, torch.tensor([[1.0, 1 - share]]), atol=5e-7)
    assert torch.allclose(dk, torch.tensor([[1.0], [-share], [share - 1]]) * q, rtol=1e-6)


@each_backend
@each_form
def test_equals_cross_entropy_of_a_hard_label(backend, form):
    """Weight 1, weight 0 and two equal columns are all one-hot: MoCo's loss."""
    q, k = unit(6, 8), unit(11, 8, seed=1)
    label, other = torch.arange(6), torch.arange(6).flip(0) + 5
    expected = F.cross_entropy(q @ k.T / 0.1, label, reduction="none")
    with use_backend(backend):
        for target in (
            TwoHot(label, other, torch.ones(6)),
            TwoHot(other, label, torch.zeros(6)),
            TwoHot(label, label, torch.linspace(0, 1, 6)),
        ):
            losses = info_nce(q, k, target, temperature=0.1, form=form, reduction="none")
            assert torch.allclose(losses, expected, atol=2e-6)


@pytest.mark.skipif(_backends.unavailable("cpp", "cpu") is not None, reason="cpp is not available")
def test_gradients_of_thousands_of_rows_are_as_near_as_pytorchs():
    """A sum over that many rows drifts where it is made block after block."""
    n = 4096
    numbers = torch.Generator().manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(n, 64, generator=numbers), dim=1)
    k = torch.nn.functional.normalize(q + 0.1 * torch.randn(n, 64, generator=numbers), dim=1)
    target = TwoHot(torch.arange(n), torch.arange(n).flip(0), torch.rand(n, generator=numbers))

    def dense(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
        logs = torch.log_softmax(leaves[0] @ leaves[1].T / 0.2, dim=1)
        first, second = (logs.gather(1, column[:, None])[:, 0] for column in (target.first, target.second))
        weight = target.weight.to(dtype)
        loss = -(weight * first + (1 - weight) * second).mean()
        return [grad.double() for grad in torch.autograd.grad(loss, leaves)]

    leaves = [x.clone().requires_grad_() for x in (q, k)]
    with use_backend("cpp"):
        ours = torch.autograd.grad(info_nce(*leaves, target, temperature=0.2), leaves)
        alone = torch.autograd.grad(info_nce(leaves[0], k, target, temperature=0.2), leaves[:1])
    exact, torchs = dense(torch.float64), dense(torch.float32)
    for found, right, theirs in zip((*ours, *alone), (*exact, exact[0]), (*torchs, torchs[0]), strict=True):
        bound = 2 * (theirs - right).abs().max() + 2.0**-23 * right.abs().max()
        assert (found.double() - right).abs().max() <= bound


@each_backend
@each_form
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 150, 19), (33, 5, 64)])
def test_an_upstream_gradient_for_every_row(backend, form, n, m, d):
    made = {"q": unit(n, d), "k": unit(m, d, seed=1), "target": drawn(n, m), "form": form}
    upstream = torch.linspace(-1.0, 2.0, n)
    with use_backend(backend):
        got = run(**made, upstream=upstream)
    truth = exact(**made, upstream=upstream)
    errors = own_errors(**made, truth=truth, upstream=upstream)
    for result, right, own in zip((got[0], *got[1]), (truth[0], *truth[1]), errors, strict=True):
        assert matrix.error(result, right) <= matrix.allowed(own, torch.float32, 2 * n / 0.2)


@each_backend
def test_ranks_with_an_offset_equal_one_process(backend):
    """Two ranks' queries against all keys, columns offset by rank: halves of what one process gets for all rows."""
    q, k = unit(8, 16), unit(8, 16, seed=1)
    plans = [draw_plan(4, (32, 32), per="sample", seed=1, step=2, world_size=2, rank=rank) for rank in (0, 1)]
    targets = [plan.pair_target(4 * rank) for rank, plan in enumerate(plans)]
    with use_backend(backend):
        whole = run(q, k, TwoHot(*map(torch.cat, zip(*targets, strict=True))))
        halves = [run(rows, k, target) for rows, target in zip(q.split(4), targets, strict=True)]
    assert torch.allclose(torch.cat([half[0] for half in halves]), whole[0], atol=1e-6)
    assert torch.allclose(torch.cat([half[1][0] for half in halves]), whole[1][0], atol=1e-6)
    assert torch.allclose(halves[0][1][1] + halves[1][1][1], whole[1][1], atol=1e-6)


@each_backend
@each_form
@pytest.mark.parametrize("lengths", [(9,), (6, 23), (5, 4, 3, 2, 7, 1)], ids=str)
def test_a_list_equals_separate_calls(backend, form, lengths):
    """Any number of key sets of different lengths, more than one launch takes among them."""
    q, sets = unit(5, 12), [unit(m, 12, seed=m) for m in lengths]
    targets = [drawn(5, m, seed=m) for m in lengths]
    with use_backend(backend):
        losses, (dq, *dks) = run(q, sets, targets, form=form)
        alone = [run(q, k, target, form=form) for k, target in zip(sets, targets, strict=True)]
    assert losses.shape == (len(lengths), 5)
    assert torch.allclose(dq, torch.stack([grads[0] for _, grads in alone]).sum(0), atol=2e-6)
    for together, (loss, grads), dk in zip(losses, alone, dks, strict=True):
        assert torch.allclose(together, loss, atol=1e-6)
        assert torch.allclose(dk, grads[1], atol=1e-6)


@each_backend
def test_only_some_key_sets_want_a_gradient(backend):
    q, sets, targets = unit(5, 12), [unit(6, 12, seed=1), unit(7, 12, seed=2)], [drawn(5, 6), drawn(5, 7)]
    sets[1].requires_grad_()
    with use_backend(backend):
        sum(info_nce(q, sets, targets, temperature=0.2, reduction="sum")).backward()
        alone = run(q, sets[1], targets[1])
    assert sets[0].grad is None
    assert torch.allclose(sets[1].grad, alone[1][1], atol=1e-6)


@each_backend
@each_form
def test_nan_is_not_hidden(backend, form):
    q = unit(3, 40)
    q[1, 7] = math.nan
    with use_backend(backend):
        losses, (dq, _) = run(q, unit(6, 40, seed=1), drawn(3, 6), form=form)
    assert losses.isnan().tolist() == [False, True, False]
    assert dq[1].isnan().any()
    assert dq[[0, 2]].isfinite().all()


@each_backend
@each_form
def test_columns_out_of_range_are_left_out(backend, form):
    """What a GPU does with columns it cannot check: their term is dropped, and nothing out of bounds is read."""
    q, k = unit(4, 8), unit(6, 8, seed=1)
    first, second = torch.tensor([6, 2, -1, 2**40]), torch.tensor([1, -7, 99, 3])
    weight = torch.tensor([0.25, 0.75, 0.5, 1.0])
    with use_backend(backend):
        losses, _, _, dq, _ = torch.ops.sdmp.info_nce(
            q, [k], [first], [second], [weight], [], [], 0.2, form, "none", True, [False]
        )
    log_p = torch.log_softmax(q @ k.T / 0.2, dim=1)
    columns, kept = torch.tensor([1, 2, 0, 0]), torch.tensor([0.75, 0.75, 0.0, 0.0])
    if form == "ce":
        expected, drop = -kept * log_p[range(4), columns], kept
    else:
        expected, drop = -(kept.log() + log_p[range(4), columns]), (kept > 0).float()
    assert torch.allclose(losses, expected, atol=1e-6)
    slope = drop[:, None] * (log_p.exp() - F.one_hot(columns, 6))
    assert torch.allclose(dq[0], slope @ k / 0.2, atol=2e-6)


# Weighted sums, exclusions, and temperatures that are learnt.


@each_backend
@pytest.mark.parametrize("lengths", [(9,), (6, 23), (5, 4, 3, 2, 7, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weighted_sum_equals_the_sum_of_weighted_losses(backend, lengths, reduction):
    """Value, both gradients, a graph that is kept, and the losses of the terms; weights of 0 and below among them."""
    weights = [0.5, -2.0, 0.0, 1.0, 0.25, 3.0][: len(lengths)]
    targets = [drawn(5, m, seed=m) for m in lengths]
    leaves = [t.requires_grad_() for t in (unit(5, 12), *(unit(m, 12, seed=m) for m in lengths))]
    options = {"temperature": 0.2, "reduction": reduction}
    with use_backend(backend):
        losses = info_nce(leaves[0], leaves[1:], targets, **options)
        loss, terms = info_nce(leaves[0], leaves[1:], targets, **options, term_weight=weights, with_terms=True)
        upstream = torch.linspace(-1, 2, 5) if reduction == "none" else torch.tensor(0.75)
        expected = sum(weight * value for weight, value in zip(weights, losses, strict=True))
        wanted = torch.autograd.grad(expected, leaves, upstream)
        once = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        twice = torch.autograd.grad(2 * loss, leaves, upstream)
    assert not terms.requires_grad
    assert torch.allclose(terms, torch.stack(losses), atol=1e-6)
    assert torch.allclose(loss, expected, atol=2e-6)
    for a, b, right in zip(once, twice, wanted, strict=True):
        assert torch.allclose(a, right, atol=5e-6)
        assert torch.allclose(b, 2 * a, atol=1e-6)


def test_a_weighted_sum_of_fixed_keys_hands_its_gradient_out_as_it_is():
    """The upstream factor of a whole loss is 1: nothing of the queries' size is made in the backward pass."""
    q, sets = unit(512, 64).requires_grad_(), [unit(600, 64, seed=s) for s in (1, 2)]
    targets = [drawn(512, 600, seed=s) for s in (1, 2)]
    loss = info_nce(q, sets, targets, temperature=0.2, term_weight=[0.5, 0.25])
    with Storages() as made:
        loss.backward()
    assert max(made.sizes, default=0) < q.nbytes


@each_backend
def test_what_is_excluded_is_as_if_it_were_not_there(backend):
    """(M,) bool equals calls without those keys, (N,) int64 a call per row."""
    q, k = unit(4, 8), unit(9, 8, seed=1)
    gone = torch.tensor([True, False, False, True, False, False, False, False, True])
    kept = (~gone).nonzero()[:, 0]
    target = TwoHot(torch.tensor([0, 1, 2, 3]), torch.tensor([3, 2, 1, 0]), torch.rand(4))
    outer = TwoHot(kept[target.first], kept[target.second], target.weight)
    backend = "torch" if backend == "triton" else backend
    with use_backend(backend):
        got = run(q, k, outer, exclude=gone)
        right = run(q, k[kept], target)
        column = torch.tensor([6, -1, 7, 0])
        by_row = run(q, k, outer, exclude=column)
    assert torch.allclose(got[0], right[0], atol=1e-6)
    assert torch.allclose(got[1][0], right[1][0], atol=1e-6)
    assert torch.allclose(got[1][1][kept], right[1][1], atol=1e-6)
    assert (got[1][1][gone] == 0).all()
    for i, hidden in enumerate(column.tolist()):
        rest = torch.tensor([j for j in range(9) if j != hidden])
        place = {int(j): p for p, j in enumerate(rest)}
        one = TwoHot(*(torch.tensor([place[int(c[i])]]) for c in outer[:2]), outer.weight[i : i + 1])
        with use_backend(backend):
            alone = run(q[i : i + 1], k[rest], one)
        assert torch.allclose(by_row[0][i], alone[0][0], atol=1e-6)
        assert torch.allclose(by_row[1][0][i], alone[1][0][0], atol=1e-6)


@each_backend
@each_form
def test_a_row_whose_target_is_excluded_has_no_loss_and_no_gradient(backend, form):
    """As a sample that could not be read: its own key is nobody's, its query counts nothing; and with no key at all."""
    q, k = unit(3, 8), unit(5, 8, seed=1)
    itself = TwoHot(torch.arange(3), torch.arange(3), torch.ones(3))
    backend = "torch" if backend == "triton" else backend
    with use_backend(backend):
        losses, (dq, dk) = run(q, k, itself, form=form, exclude=torch.tensor([False, True, False, False, False]))
        none, (nothing, _) = run(q, k, itself, form=form, exclude=torch.ones(5, dtype=torch.bool))
    assert losses[1] == 0
    assert (losses[[0, 2]] > 0).all()
    assert (dq[1] == 0).all()
    assert (dk[1] == 0).all()
    assert (none == 0).all()
    assert (nothing == 0).all()


@needs_interpreter
def test_triton_leaves_exclusions_to_torch():
    exclude = torch.zeros(4, dtype=torch.bool)
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton knows of no keys that are excluded"):
        info_nce(unit(3, 8), unit(4, 8), drawn(3, 4), temperature=0.2, exclude=exclude)


@each_backend
def test_a_temperature_of_a_tensor_is_the_number_and_gets_its_gradient(backend):
    """Against the plain form in float64; kept graphs; and without a gradient wanted it costs none."""
    q, k, target = unit(6, 12), unit(9, 12, seed=1), drawn(6, 9)
    temperature = torch.tensor([0.2], requires_grad=True)
    exact_temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    truth = cases.eager(q.double(), k.double(), target, exact_temperature)
    with use_backend(backend):
        loss = info_nce(q, k, target, temperature=temperature)
        (grad,) = torch.autograd.grad(loss, temperature, retain_graph=True)
        (again,) = torch.autograd.grad(3 * loss, temperature)
        number = info_nce(q, k, target, temperature=0.2)
        constant = info_nce(q, k, target, temperature=torch.tensor(0.2))
    assert grad.shape == (1,)
    assert torch.allclose(grad.double(), torch.autograd.grad(truth, exact_temperature)[0], rtol=2e-6)
    assert torch.allclose(again, 3 * grad)
    assert torch.allclose(loss, number, rtol=1e-6)
    assert torch.allclose(constant, number, rtol=1e-6)
    assert not constant.requires_grad


# What it keeps and allocates.


@each_backend
def test_fixed_keys_are_not_kept_and_may_change_before_the_backward_pass(backend):
    """A queue or an all-gather buffer is overwritten as soon as the loss is there."""
    q, k, target = unit(4, 8).requires_grad_(), unit(300, 8, seed=1), drawn(4, 300)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with use_backend(backend):
        (expected,) = torch.autograd.grad(info_nce(q, k, target, temperature=0.2), q)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = info_nce(q, k, target, temperature=0.2)
        k.fill_(math.nan)
        (grad,) = torch.autograd.grad(loss, q)
    assert torch.equal(grad, expected)
    assert kept
    assert sum(t.numel() for t in kept) < 300


def test_nothing_as_large_as_the_logits_is_allocated():
    """By the torch backend, with and without gradients: at most an eighth of the N x M logits."""
    n, m, d = 4096, 4096, 4
    q, k, target = unit(n, d), unit(m, d, seed=1), drawn(n, m)
    backend, problem = OP.module("torch"), Problem(q, [KeySet(k, *target, None, 1.0)], 0.2, "ce", 1 / n, False)
    with Storages() as seen:
        for need_dq in (True, False):
            _, rows, dq = backend.forward(problem, need_dq, True)
            if need_dq:
                kept = rows, dq
        backend.backward(problem, torch.ones(1, n), *kept, True, [True])
    assert seen.sizes
    assert max(seen.sizes) <= 4 * n * m / 8


@each_backend
@pytest.mark.parametrize("keys_too", [False, True])
def test_backward_twice_and_two_losses_of_one_query(backend, keys_too):
    q, k = unit(5, 8).requires_grad_(), unit(13, 8, seed=1).requires_grad_(keys_too)
    before, leaves, targets = q.detach().clone(), ([q, k] if keys_too else [q]), (drawn(5, 13, 1), drawn(5, 13, 2))
    with use_backend(backend):
        losses = [info_nce(q, k, target, temperature=0.2) for target in targets]
        total = losses[0] + 2 * losses[1]
        once = torch.autograd.grad(total, leaves, retain_graph=True)
        twice = torch.autograd.grad(total, leaves)
        alone = [torch.autograd.grad(info_nce(q, k, t, temperature=0.2), leaves) for t in targets]
    for a, b, first, second in zip(once, twice, *alone, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, first + 2 * second, atol=1e-6)
    assert torch.equal(q.detach(), before)


@each_backend
def test_a_second_derivative_raises(backend):
    """Right or refused: it is not silently zero."""
    q = unit(3, 4).requires_grad_()
    with use_backend(backend):
        (grad,) = torch.autograd.grad(info_nce(q, unit(4, 4, 1), drawn(3, 4), temperature=0.2), q, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            grad.sum().backward()


@each_backend
def test_autocast_does_not_recast(backend):
    made = {"q": unit(4, 50), "k": unit(9, 50, seed=1), "target": drawn(4, 9)}
    with use_backend(backend):
        plain = run(**made)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run(**made)
    assert torch.equal(plain[0], inside[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], inside[1], strict=True))


# Arguments and results.


def test_reductions():
    q, k, target = unit(5, 6), unit(7, 6, seed=1), drawn(5, 7)
    rows, total, mean = (info_nce(q, k, target, temperature=0.2, reduction=r) for r in ("none", "sum", "mean"))
    assert rows.shape == (5,)
    assert torch.allclose(total, rows.sum())
    assert torch.allclose(mean, rows.mean())
    assert torch.equal(info_nce(q, k, target, temperature=0.2), mean)
    nothing = {"q": q[:0].requires_grad_(), "k": k, "target": drawn(0, 7), "temperature": 0.2}
    assert info_nce(**nothing).isnan()
    assert info_nce(**nothing, reduction="sum") == 0
    assert info_nce(**nothing, reduction="none").shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_result(dtype):
    losses, grads = run(unit(3, 5).to(dtype), unit(4, 5, seed=1).to(dtype), drawn(3, 4))
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {grad.dtype for grad in grads} == {dtype}


def test_cpu_takes_cpp_and_every_kernel_runs_in_the_interpreter():
    expected = "torch" if _backends.unavailable("cpp", "cpu") else "cpp"
    assert _backends.backends()["info_nce"]["cpu"].split()[0] == expected
    if _backends.unavailable("triton", "cpu"):
        pytest.skip("no interpreter here")
    with _launch.recording() as names, use_backend("triton"):
        for form in FORMS:
            run(unit(3, 5), unit(4, 5, seed=1), drawn(3, 4), form=form)
    assert names == set(OP.module("triton").KERNELS)


@needs_interpreter
def test_a_backend_asked_for_by_name_runs_or_raises():
    with pytest.raises(RuntimeError, match="none of info_nce has a cuda backend"), use_backend("cuda", "info_nce"):
        pass
    for q, temperature, why in (
        (unit(3, 300), 0.2, "D = 300 is above 256, beyond which torch serves"),
        (unit(3, 8).double(), 0.2, "float64 is computed by the torch and reference backends"),
        (unit(3, 8).bfloat16(), 0.2, "rounds bfloat16 wrongly"),
        (unit(3, 8), 1e-35, "temperature = 1e-35 is out of float32's reach"),
    ):
        info_nce(q, q, drawn(3, 3), temperature=temperature)
        with use_backend("triton"), pytest.raises(RuntimeError, match=re.escape(why)):
            info_nce(q, q, drawn(3, 3), temperature=temperature)


T = two_hot([0, 1, 2], [1, 2, 3], [0.5, 0.5, 0.5])
GOOD = {"q": torch.zeros(3, 8), "k": torch.zeros(4, 8), "target": T, "temperature": 0.2}
WRONG = [
    ({"q": [[0.0]]}, TypeError, "q must be a torch.Tensor of shape (N, D), got list"),
    ({"q": torch.zeros(8)}, ValueError, "q must have shape (N, D), got (8,)"),
    ({"q": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "q must be float16, bfloat16, float32, float64"),
    ({"q": torch.zeros(3, 0)}, ValueError, "q must have at least one column, got shape (3, 0)"),
    ({"k": None}, TypeError, "k must be a tensor or a non-empty list of tensors, got NoneType"),
    ({"k": []}, TypeError, "k must be a tensor or a non-empty list of tensors, got list"),
    ({"k": torch.zeros(4, 8).half()}, TypeError, "k must be float32, got float16; convert it first"),
    ({"k": torch.zeros(4, 7)}, ValueError, "k must have D = 8 columns as q has, got 7"),
    ({"k": torch.zeros(0, 8)}, ValueError, "k must have at least one row, got shape (0, 8)"),
    ({"k": torch.zeros(4, 8, device="meta")}, ValueError, "q is on cpu but k is on meta; move one with .to(device)"),
    ({"k": [torch.zeros(4, 8)]}, ValueError, "target must be a list of 1 TwoHot, one per key set, got one TwoHot"),
    ({"k": [torch.zeros(4, 8)] * 2, "target": [T]}, ValueError, "target must be a list of 2 TwoHot"),
    ({"k": [torch.zeros(4, 8), torch.zeros(4, 3)], "target": [T, T]}, ValueError, "k[1] must have D = 8 columns"),
    ({"target": torch.zeros(3)}, TypeError, "target must be a TwoHot(first, second, weight), got Tensor"),
    ({"target": T._replace(first=T.first[:2])}, ValueError, "target.first has 2 rows but there are 3 rows"),
    ({"target": T._replace(second=T.second + 1)}, ValueError, "target.second must hold columns in [0, 4), got 2 to 4"),
    ({"target": T._replace(weight=T.weight + 1)}, ValueError, "target.weight must hold shares in [0, 1], got 1.5 to"),
    ({"temperature": 0.0}, ValueError, "temperature must be a number above 0, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be a number above 0, got -1"),
    ({"temperature": math.inf}, ValueError, "temperature must be a number above 0, got inf"),
    ({"temperature": math.nan}, ValueError, "temperature must be a number above 0, got nan"),
    ({"temperature": "a"}, TypeError, "temperature must be a number above 0, got str"),
    (
        {"temperature": torch.ones(2)},
        ValueError,
        "temperature must be a number above 0 or a float tensor of one element",
    ),
    ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature must be above 0, got -1"),
    ({"term_weight": 0.5}, TypeError, "term_weight must be a list of numbers, one per key set, got float"),
    ({"term_weight": [0.5, 1]}, ValueError, "term_weight must have 1 numbers, one per key set, got 2"),
    ({"term_weight": [math.nan]}, ValueError, "term_weight must be finite numbers, got nan"),
    ({"with_terms": True}, ValueError, "with_terms=True is for a weighted sum of terms; give term_weight"),
    ({"exclude": [0]}, TypeError, "exclude must be a torch.Tensor of shape (N,) or (M,), got list"),
    ({"exclude": torch.zeros(4).long()}, ValueError, "exclude must hold a column for each of the N rows, 3, got 4"),
    ({"exclude": torch.zeros(3).bool()}, ValueError, "exclude must hold a flag for each of the M keys, 4, got 3"),
    ({"exclude": torch.tensor([0, 4, 1])}, ValueError, "exclude must hold columns in [0, 4) or -1, got 0 to 4"),
    ({"exclude": torch.zeros(3)}, TypeError, "exclude must be int64, bool, got float32"),
    (
        {"k": [torch.zeros(4, 8)] * 2, "target": [T, T], "exclude": torch.zeros(4).bool()},
        ValueError,
        "exclude must be a list of 2, one per key set (None for nothing), got one Tensor",
    ),
    ({"form": "log_mix"}, ValueError, "form='log_mix' is unknown: did you mean 'log_mixture'?"),
    ({"reduction": "average"}, ValueError, "reduction='average' is unknown: expected one of mean, sum, none"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[message[:48] for _, _, message in WRONG])
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        info_nce(**{**GOOD, **changes})
