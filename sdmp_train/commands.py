"""What the command line calls: pretrain, plan (a dry run), export."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import nn

from sdmp_kernels import backends

from . import checkpoint, run_folder
from .config import Config, ConfigError, save_config, to_dict
from .data import Index, Loader, make_loader
from .distributed import World, join_world, wait_for_all
from .export import export_backbone
from .guard import StopRequest
from .log import Log
from .loop import Outcome, train
from .models import build_backbone
from .run import Run
from .splits import describe_split, open_images
from .training import Training, build, load_state, memory_bytes

EXIT_CODES = {Outcome.DONE: 0, Outcome.NOT_FINITE: 3, Outcome.STOPPED: 75}


def pretrain(
    config: Config,
    output: Path | None,
    *,
    resume: bool = False,
    previous: bool = False,
    overwrite: bool = False,
    log: Log | None = None,
) -> int:
    """Run a pretraining to its end, or until it is asked to stop. Returns the exit code.

    Raises:
        ConfigError, DataError: before anything has been written.
    """
    folder = output or run_folder.default_folder(config.run.preset)
    with ExitStack() as stack:
        world = stack.enter_context(join_world(config.run.device))
        log = stack.enter_context(log or Log(quiet=not world.is_first))
        config = resolve(config, world)
        run_folder.check_folder(folder, resume=resume, overwrite=overwrite)
        index, test_index = open_images(config, say=log.say)
        training = build(config, world, index)
        if resume:
            load_state(training, folder, index, previous=previous)
        loader = stack.enter_context(open_loader(training, index))
        wait_for_all(world)  # no rank has found a fault: only now is anything written
        if world.is_first:
            run_folder.create_folder(folder, resume=resume, overwrite=overwrite)
            save_config(config, folder / run_folder.MARKER)
        for line in describe(training, index, loader):
            log.say(line)
        if config.run.knn_max_images > 0:
            log.say(f"split    {describe_split(config.data, index, test_index)}")
        log.open(folder, from_step=training.step)
        run = Run(training, index, test_index, folder, log)
        if not resume:
            run.before_training()
        stop = stack.enter_context(StopRequest())
        outcome = train(training, loader, log, stop, run.after_step)
        log.stop_progress()
        run.after_training(outcome)
        return EXIT_CODES[outcome]


def resolve(config: Config, world: World) -> Config:
    """The configuration with its automatic choices made, and checked against the number of processes."""
    if config.optim.batch_size % world.size:
        raise ConfigError(f"batch_size is {config.optim.batch_size}; expected a multiple of the {world.size} processes")
    on_gpu = world.device.type == "cuda"
    precision = ("bf16" if on_gpu else "fp32") if config.run.precision == "auto" else config.run.precision
    return replace(config, run=replace(config.run, precision=precision))


def open_loader(training: Training, index: Index) -> Loader:
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
        loader=config.data.loader,
        workers=config.data.workers,
    )


def describe(training: Training, index: Index, loader: Loader | None) -> list[str]:
    """What runs where and why, one line each."""
    config, world, method = training.config, training.world, training.method
    optim = config.optim
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    why = (
        "a GPU is there"
        if world.device.type == "cuda"
        else f"{torch.get_num_threads()} threads; "
        + ("asked for" if torch.cuda.is_available() else "torch sees no GPU")
    )
    serving = {op: places[world.device.type] for op, places in backends().items()}
    rows = optim.batch_size // world.size
    lines = [
        f"preset   {config.run.preset}",
        f"device   {device} ({why}), {config.run.precision}",
        f"kernels  {', '.join(f'{op}: {name}' for op, name in serving.items())}",
        f"data     {index.summary()}",
        f"model    {config.model.arch} at {config.data.image_px} px: {millions(method.backbone)} M parameters, "
        f"{millions(method.trained)} M with heads",
        f"loss     {method.describe()}",
        f"batch    global {optim.batch_size} = {world.size} x {rows} x accum 1",
        f"steps    {training.steps_per_epoch} per epoch x {optim.epochs} epochs = {training.total_steps}"
        + (f", stopping after {training.last_step}" if training.last_step < training.total_steps else ""),
        f"lr       {optim.lr:.3g} = {optim.base_lr:g} x {optim.batch_size} / 256, {optim.opt}",
    ]
    if loader is not None:
        lines.insert(3, f"loader   {loader.name}: {loader.why}")
    return lines


def millions(module: nn.Module) -> str:
    """A module's number of parameters, in millions."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}"


def dry_run(config: Config, output: Path | None, overwrite: bool) -> int:
    """Check everything that `pretrain` would check, and print what it would do; nothing is written."""
    with join_world(config.run.device) as world:
        config = resolve(config, world)
        run_folder.check_folder(
            output or run_folder.default_folder(config.run.preset), resume=False, overwrite=overwrite
        )
        index, test_index = open_images(config, say=print)
        training = build(config, world, index)
        with open_loader(training, index) as loader:
            for line in describe(training, index, loader):
                print(line)
        if config.run.knn_max_images > 0:
            print(f"split    {describe_split(config.data, index, test_index)}")
        print(f"memory   {memory_bytes(training) / 2**20:.0f} MiB for weights, gradients, moments; activations on top")
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
    return 0


def export_checkpoint(run: Path, step: int | None, output: Path) -> int:
    """Write the backbone of a run's checkpoint (default the newest) as timm reads it."""
    config = run_folder.stored_config(run)
    folder = run / "checkpoints"
    path = checkpoint.newest_checkpoint(folder) if step is None else folder / f"step-{step:06d}"
    if not path.is_dir():
        known = ", ".join(p.name for p in checkpoint.finished_checkpoints(folder))
        raise ConfigError(f"there is no checkpoint {path}; finished ones: {known or 'none'}")
    if output.exists() and output != run / "exported":
        raise ConfigError(f"output is {str(output)!r}, which exists; give a new folder")
    parts, state = checkpoint.load_checkpoint(path)
    if "backbone" not in state:
        raise ConfigError(f"{path} does not say where its backbone is: it was written by another version")
    part, _, place = state["backbone"].partition(".")
    prefix = f"{place}." if place else ""
    tensors = {name.removeprefix(prefix): t for name, t in parts[part].items() if name.startswith(prefix)}
    backbone = build_backbone(config.model, config.data.image_px, config.run.seed, **config.backbone_options)
    checkpoint.load_module(backbone, tensors, f"{path}/{part}")
    export_backbone(backbone, config, output, int(state["step"]))
    print(f"exported {path} to {output}")
    return 0
