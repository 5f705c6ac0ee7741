"""InfoNCE with two-hot targets; neither logits nor targets exist in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdmp_kernels._checks import check_number, check_same_device, check_tensor
from sdmp_kernels.ops.info_nce import op as _op
from sdmp_kernels.ops.losses import FLOATS
from sdmp_kernels.ops.target import check_options, check_target
from sdmp_kernels.plan import TwoHot


def info_nce(
    q: Tensor,
    k: Tensor | Sequence[Tensor],
    target: TwoHot | Sequence[TwoHot],
    *,
    temperature: float,
    form: str = "ce",
    reduction: str = "mean",
) -> Tensor | list[Tensor]:
    """Two-hot cross-entropy over the similarities of queries and keys (paper Eq. 3 and 4).

    With q and k as given (the caller normalises), z_ij = <q_i, k_j> / temperature, p_i = softmax(z_i), and the target's
    w_i = weight[i], first_i and second_i:

        "ce":          loss_i = -(w_i log p_i[first_i] + (1 - w_i) log p_i[second_i])
        "log_mixture": loss_i = -log(w_i p_i[first_i] + (1 - w_i) p_i[second_i])

    With detached keys, loss and gradient come out of one attention-like pass: for "ce"
    dloss_i / dq_i = (sum_j p_ij k_j - w_i k[first_i] - (1 - w_i) k[second_i]) / temperature.

    Args:
        q: (N, D) float16, bfloat16, float32 or float64, any strides, D >= 1. Differentiable.
        k: (M, D) of the dtype of q, M >= 1; a gradient to k only if it requires one. Or a sequence of such key sets
            (their M may differ) that share q: one launch for all.
        target: a TwoHot of first, second (N,) int64 in [0, M) and weight (N,) in [0, 1], as `MixPlan.source_target`
            (Eq. 3) and `MixPlan.pair_target` (Eq. 4) make it for keys in the order of the rows. A sequence of as many
            as there are key sets, where those are a sequence.
        temperature: above 0.
        form: "ce" or "log_mixture", as in `soft_cross_entropy`.
        reduction: "mean" (NaN for N = 0, as torch), "sum", or "none" for (N,).

    Returns:
        The loss in float32 (float64 for float64 q), or one per key set where lists were given. Products of half
        inputs are accumulated in float32, those of float32 inputs in full precision.

    Raises:
        TypeError, ValueError: naming the argument. Columns on a GPU are not read back: one out of range is never
            read, and its term of the loss is left out.
    """
    check_tensor("q", q, dtypes=FLOATS, ndim=2, shape="(N, D)")
    if q.shape[1] == 0:
        raise ValueError(f"q must have at least one column, got shape {tuple(q.shape)}")
    check_options(form, reduction)
    temperature = check_number("temperature", temperature, low=0.0, what="a number above 0")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a number above 0, got {temperature!r}")
    several = not isinstance(k, Tensor)
    keys: list[Tensor]
    keys, given = _check_lists(k, target) if several else ([k], [target])  # type: ignore[list-item, assignment]
    targets: list[TwoHot] = []
    for t, (key_set, two_hot) in enumerate(zip(keys, given, strict=True)):
        _check_keys(f"k[{t}]" if several else "k", key_set, q)
        name = f"target[{t}]" if several else "target"
        targets.append(check_target(name, two_hot, q.shape[0], key_set.shape[0], q))
    wanted = torch.is_grad_enabled()
    loss, _, _ = _op.info_nce_op.overload(
        q,
        keys,
        [t.first for t in targets],
        [t.second for t in targets],
        [t.weight for t in targets],
        temperature,
        form,
        reduction,
        wanted and q.requires_grad,
        wanted and any(key_set.requires_grad for key_set in keys),
    )
    # Of a single key set the loss comes as it is to be, without a first dimension.
    return loss if not several else [loss] if len(keys) == 1 else list(loss.unbind(0))


def _check_lists(k: object, target: object) -> tuple[list[Tensor], list[TwoHot]]:
    if not isinstance(k, Sequence) or not k:
        raise TypeError(f"k must be a tensor or a non-empty list of tensors, got {type(k).__name__}")
    if isinstance(target, TwoHot) or not isinstance(target, Sequence) or len(target) != len(k):
        got = "one TwoHot" if isinstance(target, TwoHot) else f"{len(target)}" if hasattr(target, "__len__") else target
        raise ValueError(f"target must be a list of {len(k)} TwoHot, one per key set, got {got}")
    return list(k), list(target)


def _check_keys(name: str, k: object, q: Tensor) -> None:
    check_tensor(name, k, dtypes=(q.dtype,), ndim=2, shape="(M, D)")
    assert isinstance(k, Tensor)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"{name} must have D = {q.shape[1]} columns as q has, got {k.shape[1]}")
    if k.shape[0] == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(k.shape)}")
    check_same_device(**{name: k, "q": q})
