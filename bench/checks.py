"""Checks that only a real GPU can settle, and that the benchmarks rest on: `python -m bench check NAME`.

ceilings: what a copy and a matrix product reach here, in this run.
large: tensors of more than 2^31 elements, first, middle and last rows compared with the reference.
nosync: no op and no training step makes the host wait for the GPU.

Each takes `tiny`, which runs the same code at sizes for the interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import losses, mix, step
from bench.clock import clock_of
from bench.harness import (
    Absent,
    Arm,
    Call,
    Runner,
    Setting,
    backends_of,
    largest_error,
    once,
    percentiles,
    short,
    words,
)
from bench.results import Results
from sdmp_kernels import MixPlan, TwoHot, _backends, draw_plan, info_nce, soft_cross_entropy, use_backend
from sdmp_kernels import mix as mix_op
from sdmp_kernels.ops.distillation import distillation

BEYOND = 2**31 + 8


def run(name: str, device: torch.device, *, tiny: bool, results: Results) -> int:
    """Run one check and write its outcome; returns the exit code."""
    return {"ceilings": ceilings, "large": large, "nosync": no_sync}[name](device, tiny, results)


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
    failed = 0
    for op, trial in (
        ("mix", _large_mix),
        ("soft_cross_entropy", _large_cross_entropy),
        ("info_nce", _large_info_nce),
        ("distillation", _large_distillation),
    ):
        for backend in _compiled_backends(op, device):
            started = time.monotonic()
            try:
                worst = trial(device, tiny, backend)
                status = "passed" if worst <= 1 else "failed"
                detail = f"largest error is {worst:.2g} of what is allowed"
            except Absent as absent:
                status, detail = "absent", str(absent)
            except torch.OutOfMemoryError:
                status, detail = "absent", "this GPU has too little free memory for it"
            except ImportError as error:
                status, detail = "absent", f"not built yet ({error})"
            except Exception as error:
                # Whatever breaks in one op, the others are still checked.
                status, detail = "failed", words(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            failed += status == "failed"
            print(f"  {op} on {backend}: {status} ({detail})")
            results.check(f"large {op} {backend}", status, detail, time.monotonic() - started)
    return int(failed > 0)


def _compiled_backends(op: str, device: torch.device) -> list[str]:
    names = [b for b in backends_of(op, device) if b != "reference"]
    return [b for b in names if _backends.unavailable(b, device.type) is None]


def _rows(n: int, device: torch.device) -> Tensor:
    """First, middle and last rows, with the partners that the flip gives them."""
    some = {i for i in (0, 1, n // 2 - 1, n // 2, n - 2, n - 1) if 0 <= i < n}
    return torch.tensor(sorted(some | {n - 1 - i for i in some}), device=device)


def _fits(device: torch.device, nbytes: int) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < nbytes:
        raise Absent(f"needs {nbytes / 1e9:.0f} GB of free GPU memory")


def _within(results: list[Tensor], truths: list[Tensor], dtype: torch.dtype) -> float:
    """The largest error as a share of what is allowed: four ulps of the largest value."""
    shares = [
        largest_error(result, truth) / (4 * torch.finfo(dtype).eps * max(float(truth.detach().abs().max()), 1e-30))
        for result, truth in zip(results, truths, strict=True)
    ]
    return max(shares)


def _large_mix(device: torch.device, tiny: bool, backend: str) -> float:
    """uint8 images in and out, every rule, the flip; the backward pass is linear in the same offsets."""
    px = 16 if tiny else 224
    n = 6 if tiny else BEYOND // (3 * px * px) + 1
    _fits(device, 3 * n * 3 * px * px)
    images = torch.randint(0, 256, (n, 3, px, px), dtype=torch.uint8, device=device)
    plan = draw_plan(n, (px, px), per="sample", seed=0, step=0, device=device)
    with use_backend(backend, "mix"):
        mixed = mix_op(images, plan)
    assert isinstance(mixed, Tensor)
    rows = _rows(n, device)
    part = _part(plan, rows)
    with use_backend("reference", "mix"):
        truth = mix_op(images[rows], part)
    assert isinstance(truth, Tensor)
    # One step of uint8: a tie may round either way.
    return largest_error(mixed[rows], truth)


def _part(plan: MixPlan, rows: Tensor) -> MixPlan:
    """The plan of some rows that are closed under its pairing."""
    place = {int(row): i for i, row in enumerate(rows)}
    partner = torch.tensor([place[int(plan.partner[row])] for row in rows], device=rows.device)
    return MixPlan(
        rule=plan.rule[rows],
        partner=partner,
        lam=plan.lam[rows],
        partner_lam=plan.partner_lam[rows],
        box=plan.box[rows],
        size=plan.size,
        mirrored=False,
        rules=plan.rules,
    )


def _two_hot(n: int, columns: int, device: torch.device) -> TwoHot:
    generator = torch.Generator(device).manual_seed(0)
    first, second = (torch.randint(0, columns, (n,), device=device, generator=generator) for _ in range(2))
    return TwoHot(first, second, torch.rand(n, device=device, generator=generator))


def _dtype(tiny: bool) -> torch.dtype:
    # The interpreter is wrong for bfloat16.
    return torch.float32 if tiny else torch.bfloat16


def _large_cross_entropy(device: torch.device, tiny: bool, backend: str) -> float:
    columns = 32 if tiny else 65536
    n = 6 if tiny else BEYOND // columns + 1
    _fits(device, 5 * n * columns)
    logits = torch.randn(n, columns, device=device, dtype=_dtype(tiny)).requires_grad_()
    target = _two_hot(n, columns, device)
    with use_backend(backend, "soft_cross_entropy"):
        loss = soft_cross_entropy(logits, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), [logits])
    rows = _rows(n, device)
    exact = logits.detach()[rows].double().requires_grad_()
    with use_backend("reference", "soft_cross_entropy"):
        truth = soft_cross_entropy(exact, TwoHot(*(t[rows] for t in target)), reduction="none")
        (truth_grad,) = torch.autograd.grad(truth.sum(), [exact])
    return _within([loss[rows], grad[rows]], [truth, truth_grad], logits.dtype)


def _large_info_nce(device: torch.device, tiny: bool, backend: str) -> float:
    """Queries whose own offsets pass 2^31, against few keys."""
    width, keys = (16, 8) if tiny else (256, 128)
    n = 6 if tiny else BEYOND // width + 1
    _fits(device, 14 * n * width)
    q = torch.randn(n, width, device=device, dtype=_dtype(tiny)).mul_(width**-0.5).requires_grad_()
    k = (torch.randn(keys, width, device=device) * width**-0.5).to(q.dtype)
    target = _two_hot(n, keys, device)
    with use_backend(backend, "info_nce"):
        loss = info_nce(q, k, target, temperature=0.2, reduction="none")
        assert isinstance(loss, Tensor)
        (grad,) = torch.autograd.grad(loss.sum(), [q])
    rows = _rows(n, device)
    exact = q.detach()[rows].double().requires_grad_()
    with use_backend("reference", "info_nce"):
        truth = info_nce(exact, k.double(), TwoHot(*(t[rows] for t in target)), temperature=0.2, reduction="none")
        assert isinstance(truth, Tensor)
        (truth_grad,) = torch.autograd.grad(truth.sum(), [exact])
    return _within([loss[rows], grad[rows]], [truth, truth_grad], q.dtype)


def _large_distillation(device: torch.device, tiny: bool, backend: str) -> float:
    crops, teachers, columns = (3, 2, 32) if tiny else (10, 2, 65536)
    n = 6 if tiny else BEYOND // (crops * columns) + 1
    _fits(device, 6 * crops * n * columns)
    student = torch.randn(crops, n, columns, device=device, dtype=_dtype(tiny)).requires_grad_()
    teacher = torch.randn(teachers, n, columns, device=device, dtype=_dtype(tiny))
    weights = torch.rand(2, crops, teachers, device=device)
    options: dict[str, Any] = {"own": weights[0], "other": weights[1], "teacher_temperature": 0.5, "reduction": "none"}
    with use_backend(backend, "distillation"):
        loss = distillation(student, teacher, **options)
        assert isinstance(loss, Tensor)
        (grad,) = torch.autograd.grad(loss.sum(), [student])
    rows = _rows(n, device)
    exact = student.detach()[:, rows].double().requires_grad_()
    with use_backend("reference", "distillation"):
        truth = distillation(exact, teacher[:, rows].double(), **options)
        assert isinstance(truth, Tensor)
        (truth_grad,) = torch.autograd.grad(truth.sum(), [exact])
    return _within([loss[rows], grad[:, rows]], [truth, truth_grad], student.dtype)


# No host synchronisation.


def no_sync(device: torch.device, tiny: bool, results: Results) -> int:
    """Run every op and ten training steps where a host synchronisation is an error."""
    failed = 0
    for name, bind in _no_sync_calls(device):
        started = time.monotonic()
        try:
            call = bind()
            call()  # compiles, and allocates what is allocated once
            with _syncs_are_errors(device):
                for _ in range(1 if tiny else 10):
                    call()
            status, detail = "passed", "no host synchronisation"
        except (Absent, ImportError) as absent:
            status, detail = "absent", str(absent)
        except Exception as error:
            # A host synchronisation is a RuntimeError here; whatever it is, the others are still checked.
            status, detail = "failed", words(error)
        failed += status == "failed"
        print(f"  {name}: {status} ({detail})")
        results.check(f"nosync {name}", status, detail, time.monotonic() - started)
    return int(failed > 0)


def _no_sync_calls(device: torch.device) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """(name, function that binds it) of our compiled arms of every tiny setting, and of a training step."""
    for setting in (*mix.settings(device, "tiny"), *losses.settings(device, "tiny")):
        for arm in setting.arms:
            if arm.kind == "ours" and not arm.graph and "reference" not in arm.name:
                yield f"{setting.name}, {arm.name}", functools.partial(_bound, arm, setting)
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
