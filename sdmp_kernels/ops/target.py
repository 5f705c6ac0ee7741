"""What the losses check of their targets and options."""

from __future__ import annotations

import torch
from torch import Tensor

from sdmp_kernels._checks import check_choice, check_same_device, check_tensor, readable
from sdmp_kernels.ops.losses import extremes, within
from sdmp_kernels.plan import TwoHot

FORMS = ("ce", "log_mixture")
REDUCTIONS = ("mean", "sum", "none")


def check_target(
    argument: str, target: object, rows: int, columns: int, like: Tensor, ignored: int | None = None
) -> TwoHot:
    """`target` as a TwoHot of `rows` rows over `columns` columns, on the device of `like`; a column may be `ignored`.

    Raises:
        TypeError, ValueError: naming the argument. Values are looked at on the CPU only.
    """
    return looked_at(argument, target, rows, columns, like, ignored)[0]


def looked_at(
    argument: str, target: object, rows: int, columns: int, like: Tensor, ignored: int | None = None
) -> tuple[TwoHot, bool]:
    """`check_target`, and whether every column is known to be in range and not `ignored`."""
    if not isinstance(target, (tuple, list)) or len(target) != 3:
        raise TypeError(f"{argument} must be a TwoHot(first, second, weight), got {type(target).__name__}")
    target = target if isinstance(target, TwoHot) else TwoHot(*target)
    if not _fits(target, rows, like.device):
        _check_kind(argument, target, rows, like)
    whole = False
    if rows and readable(*target):
        whole = within(target.first, columns) and within(target.second, columns)
        if not whole:
            _check_columns(argument, target, columns, ignored)
        low, high = extremes(target.weight)
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{argument}.weight must hold shares in [0, 1], got {low:.6g} to {high:.6g}; "
                "give the share of `first`, the rest goes to `second`"
            )
    return target, whole and (ignored is None or not 0 <= ignored < columns)


_INDICES, _WEIGHTS = (torch.int64,), (torch.float32, torch.float64)
_DTYPES = (_INDICES, _INDICES, _WEIGHTS)


def _fits(target: TwoHot, rows: int, device: torch.device) -> bool:
    """Whether dtypes, shapes and device are right, in one look; `_check_kind` says what is wrong."""
    for tensor, dtypes in zip(target, _DTYPES, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
            return False
        if tensor.ndim != 1 or tensor.shape[0] != rows or tensor.device != device:
            return False
    return not target.weight.requires_grad


def _check_kind(argument: str, target: TwoHot, rows: int, like: Tensor) -> None:
    for name in ("first", "second"):
        check_tensor(f"{argument}.{name}", getattr(target, name), dtypes=_INDICES, ndim=1, shape="(N,)")
    check_tensor(f"{argument}.weight", target.weight, dtypes=_WEIGHTS, ndim=1, shape="(N,)")
    if target.weight.requires_grad:
        raise ValueError(f"{argument}.weight requires a gradient, but targets are constants; use .detach()")
    for name, tensor in target._asdict().items():
        if len(tensor) != rows:
            raise ValueError(f"{argument}.{name} has {len(tensor)} rows but there are {rows} rows of logits")
        check_same_device(**{f"{argument}.{name}": tensor, "the logits": like})


def _check_columns(argument: str, target: TwoHot, columns: int, ignored: int | None) -> None:
    for name in ("first", "second"):
        column = getattr(target, name)
        column = column if ignored is None else column[column != ignored]
        low, high = column.aminmax() if len(column) else (0, 0)
        if low < 0 or high >= columns:
            raise ValueError(
                f"{argument}.{name} must hold columns in [0, {columns}), got {int(low)} to {int(high)}; "
                "check the offset the target was made with"
            )


def check_options(form: str, reduction: str) -> None:
    """Raise ValueError for an unknown form or reduction."""
    check_choice("form", form, FORMS)
    check_choice("reduction", reduction, REDUCTIONS)
