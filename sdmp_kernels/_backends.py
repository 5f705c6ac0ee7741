"""Which implementation serves an op on a device, why not a faster one, and how to ask for one by name.

An op is described by its folder's `op.py`: for every backend a loader (imports the module that holds it) and, per
device type, the order of preference. Nothing falls back silently: a backend asked for by name runs or raises, and
`backends()` says what an automatic choice will be.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from sdmp_kernels import _sources
from sdmp_kernels._checks import check_choice

NAMES = ("reference", "torch", "cpp", "triton", "cuda")
# These serve every call wherever there is a tensor.
EVERYWHERE = ("reference", "torch")
FILES = {"torch": "composed", "cpp": "native", "cuda": "native"}
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Op:
    """One op: its name and, per device type, its backends from the preferred to the last resort.

    Every backend named here is a module of the op's folder (`FILES` where it is not called like the backend) whose
    functions have one set of names and signatures; `op.py` picks the module and calls the function.
    """

    name: str
    order: dict[str, tuple[str, ...]]

    def module(self, backend: str) -> ModuleType:
        """The module that implements `backend`."""
        return _module(self.name, backend)

    def serves(self, backend: str) -> bool:
        """Whether the op has this backend at all, on any device."""
        return any(backend in order for order in self.order.values())


@functools.cache
def _module(op: str, backend: str) -> ModuleType:
    """Imported when it is first chosen, so that no call waits for a backend that does not serve it."""
    return importlib.import_module(f"sdmp_kernels.ops.{op}.{FILES.get(backend, backend)}")


OPS: dict[str, Op] = {}
_forced: dict[str, str] = {}


def register(name: str, *, cpu: tuple[str, ...], cuda: tuple[str, ...]) -> Op:
    """Add an op to the registry that `backends` and `use_backend` read."""
    OPS[name] = Op(name, {"cpu": cpu, "cuda": cuda})
    return OPS[name]


@functools.cache
def _triton_version() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def interpreting() -> bool:
    """True where Triton's kernels run in its interpreter, on the CPU (slow; for tests)."""
    if _triton_version() is None:
        return False
    knobs = getattr(importlib.import_module("triton"), "knobs", None)
    return bool(knobs is not None and knobs.runtime.interpret)


@functools.cache
def _interpreter_fails() -> str | None:
    """Why Triton's interpreter cannot run: that of 3.6 makes loop bounds of arrays by `int`, as numpy 2.4 forbids."""
    source = inspect.getsource(importlib.import_module("triton.runtime.interpreter"))
    if "int(self.handle.data)" not in source or tuple(map(int, np.__version__.split(".")[:2])) < (2, 4):
        return None
    return f"the interpreter of triton {_triton_version()} fails with numpy {np.__version__}; pip install 'numpy<2.4'"


COMPILED = {
    "cpu": (
        "augment_cpu",
        "distillation_cpu",
        "draw_mixup_cpu",
        "draw_plan_cpu",
        "info_nce_few_cpu",
        "info_nce_rows_cpu",
        "info_nce_sweep_cpu",
        "mix_backward_cpu",
        "mix_cpu",
        "mix_plain_cpu",
        "soft_cross_entropy_cpu",
    ),
    "cuda": ("mix_backward_cuda", "mix_cuda"),
}
"""What the compiled kernels of a device type register; a library that lacks one was built from other sources."""


@functools.cache
def native_library(device_type: str) -> str | None:
    """Load the compiled kernels of a device type; None once loaded, else the reason why they are not there."""
    name = {"cpu": "_native_cpu", "cuda": "_native_cuda"}[device_type]
    folder = Path(__file__).parent
    found = sorted(folder.glob(f"{name}*.so"))
    if not found:
        why = _built(folder).get(name, "not built")
        if why.startswith("built "):
            why = f"{name}.so is gone"
        mend = f"a C++ compiler{' and nvcc' if device_type == 'cuda' else ''} and `make setup` build it"
        hidden = _hidden_package(name, folder)
        if hidden is not None:
            mend = (
                f"{hidden} has it, but {folder} comes first on sys.path: run from another folder, or `make setup` here"
            )
        return f"{why}; {mend}"
    if _is_stale(folder):
        return f"{found[0].name} was built from other sources than those in csrc/; rebuild it with `make setup`"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load ({error}); rebuild it with `make setup`"
    lacking = [op for op in COMPILED[device_type] if not hasattr(torch.ops.sdmp, op)]
    if lacking:  # the clone has moved on since it was built
        return f"{found[0].name} is of another version, without {lacking[0]}; rebuild it with `make setup`"
    return None


def _built(folder: Path) -> dict[str, str]:
    """What `setup.py` wrote of its build into the package's folder: nothing where it has not run."""
    report = folder / "_build.json"
    return json.loads(report.read_text()) if report.exists() else {}


def _is_stale(folder: Path) -> bool:
    """Whether the sources beside the package's folder are no longer those that its libraries were built from.

    A library and the Python that calls it must be of one version: the arguments of an operator change with both. An
    installed package has no sources beside it, and builds of before this was recorded are taken as they are.
    """
    root, recorded = folder.parent, _built(folder).get("sources")
    beside = (root / "setup.py").is_file() and (root / "csrc").is_dir()
    return recorded is not None and beside and recorded != _sources.digest(root / "csrc")


def _hidden_package(library: str, here: Path) -> Path | None:
    """Another copy of this package on `sys.path`, with the compiled `library`: a wheel that a clone shadows."""
    for entry in sys.path:
        folder = Path(entry or ".").absolute() / here.name
        if folder != here and any(folder.glob(f"{library}*.so")):
            return folder
    return None


def unavailable(backend: str, device_type: str) -> str | None:
    """None where `backend` can run on `device_type` on this machine, else the reason in words."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if backend in EVERYWHERE:
        return None
    if backend == "triton":
        version = _triton_version()
        if version is None:
            return "triton is not installed"
        if device_type == "cpu" and not interpreting():
            return "triton compiles for GPUs only (its interpreter is off)"
        if device_type == "cuda" and interpreting():
            return "triton is in interpreter mode, which is for tensors on the CPU"
        if device_type == "cpu":
            return _interpreter_fails()
    if backend == "cpp":
        return native_library("cpu") if device_type == "cpu" else "cpp runs on the CPU only"
    if backend == "cuda":
        return native_library("cuda") if device_type == "cuda" else "cuda runs on NVIDIA GPUs only"
    return None


def choose(op: Op, device: torch.device, refuse: Callable[[str], str | None] | None = None) -> str:
    """The backend that will run `op` on `device`.

    Args:
        op: the op.
        device: where its tensors are.
        refuse: says for a backend, other than those that serve every call, why it cannot serve this very one (a dtype,
            a size), or None.

    Raises:
        RuntimeError: where a backend was asked for by name and cannot run this call, or none can.
    """

    forced = _forced.get(op.name)
    if forced is not None and not (forced in NAMES and op.serves(forced)):
        raise RuntimeError(f"use_backend({forced!r}): {op.name} cannot run on {device}: it has no {forced} backend")
    reasons: list[tuple[str, str]] = []
    absent: list[str] = []
    for backend in (forced,) if forced is not None else op.order.get(device.type, ("torch", "reference")):
        if backend in EVERYWHERE:
            if absent and len(absent) == len(reasons):  # nothing was refused for this call alone
                _say_once(device.type, backend, absent[0])
            return backend
        missing = unavailable(backend, device.type)
        why = missing or (refuse(backend) if refuse else None)
        if why is None:
            return backend
        if missing:
            absent.append(missing)
        reasons.append((backend, why))
    if forced is not None:
        raise RuntimeError(f"use_backend({forced!r}): {op.name} cannot run on {device}: {reasons[0][1]}")
    said = "; ".join(f"{backend}: {why}" for backend, why in reasons)
    raise RuntimeError(f"no backend of {op.name} can run this call on {device} ({said})")


def announce(op: str, device_type: str) -> None:
    """Warn now where `op` will run without compiled kernels: a process forked after this does not say so again."""
    choose(OPS[op], torch.device(device_type))


@functools.cache
def _say_once(device_type: str, backend: str, why: str) -> None:
    """Warn that compiled kernels are not there; the same reason is said once, also by the processes of one loader."""
    worker = torch.utils.data.get_worker_info()
    if worker is not None and worker.id > 0:
        return
    device = {"cpu": "the CPU", "cuda": "a GPU"}[device_type]
    warnings.warn(
        f"sdmp_kernels runs on {device} without compiled kernels, by the slower {backend} backend: {why}. "
        f"use_backend({backend!r}) chooses it without this warning",
        stacklevel=2,
    )


def backends() -> dict[str, dict[str, str]]:
    """What will run: op -> device type -> the implementation, and why not a faster one.

    A call that its usual backend cannot serve (float64, for example) takes the next one in the order shown.

    Returns:
        For example ``{"mix": {"cpu": "cpp", "cuda": "none (torch sees no CUDA device)"}}``.
    """
    return {name: {device: _describe(op, device) for device in op.order} for name, op in OPS.items()}


def _describe(op: Op, device_type: str) -> str:
    forced = _forced.get(op.name)
    order: Sequence[str] = (forced,) if forced else op.order[device_type]
    reasons: list[str] = []
    for backend in order:
        why = unavailable(backend, device_type) if op.serves(backend) else f"{op.name} has no {backend} backend"
        if why is None:
            return backend + (f" ({'; '.join(reasons)})" if reasons else "")
        reasons.append(
            why if len(set(order)) == 1 or (device_type == "cuda" and "CUDA device" in why) else f"{backend}: {why}"
        )
    return f"none ({reasons[0]})" if reasons else "none"


class use_backend:
    """From now on, run the ops by the backend `name`, or raise; never another one.

    It acts at once, as `torch.set_grad_enabled` does. Used with `with`, the end of the block takes back what it set,
    and what was set before holds again; used as a decorator, it holds while the function runs.

    Args:
        name: "reference", "torch", "cpp", "triton" or "cuda"; None for the automatic choice.
        ops: names of the ops it holds for; default all of them. An op that has no such backend raises when called.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: at once, where the backend cannot run on this machine at all, and on calling an op with arguments
            that the backend cannot serve.

    The choice holds for the whole process, also for the threads that run a backward pass. Where blocks of several
    threads overlap, the latest to begin holds, and each takes back only its own: none is left set for good.
    """

    def __init__(self, name: str | None, ops: Sequence[str] | str | None = None) -> None:
        wanted = tuple(OPS) if ops is None else (ops,) if isinstance(ops, str) else tuple(ops)
        for op in wanted:
            check_choice("ops", op, tuple(OPS))
        if name is not None:
            _check_runs(name, wanted)
        self._name, self._ops = name, wanted
        self._choice: _Choice | None = _Choice(name, wanted, weakref.ref(self))
        _change(add=self._choice)

    def __enter__(self) -> None:
        if self._choice is None:
            self._choice = _Choice(self._name, self._ops, weakref.ref(self))
            _change(add=self._choice)

    def __exit__(self, *_: object) -> None:
        choice, self._choice = self._choice, None
        if choice is not None:
            _change(remove=choice)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate `function`: nothing is set but while it runs."""
        self.__exit__()

        @functools.wraps(function)
        def within(*args: P.args, **options: P.kwargs) -> R:
            with use_backend(self._name, self._ops):
                return function(*args, **options)

        return within


@dataclass(frozen=True, eq=False)
class _Choice:
    """What one `use_backend` has set. Once that object is gone, nobody can take it back: it holds for good."""

    name: str | None
    ops: tuple[str, ...]
    owner: weakref.ref[use_backend]


_choices: list[_Choice] = []
_lock = threading.Lock()


def _change(*, add: _Choice | None = None, remove: _Choice | None = None) -> None:
    """Add or remove a choice, forget those that can never hold again, and work out what now holds."""
    with _lock:
        left = [choice for choice in _choices if choice is not remove] + ([add] if add is not None else [])
        settled: set[str] = set()
        _choices.clear()
        for choice in reversed(left):
            if choice.owner() is None:
                if settled.issuperset(choice.ops):
                    continue
                settled.update(choice.ops)
            _choices.insert(0, choice)
        now = {op: choice.name for choice in _choices for op in choice.ops}
        # Replaced at once: other threads read it without the lock.
        global _forced
        _forced = {op: name for op, name in now.items() if name is not None}


def _check_runs(name: str, ops: Sequence[str]) -> None:
    """Raise unless the backend `name` is known, one of the ops has it, and it can run on this machine."""
    check_choice("name", name, NAMES)
    if not any(OPS[op].serves(name) for op in ops):
        raise RuntimeError(f"use_backend({name!r}): none of {', '.join(ops)} has a {name} backend")
    reasons = {device: unavailable(name, device) for device in ("cpu", "cuda")}
    if all(reasons.values()):
        own = {"cpp": reasons["cpu"], "cuda": reasons["cuda"]}
        why = own.get(name) or "; ".join(f"{device}: {reason}" for device, reason in reasons.items())
        raise RuntimeError(f"use_backend({name!r}) cannot run on this machine: {why}")
