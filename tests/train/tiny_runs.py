"""Pieces of a tiny run, for the tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sdmp_train.config import Config, MixingConfig
from sdmp_train.data import Batch
from sdmp_train.distributed import World
from sdmp_train.guard import BufferGuard
from sdmp_train.methods.mocov3 import MoCoV3
from sdmp_train.models import build_backbone
from sdmp_train.optim import make_optimizer
from sdmp_train.training import Training

CPU = World(torch.device("cpu"))


def build_method(config: Config, world: World = CPU) -> MoCoV3:
    """The method on a fresh backbone, float32, on the CPU."""
    backbone = build_backbone(config.model, config.data.image_px, config.run.seed)
    return MoCoV3(config, backbone, world, torch.float32)


def with_mixing(config: Config, **changes: Any) -> Config:
    """The configuration with other mixing settings."""
    return replace(config, mixing=replace(MixingConfig(), **changes))


def random_views(config: Config, count: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """`count` batches of noise as a loader gives them: uint8, channels_last."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.optim.batch_size, 3, config.data.image_px, config.data.image_px)
    return tuple(
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(count)
    )


def build_training(config: Config, steps_per_epoch: int = 4) -> Training:
    """All that a loop needs, at step 0."""
    method = build_method(config)
    optimizer = make_optimizer(config.optim, method.student.parameters())
    buffers = BufferGuard(method.student, method.momentum_encoder)
    return Training(config, CPU, method, optimizer, buffers, steps_per_epoch)


def noise_batches(config: Config, steps: int, views: int = 2) -> Iterator[Batch]:
    """A loader's batches of noise, different at every step."""
    size = config.optim.batch_size
    for step in range(steps):
        ids = torch.arange(step * size, (step + 1) * size)
        yield Batch(random_views(config, views, seed=step), ids, torch.zeros(size, dtype=torch.int64))


def all_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Copies of every weight, buffer and moment."""
    method = training.method
    found = {f"student/{k}": v.clone() for k, v in method.student.state_dict().items()}
    found |= {f"momentum/{k}": v.clone() for k, v in method.momentum_encoder.state_dict().items()}
    for number, (_, moments) in enumerate(training.optimizer.state.items()):
        found |= {f"moments/{number}/{k}": v.clone() for k, v in moments.items()}
    return found
