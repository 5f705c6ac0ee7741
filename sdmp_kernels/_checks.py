"""Argument checks shared by the public functions: what came, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def near(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the near matches, or else every known name."""
    known = list(known)
    matches = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else f"expected one of {', '.join(known)}"


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the named choices."""
    if value not in choices:
        raise ValueError(f"{argument}={value!r} is unknown: {near(str(value), choices)}")


def check_number(
    argument: str, value: object, *, low: float | None = None, high: float | None = None, what: str
) -> float:
    """`value` as a float within [low, high]; `what` says in words what is expected."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{argument} must be {what}, got {type(value).__name__}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{argument} must be {what}, got {value!r}") from None
    if not (number == number and (low is None or number >= low) and (high is None or number <= high)):
        raise ValueError(f"{argument} must be {what}, got {value!r}")
    return number


def check_integer(argument: str, value: object, *, low: int, high: int | None = None, what: str) -> int:
    """`value` as an int within [low, high]; bool and float are refused."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{argument} must be {what}, got {type(value).__name__}")
    try:
        number = int(value.__index__())
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument} must be {what}, got {value!r}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{argument} must be {what}, got {value!r}")
    return number


def check_tensor(argument: str, value: object, *, dtypes: Sequence[torch.dtype], ndim: int, shape: str) -> Tensor:
    """`value` as a tensor of one of `dtypes` with `ndim` dimensions; `shape` names them, such as "(N, C, H, W)"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor of shape {shape}, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{argument} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{argument} must be {names}, got {str(value.dtype).removeprefix('torch.')}; convert it first")
    return value


def check_channels_first(argument: str, images: Tensor, size: Sequence[int] | None = None) -> None:
    """Raise ValueError where (N, C, H, W) images are plainly (N, H, W, C) ones.

    Plain it is where `size`, the (H, W) that is asked for, lies in the middle and not at the end, or where bytes have
    3 or 4 columns, and more than 16 channels and rows.
    """
    shape = tuple(images.shape)
    if size is not None:
        last = tuple(size) == shape[1:3] != shape[2:]
    else:
        last = images.dtype == torch.uint8 and shape[3] in (3, 4) and min(shape[1:3]) > 16
    if last:
        raise ValueError(
            f"{argument} must have shape (N, C, H, W), but {shape} looks like (N, H, W, C); give "
            f"{argument}.permute(0, 3, 1, 2), which copies nothing"
        )


def check_same_device(**tensors: Tensor | None) -> torch.device:
    """The one device of all given tensors; raises ValueError naming the two that differ."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first, reference = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first} is on {reference.device}; move one with .to(device)"
            )
    return reference.device


REAL = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Types of tensors that have values; a compiler's and a tracer's are others."""


def readable(*tensors: Tensor) -> bool:
    """True where values can be read without a host synchronisation and exist at all (real tensors on the CPU)."""
    for tensor in tensors:
        if type(tensor) not in REAL or not tensor.is_cpu:
            return False
    return not torch.compiler.is_compiling()
