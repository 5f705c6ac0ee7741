"""Checks that only a real GPU can settle, and that the benchmarks rest on: `python -m bench check NAME`.

ceilings: what a copy and a matrix product reach here, in this run.
large: tensors of more than 2^31 elements, first, middle and last rows compared with the reference.
nosync: no op and no training step makes the host wait for the GPU.
small: every op once on little, for compute-sanitizer.

Each takes `tiny`, which runs the same code at sizes for the interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import augment, losses, mix, step
from bench.clock import clock_of
from bench.harness import (
    EXIT_ABSENT,
    Arm,
    Call,
    Runner,
    Setting,
    absence,
    backends_of,
    once,
    percentiles,
    short,
    words,
)
from bench.results import Results
from sdmp_kernels import _backends


def run(name: str, device: torch.device, *, tiny: bool, results: Results) -> int:
    """Run one check and write its outcome; returns the exit code."""
    return {"ceilings": ceilings, "large": large, "nosync": no_sync, "small": small}[name](device, tiny, results)


def outcome_of(error: Exception) -> tuple[str, str]:
    """("absent", what) where something is not on this machine, else ("failed", the error in one line)."""
    why = absence(error)
    return ("failed", words(error)) if why is None else ("absent", why)


def exit_code(statuses: Sequence[str]) -> int:
    """Of a check with several parts: 1 where one failed, else `EXIT_ABSENT` where one was absent or there was none."""
    if "failed" in statuses:
        return 1
    return EXIT_ABSENT if "absent" in statuses or not statuses else 0


def ceilings(device: torch.device, tiny: bool, results: Results) -> int:
    """Copy bandwidth (read and written bytes) and matrix-product rates of this run."""
    nbytes = 2**20 if tiny else 2**32 if device.type == "cuda" else 2**28
    source = torch.randint(0, 255, (nbytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _median(lambda: [target.copy_(source)], device)
    results.document["ceilings"]["copy_gb_per_s"] = nbytes / seconds / 1e9
    side = 128 if tiny else 8192 if device.type == "cuda" else 2048
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        # Random values: on zeros a matrix product draws less power and runs faster.
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _median(functools.partial(_product, a, b, torch.empty_like(a)), device)
        results.document["ceilings"][f"matmul_{short(dtype)}_tflops"] = 2 * side**3 / seconds / 1e12
    results.write()
    print("  " + ", ".join(f"{name} {value:.4g}" for name, value in results.document["ceilings"].items()))
    return 0


def _product(a: Tensor, b: Tensor, out: Tensor) -> list[Tensor]:
    return [torch.mm(a, b, out=out)]


def _median(call: Callable[[], list[Tensor]], device: torch.device) -> float:
    runner = Runner(Arm("", "", "ceiling", lambda _: Call(call)), [Call(call)], [])
    for _ in range(3):
        call()
    return percentiles([once(runner, clock_of(device.type)).seconds for _ in range(10)])["p50"]


# More than 2^31 elements.


def large(device: torch.device, tiny: bool, results: Results) -> int:
    """Every op on tensors whose offsets pass 2^31, on every backend that runs on the device."""
    statuses = []
    for op in _backends.OPS:
        trial = importlib.import_module(f"bench.{op}").large
        for backend in _compiled_backends(op, device):
            started = time.monotonic()
            try:
                worst = trial(device, tiny, backend)
                status = "passed" if worst <= 1 else "failed"
                detail = f"largest error is {worst:.2g} of what is allowed"
            except torch.OutOfMemoryError:
                status, detail = "absent", "this GPU has too little free memory for it"
            except Exception as error:
                # Whatever breaks in one op, the others are still checked.
                status, detail = outcome_of(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            statuses.append(status)
            print(f"  {op} on {backend}: {status} ({detail})")
            results.check(f"large {op} {backend}", status, detail, time.monotonic() - started)
    return exit_code(statuses)


def _compiled_backends(op: str, device: torch.device) -> list[str]:
    names = [b for b in backends_of(op, device) if b != "reference"]
    return [b for b in names if _backends.unavailable(b, device.type) is None]


# Every op once, on little: for compute-sanitizer, under which each kernel takes a hundred times as long.


def small(device: torch.device, tiny: bool, results: Results) -> int:
    """Every compiled arm of the tiny settings, run once and waited for; `tiny` changes nothing."""
    statuses = []
    for name, bind in _calls(device, mix, losses, augment):
        started = time.monotonic()
        try:
            bind()()
            clock_of(device.type).wait()
            status, detail = "passed", "ran"
        except Exception as error:
            status, detail = outcome_of(error)
        statuses.append(status)
        results.check(f"small {name}", status, detail, time.monotonic() - started)
    print(f"  {statuses.count('passed')} of {len(statuses)} calls ran")
    return exit_code(statuses)


# No host synchronisation.


def no_sync(device: torch.device, tiny: bool, results: Results) -> int:
    """Run every op and ten training steps where a host synchronisation is an error."""
    statuses = []
    for name, bind in _no_sync_calls(device):
        started = time.monotonic()
        try:
            call = bind()
            call()  # compiles, and allocates what is allocated once
            with _syncs_are_errors(device):
                for _ in range(1 if tiny else 10):
                    call()
            status, detail = "passed", "no host synchronisation"
        except Exception as error:
            # A host synchronisation is a RuntimeError here; whatever it is, the others are still checked.
            status, detail = outcome_of(error)
        statuses.append(status)
        print(f"  {name}: {status} ({detail})")
        results.check(f"nosync {name}", status, detail, time.monotonic() - started)
    return exit_code(statuses)


def _calls(device: torch.device, *questions: Any) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """(name, function that binds it) of our compiled arms of these questions' tiny settings."""
    for setting in itertools.chain.from_iterable(question.settings(device, "tiny") for question in questions):
        for arm in setting.arms:
            if arm.kind == "ours" and not arm.graph and "reference" not in arm.name:
                yield f"{setting.name}, {arm.name}", functools.partial(_bound, arm, setting)


def _no_sync_calls(device: torch.device) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """Those of mixing and the losses, and a training step."""
    yield from _calls(device, mix, losses)
    setting = step.step_setting(device, "tiny", 4)
    yield "training step", functools.partial(_bound, setting.arms[0], setting)


def _bound(arm: Arm, setting: Setting) -> Callable[[], object]:
    return arm.bind(setting.inputs(0)).run


@contextlib.contextmanager
def _syncs_are_errors(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
