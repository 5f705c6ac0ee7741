"""`use_backend` and `backends`: what is asked for holds at once, for as long as it was asked, and for nobody else."""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from sdmp_kernels import _backends, _sources, backends, use_backend


@pytest.fixture(autouse=True)
def nothing_is_left_set():
    assert chosen() == AUTOMATIC
    yield
    use_backend(None)
    gc.collect()
    assert chosen() == AUTOMATIC


def chosen(op="info_nce"):
    return backends()[op]["cpu"].split(" ")[0]


AUTOMATIC = "torch" if _backends.unavailable("cpp", "cpu") else "cpp"


def test_a_statement_acts_at_once_and_lasts():
    use_backend("reference")
    assert chosen() == "reference"
    use_backend("torch", "mix")
    assert (chosen(), chosen("mix")) == ("reference", "torch")
    with use_backend("torch"):
        assert chosen() == "torch"
    assert (chosen(), chosen("mix")) == ("reference", "torch")
    use_backend(None, "info_nce")
    assert (chosen(), chosen("distillation")) == (AUTOMATIC, "reference")


def test_a_block_takes_back_what_it_set():
    with use_backend("reference"):
        with use_backend("torch", "info_nce"):
            assert (chosen(), chosen("mix")) == ("torch", "reference")
        assert chosen() == "reference"
        with use_backend(None):
            assert chosen() == AUTOMATIC
        with pytest.raises(ZeroDivisionError), use_backend("torch"):
            raise ZeroDivisionError
        assert chosen() == "reference"
    assert chosen() == AUTOMATIC


def test_a_block_may_be_entered_again():
    block = use_backend("reference")
    for _ in range(2):
        with block:
            assert chosen() == "reference"
        assert chosen() == AUTOMATIC


def test_a_decorator_holds_while_the_function_runs():
    @use_backend("reference", "info_nce")
    def run(word: str) -> str:
        return word + chosen()

    assert chosen() == AUTOMATIC
    assert run("by ") == "by reference"
    assert chosen() == AUTOMATIC


def test_blocks_that_overlap_leave_nothing_set():
    """First in, first out, as threads may: neither the last to end nor the first decides what stays."""
    first = use_backend("reference")
    second = use_backend("torch", "info_nce")
    assert (chosen(), chosen("mix")) == ("torch", "reference")
    first.__exit__()
    assert (chosen(), chosen("mix").split()[0]) == ("torch", backends()["mix"]["cpu"].split()[0])
    second.__exit__()
    assert _backends._forced == {}


def test_threads_leave_nothing_set():
    def work(name: str) -> None:
        for _ in range(300):
            with use_backend(name):
                pass

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "torch", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _backends._forced == {}


def test_statements_do_not_pile_up():
    for _ in range(50):
        use_backend("reference")
        use_backend("torch", "mix")
    assert len(_backends._choices) <= 4


@pytest.mark.parametrize(
    ("name", "ops", "error", "message"),
    [
        ("refrence", None, ValueError, "did you mean 'reference'"),
        ("reference", "mixx", ValueError, "did you mean 'mix'"),
        ("cuda", "info_nce", RuntimeError, "none of info_nce has a cuda backend"),
    ],
)
def test_what_cannot_run_raises_at_once_and_sets_nothing(name, ops, error, message):
    with pytest.raises(error, match=message):
        use_backend(name, ops)
    assert _backends._forced == {}


def test_an_op_without_the_backend_raises_when_it_is_called(monkeypatch):
    if _backends.unavailable("cpp", "cpu"):
        pytest.skip("no compiled kernels here")
    bare = _backends.Op("bare", {"cpu": ("torch",), "cuda": ("torch",)})
    monkeypatch.setitem(_backends.OPS, "bare", bare)
    with use_backend("cpp"):
        assert (chosen("bare"), chosen()) == ("none", "cpp")
        with pytest.raises(RuntimeError, match="bare cannot run on cpu: it has no cpp backend"):
            _backends.choose(bare, torch.device("cpu"))


def test_absent_kernels_are_said_once_with_the_reason(monkeypatch):
    monkeypatch.setattr(_backends, "native_library", lambda device_type: "not built; `make setup` builds it")
    _backends._say_once.cache_clear()
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="without compiled kernels, by the slower torch backend: not built; `make se"):
        assert _backends.choose(_backends.OPS["mix"], cpu) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _backends.choose(_backends.OPS["info_nce"], cpu)
        _backends._say_once.cache_clear()
        with use_backend("torch"):
            _backends.choose(_backends.OPS["mix"], cpu)
        monkeypatch.setattr(_backends, "native_library", lambda device_type: None)
        _backends.choose(_backends.OPS["mix"], cpu, lambda name: "float64 is not for it" if name == "cpp" else None)


def test_a_library_of_another_version_is_not_used(monkeypatch):
    if _backends.unavailable("cpp", "cpu"):
        pytest.skip("no compiled kernels here")
    monkeypatch.setitem(_backends.COMPILED, "cpu", ("mix_cpu", "newer_cpu"))
    why = _backends.native_library.__wrapped__("cpu")
    assert why.endswith(".so is of another version, without newer_cpu; rebuild it with `make setup`")


def test_a_library_of_sources_that_have_changed_is_not_used(tmp_path: Path, monkeypatch):
    """A pull may change an operator's arguments, which the names of the operators do not tell."""
    package, csrc = tmp_path / "sdmp_kernels", tmp_path / "csrc"
    package.mkdir()
    csrc.mkdir()
    (csrc / "mix_op.cpp").write_text('m.def("mix_cpu(Tensor images) -> ()");')
    (package / "_build.json").write_text(json.dumps({"sources": _sources.digest(csrc)}))
    assert not _backends._is_stale(package)
    (tmp_path / "setup.py").touch()
    (csrc / ".mix_op.cpp.swp").write_text("an editor's")
    assert not _backends._is_stale(package)
    (csrc / "mix_op.cpp").write_text('m.def("mix_cpu(Tensor images, bool flip) -> ()");')
    assert _backends._is_stale(package)
    (package / "_build.json").write_text('{"_native_cpu": "built of old"}')
    assert not _backends._is_stale(package)
    if _backends.unavailable("cpp", "cpu"):
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr(_backends, "_is_stale", lambda folder: True)
    why = _backends.native_library.__wrapped__("cpu")
    assert why.endswith(".so was built from other sources than those in csrc/; rebuild it with `make setup`")


def test_the_compiled_operators_are_those_of_the_sources():
    sources = "".join(path.read_text() for path in (Path(__file__).parents[1] / "csrc").glob("*_op.cpp"))
    implemented = set(re.findall(r'm\.impl\("(\w+)"', sources))
    assert implemented == {name for names in _backends.COMPILED.values() for name in names}


def test_a_wheel_that_a_clone_shadows_is_named(tmp_path: Path, monkeypatch):
    clone, wheel = tmp_path / "clone" / "sdmp_kernels", tmp_path / "site-packages" / "sdmp_kernels"
    for folder in (clone, wheel):
        folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(clone.parent), str(wheel.parent)])
    assert _backends._hidden_package("_native_cpu", clone) is None
    (wheel / "_native_cpu.abi3.so").touch()
    assert _backends._hidden_package("_native_cpu", clone) == wheel
    assert _backends._hidden_package("_native_cpu", wheel) is None


@pytest.mark.parametrize(
    ("line", "numpy_version", "fails"),
    [
        ("lambda self: int(self.handle.data)", "2.4.0", True),
        ("lambda self: int(self.handle.data)", "2.3.5", False),
        ("lambda self: int(self.handle.data.squeeze())", "2.10.1", False),
    ],
)
def test_an_interpreter_that_numpy_breaks_is_said(monkeypatch, line, numpy_version, fails):
    """Triton 3.6's, with numpy 2.4 and newer: `backends` and the op matrix name the reason and the pin."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(_backends.inspect, "getsource", lambda module: line)
    monkeypatch.setattr(_backends.np, "__version__", numpy_version)
    monkeypatch.setattr(_backends, "interpreting", lambda: True)
    _backends._interpreter_fails.cache_clear()
    try:
        why = _backends.unavailable("triton", "cpu")
    finally:
        _backends._interpreter_fails.cache_clear()
    assert (why is not None) is fails
    assert not fails or "pip install 'numpy<2.4'" in why
