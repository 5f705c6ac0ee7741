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
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                timeout=timedelta(minutes=STEP_MINUTES),
                # NCCL then knows at once which GPU is whose, and begins there, not at the first collective.
                device_id=place if on_gpu else None,
            )
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
    """(N, 3, H, W) of the rank at the other end, channels_last: no rank ever holds the images of all."""
    return mirror_rows(images.permute(0, 2, 3, 1), world).permute(0, 3, 1, 2)


def mirror_rows(rows: Tensor, world: World) -> Tensor:
    """The tensor of the same shape on the rank at the other end, point to point."""
    peer = mirror_rank(world)
    if peer == world.rank:
        return rows
    sent = rows.contiguous()
    received = torch.empty_like(sent)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
        work.wait()
    return received


def gather_on_hosts(numbers: Tensor, world: World) -> Tensor:
    """(N,) of every rank, on the CPU, as (W * N,), in rank order. Hosts wait for each other, devices do not."""
    if world.size == 1:
        return numbers
    gathered = [torch.empty_like(numbers) for _ in range(world.size)]
    dist.all_gather(gathered, numbers, group=world.host)
    return torch.cat(gathered)


def gather_text(text: str, world: World) -> list[str]:
    """A text of every rank, in rank order; bytes that are no text survive."""
    data = torch.frombuffer(bytearray(text.encode("utf-8", "surrogateescape") + b"\0"), dtype=torch.uint8)
    lengths = gather_on_hosts(torch.tensor([len(data)]), world).tolist()
    longest = max(lengths)
    padded = torch.cat([data, data.new_zeros(longest - len(data))])
    rows = gather_on_hosts(padded, world).view(world.size, longest)
    return [
        row[: length - 1].numpy().tobytes().decode("utf-8", "surrogateescape")
        for row, length in zip(rows, lengths, strict=True)
    ]


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


def same_on_all(fingerprint: str, world: World) -> bool:
    """Whether every rank has this fingerprint."""
    return len(set(gather_text(fingerprint, world))) == 1


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
    synchronise_batch_norm(module)
    if not trained:
        return module
    # Buffers are equal on all ranks as it is: the start is, and so are the synchronised statistics.
    ids = [world.device.index] if world.device.type == "cuda" else None
    kind = nn.parallel.DistributedDataParallel
    # torch 2.14 renamed the option and warns about the former name; torch 2.11 knows only that.
    renamed = "forward_sync_buffers" in inspect.signature(kind).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return kind(module, device_ids=ids, **options)


def synchronise_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm inside `module`, in place, by one whose statistics are over all ranks."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, SyncBatchNorm.take_over(child))
        else:
            synchronise_batch_norm(child)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all ranks, on CPUs and GPUs, where every rank has as many rows.

    One collective in each direction, and the host waits for none: torch's own looks for ranks without rows, which
    stops the host once per layer and forward pass on a GPU, and refuses CPUs.
    """

    @classmethod
    def take_over(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> SyncBatchNorm:
        """The same layer, holding the same parameters and buffers."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new._parameters, new._buffers, new.training = norm._parameters, norm._buffers, norm.training
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, variance = _NormOverRanks.apply(input, self.weight, self.bias, self.eps)
        if self.training:
            count = input.numel() // input.shape[1] * dist.get_world_size()
            self._track(mean, variance * (count / max(count - 1, 1)))
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _NormOverRanks(torch.autograd.Function):
    """(output, mean (C,), biased variance (C,)) over the rows of all ranks.

    With x' the normalised input, w the weight, s the standard deviation and <.> the mean over all rows:
    d input = w / s (d output - <d output> - x' <d output x'>). Statistics and sums in float32, float64 for float64.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(input.dtype, torch.float32)
        variance, mean = torch.var_mean(input.to(wide), _other_dims(input), correction=0)
        means, variances = _of_all_ranks(torch.stack((mean, variance))).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        with torch.autocast(input.device.type, enabled=False):
            # Evaluation is the same arithmetic with given statistics, in one kernel.
            output = nn.functional.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(input, weight, mean, (variance + eps).rsqrt())
        ctx.affine = weight is not None and bias is not None
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return output, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        input, weight, mean, inverse = ctx.saved_tensors
        dims, shape = _other_dims(input), [1, -1] + [1] * (input.ndim - 2)
        wide = grad.to(mean.dtype)
        centred = input.to(mean.dtype) - mean.view(shape)
        own = torch.stack((wide.sum(dims), (wide * centred).sum(dims) * inverse))
        # Before it becomes that of all ranks: the gradients of weight and bias are averaged with all others.
        d_bias, d_weight = own.clone().to(weight.dtype).unbind() if ctx.affine else (None, None)
        dist.all_reduce(own)
        mean_grad, mean_product = own / (input.numel() // input.shape[1] * dist.get_world_size())
        slope = inverse if weight is None else inverse * weight.to(inverse.dtype)
        d_input = wide - mean_grad.view(shape)
        d_input = d_input.sub_(centred.mul_((mean_product * inverse).view(shape))).mul_(slope.view(shape))
        return d_input.to(input.dtype), d_weight, d_bias, None


def _other_dims(input: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [0, *range(2, input.ndim)]


def _of_all_ranks(values: Tensor) -> Tensor:
    """(W, ...) the values of every rank, in rank order."""
    # A sum with zeros is exact, and one collective on one tensor, whose name no version of torch has changed.
    found = values.new_zeros((dist.get_world_size(), *values.shape))
    found[dist.get_rank()] = values
    dist.all_reduce(found)
    return found
