"""InfoNCE with two-hot targets; neither logits nor targets exist in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdmp_kernels._checks import check_number, check_same_device, check_tensor, readable
from sdmp_kernels.ops.info_nce import op as _op
from sdmp_kernels.ops.losses import FLOATS, work_dtype
from sdmp_kernels.ops.target import check_options, check_target
from sdmp_kernels.plan import TwoHot


def info_nce(
    q: Tensor,
    k: Tensor | Sequence[Tensor],
    target: TwoHot | Sequence[TwoHot],
    *,
    temperature: float | Tensor,
    term_weight: Sequence[float] | None = None,
    exclude: Tensor | Sequence[Tensor | None] | None = None,
    form: str = "ce",
    reduction: str = "mean",
    with_terms: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor, Tensor]:
    """Two-hot cross-entropy over the similarities of queries and keys (paper Eq. 3 and 4).

    With q and k as given (the caller normalises), z_ij = <q_i, k_j> / temperature, p_i = softmax(z_i), and the target's
    w_i = weight[i], first_i and second_i:

        "ce":          loss_i = -(w_i log p_i[first_i] + (1 - w_i) log p_i[second_i])
        "log_mixture": loss_i = -log(w_i p_i[first_i] + (1 - w_i) p_i[second_i])

    With detached keys, loss and gradient come out of one attention-like pass: for "ce"
    dloss_i / dq_i = (sum_j p_ij k_j - w_i k[first_i] - (1 - w_i) k[second_i]) / temperature.

    Args:
        q: (N, D) float16, bfloat16, float32 or float64, any strides, D >= 1. Differentiable. On a GPU Triton serves up
            to D = 256, and torch's own operators beyond, a chunk of rows at a time: never N x M.
        k: (M, D) of the dtype of q, M >= 1; a gradient to k only if it requires one. Or a sequence of such key sets
            (their M may differ) that share q: one launch for all.
        target: a TwoHot of first, second (N,) int64 in [0, M) and weight (N,) in [0, 1], as `MixPlan.source_target`
            (Eq. 3) and `MixPlan.pair_target` (Eq. 4) make it for keys in the order of the rows. A sequence of as many
            as there are key sets, where those are a sequence.
        temperature: above 0. Or a tensor of one element, which gets a gradient if it requires one: q is then divided
            by it beforehand, half q of a CPU in float32, and of a GPU in its own dtype.
        term_weight: finite numbers, one per key set: then one loss is returned, the sum of the key sets' losses times
            these, and they are in the gradient before the backward pass.
        exclude: what is no key: (N,) int64, one column for each row (-1 for none), or (M,) bool, True for keys that
            are valid for nobody. Of several key sets a sequence, one per set, None for nothing. Where a target's
            column is excluded, its term of the loss is left out; a row without any has loss and gradient 0.
            Triton leaves these calls to torch's own operators.
        form: "ce" or "log_mixture", as in `soft_cross_entropy`.
        reduction: "mean" (NaN for N = 0, as torch), "sum", or "none" for (N,).
        with_terms: with `term_weight`, whether the losses of the key sets are returned too, to be looked at.

    Returns:
        The loss in float32 (float64 for float64 q), or one per key set where lists were given without `term_weight`;
        (loss, (T,) or (T, N) losses of the T key sets, without gradient) `with_terms`. Products of half inputs are
        accumulated in float32, those of float32 inputs in full precision.

    Raises:
        TypeError, ValueError: naming the argument. Columns on a GPU are not read back: one out of range is never
            read, and its term of the loss is left out.
    """
    check_tensor("q", q, dtypes=FLOATS, ndim=2, shape="(N, D)")
    if q.shape[1] == 0:
        raise ValueError(f"q must have at least one column, got shape {tuple(q.shape)}")
    check_options(form, reduction)
    several = not isinstance(k, Tensor)
    keys: list[Tensor]
    keys, given = _check_lists(k, target) if several else ([k], [target])  # type: ignore[list-item, assignment]
    targets: list[TwoHot] = []
    for t, (key_set, two_hot) in enumerate(zip(keys, given, strict=True)):
        _check_keys(f"k[{t}]" if several else "k", key_set, q)
        name = f"target[{t}]" if several else "target"
        targets.append(check_target(name, two_hot, q.shape[0], key_set.shape[0], q))
    weights = _check_term_weight(term_weight, len(keys))
    if with_terms and not weights:
        raise ValueError("with_terms=True is for a weighted sum of terms; give term_weight, or leave it out")
    excluded = [] if exclude is None else _check_exclude(exclude, q, keys, several)
    if isinstance(temperature, Tensor):
        q, keys = _tempered(check_temperature("temperature", temperature, q), q, keys)
        number = 1.0
    else:
        number = check_number("temperature", temperature, low=0.0, what="a number above 0")
        if not 0 < number < float("inf"):
            raise ValueError(f"temperature must be a number above 0, got {temperature!r}")
    wanted = torch.is_grad_enabled()
    loss, terms, *_ = _op.info_nce_op(
        q,
        keys,
        [t.first for t in targets],
        [t.second for t in targets],
        [t.weight for t in targets],
        excluded,
        weights,
        number,
        form,
        reduction,
        wanted and q.requires_grad,
        [wanted and key_set.requires_grad for key_set in keys],
    )
    if weights:
        return (loss, terms) if with_terms else loss
    # Of a single key set the loss comes as it is to be, without a first dimension.
    return loss if not several else [loss] if len(keys) == 1 else list(loss.unbind(0))


def _tempered(temperature: Tensor, q: Tensor, keys: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """q over the temperature, and the keys in the same dtype: gradients to a tensor are then autograd's own.

    Never by the tensor's value, which on a GPU the host does not know.
    """
    with torch.autocast(q.device.type, enabled=False):
        work = work_dtype(q)
        single = q.to(work) / temperature.to(work)
        if q.is_cuda:
            return single.to(q.dtype), keys
        return single, [k.to(work) for k in keys]


def check_temperature(argument: str, temperature: Tensor, like: Tensor) -> Tensor:
    """A temperature that is a tensor, as one of no dimension.

    Raises:
        TypeError, ValueError: naming the argument. Its value is looked at on the CPU only.
    """
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(
            f"{argument} must be a number above 0 or a float tensor of one element, got {temperature.dtype} of shape "
            f"{tuple(temperature.shape)}"
        )
    if temperature.device != like.device and temperature.ndim > 0:
        check_same_device(**{argument: temperature, "q": like})
    if readable(temperature) and not 0 < float(temperature.detach()) < float("inf"):
        raise ValueError(f"{argument} must be above 0, got {float(temperature.detach()):g}")
    return temperature.view(())


def _check_term_weight(term_weight: object, terms: int) -> list[float]:
    if term_weight is None:
        return []
    if isinstance(term_weight, (str, bytes)) or not isinstance(term_weight, Sequence):
        raise TypeError(f"term_weight must be a list of numbers, one per key set, got {type(term_weight).__name__}")
    if len(term_weight) != terms:
        raise ValueError(f"term_weight must have {terms} numbers, one per key set, got {len(term_weight)}")
    largest = torch.finfo(torch.float32).max
    what = "finite numbers"
    return [check_number("term_weight", weight, low=-largest, high=largest, what=what) for weight in term_weight]


def _check_exclude(exclude: object, q: Tensor, keys: list[Tensor], several: bool) -> list[Tensor]:
    """One tensor per key set, of no elements where nothing is excluded."""
    if not several:
        exclude = [exclude]
    elif isinstance(exclude, Tensor) or not isinstance(exclude, Sequence) or len(exclude) != len(keys):
        got = f"{len(exclude)}" if isinstance(exclude, Sequence) else f"one {type(exclude).__name__}"
        raise ValueError(f"exclude must be a list of {len(keys)}, one per key set (None for nothing), got {got}")
    found = []
    for t, (excluded, key_set) in enumerate(zip(exclude, keys, strict=True)):  # type: ignore[call-overload]
        name = f"exclude[{t}]" if several else "exclude"
        if excluded is None:
            found.append(q.new_empty(0, dtype=torch.bool))
            continue
        check_tensor(name, excluded, dtypes=(torch.int64, torch.bool), ndim=1, shape="(N,) or (M,)")
        rows = key_set.shape[0] if excluded.dtype == torch.bool else q.shape[0]
        if excluded.shape[0] != rows:
            flags = excluded.dtype == torch.bool
            what = "a flag for each of the M keys" if flags else "a column for each of the N rows"
            raise ValueError(f"{name} must hold {what}, {rows}, got {excluded.shape[0]}")
        check_same_device(**{name: excluded, "q": q})
        if excluded.dtype == torch.int64 and rows and readable(excluded):
            low, high = excluded.aminmax()
            if low < -1 or high >= key_set.shape[0]:
                raise ValueError(
                    f"{name} must hold columns in [0, {key_set.shape[0]}) or -1, got {int(low)} to {int(high)}"
                )
        found.append(excluded)
    return found


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
    if k.device != q.device:
        check_same_device(**{name: k, "q": q})
