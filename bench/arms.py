"""Arms that the losses share: value and gradients of a loss, on each of our backends, and compiled.

Everything is timed as loss plus gradients (but for the settings that say "forward").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.harness import Arm, Call, Inputs, backends_of, on_backend, with_graph


def loss_arm(
    name: str,
    what: str,
    kind: str,
    loss: Callable[[Inputs], Callable[[], Tensor]],
    *,
    forward: bool = False,
) -> Arm:
    """An arm that returns the loss and its gradients to the inputs' leaves."""

    def bind(inputs: Inputs) -> Call:
        function, leaves = loss(inputs), inputs["leaves"]

        def run() -> Sequence[Tensor]:
            if forward:
                with torch.no_grad():
                    return [function()]
            value = function()
            return [value.detach(), *torch.autograd.grad(value, leaves)]

        return Call(run)

    return Arm(name, what, kind, bind)


def our_arms(
    op: str,
    device: torch.device,
    size: str,
    graphs: bool,
    forward: bool,
    loss: Callable[[Inputs], Callable[[], Tensor]],
) -> Iterator[Arm]:
    """One arm per backend, and its graph replay where the sizes are small. The backward pass runs on it too."""
    for backend in backends_of(op, device):
        if backend == "reference" and size not in ("tiny", "full"):
            continue
        yield from with_graph(_our_arm(op, backend, device, loss, forward), graphs and backend != "reference")


def _our_arm(
    op: str, backend: str, device: torch.device, loss: Callable[[Inputs], Callable[[], Tensor]], forward: bool
) -> Arm:
    plain = loss_arm(f"sdmp {backend}", f"this project, {backend} backend", "ours", loss, forward=forward)

    def bind(inputs: Inputs) -> Call:
        return Call(on_backend(op, backend, device, plain.bind(inputs).run))

    return Arm(plain.name, plain.what, "ours", bind)


def compiled(
    name: str, loss: Callable[..., Tensor], given: Callable[[Inputs], tuple[Any, ...]], *, tuned: bool = False
) -> Iterator[Arm]:
    """`torch.compile` of a plain form; `tuned`: also with tuned matrix products, which takes it minutes."""
    for mode in ["default", "max-autotune-no-cudagraphs"] if tuned else ["default"]:
        yield _compiled(name, mode, loss, given)


def _compiled(name: str, mode: str, loss: Callable[..., Tensor], given: Callable[[Inputs], tuple[Any, ...]]) -> Arm:
    state: dict[str, Any] = {}

    def make(inputs: Inputs) -> Callable[[], Tensor]:
        if "run" not in state:
            state["run"] = torch.compile(loss, fullgraph=True, dynamic=False, mode=mode)
        arguments = given(inputs)
        return lambda: state["run"](*arguments)

    label = f"torch.compile {name}" + ("" if mode == "default" else " max-autotune")
    return loss_arm(label, f"torch {torch.__version__} torch.compile mode={mode} of the {name} form", "compile", make)
