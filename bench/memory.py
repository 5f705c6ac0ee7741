"""How much memory a call takes beyond what was there before it, and an allocator policy for CPU timings."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdmp_kernels._memory import release_kept

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Constants of glibc's <malloc.h>; the largest int is "never".
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
NEVER = 2**31 - 1


def _libc() -> Any | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def fix_allocator() -> str:
    """Make glibc keep freed memory, so that CPU timings hold no page faults of fresh outputs. Says what was done.

    With the defaults, every large tensor is mapped anew and its pages are faulted in while it is first written, which
    can cost ten times the arithmetic. This holds for the rest of the process.
    """
    libc = _libc()
    if libc is None:
        return "default (this C library has no mallopt)"
    settings = {M_MMAP_THRESHOLD: NEVER, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER}
    if all(libc.mallopt(name, value) == 1 for name, value in settings.items()):
        return "fixed (glibc keeps freed memory: M_MMAP_MAX=0, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at 2^31-1)"
    return "default (mallopt refused)"


def extra_peak(run: Callable[[], object], device: torch.device) -> tuple[int | None, str]:
    """(bytes, how measured): the most memory alive during one call beyond what was there when it began.

    CUDA: torch's allocator. CPU: resident pages of this process, whose high-water mark Linux lets us reset; freed
    memory is first given back to the system, so that it counts again when touched again. That includes the scratch
    buffers of the maths libraries, which torch's own profiler does not see.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
    libc = _libc()
    if libc is None or not CLEAR.exists():
        return None, "this system tells no resettable high-water mark"
    gc.collect()
    libc.malloc_trim(0)
    release_kept()
    try:
        CLEAR.write_text("5")
    except OSError as error:
        return None, f"the high-water mark cannot be reset ({error.strerror})"
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0), "resident set (VmHWM after clear_refs)"


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status tells no {field}")
    return int(found[1]) * 1024
