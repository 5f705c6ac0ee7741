"""What a call asks of a machine, counted operator by operator, and how long that should take.

An operator takes the longest of: being launched, moving its bytes, computing its products. A GPU's host runs ahead, so
that a call takes the longer of what the host and what the device takes; on a CPU one comes after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU."""

    name: str = "H100 SXM"
    copy_bytes_per_s: float = 2.9e12
    """Read and written together by `copy_`: 87 % of 3.35 TB/s."""
    tensor_flops: float = 660e12
    """Of bf16 products on tensor cores, sustained: two thirds of the dense peak of 989."""
    exps_per_s: float = 132 * 16 * 1.755e9
    """Exponentials: 16 a clock of each of 132 processors."""
    lanes_per_s: float = 132 * 128 * 1.755e9
    """Other float32 instructions of one lane."""
    launch_s: float = 2.2e-6
    """A kernel of a CUDA graph, from the end of the one before to its own first instruction."""
    host_s: float = 6e-6
    """What the host takes to ask for an operator of PyTorch, eagerly."""
    queues: bool = True
    """Whether the host runs ahead: then its time and the device's are side by side, else one after the other."""

    def line(self) -> str:
        """For people."""
        if not self.queues:
            return (
                f"{self.name}: copies at {self.copy_bytes_per_s / 1e9:.1f} GB/s, products at "
                f"{self.tensor_flops / 1e9:.0f} GFLOP/s, {self.host_s * 1e6:.1f} us an operator"
            )
        return (
            f"{self.name}: copies at {self.copy_bytes_per_s / 1e12:.1f} TB/s, tensor cores at "
            f"{self.tensor_flops / 1e12:.0f} TFLOP/s sustained, {self.exps_per_s / 1e12:.1f}e12 exponentials and "
            f"{self.lanes_per_s / 1e12:.0f}e12 other instructions a second, {self.launch_s * 1e6:.1f} us a launch"
        )


@dataclass
class Asked:
    """What a call asks for."""

    launches: int = 0
    nbytes: int = 0
    flops: int = 0
    device_s: float = 0.0
    """The longest of the three for every operator, added up."""

    def seconds(self, machine: Machine) -> float:
        """How long that should take."""
        host = self.launches * machine.host_s
        return max(host, self.device_s) if machine.queues else host + self.device_s

    def told(self, machine: Machine) -> dict[str, Any]:
        """For the results file."""
        counts = {"launches": self.launches, "bytes": self.nbytes, "flops": self.flops}
        return {"seconds": self.seconds(machine), **counts, "machine": machine.line()}


class Counting(TorchDispatchMode):
    """Adds up what the operators within it ask for, those of a backward pass too. Views and empty tensors are free."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine, self.asked = machine, Asked()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if is_free(func):
            return out
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        asked, machine = self.asked, self.machine
        asked.launches += 1
        asked.nbytes += nbytes
        asked.flops += flops
        asked.device_s += max(machine.launch_s, nbytes / machine.copy_bytes_per_s, flops / machine.tensor_flops)
        return out


def is_free(func: Any) -> bool:
    """Whether an operator launches nothing: it makes a view, or memory that nobody has written."""
    returns = func._schema.returns
    views = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return views or func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach", "_unsafe_view", "alias"))


def asked_by(run: Callable[[], Any], machine: Machine) -> Asked:
    """Run a call once, and count."""
    with Counting(machine) as counting:
        run()
    return counting.asked


def machine_of(device: torch.device) -> Machine:
    """What is assumed of a GPU; a CPU is asked, for a tenth of a second."""
    return Machine() if device.type == "cuda" else this_cpu()


SMALL, MIDDLE, LARGE = 16, 512, 2**24


def this_cpu() -> Machine:
    """This CPU with torch's present threads: a copy, a product, and an operator that has nothing to do."""
    tiny, side, source = torch.zeros(SMALL), torch.randn(MIDDLE, MIDDLE), torch.ones(LARGE)
    target = torch.empty_like(source)
    launch = best(lambda: tiny.add_(1), repeats=200)
    return Machine(
        name="this CPU",
        copy_bytes_per_s=2 * 4 * LARGE / best(lambda: target.copy_(source)),
        tensor_flops=2 * MIDDLE**3 / best(lambda: torch.mm(side, side)),
        launch_s=0.0,
        host_s=launch,
        queues=False,
    )


def best(run: Callable[[], Any], *, repeats: int = 1, rounds: int = 3) -> float:
    """Seconds of a call: the least of some rounds after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        times.append((time.perf_counter() - begin) / repeats)
    return min(times[1:])
