"""Whether data keeps a run waiting, measured on the run itself.

Its step, fed by its loader, beside the same step fed from images that are decoded already, in interleaved blocks of one
process, so that what else the machine does falls on both. The weights are put back afterwards: a certified run has the
bits of one that is not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import Batch, DataError, Index, Loader, cores
from .durable import write_durably
from .guard import StopRequest
from .loop import step
from .text import printable
from .training import Training, load_parts, state_parts

CERTIFICATE = "certify.json"
BLOCKS, STEPS, STARTING = 5, 10, 3
"""Blocks of each arm, timed steps of a block, and untimed ones before the first block of each arm."""
RESIDENT_BATCHES = 4
"""Global batches of images that the control keeps: it goes round them."""

Open = Callable[[Index, Any], Loader]
"""(images, loader) -> an open loader of the run's own views."""


@dataclass
class Arm:
    """The steps of one of the two ways to be fed, over all its blocks."""

    batches: Iterator[Batch]
    loader: Loader
    seconds: list[float] = field(default_factory=list)
    """Per step, on the host; on a GPU the host is a step ahead at most, since each is waited for."""
    waits: list[float] = field(default_factory=list)
    """Per step, what the host waited for its batch."""
    idle: list[float] = field(default_factory=list)
    """Per step, how long the device had nothing to do before it; on a GPU alone."""
    depths: list[int] = field(default_factory=list)
    """Batches that were ready when one was asked for, where the loader says."""
    wall: float = 0.0
    cpu: float = 0.0
    """Seconds that all cores together worked for this process and its decoders in that time."""


def certify(
    training: Training,
    index: Index,
    opened: Open,
    loader: Any,
    *,
    between: Callable[[], None],
    blocks: int = BLOCKS,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Measure, and put `training` back where it was.

    Args:
        opened: opens a loader for the images from the training's present step on, for at least
            `STARTING + blocks * steps` steps where that many are left.
        loader: the run's own choice.
        between: called between blocks; what it raises ends the measurement.

    Returns:
        What `certify.json` holds.

    Raises:
        DataError: the images of some batches do not fit into memory decoded; a file that is damaged.
    """
    kept = {part: {n: t.clone() for n, t in tensors.items()} for part, tensors in state_parts(training).items()}
    began, warned = training.step, training.warned
    rows = np.arange(min(len(index), RESIDENT_BATCHES * training.config.optim.batch_size))
    try:
        with opened(index, loader) as fed, opened(index.subset(rows), "resident") as resident:
            arms = {"fed": Arm(iter(fed), fed), "resident": Arm(iter(resident), resident)}
            blocks = min(blocks, (len(fed) - STARTING) // steps)
            if blocks < 1:
                raise DataError(f"{len(fed)} steps are too few to certify: it takes {STARTING + steps}")
            for arm in arms.values():
                run_block(training, arm, STARTING, timed=False)
            for _ in range(blocks):
                for arm in arms.values():
                    between()
                    run_block(training, arm, steps)
            return certificate(training, arms["fed"], arms["resident"], blocks)
    finally:
        # The optimiser's moments come back with the rest, and are nothing where nothing had been trained.
        training.optimizer.state.clear()
        load_parts(training, kept, began, Path("what certify kept"))
        training.warned = warned


def run_block(training: Training, arm: Arm, steps: int, *, timed: bool = True) -> None:
    """Some steps in a row, each waited for, so that its time is its own."""
    device, stop, at = training.world.device, StopRequest(), training.step
    cuda = device.type == "cuda"
    wait(device)
    begin, worked = time.perf_counter(), busy_seconds()
    for _ in range(steps):
        depth = arm.loader.ready()
        start = time.perf_counter()
        ended = event(cuda)
        batch = next(arm.batches)
        came = time.perf_counter()
        ready = event(cuda)
        step(training, [batch], stop)
        training.step = at  # schedules stand still
        wait(device)
        if timed:
            arm.seconds.append(time.perf_counter() - start)
            arm.waits.append(came - start)
            if depth is not None:
                arm.depths.append(depth)
            if ended is not None and ready is not None:
                arm.idle.append(ended.elapsed_time(ready) / 1000)
    if timed:
        arm.wall += time.perf_counter() - begin
        arm.cpu += busy_seconds() - worked


def certificate(training: Training, fed: Arm, resident: Arm, blocks: int) -> dict[str, Any]:
    """The numbers, and what each is."""
    medians = [float(np.median(arm.seconds)) for arm in (fed, resident)]
    per_block = np.array_split(np.array(fed.seconds), blocks), np.array_split(np.array(resident.seconds), blocks)
    stalls = [1 - float(b.sum() / a.sum()) for a, b in zip(*per_block, strict=True)]
    gpu = training.world.device.type == "cuda"
    return {
        "stall": 1 - sum(resident.seconds) / sum(fed.seconds),
        "stall_p50": 1 - medians[1] / medians[0],
        "stall_blocks": stalls,
        "accelerator_utilization": min(1.0, len(fed.seconds) * medians[1] / fed.wall),
        "step_seconds": {"fed": percentiles(fed.seconds), "resident": percentiles(resident.seconds)},
        "data_wait_fraction": {
            name: sum(arm.waits) / sum(arm.seconds) for name, arm in (("fed", fed), ("resident", resident))
        },
        "device_idle_fraction": sum(fed.idle) / sum(fed.seconds) if gpu else None,
        "queue_depth": {"least": min(fed.depths), "mean": float(np.mean(fed.depths))} if fed.depths else None,
        "cores_used": {"fed": fed.cpu / fed.wall, "resident": resident.cpu / resident.wall, "at_hand": cores()},
        "blocks": blocks,
        "steps": len(fed.seconds),
        "batch_size": training.config.optim.batch_size,
        "ranks": training.world.size,
        "decoder": {"loader": fed.loader.name, "why": fed.loader.why, "hardware_jpeg": None},
        "device": torch.cuda.get_device_name(training.world.device) if gpu else "cpu",
        "unknown": unknown(gpu, fed),
        "definitions": DEFINITIONS,
    }


DEFINITIONS = {
    "stall": "1 - T_resident / T_fed over the steps of interleaved blocks in one process; below 0 is noise",
    "accelerator_utilization": "as MLPerf Storage: steps x computation time (median step of resident data) / wall time",
    "data_wait_fraction": "the host's time in next() / its time in the step",
    "device_idle_fraction": "from events: device time between the end of a step and the batch of the next one",
    "queue_depth": "batches ready when one was asked for",
    "cores_used": "CPU seconds of this process and its decoding processes / wall seconds",
}


def unknown(gpu: bool, fed: Arm) -> list[str]:
    """What this machine, or this measurement, cannot tell."""
    found = ["hardware JPEG engines: whether there are any, whether they were used, and how their pixels differ"]
    if not gpu:
        found = [
            "hardware JPEG engines: a CPU has none",
            "device idle time: a CPU has no events. Decoding and training share its cores, so that a fed step is "
            "slower even where its batch is always there",
        ]
    if not fed.depths:
        found.append("queue depth: this loader decodes when it is asked")
    return found


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    return {f"p{p}": float(np.percentile(seconds, p)) for p in (50, 95, 99)}


def line_of(found: Mapping[str, Any]) -> str:
    """The one line to print."""
    p50, p95, p99 = (found["step_seconds"]["fed"][name] * 1000 for name in ("p50", "p95", "p99"))
    idle, used = found["device_idle_fraction"], found["cores_used"]
    return (
        f"certify  stall {found['stall_p50']:.1%} (p50; {found['stall']:.1%} in all) over {found['steps']} steps, "
        f"step p50 {p50:.0f} p95 {p95:.0f} p99 {p99:.0f} ms, "
        f"waiting for data {found['data_wait_fraction']['fed']:.1%}, "
        f"device idle {'unknown on a CPU' if idle is None else f'{idle:.1%}'}, "
        f"AU {found['accelerator_utilization']:.0%}, {used['fed']:.1f} of {used['at_hand']} cores"
    )


def write_certificate(found: Mapping[str, Any], folder: Path) -> str | None:
    """Put it into the run folder; returns why not, where that fails."""
    try:
        write_durably(folder / CERTIFICATE, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        return f"{printable(folder / CERTIFICATE)} cannot be written: {error}"
    return None


def event(cuda: bool) -> Any:
    """One that is recorded now, on a GPU."""
    if not cuda:
        return None
    made = torch.cuda.Event(enable_timing=True)
    made.record()
    return made


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_seconds() -> float:
    """CPU time of this process and of its children that are alive, where the system says."""
    own = time.process_time()
    return own + sum(child_seconds(child.pid) for child in multiprocessing.active_children())


def child_seconds(pid: int | None) -> float:
    """CPU time of a process; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
