"""Does it learn on this device, and how fast? `python -m bench train`: CIFAR-10 by `cifar10-r18` and by its SDMP twin.

Images live on the device (`--loader resident`). The two take turns, so that a run that is cut leaves both at the same
epoch; each is a run folder that the same command goes on with. How many epochs there are is decided once, by the time
at hand: a schedule that ends says more than the beginning of a long one.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import environment, reproduce
from bench.harness import EXIT_ABSENT, Absent, absence
from bench.reproduced import ALL_IMAGES, WRITTEN
from bench.results import Results, default_path
from bench.step import one_step
from sdmp_train.certify import CERTIFICATE, wait

if TYPE_CHECKING:
    from sdmp_train.config import Config
    from sdmp_train.evaluate.record import RunRecord

PRESETS = ("cifar10-r18", "cifar10-r18-sdmp")
TURNS = 4
"""In which each of the two makes its epochs; a run is opened anew, and kNN measured, in every turn."""
SHARE = 0.7
"""Of the time at hand, what steps are planned to take: opening, kNN, pictures and a slower step than the first ones."""
WARM_STEPS, TIMED_STEPS = 10, 30
CLASSES, POINTS = 10, 100
"""Of the images; of a curve in the results file, at most."""
TINY, TINY_EPOCHS = {"train": 56, "test": 4}, 2
"""Pictures of each of two classes: 14 steps an epoch, so that a turn is long enough to certify."""


def run(args: argparse.Namespace) -> int:
    """Train what is left: 0 where both are done, 1 where one broke, 75 where the time is up, `EXIT_ABSENT` where
    something they need is missing."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        root = Path(scratch) if args.tiny else environment.ROOT
        folder = args.folder or root / "runs" / "gpu"
        results = Results((args.json or (root / "train.json" if args.tiny else default_path())).resolve())
        print(f"train: {environment.line()}")
        results.begin("train", threads=torch.get_num_threads(), allocator="default")
        deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        try:
            data = args.data or (tiny_pictures(folder) if args.tiny else cifar10())
            both = {name: config_of(name, data, args.device, tiny=args.tiny) for name in PRESETS}
            epochs = chosen_epochs(args, folder, both, deadline)
            both = {name: lasting(config, epochs) for name, config in both.items()}
            code = take_turns(both, folder, results, deadline, again=args.again, turns=2 if args.tiny else TURNS)
        except Exception as error:
            why = absence(error)
            if why is None:
                raise
            results.gap("train", "absent", "CIFAR-10", why)
            print(f"absent: {why}")
            return EXIT_ABSENT
        if code == reproduce.DONE:
            results.finish("train")
        return code


def cifar10() -> Path:
    """The shared CIFAR-10, unpacked.

    Raises:
        Absent: there is none.
    """
    if environment.shared_data(reproduce.ARCHIVE) is None:
        raise Absent(
            f"there is no shared/data/{reproduce.ARCHIVE}, in the repository or beside it; give --data DIR with "
            "train/CLASS and test/CLASS"
        )
    return reproduce.unpacked(environment.ROOT / "runs" / "reproduce")


def tiny_pictures(folder: Path) -> Path:
    """Two classes of 32 px, gradients that rise and gradients that fall, as train/CLASS and test/CLASS."""
    from PIL import Image

    place = folder / "pictures"
    for split, count in TINY.items():
        for turn, name in ((0, "down"), (180, "up")):
            (place / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture = Image.linear_gradient("L").rotate(turn + number).resize((32, 32)).convert("RGB")
                picture.save(place / split / name / f"{number:02}.jpg")
    return place


def config_of(preset: str, data: Path, device: str, *, tiny: bool) -> Config:
    """The preset on images that live on the device; `tiny`: narrow, in batches of 8."""
    from sdmp_train.presets import get_preset

    config = get_preset(preset)
    if tiny:
        config = reproduce.narrow(config, 4, batch_size=8)
        method, data_at = replace(config.method, dim=16, mlp_dim=16), replace(config.data, image_px=16)
        config = replace(config, method=method, data=data_at, run=replace(config.run, log_every_steps=1))
    return replace(
        config,
        data=replace(config.data, data=str(data), loader="resident"),
        run=replace(config.run, device=device, save_every_minutes=reproduce.SAVE_MINUTES, keep_checkpoints=1),
    )


def lasting(config: Config, epochs: int) -> Config:
    """The same over so many epochs, of which at most a tenth warms up."""
    warmup = min(config.optim.warmup_epochs, epochs / 10)
    return replace(config, optim=replace(config.optim, epochs=epochs, warmup_epochs=warmup))


def chosen_epochs(args: argparse.Namespace, folder: Path, configs: dict[str, Config], deadline: float | None) -> int:
    """As asked; else as a run that is there has it; else as many of the preset's as the time allows."""
    from sdmp_train.run_folder import is_run_folder, stored_config

    most = configs[PRESETS[0]].optim.epochs
    if args.epochs is not None:
        return args.epochs
    if args.tiny:
        return TINY_EPOCHS
    for name in PRESETS:
        if is_run_folder(folder / name) and not args.again:
            return stored_config(folder / name).optim.epochs
    if deadline is None:
        return most
    seconds = sum(epoch_seconds(config) for config in configs.values())
    fit = epochs_that_fit(SHARE * (deadline - time.monotonic()), seconds, most)
    print(f"an epoch of each takes {seconds:.1f} s together: {fit} epochs of the preset's {most}", flush=True)
    return fit


def epochs_that_fit(seconds: float, epoch: float, most: int) -> int:
    """So many epochs of `epoch` seconds each: 1 at least, `most` at most."""
    return max(1, min(most, int(seconds / epoch)))


def epoch_seconds(config: Config) -> float:
    """What the steps of an epoch take, on noise that lies on the device."""
    from sdmp_train.commands import resolve
    from sdmp_train.data import steps_per_epoch
    from sdmp_train.distributed import join_world
    from sdmp_train.pace import noise
    from sdmp_train.training import assemble

    steps = steps_per_epoch(ALL_IMAGES, config.optim.batch_size)
    with join_world(config.run.device) as world:
        training = assemble(resolve(config, world), world, steps_per_epoch=steps, classes=CLASSES)
        batch = noise(training, config.optim.batch_size, CLASSES)

        def seconds(count: int) -> float:
            begun = time.perf_counter()
            for _ in range(count):
                one_step(training, batch)
            wait(world.device)
            return time.perf_counter() - begun

        seconds(WARM_STEPS)
        return seconds(TIMED_STEPS) / TIMED_STEPS * steps


def milestones(epochs: int, turns: int) -> list[int]:
    """The epochs at which a turn ends."""
    return sorted({max(1, round(epochs * turn / turns)) for turn in range(1, turns + 1)})


def take_turns(
    both: dict[str, Config], folder: Path, results: Results, deadline: float | None, *, again: bool, turns: int
) -> int:
    """Let each run make its epochs of a turn, one after the other; what they came to is written after each."""
    any_run = both[PRESETS[0]]
    steps, ends = steps_of_an_epoch(any_run), milestones(any_run.optim.epochs, turns)
    with reproduce.stopping_at(deadline) as stop:
        for epoch, (name, config) in itertools.product(ends, both.items()):
            place, anew = folder / name, again and epoch == ends[0]
            if stop.asked or (not anew and is_measured(place, epoch * steps)):
                continue
            turn = replace(config, run=replace(config.run, max_steps=epoch * steps))
            certified = anew or not (place / CERTIFICATE).exists()
            code = reproduce.train(turn, place, stop, quiet=True, certified=certified, overwrite=anew)
            if code not in (reproduce.DONE, reproduce.LATER):
                print(f"{name} ended with exit code {code}; see {place / 'train.log'}")
                return 1
            note(results, folder)
            print(line_of(name, results.document["trainings"][name]), flush=True)
    note(results, folder)
    if (picture := draw(results, folder)) is not None:
        print(f"  drew {picture.name}")
    unfinished = [name for name in both if not is_measured(folder / name, ends[-1] * steps)]
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}; the same command goes on")
    return reproduce.LATER if unfinished else reproduce.DONE


def steps_of_an_epoch(config: Config) -> int:
    """Steps of one pass over the run's images."""
    from sdmp_train.commands import resolve
    from sdmp_train.data import steps_per_epoch
    from sdmp_train.distributed import join_world
    from sdmp_train.splits import open_images

    with join_world(config.run.device) as world:
        images = len(open_images(resolve(config, world))[0])
    return steps_per_epoch(images, config.optim.batch_size)


def is_measured(folder: Path, step: int) -> bool:
    """Whether a run has made this step and its backbone was measured there or later."""
    from sdmp_train.evaluate.record import read_record
    from sdmp_train.run_folder import is_run_folder

    if not is_run_folder(folder):
        return False
    return any("knn" in row and row["step"] >= step for row in read_record(folder).rows)


def records_of(folder: Path) -> dict[str, RunRecord]:
    """The runs that have begun."""
    from sdmp_train.evaluate.record import read_record
    from sdmp_train.run_folder import is_run_folder

    return {name: read_record(folder / name) for name in PRESETS if is_run_folder(folder / name)}


def note(results: Results, folder: Path) -> None:
    """What the runs have come to so far, into the results file."""
    commit, dirty = environment.commit(*WRITTEN)
    when = {"commit": commit, "dirty": dirty, "date": environment.now()}
    results.document["trainings"] = {name: told_of(record) | when for name, record in records_of(folder).items()}
    results.write()


def told_of(record: RunRecord) -> dict[str, Any]:
    """A run's numbers: how far, how fast, how good."""
    config, certificate = record.config, record.folder / CERTIFICATE
    rates = [row["images_per_second"] for row in record.rows if row.get("images_per_second")]
    stall = json.loads(certificate.read_text()) if certificate.exists() else {}
    return {
        "step": record.step,
        "epochs": config.optim.epochs,
        "epochs_done": record.step / record.steps_per_epoch if record.rows else 0.0,
        "batch_size": config.optim.batch_size,
        "precision": config.run.precision,
        "loader": config.data.loader,
        "images_per_s": statistics.median(rates) if rates else None,
        "memory_gib": record.last("memory_gib"),
        "data_wait_fraction": record.mean("data_wait_fraction"),
        "stall": {key: stall[key] for key in ("stall", "stall_p50", "device_idle_fraction") if key in stall},
        "knn": points(*record.series("knn")),
        "knn_raw_pixels": record.last("knn_raw_pixels"),
        "loss": points(*record.series("loss")),
    }


def points(epochs: Sequence[float], values: Sequence[float]) -> list[list[float]]:
    """(epoch, value) evenly thinned, the last one kept."""
    every = max(1, -(-len(values) // POINTS))
    kept = sorted({*range(0, len(values), every), *([len(values) - 1] if values else [])})
    return [[epochs[i], values[i]] for i in kept]


def line_of(name: str, told: dict[str, Any]) -> str:
    """For people."""
    knn = f"kNN {told['knn'][-1][1]:.1%}" if told["knn"] else "kNN not measured"
    rate = "no rate yet" if told["images_per_s"] is None else f"{told['images_per_s']:.4g} images/s"
    stall = f"stall {told['stall']['stall_p50']:.1%}" if told["stall"] else "stall not measured"
    return f"  {name}: epoch {told['epochs_done']:.1f} of {told['epochs']}, {knn}, {rate}, {stall}"


def draw(results: Results, folder: Path) -> Path | None:
    """Loss, kNN and speed of the runs in one picture beside the results file; None without matplotlib or a run."""
    runs = [record for record in records_of(folder).values() if record.rows]
    if not runs or importlib.util.find_spec("matplotlib") is None:
        return None
    from sdmp_train.evaluate.figures import curves

    shown = {"loss": "loss", "knn": "kNN accuracy", "images_per_second": "images per second"}
    figure = curves(runs, shown)
    place = results.path.with_name(f"{results.path.stem}-curves.png")
    figure.savefig(place, dpi=110)
    return place
