"""What CONTRIBUTING.md says of the folders of ops."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import sdmp_kernels.ops
from sdmp_kernels import _backends

FOLDER = Path(sdmp_kernels.ops.__path__[0])
OPS = sorted(_backends.OPS)


def imported(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("op", OPS)
def test_no_op_imports_from_another(op):
    """What two of them share lives beside the folders."""
    for file in (FOLDER / op).glob("*.py"):
        for name in imported(file):
            other = name.removeprefix("sdmp_kernels.ops.").split(".")[0] if name.startswith("sdmp_kernels.ops.") else op
            assert other == op or other not in OPS, f"{file.name} of {op} imports {name}"


def test_what_ops_share_imports_from_none():
    for file in FOLDER.glob("*.py"):
        for name in imported(file):
            assert not any(name.startswith(f"sdmp_kernels.ops.{op}") for op in OPS), f"{file.name} imports {name}"


@pytest.mark.parametrize("op", OPS)
def test_every_folder_has_the_files_of_its_backends(op):
    backends = {name for order in _backends.OPS[op].order.values() for name in order}
    needed = {"__init__", "op", "cases"} | ({"arguments"} if (FOLDER / op / "arguments.py").exists() else set())
    needed |= {_backends.FILES.get(name, name) for name in backends}
    needed |= {"triton_kernels"} if "triton" in backends else set()
    assert {file.stem for file in (FOLDER / op).glob("*.py")} == needed


@pytest.mark.parametrize("op", OPS)
def test_kernels_are_apart_from_their_launches(op):
    """`@triton.jit` in `triton_kernels.py` and nowhere else, and no tensor is touched there."""
    kernels = ast.parse((FOLDER / op / "triton_kernels.py").read_text())
    for node in kernels.body:
        if isinstance(node, ast.FunctionDef):
            assert any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list), node.name
    assert "torch.Tensor" not in imported(FOLDER / op / "triton_kernels.py")
    for file in (FOLDER / op).glob("*.py"):
        if file.stem != "triton_kernels":
            assert "@triton.jit" not in file.read_text(), file


@pytest.mark.parametrize("name", sorted({*OPS, "backends", "use_backend"}))
def test_public_functions_say_what_they_take_return_and_raise(name):
    public = getattr(sdmp_kernels, name)
    words = inspect.getdoc(public)
    parameters = inspect.signature(public).parameters
    assert not parameters or "\nArgs:\n" in words
    assert inspect.isclass(public) or "\nReturns:\n" in words
    assert not parameters or "\nRaises:\n" in words
    for parameter in parameters:
        assert parameter in words.split("\nArgs:\n")[1].split("\nR")[0], parameter
