"""A training: built at step 0, saved, loaded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint
from .config import Config, ConfigError, drift, from_dict
from .data import Index, steps_per_epoch
from .distributed import World
from .file_list import changed_files
from .guard import BufferGuard
from .methods.method import At, Method, Setup
from .models import build_backbone
from .optim import AdamW, Optimizer, apart, make_optimizer
from .reading import is_whole_number
from .run_folder import CHECKPOINTS
from .text import brief

if TYPE_CHECKING:
    from .continuing import Start

# Highest counter word of the stream that seeds stochastic layers; views, orders and plans have other ones.
LAYER_STREAM = 0x4C415952


@dataclass
class Training:
    """All that a step reads and changes. `step` counts the steps made."""

    config: Config
    world: World
    method: Method
    optimizer: Optimizer
    buffers: BufferGuard
    steps_per_epoch: int
    step: int = 0
    warned: bool = False
    """Whether a collapse has been said."""
    lost_images: int = 0
    """Images of the epoch that were lost before the step that was loaded."""

    @property
    def total_steps(self) -> int:
        """The steps that the schedules span."""
        return self.config.optim.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return min(self.total_steps, self.config.run.max_steps or self.total_steps)

    @property
    def at(self) -> At:
        """Where it stands."""
        return At(self.step, self.total_steps, self.steps_per_epoch)

    def writes_line(self, step: int) -> bool:
        """Whether a line of numbers is written once `step` steps are made."""
        return step == self.last_step or step % self.config.run.log_every_steps == 0

    @contextmanager
    def undoable(self) -> Iterator[None]:
        """Within the block `undo_buffers` can take back what forward passes and updates did to buffers."""
        self.buffers.keep()
        try:
            yield
        finally:
            self.buffers.forget()

    def undo_buffers(self, bad: Tensor) -> None:
        """Put the buffers back where `bad` (0-dim bool on the device) is true. The host does not look."""
        self.buffers.restore(bad)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Stochastic layers within the block, such as drop path, draw from (seed, step, rank) alone.

        They read torch's global generators, which are put back as they were.
        """
        key = np.array([self.config.run.seed, self.step], np.uint64)
        counter = np.array([0, 0, self.world.rank, LAYER_STREAM], np.uint64)
        seed = int(np.random.Philox(key=key, counter=counter).random_raw())
        device = self.world.device
        gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            # Not torch.manual_seed, which would also seed GPUs that are not put back.
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(seed)
            yield


def build(config: Config, world: World, index: Index, start: Start | None = None) -> Training:
    """Model, optimiser and schedules at step 0, for these images; `start`: the weights of the backbone."""
    steps = steps_per_epoch(len(index), config.optim.batch_size)
    return assemble(config, world, steps_per_epoch=steps, classes=len(index.classes), start=start)


def assemble(
    config: Config,
    world: World,
    *,
    steps_per_epoch: int,
    classes: int = 0,
    method_class: Callable[..., Method] | None = None,
    start: Start | None = None,
) -> Training:
    """Model, optimiser and schedules at step 0; `method_class`: in place of the one that `config` names; `start`: the
    weights that the backbone begins with, which are random otherwise."""
    setup = Setup(
        world=world,
        dtype=torch.bfloat16 if config.run.precision == "bf16" else torch.float32,
        seed=config.run.seed,
        rows=config.optim.batch_size // world.size,
        data=config.data,
        classes=classes,
    )
    backbone: Callable[..., nn.Module] = partial(
        build_backbone, config.model, config.data.image_px, config.run.seed, channels=config.data.channels
    )
    if start is not None:
        backbone = start.filling(backbone)
    method = (method_class or config.method_class)(config.method, backbone, setup)
    if config.run.compile:
        for module in method.backbones:
            module.compile()  # in place: parameters keep their names
    of_backbones = [parameter for module in method.backbones for parameter in module.parameters()]
    optimizer = make_optimizer(config.optim, apart(method.groups(), of_backbones, config.optim))
    return Training(config, world, method, optimizer, BufferGuard(method.state), steps_per_epoch)


def state_parts(training: Training) -> dict[str, dict[str, Tensor]]:
    """Every tensor that the next step depends on: a part for each entry of the method's state, and the optimiser's."""
    method = training.method
    parts = {name: module.state_dict() for name, module in method.state.items()}
    return {**parts, "optim": checkpoint.optimizer_tensors(training.optimizer, parameter_names(method))}


def backbone_place(method: Method) -> str:
    """Where in the method's state its backbone lies, such as "student.encoder.backbone"."""
    return next(name for name, module in method.state.named_modules() if module is method.backbone)


def parameter_names(method: Method) -> dict[nn.Parameter, str]:
    """The trained parameters by identity."""
    return {parameter: name for name, parameter in method.trained.named_parameters()}


def load_state(
    training: Training, folder: Path, index: Index, *, previous: bool, accept_changed_data: bool = False
) -> list[str]:
    """Put the newest checkpoint (or the one before) into `training`; returns what is otherwise now, in words.

    `accept_changed_data`: image files may have come, gone or changed since then.

    Raises:
        ConfigError: where it is damaged, of another model, of other images, or of settings that change the training;
            the differences are listed.
    """
    path = checkpoint.newest_checkpoint(folder / CHECKPOINTS, previous=previous)
    parts, state = checkpoint.load_checkpoint(path)
    ranks = check_state(state, path, training.total_steps)
    if state["step"] > training.last_step:
        raise ConfigError(
            f"--max-steps is {training.last_step}, and {path} is of step {state['step']}; expected at least that"
        )
    changes = drift(from_dict(state["config"], Config(), str(path)), training.config)
    remarks = []
    if state["images"] != index.fingerprint:
        what = changed_files(state["images"], index, folder)
        if accept_changed_data:
            remarks.append(f"changed  {what}")
        else:
            changes.append(f"images: {what}; --accept-changed-data goes on with those that are there now")
    changes = [f"{line} (--loader)" if line.startswith("data.loader:") else line for line in changes]
    if changes:
        raise ConfigError(
            f"cannot resume {folder}: these settings would change the training: {'; '.join(changes)}. "
            "Leave them as they were, or start a new run"
        )
    load_parts(training, parts, state["step"], path)
    training.lost_images = state.get("lost_images", 0)  # nothing was counted by older versions
    return [*remarks, *rank_remarks(ranks, training.world.size, training.method.partners_follow_ranks)]


def load_parts(training: Training, parts: dict[str, dict[str, Tensor]], step: int, path: Path) -> None:
    """Put the tensors of a checkpoint, made at `step`, into `training`; `path` is what messages call it.

    Raises:
        CheckpointError: they are not those of this training.
    """
    expected = {*training.method.state, "optim"}
    if parts.keys() != expected:
        raise checkpoint.CheckpointError(
            f"{path} holds the parts {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}: "
            "it was written by another version of this program"
        )
    for name, module in training.method.state.items():
        checkpoint.load_module(module, parts[name], f"{path}/{name}")
    last_epoch = (step - 1) / training.steps_per_epoch
    names = parameter_names(training.method)
    checkpoint.load_optimizer(training.optimizer, parts["optim"], names, last_epoch=last_epoch)
    training.step = step


def check_state(state: dict[str, Any], path: Path, total_steps: int) -> int:
    """Raise `CheckpointError` unless state.json holds what a run writes; returns the processes it was written by."""
    kinds = {"config": dict, "images": str, "world_size": int}
    for name, kind in kinds.items():
        if type(state.get(name)) is not kind:
            got = brief(state.get(name))
            raise checkpoint.CheckpointError(f"{path / 'state.json'}: {name} is {got}; expected {kind.__name__}")
    if state["world_size"] < 1:
        raise checkpoint.CheckpointError(
            f"{path / 'state.json'}: world_size is {state['world_size']}; expected 1 or more"
        )
    if not is_whole_number(lost := state.get("lost_images", 0), 0, 2**53):
        said = f"{path / 'state.json'}: lost_images is {brief(lost)}; expected a whole number"
        raise checkpoint.CheckpointError(said)
    if state["step"] > total_steps:
        raise checkpoint.CheckpointError(f"{path} is beyond the {total_steps} steps of this run")
    return int(state["world_size"])


def rank_remarks(before: int, now: int, partners_follow_ranks: bool) -> list[str]:
    """What changes for a run that goes on with another number of processes."""
    if before == now:
        return []
    partners = (
        "an image or its feature is mixed with another partner (--flip global, where a method has it, keeps them), and "
        if partners_follow_ranks
        else ""
    )
    return [
        f"ranks    {now} in place of {before}: the same images in the same order, with the same views, rules, shares "
        f"and boxes; but {partners}sums are rounded otherwise, so the bits are not those of the unbroken run"
    ]


def versions() -> dict[str, str]:
    """The software that a run's bits depend on."""
    names = ("torch", "timm", "numpy", "safetensors", "sdmp-kernels")
    installed = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: installed.get(name, "unknown") for name in names}


def memory_bytes(training: Training) -> int:
    """Bytes of the method's weights, and of the trained ones' gradients and moments, all float32."""
    moments = 2 if isinstance(training.optimizer, AdamW) else 1
    trained = sum(p.numel() for p in training.method.trained.parameters() if p.requires_grad)
    held = sum(p.numel() for p in training.method.state.parameters())
    return 4 * (held + (1 + moments) * trained)
