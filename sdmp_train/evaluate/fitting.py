"""The trainings that evaluations make: run by `loop.train`, with the guard, checkpoints and signals of pretraining.

Each has a folder of its own, a run folder: in that of the run it belongs to, or where --output says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import checkpoint, run_folder
from ..config import Config, ConfigError, OptimConfig, RunConfig
from ..data import DataError, HostTransform, Index, LoaderName, choose_loader, make_loader, steps_per_epoch
from ..distributed import World, together
from ..durable import write_durably
from ..log import Log
from ..loop import Outcome, train
from ..methods.method import Method, Setup
from ..run_folder import CHECKPOINTS, EVALUATED, SETTINGS
from ..saver import Saver
from ..settings import require
from ..stop import Stopped, StopRequest
from ..text import brief, printable
from ..training import Training, assemble, load_parts, versions
from .settings.fit import FitConfig
from .subject import PLACES, Subject, resolved_precision


class NotFinite(RuntimeError):
    """Too many steps in a row were not finite. Exit code 3."""

    exit_code = 3


NOT_MATHS = frozenset(
    {*PLACES, "data", "test_data", "device", "workers", "save_every_minutes", "log_every_steps"}
    | {"bad_images", "max_bad_frac", "max_pixels"}
)
"""Settings that a training may be gone on with otherwise: weights and images are compared by their digests."""


def run_settings(config: FitConfig, name: str, world: World) -> RunConfig:
    """The settings of the training itself, under the name that stands in place of a preset's."""
    return RunConfig(
        preset=name,
        seed=config.seed,
        device=config.device,
        precision=resolved_precision(config.precision, world),
        log_every_steps=config.log_every_steps,
        save_every_minutes=config.save_every_minutes,
    )


@dataclass(frozen=True)
class Fitting:
    """A training that an evaluation asks for."""

    protocol: str
    asked: FitConfig
    subject: Subject
    settings: Mapping[str, Any]
    """Kept in config.yaml, and compared by --resume."""
    config: Config
    """What the loop reads: data, optim and run."""
    make: Callable[[Setup], Method]
    index: Index
    repeats: int = 1
    host: HostTransform | None = None
    """As `make_loader` has them."""
    usual_batch: int = 0
    """Of the recipe, where the settings name none."""

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        if self.subject.run is not None and self.asked.output is None:
            return self.subject.run / EVALUATED / self.protocol
        if self.asked.output is None:
            raise ConfigError(f"output is missing; give --output DIR, a folder for eval {self.protocol} to train in")
        return Path(self.asked.output)

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint is compared by."""
        compared = {name: value for name, value in self.settings.items() if name not in NOT_MATHS}
        return {
            "evaluation": self.protocol,
            "settings": compared,
            "images": self.index.fingerprint,
            "weights": self.subject.digest,
            "precision": self.config.run.precision,
            "loader": self.config.data.loader,
        }


def resolved_loader(loader: LoaderName, world: World, channels: int = 3) -> LoaderName:
    """What `auto` means here: on a GPU the loaders' pixels differ, so that a training keeps its own."""
    try:
        return choose_loader(loader, world.device, channels).name
    except DataError as error:
        raise ConfigError(f"--loader {loader}: {error}") from error


@contextmanager
def fitted(fitting: Fitting, world: World, log: Log, stop: StopRequest) -> Iterator[Training]:
    """Train to the end; within the block the training is there and its folder is locked.

    Raises:
        ConfigError: before anything has been written.
        Stopped: asked for; what was trained is saved, and --resume goes on.
        NotFinite: `max_bad_steps` steps in a row were not finite.
    """
    mode: run_folder.Mode = "auto" if fitting.asked.resume else "overwrite" if fitting.asked.overwrite else "new"
    config, folder, index = fitting.config, fitting.folder, fitting.index
    with together(world):
        require_batches(config, index, world)
        check_free(folder, mode)
        stop.check()
    training = assemble(
        config,
        world,
        steps_per_epoch=steps_per_epoch(len(index), config.optim.batch_size),
        classes=len(index.classes),
        method_class=lambda _config, _build, setup: fitting.make(setup),
    )
    with ExitStack() as stack:
        with together(world):
            if mode == "auto" and checkpoint.step_folders(folder / CHECKPOINTS):
                go_on(training, fitting)
            run_id = begin(fitting, training, stack, mode, log)
        saver = Saver(training, folder / CHECKPOINTS, log, lambda: {"run": run_id, **fitting.facts, **versions_of()})

        def after_step(training: Training) -> None:
            if world.is_first and saver.is_due() and training.step < training.last_step:
                saver.save()

        loader = stack.enter_context(
            make_loader(
                index,
                training.method.views(training.at),
                batch_size=config.optim.batch_size // world.size,
                steps=training.last_step,
                start_step=training.step,
                seed=config.run.seed,
                rank=world.rank,
                world_size=world.size,
                device=world.device,
                loader=config.data.loader,
                workers=config.data.workers,
                repeats=fitting.repeats,
                host=fitting.host,
            )
        )
        for line in describe(fitting, training):
            log.say(line)
        outcome = train(training, loader, log, stop, after_step)
        log.stop_progress()
        with together(world):
            if world.is_first:
                saver.save(last=True)
            end(outcome, training, folder, log, stop)
        yield training


def require_batches(config: Config, index: Index, world: World) -> None:
    """Raise `ConfigError` unless the images fill a batch, and the processes share it evenly."""
    batch_size = config.optim.batch_size
    require(len(index.classes) >= 2, "the number of classes", len(index.classes), "at least 2")
    require(batch_size % world.size == 0, "batch_size", batch_size, f"a multiple of the {world.size} processes")
    require(batch_size <= len(index), "batch_size", batch_size, f"at most the {len(index)} images to train on")


def check_free(folder: Path, mode: run_folder.Mode) -> None:
    """As `run_folder.check_folder`; a free folder may hold results."""
    try:
        run_folder.check_folder(folder, mode)
    except ConfigError as error:
        if mode == "new" and run_folder.is_run_folder(folder):
            raise ConfigError(
                f"{printable(folder)} holds a training already; --resume goes on with it (and measures again where it "
                "has ended), --overwrite deletes it, --output OTHER trains in another folder"
            ) from error
        raise


def begin(fitting: Fitting, training: Training, stack: ExitStack, mode: run_folder.Mode, log: Log) -> str:
    """Claim the folder until the stack ends, put the settings there; returns what names this training."""
    if not training.world.is_first:
        return ""
    claimed = stack.enter_context(run_folder.claim(fitting.folder, mode))
    settings = yaml.safe_dump({"evaluation": fitting.protocol, "settings": dict(fitting.settings)}, sort_keys=False)
    try:
        write_durably(claimed.path / SETTINGS, settings)
        log.open(claimed.path, from_step=training.step)
        for line in checkpoint.set_later_aside(claimed.path / CHECKPOINTS, training.step):
            log.say(line)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the folder {printable(claimed.path)} cannot be written: {error}") from error
    return claimed.run_id


def go_on(training: Training, fitting: Fitting) -> None:
    """Put the newest checkpoint into `training`.

    Raises:
        ConfigError: it is damaged, or of other weights, images or settings, which are named.
    """
    path = checkpoint.newest_checkpoint(fitting.folder / CHECKPOINTS)
    parts, state = checkpoint.load_checkpoint(path)
    changes = []
    for name, value in fitting.facts.items():
        before = state.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            keys = sorted(value.keys() | before.keys())
            changes += [
                f"{key}: {brief(before.get(key))} -> {brief(value.get(key))}"
                for key in keys
                if before.get(key) != value.get(key)
            ]
        elif before != value:
            changes.append(name if name in ("images", "weights") else f"{name}: {brief(before)} -> {brief(value)}")
    if changes:
        raise ConfigError(
            f"cannot go on in {printable(fitting.folder)}: {'; '.join(changes)} changed. Leave them as they were, "
            "or give --overwrite or another --output"
        )
    if state["step"] > training.last_step:
        raise checkpoint.CheckpointError(f"{path} is beyond the {training.last_step} steps of this training")
    load_parts(training, parts, state["step"], path)


def shrunk(usual: int, optim: OptimConfig, images: int) -> list[str]:
    """A line where the batch is smaller than the recipe's, and what that does to the learning rate."""
    batch = optim.batch_size
    if batch >= usual or images >= usual:  # or smaller only to be shared evenly
        return []
    falls = "" if optim.min_lr < optim.lr else ", and stays there: the schedule's end is no lower"
    return [
        f"batch    {usual:,} -> {batch}: there are {images:,} images to train on; the learning rate peaks at "
        f"{optim.base_lr:g} x {batch} / 256 = {optim.lr:.3g} in place of {optim.base_lr * usual / 256:.3g}{falls}. "
        f"An epoch is {images // batch} step{'s' * (images // batch > 1)}: for few images give --batch-size, --lr and "
        "--epochs (docs/evaluation.md)"
    ]


def versions_of() -> dict[str, Any]:
    """The software, for state.json."""
    return {"versions": versions()}


def describe(fitting: Fitting, training: Training) -> list[str]:
    """What is trained on what, one line each."""
    optim = training.config.optim
    began = f", going on at {training.step}" if training.step else ""
    return [
        f"weights  {fitting.subject.name}",
        f"data     {fitting.index.summary()}",
        *shrunk(fitting.usual_batch, optim, len(fitting.index)),
        f"loss     {training.method.describe()}",
        f"steps    {training.steps_per_epoch} per epoch x {optim.epochs} epochs = {training.total_steps}, "
        f"batch {optim.batch_size}{began}",
        f"folder   {fitting.folder}",
    ]


def measured_on(train: Index, test: Index) -> dict[str, int]:
    """How many images and classes a result is of, for its record."""
    return {"test_images": len(test), "train_images": len(train), "classes": len(test.classes)}


def end(outcome: Outcome, training: Training, folder: Path, log: Log, stop: StopRequest) -> None:
    """Nothing where the training is done; else raise what ended it."""
    if outcome is Outcome.DONE:
        return
    if outcome is Outcome.NOT_FINITE:
        raise NotFinite(
            f"{training.config.run.max_bad_steps} steps in a row were not finite: stopped at step {training.step}; "
            "try a smaller --lr"
        )
    log.say(f"stopped after step {training.step} of {training.last_step}; the same command with --resume goes on")
    if outcome is Outcome.FAILED and stop.failure is not None:
        raise stop.failure
    raise Stopped("stopped on request")
