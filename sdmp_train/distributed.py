"""One process or many: torchrun starts them, this file lets them agree. N rows per rank, W ranks, D features."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .settings import ConfigError
from .stop import EndedElsewhere, Stopped, leaving_at_once

STEP_MINUTES = 30
"""How long a rank waits for another within a step: the first one may be saving or measuring."""
HOST_MINUTES = 240
"""How long ranks wait on the host, for the last checkpoint or the first measurement."""


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not answer. Exit code 1."""

    exit_code = 1


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    device: torch.device
    rank: int = 0
    size: int = 1
    host: dist.ProcessGroup | None = None
    """All ranks, by gloo: for waiting on the host without a collective pending on the device."""

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """The processes that torchrun started (or just this one), until the end of the block."""
    rank, size, local = (
        int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU here; leave --device away, or take --device cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if size == 1:
        yield World(place)
        return
    try:
        with leaving_at_once():
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=STEP_MINUTES))
            host = dist.new_group(backend="gloo", timeout=timedelta(minutes=HOST_MINUTES))
        yield World(place, rank, size, host if isinstance(host, dist.ProcessGroup) else None)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """(N, D) of every rank as one (W * N, D), in rank order, without gradient."""
    if world.size == 1:
        return rows.detach()
    gathered = [torch.empty_like(rows) for _ in range(world.size)]
    dist.all_gather(gathered, rows.detach().contiguous())
    return torch.cat(gathered)


def mirror_rank(world: World) -> int:
    """The rank at the other end, W - 1 - r: its row N - 1 - i is the partner of row i under the global flip."""
    return world.size - 1 - world.rank


def mirror_images(images: Tensor, world: World) -> Tensor:
    """(N, 3, H, W) of the rank at the other end, point to point: no rank ever holds the images of all."""
    peer = mirror_rank(world)
    if peer == world.rank:
        return images
    sent = images.permute(0, 2, 3, 1).contiguous()
    received = torch.empty_like(sent)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
        work.wait()
    return received.permute(0, 3, 1, 2)


def reduce_max(flags: Tensor, world: World) -> Tensor:
    """The largest value over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags


def reduce_mean(values: Tensor, world: World) -> Tensor:
    """The mean over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
        values /= world.size
    return values


def said_by_first(choice: str, known: Sequence[str], world: World) -> str:
    """What the first rank chose among the `known`, on every rank."""
    if world.size == 1:
        return choice
    number = torch.tensor(known.index(choice))
    dist.broadcast(number, 0, group=world.host)
    return known[int(number)]


@contextmanager
def together(world: World) -> Iterator[None]:
    """A block that all ranks leave at the same time, and in the same way.

    Where one rank raises, the others raise too: `Stopped` where that was asked for, else `EndedElsewhere` with that
    rank's exit code. So none leaves while another still saves, and none waits for one that has given up. Within the
    block ranks must not wait for each other: one would never come.

    Raises:
        ProcessLost: a rank has died, or has not come within `HOST_MINUTES`.
    """
    if world.size == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    worst = torch.tensor(0 if failure is None else getattr(failure, "exit_code", 1))
    try:
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=world.host)
    except RuntimeError as error:
        if failure is None:
            raise ProcessLost(f"another process of this run has ended, or does not answer: {error}") from error
    if failure is not None:
        raise failure
    if int(worst) == Stopped.exit_code:
        raise Stopped("stopped on request")
    if int(worst):
        raise EndedElsewhere(int(worst))


def distribute(module: nn.Module, world: World, *, trained: bool = True) -> nn.Module:
    """The module with synchronised batch norm; if it is trained, wrapped so that gradients are averaged."""
    if world.size == 1:
        return module
    synchronise_batch_norm(module, world)
    if not trained:
        return module
    # Buffers are equal on all ranks as it is: the start is, and so are the synchronised statistics.
    ids = [world.device.index] if world.device.type == "cuda" else None
    kind = nn.parallel.DistributedDataParallel
    # torch 2.14 renamed the option and warns about the former name; torch 2.11 knows only that.
    renamed = "forward_sync_buffers" in inspect.signature(kind).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return kind(module, device_ids=ids, **options)


def synchronise_batch_norm(module: nn.Module, world: World) -> None:
    """Replace every batch norm inside `module`, in place, by one whose statistics are over all ranks."""
    if world.device.type == "cuda":
        for name, child in module.named_children():
            setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, CpuSyncBatchNorm.take_over(child))
        else:
            synchronise_batch_norm(child, world)


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all ranks on CPUs, which torch's SyncBatchNorm refuses. For tests and small trials."""

    @classmethod
    def take_over(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> CpuSyncBatchNorm:
        """The same layer, holding the same parameters and buffers."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new._parameters, new._buffers = norm._parameters, norm._buffers
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        ranks = dist.get_world_size()
        count = input.numel() / input.shape[1] * ranks
        mean = sum_over_ranks(input.sum(dims)) / count
        centred = input - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * count / max(count - 1, 1))
        output = centred * (variance + self.eps).rsqrt().view(shape)
        return output if self.weight is None else output * self.weight.view(shape) + self.bias.view(shape)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over the ranks, differentiable: every rank's gradient reaches every rank's values."""
    return _SumOverRanks.apply(values)
