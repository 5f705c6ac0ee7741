"""Large results on a CPU without a page fault for every 4 KiB."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

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
    advise = _madvise()
    size = out.numel() * out.element_size()
    if advise is not None and out.device.type == "cpu" and size > _MAPPED_AFRESH:
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
