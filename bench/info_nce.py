"""`info_nce`, beside the paper's Algorithm 1, careful eager forms, torch.compile, fused attention, other libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.arms import compiled, loss_arm, our_arms
from bench.harness import Absent, Arm, Call, Inputs, Model, Setting, ceiling_matmul, model_of, short, with_graph
from bench.large import BEYOND, dtype_of, fits, some_rows, two_hot, within
from sdmp_kernels import TwoHot, draw_plan, info_nce, use_backend

TEMPERATURE = 0.2


def setting(
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
        inputs=functools.partial(_inputs, n, width, dtype, device, terms, key_grad),
        truth=_truth,
        plain=_plain,
        outputs=names,
        dtype=dtype,
        arms=list(_arms(n, width, dtype, device, size, terms, key_grad)),
        model=model(n=n, width=width, dtype=dtype, terms=terms, key_grad=key_grad),
    )


def model(*, n: int, width: int, dtype: torch.dtype, terms: int = 1, key_grad: bool = False) -> Model:
    """Bytes and operations of a setting."""
    q, *keys = (torch.empty(n, width, dtype=dtype, device="meta") for _ in range(1 + terms))
    return model_of("info_nce", q=q.requires_grad_(), k=[k.requires_grad_(key_grad) for k in keys], target=None)


def _inputs(
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


def _truth(inputs: Inputs) -> list[Tensor]:
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


def _plain(inputs: Inputs) -> list[Tensor]:
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
    # As the trainer calls it: one weighted sum.
    return lambda: info_nce(q, keys, targets, temperature=t, term_weight=[1.0] * len(keys))  # type: ignore[return-value]


def _arms(
    n: int, width: int, dtype: torch.dtype, device: torch.device, size: str, terms: int, key_grad: bool
) -> Iterator[Arm]:
    graphs = device.type == "cuda" and n <= 4096
    torch_ = f"torch {torch.__version__} eager"
    flops = model(n=n, width=width, dtype=dtype, terms=terms, key_grad=key_grad).flops
    yield from with_graph(ceiling_matmul(flops, dtype, device), graphs)
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


# More than 2^31 elements.


def large(device: torch.device, tiny: bool, backend: str) -> float:
    """Queries whose own offsets pass 2^31, against few keys."""
    width, keys = (16, 8) if tiny else (256, 128)
    n = 6 if tiny else BEYOND // width + 1
    fits(device, 14 * n * width)
    q = torch.randn(n, width, device=device, dtype=dtype_of(tiny)).mul_(width**-0.5).requires_grad_()
    k = (torch.randn(keys, width, device=device) * width**-0.5).to(q.dtype)
    target = two_hot(n, keys, device)
    with use_backend(backend, "info_nce"):
        loss = info_nce(q, k, target, temperature=0.2, reduction="none")
        assert isinstance(loss, Tensor)
        (grad,) = torch.autograd.grad(loss.sum(), [q])
    rows = some_rows(n, device)
    exact = q.detach()[rows].double().requires_grad_()
    with use_backend("reference", "info_nce"):
        truth = info_nce(exact, k.double(), TwoHot(*(t[rows] for t in target)), temperature=0.2, reduction="none")
        assert isinstance(truth, Tensor)
        (truth_grad,) = torch.autograd.grad(truth.sum(), [exact])
    return within([loss[rows], grad[rows]], [truth, truth_grad], q.dtype)
