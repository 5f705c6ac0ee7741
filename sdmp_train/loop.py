"""The training loop: decode, augment, plan, mix, encode, loss, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum

import torch

from .data import Batch, Loader
from .distributed import reduce_max
from .guard import FAILED, LateFlags, StopRequest, stop_flag
from .log import Log
from .lost import NONE_LOST, Lost
from .meter import Meter, line_of
from .methods.method import Loss, Step, mean_of
from .optim import clip_gradients, drop_frozen_gradients, set_schedules
from .text import duration
from .training import Training


class Outcome(Enum):
    """How a loop ended."""

    DONE = "done"
    STOPPED = "stopped on request"
    NOT_FINITE = "not finite"
    FAILED = "a rank had no batch"
    LOST_IMAGES = "too many images could not be decoded"


AfterStep = Callable[[Training], None]


def train(
    training: Training, loader: Loader, log: Log, stop: StopRequest, after_step: AfterStep, lost: Lost = NONE_LOST
) -> Outcome:
    """Train from `training.step` to its last step; `after_step` (checkpoints, kNN) runs between steps.

    The host never waits for the device within a step: whether a step was finite, and whether any rank was asked to
    stop, it reads one step late. Where a rank's loader fails, the steps since then have changed nothing on any rank:
    `training.step` goes back to the first of them, so that what is saved is whole.
    """
    config = training.config
    flags, meter, bad_steps = LateFlags(), Meter(training.world, config.optim.batch_size), 0
    log.start_progress(training.last_step, training.step)
    batches, batch = iter(loader), None
    while training.step < training.last_step:
        with meter.waiting():
            batch = next_batch(batches, batch, stop)  # decode, augment
            batch = lost.agree(batch, training.step, log)
        made = step(training, [batch], stop)

        flags.push(training.step - 1, batch.ids, made.flags)
        last = lost.too_many or training.step == training.last_step
        meter.add(made)
        if training.writes_line(training.step):
            write_line(training, meter, log, lost.facts)
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
        if lost.too_many:
            return Outcome.LOST_IMAGES
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


def step(training: Training, batches: Sequence[Batch], stop: StopRequest) -> Step:
    """One step on batches that are decoded and augmented; gradients accumulate where there are several."""
    method, losses = training.method, []
    training.optimizer.zero_grad(set_to_none=True)
    with training.undoable(), training.seeded():
        for part, batch in enumerate(batches):
            at = training.at._replace(part=part, parts=len(batches))
            plan = method.plan(at)
            if batch.all_valid is not None:
                plan = method.without_lost(plan, batch)
            images = method.mix(batch, plan)
            features = method.encode(images)
            loss = method.loss(features, plan, batch, at)
            backward(loss, len(batches))
            health = method.health(features) if training.writes_line(training.step + 1) else {}
            facts = {**method.facts(plan), **loss.facts, **health}
            losses.append(loss._replace(total=loss.total.detach(), facts=facts))
        return update(training, mean_of(losses), stop)


def backward(loss: Loss, parts: int) -> None:
    """Add the gradient of this batch's share of the step's loss, which is the mean over its batches."""
    (loss.total if parts == 1 else loss.total / parts).backward()


def update(training: Training, loss: Loss, stop: StopRequest) -> Step:
    """Clip, schedules, optimiser, what follows. Where loss or gradient is not finite on any rank, nothing changes."""
    method, optimizer, at, config = training.method, training.optimizer, training.at, training.config.optim
    drop_frozen_gradients(optimizer, at)
    grad_norm = clip_gradients([p.grad for p in method.trained.parameters() if p.grad is not None], config)
    bad = ~(loss.total.isfinite() & grad_norm.isfinite())
    said = stop_flag(stop)
    flags = torch.stack([(bad | (said >= FAILED)).float(), torch.full_like(grad_norm, said)])
    bad = reduce_max(flags, training.world)[0]
    set_schedules(optimizer, at, config)
    optimizer.found_inf = bad
    optimizer.step()
    method.after_update(at, 1 - bad)
    training.undo_buffers(bad > 0)
    training.step += 1
    return Step(loss, grad_norm, flags)


def write_line(training: Training, meter: Meter, log: Log, facts: Mapping[str, float]) -> None:
    """One object for metrics.jsonl and one line for people; once, a warning where features have likely collapsed."""
    values, at, lr = meter.read(), training.at, training.optimizer.param_groups[0]["lr"]
    log.metrics({"step": at.step, "epoch": at.epoch, "lr": lr, **values, **facts})
    head = f"step {at.step}/{training.last_step}"
    left = duration((training.last_step - at.step) * values["step_seconds"])
    line = f"{head}  epoch {at.epoch:.1f}  {line_of(values)}  lr {lr:.2e}  "
    line += f"{duration(values['step_seconds'])} a step  memory {values['memory_gib']:.1f} GiB  left {left}"
    log.report(line, live=f"{head}  loss {values['loss']:.3f}  {values['images_per_second']:.3g} img/s")
    why = training.method.collapse(values) if at.epoch > training.config.optim.warmup_epochs else None
    if why is not None and not training.warned:
        training.warned = True
        log.say(f"warning  likely collapsed at step {at.step}: {why}")
