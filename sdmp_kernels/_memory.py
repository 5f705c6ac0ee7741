"""Memory: small tensors that travel in one copy, and large results on a CPU without a page fault for every 4 KiB."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Above this glibc asks the kernel for every block anew and gives it back when it is freed (M_MMAP_THRESHOLD_MAX), so
# that nothing else ever lives in these pages.
_MAPPED_AFRESH = 32 * 2**20
_HUGE_PAGE = 2 * 2**20


def new_empty(like: Tensor) -> Tensor:
    """`like.new_empty(like.shape)`; large ones on a CPU in huge pages, where the system lets programs ask for them.

    The first write to a fresh block costs more than most arithmetic on it, and in huge pages a fifth of that. PyTorch
    has the same switch for the whole process (THP_MEM_ALLOC_ENABLE); a refusal by the system changes nothing.
    """
    out = like.new_empty(like.shape)
    size = out.nbytes
    if size > _MAPPED_AFRESH and out.is_cpu and (advise := _madvise()) is not None:
        start = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        stop = (out.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        advise(start, stop - start, mmap.MADV_HUGEPAGE)
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system call of that name, where there is one that knows huge pages (Linux)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def is_on(device: torch.device, target: torch.device) -> bool:
    """Whether what is on `device` is where `target` asks for."""
    return target.type == device.type and target.index in (None, device.index)


def moved(tensors: Sequence[Tensor], target: torch.device, *, non_blocking: bool = True) -> list[Tensor]:
    """The tensors, all of one device, on `target` by one copy: from pinned memory where that is a GPU.

    A copy to the CPU always waits, since the host may read it at once.
    """
    packed = _packed(tensors, pin=target.type == "cuda" and tensors[0].device.type == "cpu")
    return _parts(packed.to(target, non_blocking=non_blocking and target.type != "cpu"), tensors)


def pinned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The CPU tensors in one block of page-locked memory."""
    return _parts(_packed(tensors, pin=True), tensors)


_ALIGNED = 16


def _packed(tensors: Sequence[Tensor], *, pin: bool) -> Tensor:
    total = sum(_room(tensor) for tensor in tensors)
    packed = torch.empty(total, dtype=torch.uint8, device=tensors[0].device, pin_memory=pin)
    for part, tensor in zip(_parts(packed, tensors), tensors, strict=True):
        part.copy_(tensor)
    return packed


def _parts(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What lies in `packed`, as views with the shapes and dtypes of `like`."""
    parts, start = [], 0
    for tensor in like:
        part = packed[start : start + tensor.numel() * tensor.element_size()]
        parts.append(part.view(tensor.dtype).view(tensor.shape))
        start += _room(tensor)
    return parts


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
