"""The training loop: decode, augment, plan, mix, encode, loss, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .data import Batch, Loader
from .distributed import reduce_max
from .guard import FAILED, LateFlags, StopRequest, stop_flag
from .log import Log
from .meter import Meter
from .optim import key_momentum, learning_rate
from .training import Training


class Outcome(Enum):
    """How a loop ended."""

    DONE = "done"
    STOPPED = "stopped on request"
    NOT_FINITE = "not finite"
    FAILED = "a rank had no batch"


def train(
    training: Training, loader: Loader, log: Log, stop: StopRequest, after_step: Callable[[Training], None]
) -> Outcome:
    """Train from `training.step` to its last step; `after_step` (checkpoints, kNN) runs between steps.

    The host never waits for the device within a step: whether a step was finite, and whether any rank was asked to
    stop, it reads one step late. Where a rank's loader fails, the steps since then have changed nothing on any rank:
    `training.step` goes back to the first of them, so that what is saved is whole.
    """
    config, method = training.config, training.method
    flags, meter, bad_steps = LateFlags(), Meter(training.world, config.optim.batch_size), 0
    log.start_progress(training.last_step, training.step)
    batches, batch = iter(loader), None
    while training.step < training.last_step:
        with meter.waiting():
            batch = next_batch(batches, batch, stop)  # decode, augment
        plan = method.plan(training.step)
        images = method.mix(batch.views, plan)
        training.buffers.keep()
        queries, keys = method.encode(images)
        loss, terms = method.loss(queries, keys, plan)
        grad_norm, bad_or_stop = update(training, loss, stop)

        flags.push(training.step, batch.ids, bad_or_stop)
        training.step += 1
        last = training.step == training.last_step
        meter.add({"loss": loss, **terms, "grad_norm": grad_norm, **method.facts(plan)})
        if last or training.step % config.run.log_every_steps == 0:
            write_line(training, meter, log)
        with meter.paused():
            after_step(training)
        while (report := flags.pop(keep=0 if last else 1)) is not None:
            if report.failed:
                training.step = report.step
                return Outcome.FAILED
            bad_steps = bad_steps + 1 if report.bad else 0
            if report.bad:
                log.say(f"step {report.step} was not finite and changed nothing; its images: {report.ids.tolist()}")
            if bad_steps >= config.run.max_bad_steps:
                return Outcome.NOT_FINITE
            if report.stop and not last:
                return Outcome.STOPPED
        log.advance(training.step)
    return Outcome.DONE


def next_batch(batches: Iterator[Batch], former: Batch | None, stop: StopRequest) -> Batch:
    """The next batch; where there is none, the former again, for steps that every rank makes and none keeps."""
    if stop.failure is None:
        try:
            return next(batches)
        except Exception as error:
            if former is None:
                raise  # nothing has been trained since the last checkpoint
            stop.failure = error
    if former is None:
        raise stop.failure
    return former


def update(training: Training, loss: Tensor, stop: StopRequest) -> tuple[Tensor, Tensor]:
    """Backward, optimiser, momentum encoder. Where loss or gradient is not finite on any rank, nothing changes.

    Returns the gradient's norm and the flags [bad, stop], the largest over the ranks; both stay on the device.
    """
    config, method, optimizer = training.config, training.method, training.optimizer
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = get_total_norm([p.grad for p in method.student.parameters() if p.grad is not None])
    bad = ~(loss.detach().isfinite() & grad_norm.isfinite())
    said = stop_flag(stop)
    flags = torch.stack([(bad | (said >= FAILED)).float(), torch.full_like(grad_norm, said)])
    bad = reduce_max(flags, training.world)[0]
    warmup_steps = config.optim.warmup_epochs * training.steps_per_epoch
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(
            training.step, lr=config.optim.lr, steps=training.total_steps, warmup_steps=warmup_steps
        )
    optimizer.found_inf = bad
    optimizer.step()
    # MoCo v3 averages just before it makes a step's keys, with that step's momentum: the same as doing it here.
    momentum = key_momentum(
        training.step + 1,
        start=config.method.momentum,
        steps=training.total_steps,
        cosine=config.method.momentum_cosine,
    )
    method.follow_student((1 - momentum) * (1 - bad))
    training.buffers.restore(bad > 0)
    return grad_norm, flags


def write_line(training: Training, meter: Meter, log: Log) -> None:
    """One object for metrics.jsonl and one line for people."""
    epoch = training.step / training.steps_per_epoch
    values = meter.read()
    log.metrics({"step": training.step, "epoch": epoch, "lr": training.optimizer.param_groups[0]["lr"], **values})
    log.report(
        f"step {training.step}/{training.last_step}  epoch {epoch:.1f}  loss {values['loss']:.3f}  "
        f"{values['images_per_second']:.3g} img/s  waiting for data {values['data_wait_fraction']:.0%}"
    )
