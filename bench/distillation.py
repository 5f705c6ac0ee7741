"""`distillation`, beside DINO's double loop over crops, its collapsed form and torch.compile of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.arms import compiled, loss_arm, our_arms
from bench.harness import Arm, Inputs, Model, Setting, ceiling_copy, model_of, short, with_graph
from bench.large import BEYOND, dtype_of, fits, some_rows, within
from sdmp_kernels import draw_plan, use_backend
from sdmp_kernels.ops.distillation import distillation

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
GLOBAL_CROPS, CLEAN_CROPS = 2, 6  # of V student crops: 2 global, then clean local ones up to here, then mixed ones


@dataclass(frozen=True)
class Crops:
    """Sizes of a distillation: V student crops, T teacher crops, N images, K prototypes."""

    v: int
    t: int
    n: int
    k: int


def setting(
    *, n: int, columns: int, dtype: torch.dtype, device: torch.device, size: str, v: int = 10, t: int = 2
) -> Setting:
    """DINO's loss with half of the local crops mixed: V student crops against T teacher crops."""
    crops = Crops(v, t, n, columns)
    return Setting(
        op="distillation",
        name=f"distillation {short(dtype)}, n = {n}, {v} + {t} crops, k = {columns}",
        config={"n": n, "v": v, "t": t, "k": columns, "dtype": short(dtype)},
        inputs=functools.partial(_inputs, crops, dtype, device),
        truth=_truth,
        plain=_plain,
        outputs=("loss", "dstudent"),
        dtype=dtype,
        arms=list(_arms(crops, dtype, device, size)),
        model=model(crops, dtype),
    )


def model(crops: Crops, dtype: torch.dtype) -> Model:
    """Bytes and operations of a setting: all of its crops have terms of both kinds."""
    student, teacher = (torch.empty(many, crops.n, crops.k, dtype=dtype, device="meta") for many in (crops.v, crops.t))
    other = torch.empty(crops.v, crops.t, crops.n, device="meta")
    return model_of("distillation", student=student.requires_grad_(), teacher=teacher, other=other)


def _inputs(crops: Crops, dtype: torch.dtype, device: torch.device, copy: int) -> Inputs:
    """Logits like those of normalised prototypes, and the weights of every (student crop, teacher crop, image)."""
    generator = torch.Generator(device).manual_seed(copy)
    shape = (crops.n, crops.k)
    student = (torch.randn(crops.v, *shape, device=device, generator=generator) / 4).to(dtype).requires_grad_()
    teacher = (torch.randn(crops.t, *shape, device=device, generator=generator) / 4).to(dtype)
    plan = draw_plan(crops.n, (32, 32), rules=["mixup"], per="sample", seed=0, step=copy).to(device)
    own = torch.zeros(crops.v, crops.t, crops.n, device=device)
    other = torch.zeros_like(own)
    clean_terms = CLEAN_CROPS * crops.t - GLOBAL_CROPS
    own[:CLEAN_CROPS] = 1 / clean_terms
    for crop in range(GLOBAL_CROPS):
        own[crop, crop] = 0  # a view is never its own teacher
    mixed_terms = (crops.v - CLEAN_CROPS) * crops.t
    own[CLEAN_CROPS:] = plan.lam / mixed_terms
    other[CLEAN_CROPS:] = (1 - plan.lam) / mixed_terms
    center = torch.randn(crops.k, device=device, generator=generator) / 100
    return {
        "student": student,
        "teacher": teacher,
        "lam": plan.lam,
        "own": own,
        "other": other,
        "center": center,
        "leaves": [student],
    }


def _truth(inputs: Inputs) -> list[Tensor]:
    """By student crop in float64: weight * lse - sum(target * z)."""
    teacher = torch.softmax((inputs["teacher"].double() - inputs["center"].double()) / TEACHER_TEMPERATURE, -1)
    total, grads = teacher.new_zeros(()), []
    for crop, own, other in zip(inputs["student"].detach(), inputs["own"], inputs["other"], strict=True):
        z = crop.double() / STUDENT_TEMPERATURE
        target = (own.double()[..., None] * teacher + other.double()[..., None] * teacher.flip(1)).sum(0)
        weight = (own + other).double().sum(0)[:, None]
        lse = torch.logsumexp(z, 1, keepdim=True)
        total += (weight * lse - (target * z).sum(1, keepdim=True)).mean()
        grads.append((weight * torch.exp(z - lse) - target) / (STUDENT_TEMPERATURE * len(z)))
    return [total, torch.stack(grads)]


def _plain(inputs: Inputs) -> list[Tensor]:
    loss = double_loop(*_given(inputs))
    return [loss.detach(), *torch.autograd.grad(loss, inputs["leaves"])]


def _given(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs[name] for name in ("student", "teacher", "lam", "own", "other", "center"))


def double_loop(student: Tensor, teacher: Tensor, lam: Tensor, own: Tensor, other: Tensor, center: Tensor) -> Tensor:
    """One cross-entropy for every pair of a teacher crop and a student crop, in the manner of DINO's loss."""
    targets = torch.softmax((teacher.float() - center) / TEACHER_TEMPERATURE, -1)
    lam = lam[:, None]
    clean_terms = CLEAN_CROPS * len(teacher) - GLOBAL_CROPS
    mixed_terms = (len(student) - CLEAN_CROPS) * len(teacher)
    total = student.new_zeros((), dtype=torch.float32)
    for t, target in enumerate(targets):
        for v, crop in enumerate(student):
            if v == t:
                continue
            mixed = v >= CLEAN_CROPS
            wanted = lam * target + (1 - lam) * target.flip(0) if mixed else target
            entropy = torch.sum(-wanted * F.log_softmax(crop.float() / STUDENT_TEMPERATURE, -1), -1)
            total = total + entropy.mean() / (mixed_terms if mixed else clean_terms)
    return total


def collapsed(student: Tensor, teacher: Tensor, lam: Tensor, own: Tensor, other: Tensor, center: Tensor) -> Tensor:
    """One pass per student crop, as cross-entropy is linear in its target: weight * lse - sum(target * z)."""
    probability = torch.softmax((teacher.float() - center) / TEACHER_TEMPERATURE, -1)
    losses = []
    for crop, a, b in zip(student.unbind(0), own.unbind(0), other.unbind(0), strict=True):
        z = crop.float() / STUDENT_TEMPERATURE
        target = (a[..., None] * probability + b[..., None] * probability.flip(1)).sum(0)
        losses.append(((a + b).sum(0) * torch.logsumexp(z, 1) - (target * z).sum(1)).mean())
    return torch.stack(losses).sum()


def our_distillation(inputs: Inputs) -> Callable[[], Tensor]:
    """All crops in one call."""

    def run() -> Tensor:
        loss = distillation(
            inputs["student"],
            inputs["teacher"],
            own=inputs["own"],
            other=inputs["other"],
            center=inputs["center"],
            student_temperature=STUDENT_TEMPERATURE,
            teacher_temperature=TEACHER_TEMPERATURE,
        )
        return loss if isinstance(loss, Tensor) else loss[0]

    return run


def _arms(crops: Crops, dtype: torch.dtype, device: torch.device, size: str) -> Iterator[Arm]:
    # The host takes longer over a call than the GPU: a replay shows the kernels.
    graphs = device.type == "cuda"
    yield from with_graph(ceiling_copy(model(crops, dtype).floor_bytes, device), graphs)
    yield from our_arms("distillation", device, size, graphs, False, our_distillation)
    forms = {"double loop": double_loop, "collapsed": collapsed}
    for name, form in forms.items():
        yield _form(name, form)
    if size != "tiny":
        for name, form in forms.items():
            for arm in compiled(name, form, _given):
                yield from with_graph(arm, graphs)


def _form(name: str, form: Callable[..., Tensor]) -> Arm:
    what = f"torch {torch.__version__} eager: {form.__doc__}"
    return loss_arm(f"eager {name}", what, "eager", lambda given: lambda: form(*_given(given)))


# More than 2^31 elements.


def large(device: torch.device, tiny: bool, backend: str) -> float:
    crops, teachers, columns = (3, 2, 32) if tiny else (10, 2, 65536)
    n = 6 if tiny else BEYOND // (crops * columns) + 1
    fits(device, 6 * crops * n * columns)
    student = torch.randn(crops, n, columns, device=device, dtype=dtype_of(tiny)).requires_grad_()
    teacher = torch.randn(teachers, n, columns, device=device, dtype=dtype_of(tiny))
    weights = torch.rand(2, crops, teachers, device=device)
    options: dict[str, Any] = {"own": weights[0], "other": weights[1], "teacher_temperature": 0.5, "reduction": "none"}
    with use_backend(backend, "distillation"):
        loss = distillation(student, teacher, **options)
        assert isinstance(loss, Tensor)
        (grad,) = torch.autograd.grad(loss.sum(), [student])
    rows = some_rows(n, device)
    exact = student.detach()[:, rows].double().requires_grad_()
    with use_backend("reference", "distillation"):
        truth = distillation(exact, teacher[:, rows].double(), **options)
        assert isinstance(truth, Tensor)
        (truth_grad,) = torch.autograd.grad(truth.sum(), [exact])
    return within([loss[rows], grad[:, rows]], [truth, truth_grad], student.dtype)
