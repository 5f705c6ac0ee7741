"""`soft_cross_entropy` of given logits, beside dense targets, gathered logits, torch.compile and hard-label kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.arms import compiled, loss_arm, our_arms
from bench.harness import Arm, Inputs, Model, Setting, ceiling_copy, model_of, short, with_graph
from bench.large import BEYOND, dtype_of, fits, some_rows, two_hot, within
from sdmp_kernels import TwoHot, draw_plan, soft_cross_entropy, use_backend


def setting(
    *, n: int, columns: int, dtype: torch.dtype, device: torch.device, size: str, forward: bool = False
) -> Setting:
    """soft_cross_entropy of (n, columns) logits with two-hot targets."""
    part = ", forward" if forward else ""
    return Setting(
        op="soft_cross_entropy",
        name=f"soft_cross_entropy {short(dtype)}, {n} x {columns}{part}",
        config={"n": n, "k": columns, "dtype": short(dtype), "forward": forward},
        inputs=functools.partial(_inputs, n, columns, dtype, device),
        truth=functools.partial(_truth, forward),
        plain=functools.partial(_plain, forward),
        outputs=("loss",) if forward else ("loss", "dlogits"),
        dtype=dtype,
        arms=list(_arms(n, columns, dtype, device, size, forward)),
        model=model(n=n, columns=columns, dtype=dtype, forward=forward),
    )


def model(*, n: int, columns: int, dtype: torch.dtype, forward: bool = False) -> Model:
    """Bytes and operations of a setting."""
    logits = torch.empty(n, columns, dtype=dtype, device="meta", requires_grad=not forward)
    return model_of("soft_cross_entropy", logits=logits, target=None)


def _inputs(n: int, columns: int, dtype: torch.dtype, device: torch.device, copy: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(copy)
    logits = (2 * torch.randn(n, columns, device=device, generator=generator)).to(dtype).requires_grad_()
    plan = draw_plan(n, (32, 32), rules=["mixup"], per="sample", seed=0, step=copy).to(device)
    labels = torch.randint(0, columns, (n,), device=device, generator=generator)
    return {"logits": logits, "target": plan.label_target(labels), "leaves": [logits]}


def _truth(forward: bool, inputs: Inputs) -> list[Tensor]:
    logits, (first, second, weight) = inputs["logits"].detach(), inputs["target"]
    n, losses, grads = len(logits), [], []
    for rows in torch.arange(n, device=logits.device).split(max(1, 2**25 // logits.shape[1])):
        z, share = logits[rows].double(), weight[rows].double()
        lse = torch.logsumexp(z, 1)
        columns, shares = torch.stack([first[rows], second[rows]], 1), torch.stack([share, 1 - share], 1)
        losses.append(lse - (z.gather(1, columns) * shares).sum(1))
        if not forward:
            grads.append(torch.exp(z - lse[:, None]).scatter_add_(1, columns, -shares) / n)
    return [torch.cat(losses).mean(), *([torch.cat(grads)] if grads else [])]


def _plain(forward: bool, inputs: Inputs) -> list[Tensor]:
    loss = dense_cross_entropy(inputs["logits"], *inputs["target"])
    return [loss.detach()] if forward else [loss.detach(), *torch.autograd.grad(loss, inputs["leaves"])]


def dense_cross_entropy(logits: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """What timm's users run: a dense target from two one-hots, then the soft cross-entropy."""
    columns = logits.shape[1]
    one, two = (F.one_hot(column, columns).to(logits.dtype) for column in (first, second))
    target = weight[:, None] * one + (1 - weight)[:, None] * two
    return F.cross_entropy(logits, target.to(logits.dtype))


def gathered_cross_entropy(logits: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """log-sum-exp minus the two gathered logits."""
    one, two = (logits.gather(1, column[:, None])[:, 0].float() for column in (first, second))
    return (torch.logsumexp(logits.float(), 1) - weight * one - (1 - weight) * two).mean()


def two_cross_entropies(logits: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """The mixup idiom: lam * CE(logits, a) + (1 - lam) * CE(logits, b)."""
    one, two = (F.cross_entropy(logits, column, reduction="none") for column in (first, second))
    return (weight * one + (1 - weight) * two).mean()


def _arms(n: int, columns: int, dtype: torch.dtype, device: torch.device, size: str, forward: bool) -> Iterator[Arm]:
    floor = model(n=n, columns=columns, dtype=dtype, forward=forward).floor_bytes
    graphs = device.type == "cuda" and floor < 2**26
    yield from with_graph(ceiling_copy(floor, device), graphs)

    def ours(inputs: Inputs) -> Callable[[], Tensor]:
        return lambda: soft_cross_entropy(inputs["logits"], inputs["target"])

    yield from our_arms("soft_cross_entropy", device, size, graphs, forward, ours)
    forms = {
        "dense target": dense_cross_entropy,
        "gathered": gathered_cross_entropy,
        "two cross-entropies": two_cross_entropies,
    }
    for name, form in forms.items():
        yield _form(name, form, forward)
    if size != "tiny" and not forward:
        yield from compiled("gathered", gathered_cross_entropy, _given)
        yield from compiled("dense target", dense_cross_entropy, _given)
    yield peers.timm_dense_labels(forward)
    yield peers.torchvision_dense_labels(forward)
    if not forward:
        functional = "liger_kernel.transformers.functional"
        yield peers.hard_cross_entropy("Liger", functional, "liger-kernel", "liger_cross_entropy")
        yield peers.hard_cross_entropy("QuACK", "quack.cross_entropy", "quack-kernels", "cross_entropy")


def _given(inputs: Inputs) -> tuple[Any, ...]:
    return inputs["logits"], *inputs["target"]


def _form(name: str, form: Callable[..., Tensor], forward: bool) -> Arm:
    what = f"torch {torch.__version__} eager: {form.__doc__}"
    return loss_arm(f"eager {name}", what, "eager", lambda given: lambda: form(*_given(given)), forward=forward)


# More than 2^31 elements.


def large(device: torch.device, tiny: bool, backend: str) -> float:
    columns = 32 if tiny else 65536
    n = 6 if tiny else BEYOND // columns + 1
    fits(device, 5 * n * columns)
    logits = torch.randn(n, columns, device=device, dtype=dtype_of(tiny)).requires_grad_()
    target = two_hot(n, columns, device)
    with use_backend(backend, "soft_cross_entropy"):
        loss = soft_cross_entropy(logits, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), [logits])
    rows = some_rows(n, device)
    exact = logits.detach()[rows].double().requires_grad_()
    with use_backend("reference", "soft_cross_entropy"):
        truth = soft_cross_entropy(exact, TwoHot(*(t[rows] for t in target)), reduction="none")
        (truth_grad,) = torch.autograd.grad(truth.sum(), [exact])
    return within([loss[rows], grad[rows]], [truth, truth_grad], logits.dtype)
