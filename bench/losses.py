"""Are the losses faster and leaner than materialised logits and targets? `python -m bench losses`.

What is measured of each stands in the file of its name; here they are put in order. With the default allocator, and on
a CPU every arm in processes of its own (bench/apart.py), as a user runs them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from bench import distillation, info_nce, soft_cross_entropy
from bench.harness import Setting


def settings(device: torch.device, size: str) -> Iterator[Setting]:
    """Every setting, most valuable first. `size`: "tiny" (for tests), "quick", "default", "full"."""
    f32, bf16 = torch.float32, torch.bfloat16
    contrast = functools.partial(info_nce.setting, device=device, size=size)
    given = functools.partial(soft_cross_entropy.setting, device=device, size=size)
    distil = functools.partial(distillation.setting, device=device, size=size)
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
    yield contrast(n=4096, width=256, dtype=bf16, terms=2)
    yield given(n=8192, columns=65536, dtype=bf16)
    yield distil(n=64, columns=65536, dtype=bf16)
    yield contrast(n=32768, width=256, dtype=bf16, key_grad=True)
    yield given(n=8192, columns=65536, dtype=bf16, forward=True)
    yield contrast(n=8192, width=256, dtype=bf16)
    if size == "full":
        yield contrast(n=32768, width=128, dtype=bf16)
        yield contrast(n=4096, width=256, dtype=f32)
        yield given(n=256, columns=1000, dtype=bf16)
        yield distil(n=64, columns=65536, dtype=f32)
