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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import Batch, DataError, Index, Loader, cores
from .durable import write_durably
from .guard import StopRequest
from .jpeg_engines import JpegEngines, find_engines
from .loop import step
from .text import one_line, printable
from .training import Training, load_parts, state_parts

CERTIFICATE = "certify.json"
BLOCKS, STEPS, STARTING = 5, 10, 3
"""Blocks of each arm, timed steps of a block, and untimed ones before the first block of each arm."""
COMPARED = 32
"""Images that are decoded with and without hardware engines, to compare their pixels."""
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
    engines: JpegEngines | None = None
    """Asked after each step how busy they are."""
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
            engines = replace(find_engines(training.world.device), busy=[])
            arms = {"fed": Arm(iter(fed), fed, engines=engines), "resident": Arm(iter(resident), resident)}
            blocks = min(blocks, (len(fed) - STARTING) // steps)
            if blocks < 1:
                raise DataError(f"{len(fed)} steps are too few to certify: it takes {STARTING + steps}")
            for arm in arms.values():
                run_block(training, arm, STARTING, timed=False)
            for _ in range(blocks):
                for arm in arms.values():
                    between()
                    run_block(training, arm, steps)
            facts = decoder_facts(engines, fed.name, index, training.world.device)
            return certificate(training, arms["fed"], arms["resident"], blocks, facts)
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
            if arm.engines is not None:
                arm.engines.look()
    if timed:
        arm.wall += time.perf_counter() - begin
        arm.cpu += busy_seconds() - worked


def decoder_facts(engines: JpegEngines, loader: str, index: Index, device: torch.device) -> dict[str, Any]:
    """Hardware JPEG engines: how many, whether this run used them, and what they change in the pixels."""
    busiest, why = max(engines.busy, default=None), engines.why
    used, pixels = (None if busiest is None else busiest > 0), None
    if engines.count == 0:
        used = False
    elif loader != "dali":
        used, why = False, f"{why}; Pillow decodes on the CPU"
    else:
        try:
            pixels = compared_pixels(index, device)
        except (RuntimeError, OSError, ValueError) as error:
            why = f"{why}; pixels are not compared: {one_line(error)}"
    return {
        "engines": engines.count,
        "cores_per_engine": engines.cores,
        "used": used,
        "busiest_percent": busiest,
        "pixels": pixels,
        "why": why,
    }


def compared_pixels(index: Index, device: torch.device) -> dict[str, int] | None:
    """DALI's pixels with all and with no JPEGs given to the engines; None where Pillow decodes all of these images."""
    from .data.dali import pixels_by_share

    rows = np.flatnonzero(~index.pillow)[:COMPARED]
    if not len(rows):
        return None
    none, all_of_them = (pixels_by_share(index, rows, device, share) for share in (0.0, 1.0))
    differences = [int((a.int() - b.int()).abs().max()) for a, b in zip(none, all_of_them, strict=True)]
    return {"images": len(rows), "largest_difference": max(differences)}


def certificate(
    training: Training, fed: Arm, resident: Arm, blocks: int, hardware_jpeg: Mapping[str, Any]
) -> dict[str, Any]:
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
        "decoder": {"loader": fed.loader.name, "why": fed.loader.why, "hardware_jpeg": dict(hardware_jpeg)},
        "device": torch.cuda.get_device_name(training.world.device) if gpu else "cpu",
        "unknown": unknown(gpu, fed, hardware_jpeg),
        "definitions": DEFINITIONS,
    }


DEFINITIONS = {
    "stall": "1 - T_resident / T_fed over the steps of interleaved blocks in one process; below 0 is noise",
    "accelerator_utilization": "as MLPerf Storage: steps x computation time (median step of resident data) / wall time",
    "data_wait_fraction": "the host's time in next() / its time in the step",
    "device_idle_fraction": "from events: device time between the end of a step and the batch of the next one",
    "queue_depth": "batches ready when one was asked for",
    "cores_used": "CPU seconds of this process and its decoding processes / wall seconds",
    "hardware_jpeg": "engines and cores as nvJPEG counts them; busiest_percent as NVML tells between fed steps; "
    "largest_difference in 8-bit levels between all and no JPEGs given to the engines",
}


def unknown(gpu: bool, fed: Arm, hardware_jpeg: Mapping[str, Any]) -> list[str]:
    """What this machine, or this measurement, cannot tell."""
    found = []
    if hardware_jpeg["engines"] is None:
        found.append(f"hardware JPEG engines: {hardware_jpeg['why']}")
    if hardware_jpeg["used"] is None:
        found.append("whether hardware JPEG engines were used: NVML does not say")
    if not gpu:
        found.append(
            "device idle time: a CPU has no events. Decoding and training share its cores, so that a fed step is "
            "slower even where its batch is always there"
        )
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
        f"AU {found['accelerator_utilization']:.0%}, {used['fed']:.1f} of {used['at_hand']} cores, "
        f"JPEG engines {phrase_of(found['decoder']['hardware_jpeg'])}"
    )


def phrase_of(hardware_jpeg: Mapping[str, Any]) -> str:
    """What became of the engines, in a few words."""
    count, used, busiest = (hardware_jpeg[name] for name in ("engines", "used", "busiest_percent"))
    if not count:
        return "unknown" if count is None else f"none ({hardware_jpeg['why'].partition(':')[0].partition(';')[0]})"
    if not used:
        return f"{count}, {'not used' if used is False else 'use unknown'}"
    return f"{count}, used (to {busiest}%)"


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
