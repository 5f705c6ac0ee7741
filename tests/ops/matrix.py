"""The op matrix: every op folder's cases, by dtype, backend and device, and how a result is judged.

An op's `cases.py` may also define `truth(**inputs)` (the exact result in float64, where casting the inputs up does
not give it) and `largest_grad_term(**inputs)`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import sdmp_kernels.ops
from sdmp_kernels import _backends, use_backend
from sdmp_kernels.ops.case import Case

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def ops() -> Iterator[tuple[str, ModuleType]]:
    """Every public op whose folder has a `cases.py`, with that module."""
    for info in pkgutil.iter_modules(sdmp_kernels.ops.__path__):
        folder = Path(sdmp_kernels.ops.__path__[0]) / info.name
        if (folder / "cases.py").exists() and info.name in sdmp_kernels.__all__:
            yield info.name, importlib.import_module(f"sdmp_kernels.ops.{info.name}.cases")


@dataclass(frozen=True)
class Trial:
    """One case of one op at one dtype, on one backend and device."""

    op: str
    cases: ModuleType
    case: Case
    dtype: torch.dtype
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.op}-{self.case.name}-{str(self.dtype)[6:]}-{self.backend}-{self.device}"

    def inputs(self) -> dict[str, Any]:
        """Fresh arguments, the same every time: cast, moved, strides and offsets kept."""
        made = self.case.inputs(torch.Generator().manual_seed(0))
        return {
            name: convert(value, self.dtype if name in self.case.cast else None, self.device)
            for name, value in made.items()
        }

    def leaves(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The tensors whose gradient is compared, in a fixed order."""
        return [t for name in self.case.grads for t in pytree.tree_leaves(inputs[name])]

    def forced(self) -> AbstractContextManager[None]:
        """The context in which the op runs on this trial's backend."""
        return use_backend(self.backend, self.op)

    def results(self) -> list[Tensor] | str:
        """What this backend returns, or why it says it cannot serve this very call."""
        try:
            with self.forced(), torch.no_grad():
                return flat(self.cases.call(**self.inputs()))
        except RuntimeError as error:
            if "cannot run on" in str(error):
                return str(error)
            raise


def trials(*, with_grads: bool = False) -> Iterator[Trial]:
    """Every trial that can run on this machine; bfloat16 is left to real GPUs where Triton only interprets."""
    for op, cases in ops():
        for case in cases.CASES:
            if with_grads and not case.grads:
                continue
            for device in DEVICES:
                for backend in _backends.NAMES:
                    if not _backends.OPS[op].serves(backend) or _backends.unavailable(backend, device):
                        continue
                    interpreted = backend == "triton" and device == "cpu"
                    for dtype in case.dtypes:
                        if interpreted and (not case.interpreter or dtype == torch.bfloat16):
                            continue
                        yield Trial(op, cases, case, dtype, backend, device)


def convert(value: Any, dtype: torch.dtype | None, device: str) -> Any:
    """`value` with its tensors cast and moved, sharing nothing with the original, strides and offset as they were."""
    if hasattr(value, "to") and not isinstance(value, Tensor):
        return value.to(device)
    return pytree.tree_map_only(Tensor, lambda t: restride(t, dtype or t.dtype, device), value)


def restride(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A copy with the same shape, strides and storage offset."""
    if tensor.numel() == 0:
        return tensor.to(device=device, dtype=dtype, copy=True)
    used = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((tensor.storage_offset() + used,), (1,), 0)
    return flat.to(device=device, dtype=dtype, copy=True).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def upcast(trial: Trial, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64, and a float result in float64 where its dtype is an argument."""
    raised = {n: convert(v, torch.float64 if n in trial.case.cast else None, trial.device) for n, v in inputs.items()}
    wanted = raised.get("dtype")
    return raised | ({"dtype": torch.float64} if wanted is not None and wanted.is_floating_point else {})


def gradients(
    run: Callable[..., Any], trial: Trial, inputs: dict[str, Any], upstream: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients of the case's `grads`) for upstream gradients made per result."""
    leaves = trial.leaves(inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    results = [t for t in flat(run(**inputs)) if t.requires_grad]
    given = [upstream(t) for t in results]
    return results, list(torch.autograd.grad(results, leaves, given))


def error(got: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; infinite where `got` is not finite but the truth is, or the reverse."""
    if truth.numel() == 0:
        return 0.0
    got, truth = got.double(), truth.double()
    same = (got == truth) | (got.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, (got - truth).abs())
    return float(difference.nan_to_num(nan=float("inf")).max())


def allowed(own: float, dtype: torch.dtype, term: float) -> float:
    """Twice PyTorch's own error plus one ulp of the largest term summed."""
    ulp = 1.0 if not dtype.is_floating_point else torch.finfo(dtype).eps
    return 2 * own + ulp * term
