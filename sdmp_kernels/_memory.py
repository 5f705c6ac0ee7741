"""Memory: small tensors that travel in one copy, and large results on a CPU in pages that are there already."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Above this glibc asks the kernel for every block anew and gives it back when it is freed (M_MMAP_THRESHOLD_MAX).
_MAPPED_AFRESH = 32 * 2**20
_HUGE_PAGE = 2 * 2**20
_KEPT = 256 * 2**20
"""Bytes of freed blocks that are kept at most."""


def empty_like(
    like: Tensor, dtype: torch.dtype | None = None, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """`torch.empty_like`; a large one on a CPU in a block of huge pages that an earlier result may have left.

    The first write to fresh pages costs more than most arithmetic on them: the system fills them with zeros, one fault
    at a time. A loop asks for the same sizes over and over, and so the last freed blocks, `_KEPT` bytes at most, stay
    with the process, as a GPU's memory does. Where the system refuses, or knows no huge pages, all is as ever.
    """
    size = like.numel() * (dtype or like.dtype).itemsize
    if size <= _MAPPED_AFRESH or not like.is_cpu or (block := _BLOCKS.take(size)) is None:
        return torch.empty_like(like, dtype=dtype, memory_format=memory_format)
    plain = torch.empty_like(like, dtype=dtype, memory_format=memory_format, device="meta")
    # Not a view of the bytes: autograd treats the two differently.
    return torch.empty(0, dtype=plain.dtype).set_(block, 0, plain.shape, plain.stride())


def new_empty(like: Tensor) -> Tensor:
    """`like.new_empty(like.shape)`, large ones as `empty_like` has them."""
    return empty_like(like, memory_format=torch.contiguous_format)


class _Blocks:
    """Private blocks of memory, of which those freed last are handed out again."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    @property
    def kept(self) -> int:
        """Bytes that nothing uses now."""
        return sum(map(len, self._free))

    def release(self) -> None:
        """Give back to the system what is kept."""
        self._free.clear()

    def take(self, size: int) -> torch.UntypedStorage | None:
        """At least `size` bytes that nothing else uses, until the last tensor in them is gone; None if refused."""
        pages = self._again(size) or self._fresh(size)
        if pages is None:
            return None
        held = np.frombuffer(pages, dtype=np.uint8)
        storage = torch.from_numpy(held).untyped_storage()
        # The storage holds the array alone; when that goes, so has every tensor.
        weakref.finalize(held, self._give_back, pages).atexit = False
        return storage

    def _again(self, size: int) -> mmap.mmap | None:
        """A freed block that fits, and is not much larger than that."""
        for pages in list(self._free):
            if size <= len(pages) <= size + size // 4 + _HUGE_PAGE:
                try:
                    self._free.remove(pages)
                except ValueError:  # another thread was first
                    continue
                return pages
        return None

    @staticmethod
    def _fresh(size: int) -> mmap.mmap | None:
        if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
            return None
        try:
            pages = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            return None
        with contextlib.suppress(OSError):  # of a kernel without them: small pages, then
            pages.madvise(mmap.MADV_HUGEPAGE)
        return pages

    def _give_back(self, pages: mmap.mmap) -> None:
        self._free.append(pages)
        while self.kept > _KEPT:
            self._free.pop(0)


_BLOCKS = _Blocks()


def release_kept() -> None:
    """Give back to the system the freed blocks that this process keeps for the next large results."""
    _BLOCKS.release()


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
