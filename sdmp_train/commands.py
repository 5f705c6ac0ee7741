"""What the command line calls: pretrain, plan (a dry run), export, verify. Evaluations are in `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import nn

from sdmp_kernels import backends

from . import certify, checkpoint, run_folder
from .config import Config, ConfigError, OptimConfig, save_config, to_dict
from .continuing import Start, line_of, open_start, resolved
from .data import (
    LOADERS,
    Choice,
    DataError,
    Index,
    Loader,
    LoaderName,
    TooManyBadFiles,
    choose_loader,
    make_loader,
)
from .distributed import World, join_world, said_by_first, same_on_all, together
from .export import export_backbone
from .file_list import store_file_list
from .log import Log
from .loop import Outcome, train
from .lost import NONE_LOST, Lost, LostImages, too_many_lost
from .pace import is_long, measure_pace, too_much
from .run import Run
from .run_folder import RunFolder
from .splits import describe_split, from_anywhere, open_images
from .stop import Stopped, StopRequest
from .text import counted, printable_lines, shown_size
from .trackers import asked_for, open_trackers
from .training import Training, build, load_state, memory_bytes
from .weights import checkpoint_backbone

EXIT_CODES = {Outcome.DONE: 0, Outcome.NOT_FINITE: 3, Outcome.STOPPED: Stopped.exit_code}


def pretrain(
    config: Config,
    output: Path | None,
    *,
    resume: bool = False,
    or_start: bool = False,
    previous: bool = False,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    certified: bool = False,
    log: Log | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Run a pretraining to its end, or until it is asked to stop. Returns the exit code.

    `or_start`: with `resume`, begin where there is no run to go on with: one command for a job that is requeued.

    Raises:
        ConfigError, DataError: before anything has been written; `DataError` also later, once the run is saved.
        Stopped: asked for before the first step. What is there can be resumed.
    """
    mode: run_folder.Mode = "overwrite" if overwrite else "new"
    if resume:
        mode = "auto" if or_start else "resume"
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        stop.check()
        world = stack.enter_context(join_world(config.run.device))
        stop.speaks = world.is_first
        log = stack.enter_context(log or Log(quiet=not world.is_first))
        folder, claimed = output or run_folder.default_folder(config.run.preset), None
        config = kept_start(config, folder) if resume else config
        kept = kept_loader(config, folder, world) if resume else None
        asked, config = config, resolve(kept or config, world)
        with together(world):
            if output is not None:
                run_folder.check_folder(output, mode)
            if resume and run_folder.is_run_folder(folder):
                claimed = claim(stack, world, folder, mode)
            index, test_index = open_images(config, stop.check, log.say)
            stop.check()
        if not same_on_all(index.fingerprint, world):
            raise ConfigError(
                f"--data {config.data.data} does not hold the same files for all {world.size} processes; expected one "
                "folder that all nodes see, or copies of the same files by the same names"
            )
        goes_on = resume and (previous or bool(checkpoint.step_folders(folder / run_folder.CHECKPOINTS)))
        start, config = (None, config) if goes_on else begin_from(config, world)
        stop.check()
        training = build(config, world, index, start)
        remarks: list[str] = []
        with together(world):  # no rank has found a fault: only after this is anything written
            if goes_on:
                remarks = load_state(
                    training, folder, index, previous=previous, accept_changed_data=accept_changed_data
                )
            choice = loader_choice(training, index, asked, measure=kept is None)
            stop.check()
        training.config = config = with_loader(config, said_by_first(choice.name, LOADERS, world))
        with together(world):
            loader = stack.enter_context(open_loader(training, index, choice._replace(name=config.data.loader)))
            claimed = claimed or claim(stack, world, folder, mode, may_rename=output is None)
            folder, run_id = (claimed.path, claimed.run_id) if claimed else (folder, "")
            if claimed:
                begin(claimed, config, log, training, index)
        if resume and training.step:
            remarks = [resumed(training), *remarks]
        for line in [*describe(training, index, loader, start), *remarks]:
            log.say(line)
        if is_long(config, world) and (pace := measure_pace(config, world, len(index.classes))) is not None:
            log.say(pace.line(training.last_step - training.step))
            if (warning := too_much(pace, world.device)) is not None:
                log.say(warning)
        if config.run.knn_max_images > 0 and len(index.classes) > 1:  # else the run says why nothing is measured
            log.say(f"split    {describe_split(config.data, index, test_index)}")
        lost = lost_images(training, index)
        run = Run(training, index, test_index, folder, run_id, log, stop, lost)
        if training.step:
            run.recall()
        with asking_to_go_on(run):
            if training.step == 0:
                with together(world):
                    run.before_training()
                    stop.check()
            if certified:
                write_stall(run, choice._replace(name=config.data.loader))
            outcome = train(training, loader, log, stop, run.after_step, lost)
            log.stop_progress()
            with together(world):  # none leaves while the first still saves
                run.save_last(outcome)
                if stop.failure is not None:
                    raise stop.failure
                if outcome is Outcome.LOST_IMAGES:
                    raise TooManyBadFiles(too_many_lost(len(index)))
            if outcome is Outcome.DONE:
                run.after_training()
        return EXIT_CODES[outcome]


def begin_from(config: Config, world: World) -> tuple[Start | None, Config]:
    """The trained weights that a run begins with, and its configuration with their digest; no weights where none are
    asked for.

    Raises:
        ConfigError: they cannot be had or are of another model; or they are not the same for all processes.
    """
    with together(world):
        start = open_start(config)
    if start is None:
        return None, config
    if not same_on_all(start.weights.digest, world):
        raise ConfigError(f"--init-from {config.model.init_from} does not hold the same weights for all processes")
    return start, replace(config, model=replace(config.model, init_sha256=start.weights.digest))


def kept_start(config: Config, folder: Path) -> Config:
    """`config` with the digest of the weights that the run in `folder` began with, where it names the same."""
    if config.model.init_from is None or not (folder / run_folder.SETTINGS).exists():
        return config
    model = run_folder.stored_config(folder).model
    if model.init_from != config.model.init_from or config.model.init_sha256 is not None:
        return config
    return replace(config, model=replace(config.model, init_sha256=model.init_sha256))


def resumed(training: Training) -> str:
    """From where a run goes on, or that nothing is left to do."""
    step, last = training.step, training.last_step
    if step < last:
        return f"resume   after step {step} of {last}"
    more = "; a larger --max-steps goes on" if last < training.total_steps else ""
    return f"resume   this run is finished, all {last} steps are made{more}: backbone and kNN are made again"


def claim(
    stack: ExitStack, world: World, folder: Path, mode: run_folder.Mode, *, may_rename: bool = False
) -> RunFolder | None:
    """The run folder, locked until the run ends; only the first rank has it."""
    if not world.is_first:
        return None
    return stack.enter_context(run_folder.claim(folder, mode, may_rename=may_rename))


def begin(claimed: RunFolder, config: Config, log: Log, training: Training, index: Index) -> None:
    """Put settings, logs and the list of images where they belong, and set aside checkpoints of steps that come again.

    Raises:
        ConfigError: where that cannot be written.
    """
    try:
        save_config(replace(config, data=from_anywhere(config.data)), claimed.path / run_folder.SETTINGS)
        store_file_list(index, claimed.path)
        log.open(claimed.path, from_step=training.step)
        lines = checkpoint.set_later_aside(claimed.path / run_folder.CHECKPOINTS, training.step)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the run folder {claimed.path} cannot be written: {error}") from error
    try:
        log.trackers = open_trackers(config, claimed.path, claimed.run_id, training.step)
    except Exception as error:  # a network, a password, a server: theirs to explain
        raise ConfigError(f"cannot log to {' and '.join(asked_for(config.run))}: {error}") from error
    for line in [*lines, *([claimed.unlocked] if claimed.unlocked else [])]:
        log.say(line)


@contextmanager
def asking_to_go_on(run: Run) -> Iterator[None]:
    """Where the block is stopped, say how to go on."""
    try:
        yield
    except Stopped:
        run.log.say(f"stopped on request at step {run.training.step}")
        run.say_how_to_go_on()
        raise


def resolve(config: Config, world: World) -> Config:
    """The configuration with its automatic choices made, and checked against the number of processes.

    What is stored, and compared on resume, are the choices: the loaders make other pixels, the precisions other sums.
    """
    if config.optim.batch_size % world.size:
        raise ConfigError(f"batch_size is {config.optim.batch_size}; expected a multiple of the {world.size} processes")
    asked_for(config.run)
    on_gpu = world.device.type == "cuda"
    precision = ("bf16" if on_gpu else "fp32") if config.run.precision == "auto" else config.run.precision
    try:
        loader, _ = choose_loader(config.data.loader, world.device, config.data.channels)
    except DataError as error:
        raise ConfigError(f"--loader {config.data.loader}: {error}; a run that began with one keeps it") from error
    data = replace(config.data, loader=loader)
    return resolved(replace(config, data=data, run=replace(config.run, precision=precision)))


def kept_loader(config: Config, folder: Path, world: World) -> Config | None:
    """`config` with the loader that the run in `folder` began with, where it leaves the choice and that one is here."""
    if config.data.loader != "auto" or not run_folder.is_run_folder(folder):
        return None
    kept = with_loader(config, run_folder.stored_config(folder).data.loader)
    try:
        choose_loader(kept.data.loader, world.device, config.data.channels)
    except DataError:
        return None
    return kept


def with_loader(config: Config, name: str) -> Config:
    """`config` with a loader of this name."""
    return replace(config, data=replace(config.data, loader=name))


def loader_choice(training: Training, index: Index, asked: Config, *, measure: bool) -> Choice:
    """The loader of a run, and why; the first rank measures where that is left to it."""
    name, world = training.config.data.loader, training.world
    if training.step:
        return Choice(name, f"this run began with {name}")
    if asked.data.loader != "auto":
        return choose_loader(name, world.device, index.channels)
    if not measure:
        return Choice(name, f"this run began with {name}")
    if not world.is_first:
        return choose_loader("auto", world.device, index.channels)
    with open_loader(training, index, "auto") as loader:
        return Choice(loader.name, loader.why)


def open_loader(training: Training, index: Index, loader: Choice | LoaderName) -> Loader:
    """The views of the steps still to be made."""
    config, world = training.config, training.world
    return make_loader(
        index,
        training.method.views(training.at),
        batch_size=config.optim.batch_size // world.size,
        steps=training.last_step,
        start_step=training.step,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        loader=loader,
        workers=config.data.workers,
        fill=colour_of(config.data.mean) if config.data.bad_images == "skip" else None,
    )


def write_stall(run: Run, choice: Choice) -> None:
    """Measure whether data keeps the run waiting; certify.json and a line say so. The training stays as it is."""
    training, log = run.training, run.log

    def opened(images: Index, loader: Choice | LoaderName) -> Loader:
        return open_loader(training, images, loader)

    # Ranks wait for each other within a block: one that leaves alone would leave the others waiting.
    between = run.stop.check if training.world.size == 1 else lambda: None
    try:
        found = certify.certify(training, run.index, opened, choice, between=between)
    except DataError as error:
        log.say(f"certify  not measured: {error}")
        return
    log.say(certify.line_of(found))
    if training.world.is_first and (why := certify.write_certificate(found, run.folder)):
        log.say(why)


def colour_of(mean: Sequence[float]) -> tuple[int, ...]:
    """The 8-bit colour next to means on the 0 to 1 scale."""
    return tuple(min(255, max(0, round(255 * value))) for value in mean)


def lost_images(training: Training, index: Index) -> Lost:
    """The count of files that cannot be decoded, where they may be left out; those before the start count too."""
    config = training.config.data
    if config.bad_images != "skip":
        return NONE_LOST
    limit = config.max_bad_frac * (len(index) + len(index.bad)) - len(index.bad)
    return LostImages(training.world, training.steps_per_epoch, max(0, limit), training.step, training.lost_images)


def serving(device_type: str) -> str:
    """Which backend serves which ops, and once why no faster one does."""
    by_backend: dict[str, list[str]] = {}
    for op, places in backends().items():
        by_backend.setdefault(places[device_type], []).append(op)
    return "; ".join(f"{', '.join(ops)}: {backend}" for backend, ops in by_backend.items())


def describe(training: Training, index: Index, loader: Loader | None, start: Start | None = None) -> list[str]:
    """What runs where and why, one line each. start: the weights that were loaded for it now."""
    config, world, method = training.config, training.world, training.method
    optim = config.optim
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    why = (
        "a GPU is there"
        if world.device.type == "cuda"
        else f"{counted(torch.get_num_threads(), 'thread')}; "
        + ("asked for" if torch.cuda.is_available() else "torch sees no GPU")
    )
    rows = optim.batch_size // world.size
    lines = [
        f"preset   {config.run.preset}",
        f"device   {device} ({why}), {config.run.precision}",
        f"kernels  {serving(world.device.type)}",
        f"data     {index.summary()}",
        f"model    {config.model.arch} at {shown_size(config.data.image_px)} px: "
        f"{millions(method.backbone)} M parameters, "
        f"{millions(method.trained)} M with heads",
        f"loss     {method.describe()}",
        f"batch    global {optim.batch_size} = {world.size} x {rows} x accum 1",
        f"steps    {training.steps_per_epoch} per epoch x {optim.epochs} epochs = {training.total_steps}"
        + (f", stopping after {training.last_step}" if training.last_step < training.total_steps else ""),
        f"lr       {optim.lr:.3g} = {optim.base_lr:g} x {optim.batch_size} / 256, {optim.opt}{of_backbone(optim)}",
    ]
    if config.model.init_from is not None:
        lines.insert(5, line_of(config, start))
    if loader is not None:
        lines.insert(3, f"loader   {loader.name}: {loader.why}")
    return lines


def of_backbone(optim: OptimConfig) -> str:
    """At which rate and from when on the backbone is trained, where that is not as the heads are."""
    scale, begin = optim.backbone_lr_scale or 1.0, optim.heads_only_epochs or 0.0
    rate = "" if scale == 1 else f" at {scale:g} x that"
    later = "" if begin == 0 else f" from epoch {begin:g} on"
    return f"; the backbone{rate}{later}" if rate or later else ""


def millions(module: nn.Module) -> str:
    """A module's number of parameters, in millions."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}"


def dry_run(config: Config, output: Path | None, overwrite: bool) -> int:
    """Check everything that `pretrain` would check, and print what it would do; nothing is written."""
    with join_world(config.run.device) as world:
        asked, config = config, resolve(config, world)
        if output is not None:
            run_folder.check_folder(output, "overwrite" if overwrite else "new")
        index, test_index = open_images(config, say=print)
        start, config = begin_from(config, world)
        training = build(config, world, index, start)
        with open_loader(training, index, loader_choice(training, index, asked, measure=True)) as loader:
            for line in describe(training, index, loader, start):
                print(printable_lines(line))
        if config.run.knn_max_images > 0:
            print(f"split    {describe_split(config.data, index, test_index)}")
        # The answer that is waited for comes last, where a screen ends.
        print(yaml.safe_dump(to_dict(config), sort_keys=False), flush=True)
        pace = measure_pace(config, world, len(index.classes))
        if pace is not None:
            print(pace.line(training.last_step))
            if (warning := too_much(pace, world.device)) is not None:
                print(warning)
        print(
            f"weights  {memory_bytes(training) / 2**20:.0f} MiB of memory: weights, gradients, moments of the optimiser"
        )
    return 0


def export_checkpoint(run: Path, step: int | None, output: Path) -> int:
    """Write the backbone of a run's checkpoint (default the newest) as timm reads it."""
    config = run_folder.stored_config(run)
    folder = run / run_folder.CHECKPOINTS
    path = checkpoint.newest_checkpoint(folder) if step is None else folder / f"step-{step:06d}"
    if not path.is_dir():
        known = ", ".join(p.name for p in checkpoint.finished_checkpoints(folder))
        raise ConfigError(f"there is no checkpoint {path}; finished ones: {known or 'none'}")
    if output.exists() and output != run / run_folder.EXPORTED:
        raise ConfigError(f"output is {str(output)!r}, which exists; give a new folder")
    backbone, made = checkpoint_backbone(path, config)
    try:
        export_backbone(backbone, config, output, made)
    except OSError as error:
        raise ConfigError(f"the export cannot be written to {output}: {error}") from error
    print(printable_lines(f"exported {path} to {output}"))
    return 0
