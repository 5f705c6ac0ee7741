"""Are the losses faster and leaner than materialised logits and targets? `python -m bench losses`.

Everything is timed as loss plus gradients (but for the settings that say "forward"), with the default allocator, as
a user runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.harness import (
    Absent,
    Arm,
    Call,
    Inputs,
    Setting,
    backends_of,
    ceiling_copy,
    ceiling_matmul,
    on_backend,
    with_graph,
)
from sdmp_kernels import draw_plan, info_nce, soft_cross_entropy
from sdmp_kernels.ops.distillation import distillation

TEMPERATURE = 0.2
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
GLOBAL_CROPS, CLEAN_CROPS = 2, 6  # of V student crops: 2 global, then clean local ones up to here, then mixed ones


def short(dtype: torch.dtype) -> str:
    """ "float32"."""
    return str(dtype).removeprefix("torch.")


def settings(device: torch.device, size: str) -> Iterator[Setting]:
    """Every setting, most valuable first. `size`: "tiny" (for tests), "quick", "default", "full"."""
    f32, bf16 = torch.float32, torch.bfloat16
    contrast = functools.partial(contrastive, device=device, size=size)
    given = functools.partial(given_logits, device=device, size=size)
    distil = functools.partial(distilled, device=device, size=size)
    if size == "tiny":
        yield contrast(n=8, width=16, dtype=f32, terms=2)
        yield contrast(n=8, width=16, dtype=f32, key_grad=True)
        yield given(n=4, columns=64, dtype=f32)
        yield distil(n=4, columns=64, dtype=f32)
        return
    if device.type == "cpu":
        n = 1024 if size == "quick" else 4096
        yield contrast(n=n, width=256, dtype=f32)
        yield given(n=n, columns=n, dtype=f32)
        yield distil(n=8 if size == "quick" else 32, columns=65536 if size != "quick" else 16384, dtype=f32)
        yield contrast(n=n, width=256, dtype=f32, terms=2)
        if size != "quick":
            yield contrast(n=n, width=256, dtype=f32, key_grad=True)
            yield contrast(n=1024, width=256, dtype=f32, terms=2)
        if size == "full":
            yield given(n=256, columns=1000, dtype=f32)
            yield contrast(n=1024, width=128, dtype=f32)
            yield given(n=n, columns=n, dtype=f32, forward=True)
        return
    if size == "quick":
        yield contrast(n=4096, width=256, dtype=bf16)
        yield given(n=2048, columns=65536, dtype=bf16)
        yield distil(n=16, columns=65536, dtype=bf16)
        return
    yield contrast(n=32768, width=256, dtype=bf16)
    yield contrast(n=1024, width=256, dtype=bf16, terms=2)
    yield distil(n=64, columns=65536, dtype=bf16)
    yield given(n=8192, columns=65536, dtype=bf16)
    yield contrast(n=4096, width=256, dtype=bf16, terms=2)
    yield contrast(n=32768, width=256, dtype=bf16, key_grad=True)
    yield given(n=8192, columns=65536, dtype=bf16, forward=True)
    yield contrast(n=8192, width=256, dtype=bf16)
    if size == "full":
        yield contrast(n=32768, width=128, dtype=bf16)
        yield contrast(n=4096, width=256, dtype=f32)
        yield given(n=256, columns=1000, dtype=bf16)
        yield distil(n=64, columns=65536, dtype=f32)


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


# InfoNCE.


def contrastive(
    *,
    n: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    size: str,
    terms: int = 1,
    key_grad: bool = False,
) -> Setting:
    """info_nce of n queries with n keys: the source term alone, or source and pair terms of one query."""
    names = ("loss", "dq", *(f"dk{t}" for t in range(terms if key_grad else 0)))
    words = "source and pair terms" if terms == 2 else "source term"
    keys = "keys with gradient" if key_grad else "keys detached"
    return Setting(
        op="info_nce",
        name=f"info_nce {short(dtype)}, n = m = {n}, d = {width}, {words}, {keys}",
        config={"n": n, "m": n, "d": width, "dtype": short(dtype), "terms": terms, "key_grad": key_grad},
        inputs=functools.partial(_contrastive_inputs, n, width, dtype, device, terms, key_grad),
        truth=_contrastive_truth,
        plain=_contrastive_plain,
        outputs=names,
        dtype=dtype,
        arms=list(_contrastive_arms(n, width, dtype, device, size, terms, key_grad)),
        bytes_moved=n * width * dtype.itemsize * (2 + terms * (2 if key_grad else 1)),
        flops=terms * (8 if key_grad else 4) * n * n * width,
    )


def _contrastive_inputs(
    n: int, width: int, dtype: torch.dtype, device: torch.device, terms: int, key_grad: bool, copy: int
) -> Inputs:
    """Unit features as in training: a query resembles its own key and its partner's by their shares."""
    generator = torch.Generator(device).manual_seed(copy)
    plan = draw_plan(n, (32, 32), rules=["mixup"], per="sample", seed=0, step=copy).to(device)
    keys = [F.normalize(torch.randn(n, width, device=device, generator=generator), dim=1) for _ in range(terms)]
    lam = plan.lam[:, None]
    noise = torch.randn(n, width, device=device, generator=generator) / width**0.5
    q = F.normalize(lam * keys[0] + (1 - lam) * keys[0].flip(0) + noise, dim=1)
    q, keys = q.to(dtype).requires_grad_(), [k.to(dtype).requires_grad_(key_grad) for k in keys]
    return {
        "q": q,
        "k": keys,
        "plan": plan,
        "targets": [plan.source_target(), plan.pair_target()][:terms],
        "temperature": TEMPERATURE,
        "leaves": [q, *keys] if key_grad else [q],
    }


def _contrastive_truth(inputs: Inputs) -> list[Tensor]:
    """Loss and gradients in float64, a block of rows at a time."""
    q = inputs["q"].detach().double()
    n, t = len(q), inputs["temperature"]
    total, dq = q.new_zeros(()), torch.zeros_like(q)
    dks = []
    for k, target in zip(inputs["k"], inputs["targets"], strict=True):
        k, weight = k.detach().double(), target.weight.double()
        dk = torch.zeros_like(k)
        for rows in torch.arange(n, device=q.device).split(max(1, 2**25 // len(k))):
            logits = q[rows] @ k.T / t
            lse = torch.logsumexp(logits, 1)
            columns = torch.stack([target.first[rows], target.second[rows]], 1)
            shares = torch.stack([weight[rows], 1 - weight[rows]], 1)
            total += (lse - (logits.gather(1, columns) * shares).sum(1)).sum() / n
            dlogits = torch.exp(logits - lse[:, None]).scatter_add_(1, columns, -shares) / (n * t)
            dq[rows] += dlogits @ k
            dk += dlogits.T @ q[rows]
        dks.append(dk)
    return [total, dq, *(dks if inputs["k"][0].requires_grad else [])]


def _contrastive_plain(inputs: Inputs) -> list[Tensor]:
    loss = algorithm1(inputs["q"], inputs["k"], inputs["plan"].lam)
    return [loss.detach(), *torch.autograd.grad(loss, inputs["leaves"])]


def algorithm1(q: Tensor, keys: list[Tensor], lam: Tensor) -> Tensor:
    """The paper's Algorithm 1, line by line: dense labels, materialised logits."""
    lam = lam[:, None]
    one_hot = F.one_hot(torch.arange(len(q), device=q.device), len(q)).to(q.dtype)
    logits = q @ keys[0].T / TEMPERATURE
    label = lam * one_hot + (1 - lam) * one_hot.flip(0)
    loss = F.cross_entropy(logits, label.to(q.dtype))
    if len(keys) == 2:
        clam = torch.minimum(lam, 1 - lam.flip(0)) + torch.minimum(1 - lam, lam.flip(0))
        logits = q @ keys[1].T / TEMPERATURE
        label = 1 / (1 + clam) * one_hot + clam / (1 + clam) * one_hot.flip(0)
        loss = loss + F.cross_entropy(logits, label.to(q.dtype))
    return loss


def gathered_logits(q: Tensor, keys: list[Tensor], targets: list[Any]) -> Tensor:
    """No dense label: the two target logits are gathered from the logits."""
    losses = []
    for k, (first, second, weight) in zip(keys, targets, strict=True):
        logits = (q @ k.T / TEMPERATURE).float()
        one, two = (logits.gather(1, column[:, None])[:, 0] for column in (first, second))
        losses.append((torch.logsumexp(logits, 1) - weight * one - (1 - weight) * two).mean())
    return torch.stack(losses).sum()


def gathered_rows(q: Tensor, keys: list[Tensor], targets: list[Any]) -> Tensor:
    """No dense label and no gather from the logits: the two target logits are dots of rows."""
    losses = []
    for k, (first, second, weight) in zip(keys, targets, strict=True):
        lse = torch.logsumexp((q @ k.T / TEMPERATURE).float(), 1)
        wanted = weight[:, None] * k[first] + (1 - weight)[:, None] * k[second]
        losses.append((lse - (q * wanted).sum(1) / TEMPERATURE).mean())
    return torch.stack(losses).sum()


def attention(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(softmax(q k^T scale) k, log-sum-exp) by PyTorch's own fused attention."""
    heads = [t.detach()[None, None] for t in (q, k, k)]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, False, scale=scale)
    elif q.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*heads, None, True, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads, 0.0, False, False, scale=scale)
    return out[0, 0], lse.reshape(-1)[: len(q)] if lse.ndim != 3 else lse[0, 0, : len(q)]


def sdpa_identity(inputs: Inputs) -> Call:
    """Loss and dq of detached keys out of one attention pass per term: dLSE/dq = attention(q, k, k) / temperature."""
    q, t = inputs["q"].detach(), inputs["temperature"]

    def run() -> Sequence[Tensor]:
        loss, dq = q.new_zeros((), dtype=torch.float32), torch.zeros_like(q, dtype=torch.float32)
        for k, (first, second, weight) in zip(inputs["k"], inputs["targets"], strict=True):
            out, lse = attention(q, k, 1 / t)
            wanted = weight[:, None] * k[first] + (1 - weight)[:, None] * k[second]
            loss = loss + (lse - (q * wanted).sum(1) / t).mean()
            dq += (out - wanted) / (t * len(q))
        return [loss, dq.to(q.dtype)]

    return Call(run)


def linear_cross_entropy(inputs: Inputs) -> Callable[[], Tensor]:
    """F.linear_cross_entropy (torch 2.13 and later), chunked, with the dense soft targets it takes."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    chosen = {"options": options()} if options is not None else {}
    q, keys, targets = inputs["q"], inputs["k"], inputs["targets"]

    def run() -> Tensor:
        losses = []
        for k, (first, second, weight) in zip(keys, targets, strict=True):
            dense = q.new_zeros(len(q), len(k))
            dense.scatter_add_(1, first[:, None], weight[:, None].to(q.dtype))
            dense.scatter_add_(1, second[:, None], (1 - weight)[:, None].to(q.dtype))
            losses.append(function(q / TEMPERATURE, k, dense, **chosen))
        return torch.stack(losses).sum()

    return run


def our_info_nce(inputs: Inputs) -> Callable[[], Tensor]:
    """All terms in one call."""
    q, keys, targets, t = inputs["q"], inputs["k"], inputs["targets"], inputs["temperature"]
    if len(keys) == 1:
        return lambda: info_nce(q, keys[0], targets[0], temperature=t)  # type: ignore[return-value]
    return lambda: torch.stack(list(info_nce(q, keys, targets, temperature=t))).sum()


def _contrastive_arms(
    n: int, width: int, dtype: torch.dtype, device: torch.device, size: str, terms: int, key_grad: bool
) -> Iterator[Arm]:
    graphs = device.type == "cuda" and n <= 4096
    torch_ = f"torch {torch.__version__} eager"
    yield from with_graph(ceiling_matmul(terms * (8 if key_grad else 4) * n * n * width, dtype, device), graphs)
    yield from our_arms("info_nce", device, size, graphs, False, our_info_nce)
    yield loss_arm(
        "eager Algorithm 1",
        f"{torch_}: the paper's Algorithm 1, dense labels built inside",
        "eager",
        lambda given: lambda: algorithm1(given["q"], given["k"], given["plan"].lam),
    )
    forms = {"gathered logits": gathered_logits, "gathered rows": gathered_rows}
    for name, form in forms.items():
        yield from with_graph(_eager_form(name, form), graphs)
    if size != "tiny":
        tuned = device.type == "cuda" and size == "full"
        for arm in compiled("gathered rows", gathered_rows, _qkt, tuned=tuned):
            yield from with_graph(arm, graphs)
    if not key_grad:
        words = f"{torch_}: fused attention and its log-sum-exp, gradient by the attention identity"
        yield from with_graph(Arm("SDPA identity", words, "eager", sdpa_identity), graphs)
    chunked = f"torch {torch.__version__} F.linear_cross_entropy, chunked, dense soft targets built inside"
    yield loss_arm("F.linear_cross_entropy", chunked, "peer", linear_cross_entropy)
    if terms == 1:
        for peer in (peers.liger_linear, peers.cut_cross_entropy, peers.quack_linear, peers.inf_cl):
            yield peer()


def _qkt(inputs: Inputs) -> tuple[Any, ...]:
    return inputs["q"], inputs["k"], [tuple(target) for target in inputs["targets"]]


def _eager_form(name: str, form: Callable[..., Tensor]) -> Arm:
    what = f"torch {torch.__version__} eager: {name}, no dense label"
    return loss_arm(f"eager {name}", what, "eager", lambda given: lambda: form(*_qkt(given)))


# Cross-entropy of given logits.


def given_logits(
    *, n: int, columns: int, dtype: torch.dtype, device: torch.device, size: str, forward: bool = False
) -> Setting:
    """soft_cross_entropy of (n, columns) logits with two-hot targets."""
    part = ", forward" if forward else ""
    return Setting(
        op="soft_cross_entropy",
        name=f"soft_cross_entropy {short(dtype)}, {n} x {columns}{part}",
        config={"n": n, "k": columns, "dtype": short(dtype), "forward": forward},
        inputs=functools.partial(_logits_inputs, n, columns, dtype, device),
        truth=functools.partial(_logits_truth, forward),
        plain=functools.partial(_logits_plain, forward),
        outputs=("loss",) if forward else ("loss", "dlogits"),
        dtype=dtype,
        arms=list(_logits_arms(n, columns, dtype, device, size, forward)),
        bytes_moved=n * columns * dtype.itemsize * (1 if forward else 2),
    )


def _logits_inputs(n: int, columns: int, dtype: torch.dtype, device: torch.device, copy: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(copy)
    logits = (2 * torch.randn(n, columns, device=device, generator=generator)).to(dtype).requires_grad_()
    plan = draw_plan(n, (32, 32), rules=["mixup"], per="sample", seed=0, step=copy).to(device)
    labels = torch.randint(0, columns, (n,), device=device, generator=generator)
    return {"logits": logits, "target": plan.label_target(labels), "leaves": [logits]}


def _logits_truth(forward: bool, inputs: Inputs) -> list[Tensor]:
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


def _logits_plain(forward: bool, inputs: Inputs) -> list[Tensor]:
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


def _logits_arms(
    n: int, columns: int, dtype: torch.dtype, device: torch.device, size: str, forward: bool
) -> Iterator[Arm]:
    nbytes = n * columns * dtype.itemsize * (1 if forward else 2)
    graphs = device.type == "cuda" and nbytes < 2**26
    yield from with_graph(ceiling_copy(nbytes, device), graphs)

    def ours(inputs: Inputs) -> Callable[[], Tensor]:
        return lambda: soft_cross_entropy(inputs["logits"], inputs["target"])

    yield from our_arms("soft_cross_entropy", device, size, graphs, forward, ours)
    forms = {
        "dense target": dense_cross_entropy,
        "gathered": gathered_cross_entropy,
        "two cross-entropies": two_cross_entropies,
    }
    for name, form in forms.items():
        yield _logits_form(name, form, forward)
    if size != "tiny" and not forward:
        yield from compiled("gathered", gathered_cross_entropy, _logits_given)
        yield from compiled("dense target", dense_cross_entropy, _logits_given)
    if not forward:
        functional = "liger_kernel.transformers.functional"
        yield peers.hard_cross_entropy("Liger", functional, "liger-kernel", "liger_cross_entropy")
        yield peers.hard_cross_entropy("QuACK", "quack.cross_entropy", "quack-kernels", "cross_entropy")


def _logits_given(inputs: Inputs) -> tuple[Any, ...]:
    return inputs["logits"], *inputs["target"]


def _logits_form(name: str, form: Callable[..., Tensor], forward: bool) -> Arm:
    what = f"torch {torch.__version__} eager: {form.__doc__}"
    return loss_arm(f"eager {name}", what, "eager", lambda given: lambda: form(*_logits_given(given)), forward=forward)


# Distillation.


@dataclass(frozen=True)
class Crops:
    """Sizes of a distillation: V student crops, T teacher crops, N images, K prototypes."""

    v: int
    t: int
    n: int
    k: int


def distilled(
    *, n: int, columns: int, dtype: torch.dtype, device: torch.device, size: str, v: int = 10, t: int = 2
) -> Setting:
    """DINO's loss with half of the local crops mixed: V student crops against T teacher crops."""
    crops = Crops(v, t, n, columns)
    return Setting(
        op="distillation",
        name=f"distillation {short(dtype)}, n = {n}, {v} + {t} crops, k = {columns}",
        config={"n": n, "v": v, "t": t, "k": columns, "dtype": short(dtype)},
        inputs=functools.partial(_distilled_inputs, crops, dtype, device),
        truth=_distilled_truth,
        plain=_distilled_plain,
        outputs=("loss", "dstudent"),
        dtype=dtype,
        arms=list(_distilled_arms(crops, dtype, device, size)),
        bytes_moved=(2 * v + t) * n * columns * dtype.itemsize,
    )


def _distilled_inputs(crops: Crops, dtype: torch.dtype, device: torch.device, copy: int) -> Inputs:
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


def _distilled_truth(inputs: Inputs) -> list[Tensor]:
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


def _distilled_plain(inputs: Inputs) -> list[Tensor]:
    loss = double_loop(*_distilled_given(inputs))
    return [loss.detach(), *torch.autograd.grad(loss, inputs["leaves"])]


def _distilled_given(inputs: Inputs) -> tuple[Tensor, ...]:
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


def _distilled_arms(crops: Crops, dtype: torch.dtype, device: torch.device, size: str) -> Iterator[Arm]:
    yield ceiling_copy((2 * crops.v + crops.t) * crops.n * crops.k * dtype.itemsize, device)
    yield from our_arms("distillation", device, size, False, False, our_distillation)
    forms = {"double loop": double_loop, "collapsed": collapsed}
    for name, form in forms.items():
        yield _distilled_form(name, form)
    if size != "tiny":
        for name, form in forms.items():
            yield from compiled(name, form, _distilled_given)


def _distilled_form(name: str, form: Callable[..., Tensor]) -> Arm:
    what = f"torch {torch.__version__} eager: {form.__doc__}"
    return loss_arm(f"eager {name}", what, "eager", lambda given: lambda: form(*_distilled_given(given)))
