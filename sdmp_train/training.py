"""A training: built at step 0, saved, loaded."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .config import Config, ConfigError, brief, drift, from_dict
from .data import Index, steps_per_epoch
from .distributed import World
from .guard import BufferGuard
from .methods.mocov3 import MoCoV3
from .models import build_backbone
from .optim import LARS, AdamW, make_optimizer


@dataclass
class Training:
    """All that a step reads and changes. `step` counts the steps made."""

    config: Config
    world: World
    method: MoCoV3
    optimizer: AdamW | LARS
    buffers: BufferGuard
    steps_per_epoch: int
    step: int = 0

    @property
    def total_steps(self) -> int:
        """The steps that the schedules span."""
        return self.config.optim.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return min(self.total_steps, self.config.run.max_steps or self.total_steps)


def build(config: Config, world: World, index: Index) -> Training:
    """Model, optimiser and schedules at step 0."""
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    backbone = build_backbone(config.model, config.data.image_px, config.run.seed)
    method = MoCoV3(config, backbone, world, dtype)
    optimizer = make_optimizer(config.optim, method.student.parameters())
    buffers = BufferGuard(method.student, method.momentum_encoder)
    return Training(config, world, method, optimizer, buffers, steps_per_epoch(len(index), config.optim.batch_size))


def state_parts(training: Training) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor that the next step depends on."""
    method = training.method
    return {
        "model": method.student.state_dict(),
        "ema": method.momentum_encoder.state_dict(),
        "optim": checkpoint.optimizer_tensors(training.optimizer, parameter_names(method)),
    }


def parameter_names(method: MoCoV3) -> dict[nn.Parameter, str]:
    """The student's parameters by identity."""
    return {parameter: name for name, parameter in method.student.named_parameters()}


def load_state(training: Training, folder: Path, index: Index, *, previous: bool) -> list[str]:
    """Put the newest checkpoint (or the one before) into `training`; returns what is otherwise now, in words.

    Raises:
        ConfigError: where it is damaged, of another model, of other images, or of settings that change the training;
            the differences are listed.
    """
    path = checkpoint.newest_checkpoint(folder / "checkpoints", previous=previous)
    parts, state = checkpoint.load_checkpoint(path)
    ranks = check_state(state, path, training.total_steps)
    changes = drift(from_dict(state["config"], Config(), str(path)), training.config)
    if state["images"] != index.fingerprint:
        changes.append(f"images: {brief(state['images'])} -> {index.fingerprint}")
    changes = [f"{line} (--loader)" if line.startswith("data.loader:") else line for line in changes]
    if changes:
        raise ConfigError(
            f"cannot resume {folder}: these settings would change the training: {'; '.join(changes)}. "
            "Leave them as they were, or start a new run"
        )
    if parts.keys() != {"model", "ema", "optim"}:
        raise checkpoint.CheckpointError(
            f"{path} holds the parts {', '.join(sorted(parts))}; expected ema, model, optim"
        )
    checkpoint.load_module(training.method.student, parts["model"], f"{path}/model")
    checkpoint.load_module(training.method.momentum_encoder, parts["ema"], f"{path}/ema")
    last_epoch = (state["step"] - 1) / training.steps_per_epoch
    names = parameter_names(training.method)
    checkpoint.load_optimizer(training.optimizer, parts["optim"], names, last_epoch=last_epoch)
    training.step = state["step"]
    mixing = training.config.mixing
    return rank_remarks(ranks, training.world.size, partners_stay=mixing.mixing == "none" or mixing.flip == "global")


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
    if state["step"] > total_steps:
        raise checkpoint.CheckpointError(f"{path} is beyond the {total_steps} steps of this run")
    return int(state["world_size"])


def rank_remarks(before: int, now: int, *, partners_stay: bool) -> list[str]:
    """What changes for a run that goes on with another number of processes."""
    if before == now:
        return []
    partners = "" if partners_stay else "an image is mixed with another partner (--flip global keeps them), and "
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
    """Bytes of the student, its gradients and moments, and the momentum encoder, all float32."""
    method = training.method
    moments = 2 if isinstance(training.optimizer, AdamW) else 1
    trained = sum(p.numel() for p in method.student.parameters() if p.requires_grad)
    held = sum(p.numel() for module in (method.student, method.momentum_encoder) for p in module.parameters())
    return 4 * (held + (1 + moments) * trained)
