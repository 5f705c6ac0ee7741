"""How the operators are registered: cheap to call first, and refused where there is no derivative."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ops import matrix
from torch.autograd import forward_ad

from sdmp_kernels import TwoHot, draw_plan, info_nce, mix, soft_cross_entropy
from sdmp_kernels._operators import operator

FIRST_CALL = """
import sys
import torch
from ops import matrix
from sdmp_kernels import backends
cases = dict(matrix.ops())[sys.argv[1]]
case = next((case for case in cases.CASES if case.grads), cases.CASES[0])
dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
inputs = {n: matrix.convert(v, dtype if n in case.cast else None, "cpu") for n, v in
          case.inputs(torch.Generator().manual_seed(0)).items()}
for name in case.grads:
    inputs[name].requires_grad_()
result = matrix.flat(cases.call(**inputs))[0]
if case.grads:
    result.sum().backward()
backends()
print(*sorted(set(sys.modules)))
"""


@pytest.mark.parametrize("op", [name for name, _ in matrix.ops()])
def test_the_first_call_imports_neither_compiler_nor_triton(op):
    """In a process of its own, with forward, backward and `backends()`."""
    paths = f"import sys; sys.path[:0] = {sys.path!r}\n"
    done = subprocess.run([sys.executable, "-c", paths + FIRST_CALL, op], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = done.stdout.split()
    assert any(name.startswith(f"sdmp_kernels.ops.{op}") for name in imported)
    unwanted = {"torch._dynamo", "torch._inductor", "sympy"}
    if not torch.cuda.is_available():
        # Where there is a GPU, `backends()` asks Triton whether it is in its interpreter.
        unwanted |= {"triton"}
    assert not unwanted & set(imported)


@pytest.fixture(scope="module")
def doubled():
    """An operator without a formula, of a tensor and a list, with a tensor and a list as results."""

    @operator("test_doubled")
    def doubled(x: torch.Tensor, more: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return 2 * x, [2 * item for item in more]

    return doubled.overload


@pytest.mark.parametrize("result", [0, 1])
def test_what_has_no_formula_refuses_a_backward_pass(doubled, result):
    x = torch.ones(3, requires_grad=True)
    one, (other,) = doubled(x, [torch.ones(2)])
    assert torch.equal(one, torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match=r"sdmp\.test_doubled\.default has no autograd formula"):
        (one, other)[result].sum().backward()
    with torch.no_grad():
        assert not doubled(x, [])[0].requires_grad


def test_writes_are_counted():
    """Autograd notices that a tensor it saved was written to by an operator."""

    @operator("test_cleared", mutates=("x", "other"))
    def cleared(x: torch.Tensor, other: torch.Tensor | None) -> None:
        x.zero_()

    x, kept = torch.ones(3), torch.ones(3, requires_grad=True)
    product = x * kept
    version = x._version
    cleared.overload(x, None)
    assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_autocast_recasts_no_argument():
    seen = []

    @operator("test_seen")
    def looked_at(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return x.clone()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        looked_at.overload(torch.ones(2))
    assert seen == [torch.float32]


@pytest.mark.parametrize("op", [name for name, _ in matrix.ops()])
def test_no_dispatch_key_but_those_we_mean(op):
    """Not Autocast, and nothing that would keep a CUDA graph or another device from the one implementation."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"sdmp::{op}", "Autograd") or has(f"sdmp::{op}", "AutogradCPU")
    assert has(f"sdmp::{op}", "CompositeExplicitAutograd")
    assert not has(f"sdmp::{op}", "AutocastCPU")
    assert not has(f"sdmp::{op}", "AutocastCUDA")


@pytest.mark.parametrize("op", ["info_nce", "soft_cross_entropy", "mix"])
def test_forward_mode_is_refused_and_not_zero(op: str):
    plan = draw_plan(6, (4, 4), seed=0, step=0)
    calls = {
        "info_nce": (lambda x: info_nce(x, torch.eye(6), plan.source_target(), temperature=0.2), torch.rand(6, 6)),
        "soft_cross_entropy": (lambda x: soft_cross_entropy(x, plan.source_target()), torch.rand(6, 6)),
        "mix": (lambda x: mix(x, plan), torch.rand(6, 3, 4, 4)),
    }
    call, x = calls[op]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        call(x)  # no tangent, no harm
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(forward_ad.make_dual(x, torch.ones_like(x)))


def test_targets_that_are_parameters_are_looked_at_like_any():
    first = torch.nn.Parameter(torch.tensor([0, 99]), requires_grad=False)
    target = TwoHot(first, torch.tensor([1, 0]), torch.nn.Buffer(torch.tensor([0.5, 0.5])))
    with pytest.raises(ValueError, match="must hold columns in"):
        soft_cross_entropy(torch.rand(2, 2), target)
