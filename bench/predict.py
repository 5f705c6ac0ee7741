"""What a call asks of a machine, how long that should take, and what each goal should so come out at on a GPU.

An operator of PyTorch takes the longest of: being launched, moving its bytes, computing its products (`Counting`, which
watches a call). A GPU's host runs ahead, so that a call takes the longer of what the host and what the device takes; on
a CPU one comes after the other. Within our own kernels, whose bytes and operations are in their ops' `cases.py`, a
program's products and exponentials take turns (`attention_seconds`).

A first run on a GPU confirms or refutes these numbers instead of starting from nothing: `bench step` has them beside
its times, and `python -m bench table --write` puts them, each with its formula, beside what was measured, in
docs/gpu-run.md. What is off by more than `APART` wants a reason.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import info_nce
from bench.goals import CLAIMS, Outcome, outcomes


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
    """What a call asks for: bytes and operations of every operator that it launches."""

    operators: list[tuple[int, int]] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """How many operators."""
        return len(self.operators)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(nbytes for nbytes, _ in self.operators)

    @property
    def flops(self) -> int:
        """Of all of them."""
        return sum(flops for _, flops in self.operators)

    def device_seconds(self, machine: Machine) -> float:
        """The longest of launch, bytes and products for every operator, added up."""
        return sum(
            max(machine.launch_s, nbytes / machine.copy_bytes_per_s, flops / machine.tensor_flops)
            for nbytes, flops in self.operators
        )

    def host_seconds(self, machine: Machine) -> float:
        """What the host takes to ask for them."""
        return self.launches * machine.host_s

    def seconds(self, machine: Machine) -> float:
        """How long the call should take."""
        host, device = self.host_seconds(machine), self.device_seconds(machine)
        return max(host, device) if machine.queues else host + device

    def told(self, machine: Machine) -> dict[str, Any]:
        """For the results file."""
        counts = {"launches": self.launches, "bytes": self.nbytes, "flops": self.flops}
        return {"seconds": self.seconds(machine), **counts, "machine": machine.line()}

    def formula(self, machine: Machine) -> str:
        """Where the time comes from, for people."""
        bytes_ms, flops_ms = 1e3 * self.nbytes / machine.copy_bytes_per_s, 1e3 * self.flops / machine.tensor_flops
        return (
            f"{self.launches:,} operators, each the longest of its launch, its share of {self.nbytes / 1e9:.0f} GB "
            f"({bytes_ms:.0f} ms) and of {self.flops / 1e12:.1f} TFLOP ({flops_ms:.0f} ms): "
            f"{1e3 * self.device_seconds(machine):.0f} ms, while the host asks for them in "
            f"{1e3 * self.host_seconds(machine):.0f} ms"
        )


# The CPU's attention, whose products torch does not count: they are those of a GPU's.
FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


class Counting(TorchDispatchMode):
    """Adds up what the operators within it ask for, those of a backward pass too. Views and empty tensors are free."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = Asked()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if is_free(func):
            return out
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        formula = flop_registry.get(FLOPS.get(func.overloadpacket, func.overloadpacket))
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        self.asked.operators.append((nbytes, flops))
        return out


def is_free(func: Any) -> bool:
    """Whether an operator launches nothing: it makes a view, or memory that nobody has written, or asks for a fact."""
    returns = func._schema.returns
    views = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    names = ("empty", "new_empty", "detach", "_unsafe_view", "alias")
    return views or func.namespace == "prim" or func.overloadpacket.__name__.startswith(names)


def asked_by(run: Callable[[], Any]) -> Asked:
    """Run a call once, and count."""
    with Counting() as counting:
        run()
    return counting.asked


def beside(device: torch.device, runs: Sequence[Callable[[], Any]]) -> list[dict[str, Any]]:
    """What each of these calls should take there, for the results file: every one is run once."""
    machine = machine_of(device)
    return [asked_by(run).told(machine) for run in runs]


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


APART = 0.15


@dataclass(frozen=True)
class Prediction:
    """A number in the unit of its claim, and how it comes about."""

    value: float
    formula: str


LANES = 6
"""Instructions of a lane for every logit beside its exponential: scale, subtract, compare, add, convert."""


def predictions(machine: Machine | None = None) -> dict[tuple[str, str], Prediction]:
    """By (goal, words) of a claim. Ratios to other people's code are not predicted."""
    gpu = machine or Machine()
    found: dict[tuple[str, str], Prediction] = {}
    for rule in ("mixup", "cutmix"):
        found["G1", f"{rule} bf16, n = 1024: time over a copy's"] = Prediction(
            1.0, "each byte read and written once, one launch: a copy's time"
        )
    found["G1", "resizemix bf16, n = 1024: time over a copy's"] = Prediction(
        1.25,
        "the box, half an image on average, is written twice; its 155 instructions for a pixel of three channels, "
        "with twelve taps in flight, take 0.6 of a copy's time and hide",
    )
    found["G1", "mixup: launches"] = Prediction(1, "counted in the code")
    found["G1", "mixup: host syncs"] = Prediction(0, "counted in the code")
    found["G2", "uint8 to bf16, clean and mixed, n = 1024: time over a copy's"] = Prediction(
        1.0, "one byte read and four written a value, each once"
    )
    big = info_nce.model(n=32768, width=256, dtype=torch.bfloat16)
    found["G3", "info_nce bf16, n = m = 32768, d = 256: Triton"] = Prediction(
        big.flops / attention_seconds(gpu, 32768, 32768, big.flops) / 1e12,
        "operations / (products + exponentials + other instructions): a program's softmax and its products take turns",
    )
    found["G3", "the same: over one flash attention"] = Prediction(1.0, "the same products and exponentials")
    both = info_nce.model(n=32768, width=256, dtype=torch.bfloat16, key_grad=True)
    again = attention_seconds(gpu, 32768, 32768, big.flops) + attention_seconds(
        gpu, 32768, 32768, both.flops - big.flops
    )
    found["G4", "info_nce with key gradients, 32768: Triton"] = Prediction(
        both.flops / again / 1e12, "the same, and once more for the gradient of the keys, which makes the products anew"
    )
    for n in (1024, 4096):
        small = info_nce.model(n=n, width=256, dtype=torch.bfloat16, terms=2)
        words = f"info_nce both terms, n = {n}, CUDA graph"
        seconds = 3 * gpu.launch_s + attention_seconds(gpu, n, 2 * n, small.flops)
        found["G5", words] = Prediction(
            seconds * 1e6, "3 launches (attend, merge, scale) + products, exponentials and other instructions"
        )
        found["G5", f"{words}: launches"] = Prediction(
            3, "attend and merge for both terms, and the scale of the backward"
        )
    formulas = {
        "G6": "bytes that must move / bytes that the kernels move",
        "G7": "bytes that the kernels move / bytes that must move",
    }
    for claim in CLAIMS:
        if claim.reach is not None:
            found[claim.goal, claim.words] = Prediction(claim.reach, formulas[claim.goal])
    asked = asked_of_a_step()
    if asked is not None:
        found["G10", "ViT-S/16 step, batch 512: images per second"] = Prediction(
            STEP_BATCH / asked.seconds(gpu), asked.formula(gpu)
        )
    return found


STEP_BATCH = 512


@functools.cache
def asked_of_a_step() -> Asked | None:
    """The training step of G10 as it is configured, made once on fake images; None where the trainer's packages are
    not installed.

    Shapes and dtypes are all that is computed, on any machine, and no weight changes. Autocast is the CPU's: it lowers
    the same products, and whatever follows them is in the dtype that a GPU has there.
    """
    from bench import step  # which asks this module for what its own steps should take

    try:
        return asked_by(step.on_fake_images("sdmp", STEP_BATCH))
    except ImportError:
        return None


def attention_seconds(gpu: Machine, n: int, m: int, flops: int) -> float:
    """Products, then exponentials, then other instructions of n x m logits, one after the other."""
    logits = n * m
    return flops / gpu.tensor_flops + logits / gpu.exps_per_s + LANES * logits / gpu.lanes_per_s


def table(document: dict[str, Any] | None) -> str:
    """Every goal on a GPU: asked, predicted by which formula, and measured, if a GPU has run; what is off is marked."""
    known = predictions()
    lines = [
        f"Assumed of the machine: {Machine().line()}.",
        "",
        "| goal | | asked | predicted | because |" + (" measured |" if document else ""),
        "|---|---|---|---|---|" + ("---|" if document else ""),
    ]
    for outcome in outcomes(document, "cuda"):
        claim = outcome.claim
        asked = f"{'<=' if claim.at_most else '>='} {claim.bound:g}{claim.unit}"
        guess = known.get((claim.goal, claim.words))
        predicted, why = ("", "") if guess is None else (f"{guess.value:.3g}{claim.unit}", guess.formula)
        came_out = f" {measured(outcome, guess)} |" if document else ""
        lines.append(f"| {claim.goal} | {claim.words} | {asked} | {predicted} | {why} |{came_out}")
    return "\n".join(lines)


def measured(outcome: Outcome, guess: Prediction | None) -> str:
    """What came out, beside its prediction."""
    if outcome.value is None:
        return f"no: {outcome.why}"
    said = f"{outcome.value:.3g}{outcome.claim.unit}" + ("" if outcome.held else ", **missed**")
    if guess is None or abs(outcome.value - guess.value) <= APART * max(abs(guess.value), 1e-9):
        return said
    return (
        f"{said}, **{outcome.value / guess.value:.2f} of the prediction**"
        if guess.value
        else f"{said}, **not as predicted**"
    )
