"""One file for all ops: every case of every op folder, on every backend that runs here.

The rule: no backend errs, against the reference in float64, by more than twice what plain PyTorch errs at the same
dtype, plus one ulp of the largest term summed.
"""

import copy
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from ops import counts, matrix
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sdmp_kernels import _backends, use_backend

TRIALS = list(matrix.trials())
GRAD_TRIALS = list(matrix.trials(with_grads=True))
for _name in _backends.NAMES:
    for _device in matrix.DEVICES:
        _why = _backends.unavailable(_name, _device)
        if _why and (_name, _device) not in {("cuda", "cpu"), ("cpp", "cuda")}:
            counts.NOT_RUN[f"{_name} on {_device}"] = _why


def each(trials):
    return pytest.mark.parametrize("trial", trials, ids=str)


def some(trials, backends=_backends.NAMES, dtype=torch.float32):
    """One dtype of each case (its first where it is not run in `dtype`), to keep the heavier checks quick."""
    picked = [t for t in trials if t.backend in backends]
    return [t for t in picked if t.dtype == (dtype if dtype in t.case.dtypes else t.case.dtypes[0])]


def truth_of(trial, inputs):
    exact = getattr(trial.cases, "truth", None)
    if exact is not None:
        return matrix.flat(exact(**inputs))
    with use_backend("reference", trial.op):
        return matrix.flat(trial.cases.call(**matrix.upcast(trial, inputs)))


def own_results(trial, inputs, truth):
    """What plain PyTorch returns at this dtype; in float32 where it is not finite at this dtype but the truth is."""
    results = matrix.flat(trial.cases.eager(**inputs))
    if all(matrix.error(r, t) < float("inf") for r, t in zip(results, truth, strict=True)):
        return results
    single = {
        n: matrix.convert(v, torch.float32 if n in trial.case.cast else None, trial.device) for n, v in inputs.items()
    }
    return matrix.flat(trial.cases.eager(**single))


RESULTS, GRADIENTS = {}, {}
"""By the trial's name: the tests compare other calls with them, bit for bit, so that each is made once."""


def results_of(trial):
    """What the backend returns; skips where it says that it cannot serve this call."""
    if str(trial) not in RESULTS:
        RESULTS[str(trial)] = trial.results()
    found = RESULTS[str(trial)]
    if isinstance(found, str):
        pytest.skip(found)
    return found


def gradients_of(trial):
    """Its gradients for upstream gradients that differ per element; skips likewise."""
    results_of(trial)
    if str(trial) not in GRADIENTS:
        with trial.forced():
            GRADIENTS[str(trial)] = matrix.gradients(trial.cases.call, trial, trial.inputs(), uneven)[1]
    return GRADIENTS[str(trial)]


@each(TRIALS)
def test_values(trial):
    got, inputs = results_of(trial), trial.inputs()
    truth = truth_of(trial, trial.inputs())
    own = own_results(trial, trial.inputs(), truth)
    assert len(got) == len(truth) == len(own)
    term = float(trial.cases.largest_term(**inputs))
    for result, exact, plain in zip(got, truth, own, strict=True):
        assert result.shape == exact.shape
        bound = matrix.allowed(matrix.error(plain, exact), result.dtype, term)
        assert matrix.error(result, exact) <= bound
    counts.RAN[f"{trial.backend}{' interpreted' if trial.backend == 'triton' and trial.device == 'cpu' else ''}"] += 1


@each(TRIALS)
def test_writes_every_element_and_no_argument_and_the_same_bits_again(trial):
    """Outputs are allocated full of NaN, and equal those of another call; inputs are compared before and after."""
    expected, inputs = results_of(trial), trial.inputs()
    with trial.forced():
        before = copy.deepcopy(inputs)
        torch.use_deterministic_algorithms(True)  # makes torch fill fresh memory with NaN
        try:
            got = matrix.flat(trial.cases.call(**inputs))
        finally:
            torch.use_deterministic_algorithms(False)
    for result, again in zip(got, expected, strict=True):
        assert torch.equal(result.nan_to_num(nan=1e30), again.nan_to_num(nan=1e30))
    for now, then in zip(tensors(inputs), tensors(before), strict=True):
        assert torch.equal(now.nan_to_num(nan=1e30), then.nan_to_num(nan=1e30))


def tensors(inputs):
    found = []
    for value in inputs.values():
        parts = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else value
        found += [t for t in pytree.tree_leaves(parts) if isinstance(t, torch.Tensor)]
    return found


def uneven(t):
    """Upstream gradients that differ per element, contiguous."""
    return torch.linspace(-1.0, 2.0, max(t.numel(), 1), dtype=t.dtype, device=t.device)[: t.numel()].view(t.shape)


def strided(t):
    """The same values with strides that are nobody's: every second element, from the second on."""
    room = torch.full((2 * t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
    view = room[1::2].view(-1)[: t.numel()].as_strided(t.shape, [2 * s for s in torch.empty(t.shape).stride()], 1)
    return view.copy_(uneven(t))


def transposed(t):
    """The same values in the memory order of the reversed dimensions."""
    order = tuple(reversed(range(t.ndim)))
    return uneven(t).permute(order).contiguous().permute(order)


def expanded(t):
    """One value for all: strides of zero, what `.sum()` sends back."""
    return torch.full((), 0.75, dtype=t.dtype, device=t.device).expand(t.shape)


@each(GRAD_TRIALS)
def test_gradients(trial):
    got, inputs = gradients_of(trial), trial.inputs()
    exact_run = getattr(trial.cases, "truth", None)
    if exact_run is None:
        with use_backend("reference", trial.op):
            _, truth = matrix.gradients(trial.cases.call, trial, matrix.upcast(trial, trial.inputs()), uneven)
    else:
        _, truth = matrix.gradients(exact_run, trial, matrix.upcast(trial, trial.inputs()), uneven)
    _, own = matrix.gradients(trial.cases.eager, trial, trial.inputs(), uneven)
    largest = getattr(trial.cases, "largest_grad_term", None)
    for result, exact, plain in zip(got, truth, own, strict=True):
        assert result.shape == exact.shape
        term = float(largest(**inputs)) if largest else float(exact.abs().max()) if exact.numel() else 0.0
        mistake = matrix.error(plain, exact)
        bound = matrix.allowed(mistake if mistake < float("inf") else 0.0, result.dtype, term)
        assert matrix.error(result, exact) <= bound


@each(some(GRAD_TRIALS))
@pytest.mark.parametrize("layout", [strided, transposed], ids=lambda f: f.__name__)
def test_upstream_gradients_of_any_layout(trial, layout):
    expected = gradients_of(trial)
    with trial.forced():
        _, got = matrix.gradients(trial.cases.call, trial, trial.inputs(), layout)
    for result, again in zip(got, expected, strict=True):
        assert torch.equal(result, again)


@each(some(GRAD_TRIALS))
def test_upstream_gradient_of_stride_zero(trial):
    results_of(trial)
    with trial.forced():
        _, expected = matrix.gradients(trial.cases.call, trial, trial.inputs(), lambda t: expanded(t).contiguous())
        _, got = matrix.gradients(trial.cases.call, trial, trial.inputs(), expanded)
    for result, again in zip(got, expected, strict=True):
        assert torch.equal(result, again)


def sliced(t):
    """The same values inside a larger buffer of NaN, with a step along every dimension."""
    room = torch.full(
        [2 * n + 1 for n in t.shape], float("nan") if t.is_floating_point() else 77, dtype=t.dtype, device=t.device
    )
    view = room[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def reversed_dims(t):
    order = tuple(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute(order)


@each(some(TRIALS))
@pytest.mark.parametrize("layout", [sliced, reversed_dims], ids=lambda f: f.__name__)
def test_inputs_of_any_layout(trial, layout):
    """The values do not depend on the strides of any tensor argument of the case's `cast`."""
    expected = results_of(trial)
    inputs, moved = trial.inputs(), trial.inputs()
    for name in trial.case.cast:
        moved[name] = pytree.tree_map_only(torch.Tensor, layout, moved[name])
    with trial.forced():
        got = matrix.flat(trial.cases.call(**moved))
    term = float(trial.cases.largest_term(**inputs))
    for result, again in zip(got, expected, strict=True):
        # Another layout may sum in another order: one ulp of the largest term, nothing for copies.
        assert matrix.error(result, again) <= matrix.allowed(0.0, result.dtype, term)


@each([t for t in some(GRAD_TRIALS, ("reference",), torch.float32) if t.device == "cpu"])
def test_gradcheck_of_the_reference(trial):
    """The registered backward of the reference against finite differences in float64."""
    inputs = matrix.upcast(trial, trial.inputs())
    leaves = [leaf.detach().contiguous().requires_grad_() for leaf in trial.leaves(inputs)]
    if not leaves or sum(leaf.numel() for leaf in leaves) > 4096:
        pytest.skip("too many elements for finite differences")

    def run(*given):
        values = dict(inputs)
        rest = list(given)
        for name in trial.case.grads:
            spec = pytree.tree_structure(values[name])
            values[name] = pytree.tree_unflatten([rest.pop(0) for _ in range(spec.num_leaves)], spec)
        with use_backend("reference", trial.op):
            return tuple(t for t in matrix.flat(trial.cases.call(**values)) if t.requires_grad)

    with torch.no_grad():
        empty = not matrix.flat(trial.cases.call(**inputs))[0].numel()
    if empty:
        pytest.skip("nothing to differentiate")
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@each([t for t in some(TRIALS, ("reference",)) if t.device == "cpu"])
def test_compiles_to_one_graph(trial):
    torch._dynamo.reset()
    compiled = torch.compile(trial.cases.call, fullgraph=True, backend="aot_eager")
    with trial.forced():
        expected = matrix.flat(trial.cases.call(**trial.inputs()))
        got = matrix.flat(compiled(**trial.inputs()))
    for result, again in zip(got, expected, strict=True):
        assert torch.equal(result.nan_to_num(nan=1e30), again.nan_to_num(nan=1e30))


class Captured(TorchDispatchMode):
    """Keeps the calls of this project's operators that pass by, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sdmp":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def detached(t):
    return t.detach().clone()


def leaf(t):
    return t.detach().clone().requires_grad_(t.requires_grad)


def a_few_per_op(trials, count):
    taken = {}
    for trial in trials:
        taken.setdefault(trial.op, []).append(trial)
    return [trial for group in taken.values() for trial in group[:count]]


def not_empty(trial):
    return all(t.numel() for t in tensors(trial.inputs()))


@each(a_few_per_op([t for t in some(GRAD_TRIALS, ("reference",)) if t.device == "cpu" and not_empty(t)], 4))
def test_opcheck(trial):
    """Schema, fake, autograd registration and dynamic AOT dispatch of every operator that the case reaches."""
    with trial.forced():
        with Captured() as captured:
            matrix.gradients(trial.cases.call, trial, trial.inputs(), uneven)
        assert captured.calls
        for func, args in captured.calls:
            # A backward operator runs below autograd; it has no derivative of its own.
            again = pytree.tree_map_only(torch.Tensor, detached if "_backward" in func.name() else leaf, args)
            torch.library.opcheck(func, again)


def fake(value):
    """The same on a CUDA device that does not exist."""
    if is_dataclass(value):
        return replace(value, **{f.name: fake(getattr(value, f.name)) for f in fields(value)})
    return pytree.tree_map_only(
        torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"), value
    )


@each([t for t in some(TRIALS, ("reference",)) if t.device == "cpu"])
def test_fake_cuda_tensors(trial):
    """Shapes, dtypes and strides of the CUDA path, told without a GPU."""
    inputs = trial.inputs()
    with trial.forced():
        real = matrix.flat(trial.cases.call(**inputs))
    with FakeTensorMode():
        told = matrix.flat(trial.cases.call(**{name: fake(value) for name, value in inputs.items()}))
    for fiction, fact in zip(told, real, strict=True):
        assert fiction.device.type == "cuda"
        assert (fiction.shape, fiction.dtype, fiction.stride()) == (fact.shape, fact.dtype, fact.stride())


def test_the_backends_that_must_run_did(request):
    """A run without a GPU proves reference, C++ and the interpreter, or fails."""
    chosen = {item.name for item in request.session.items}
    if not all(f"test_values[{t}]" in chosen for t in TRIALS):
        pytest.skip("only part of the matrix was asked for")
    must = {"reference", "cpp", "triton" if torch.cuda.is_available() else "triton interpreted"}
    assert must <= set(counts.RAN), f"ran {dict(counts.RAN)}; not run: {counts.NOT_RUN}"
