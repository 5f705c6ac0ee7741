"""The one place that launches Triton kernels, and the fixed launch tables they are launched by.

No autotuner runs: a table per architecture (`tables/<arch>.json`, written by `python -m bench tune`) gives the
constants of every kernel and shape bucket, so that ranks and runs cannot differ.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLES = Path(__file__).parent / "tables"
DEFAULT_ARCH = "sm_80"
_recorders: list[set[str]] = []
_tables_in_force: list[Mapping[str, dict[str, Any]]] = []


class Compile(NamedTuple):
    """One ahead-of-time compilation of a kernel, and what must be true of it.

    Attributes:
        kernel: the `@triton.jit` function.
        signature: argument name -> Triton type, such as "*bf16", "i64", "fp32"; "constexpr" for constants.
        constants: the values of the constexpr arguments.
        divisible: pointer and integer arguments known to be multiples of 16 (what Triton specialises on by itself).
        num_warps, num_stages: as launched.
        facts: of "wide_loads", "wide_stores" (every access of a tensor is 128-bit, but for those whose source line
            says `# narrow: <why>`), "no_spills", "tensor_cores" (any), "warpgroup_mma" (HGMMA on sm_90, and not
            waited for one by one; tcgen05 on sm_100; holds of itself elsewhere), "registers<=N", "barriers<=N",
            "loop<=N" (instructions of the hottest loop) and "in_flight>=N". Shared memory is always checked.
        name: how reports call it.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    facts: tuple[str, ...]
    name: str


def launch(
    kernel: Any,
    grid: Sequence[int],
    device: torch.device,
    *args: Any,
    num_warps: int,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Launch on the tensors' device and its current stream; a grid with a zero launches nothing.

    Floating-point contraction is off, so that a product and a sum round as they do in the reference.
    """
    for names in _recorders:
        names.add(kernel.__name__)
    if 0 in grid:
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[tuple(grid)](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **constants)


_TYPES = {
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
}


def compilation(
    kernel: Any,
    *args: Any,
    num_warps: int,
    num_stages: int = 2,
    facts: Sequence[str] = (),
    name: str,
    **constants: Any,
) -> Compile:
    """What `launch` compiles when it gets these arguments, as a `Compile`; tensors may be on the meta device.

    So an op's `compiles` can hand the very arguments of a launch to this function, and the two cannot differ.
    """
    names = kernel.arg_names[: len(args)]
    free = {p.name for p in getattr(kernel, "params", ()) if p.do_not_specialize}
    signature, ones, divisible = {}, {}, []
    for argument, value in zip(names, args, strict=True):
        if isinstance(value, torch.Tensor):
            signature[argument] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[argument], aligned = "fp32", False
        elif value == 1 and argument not in free:
            # What Triton does by itself with an integer of 1.
            signature[argument], ones[argument], aligned = "constexpr", 1, False
        else:
            signature[argument] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and argument not in free
        divisible += [argument] if aligned else []
    signature |= dict.fromkeys(constants, "constexpr")
    values = {**ones, **constants}
    return Compile(kernel, signature, values, tuple(divisible), num_warps, num_stages, tuple(facts), name)


class Call(NamedTuple):
    """A launch not yet made, so that what is compiled ahead of time is what is launched.

    Attributes:
        kernel, grid, args: as `launch` takes them.
        num_warps, num_stages: likewise.
        constants: the kernel's constexpr arguments.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]

    def launch(self, device: torch.device) -> None:
        """Make it."""
        stages = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        launch(self.kernel, self.grid, device, *self.args, **stages, **self.constants)

    def compilation(self, name: str, facts: Sequence[str]) -> Compile:
        """What it compiles."""
        stages = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return compilation(self.kernel, *self.args, **stages, facts=facts, name=name, **self.constants)


@contextlib.contextmanager
def recording() -> Iterator[set[str]]:
    """The names of the kernels launched within the context: how tests prove that every path ran."""
    names: set[str] = set()
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders.remove(names)


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like; "cpu" under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def table(arch: str) -> Mapping[str, dict[str, Any]]:
    """Launch constants of an architecture: "<op>.<kernel>.<bucket>" -> constants. The stated default is sm_80's."""
    return _tables_in_force[-1] if _tables_in_force else _stored(arch)


@functools.cache
def _stored(arch: str) -> dict[str, dict[str, Any]]:
    path = TABLES / f"{arch}.json"
    if not path.exists():
        path = TABLES / f"{DEFAULT_ARCH}.json"
    return json.loads(path.read_text())


@contextlib.contextmanager
def table_in_force(entries: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Within the context every launch reads its constants from `entries`, whatever the architecture: to measure them.

    In all threads: a backward pass runs in autograd's own.
    """
    _tables_in_force.append(entries)
    try:
        yield
    finally:
        _tables_in_force.pop()


def constants(arch: str, key: str) -> dict[str, Any]:
    """The launch constants of `key` on `arch`, taken from the default architecture where its own table lacks it."""
    found = table(arch).get(key)
    return dict(found if found is not None else table(DEFAULT_ARCH)[key])


def table_digest(arch: str) -> str:
    """A short hash of the table in force, for logs and checkpoints."""
    return hashlib.sha256(json.dumps(dict(table(arch)), sort_keys=True).encode()).hexdigest()[:12]
