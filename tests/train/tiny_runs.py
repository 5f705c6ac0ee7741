"""Pieces of a tiny run, for the tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from sdmp_kernels import Rule
from sdmp_train.checkpoint import load_checkpoint, newest_checkpoint
from sdmp_train.config import METHODS, Config
from sdmp_train.data import Batch
from sdmp_train.distributed import World
from sdmp_train.log import Log
from sdmp_train.methods.contrast import Features
from sdmp_train.methods.method import At, Loss, Method
from sdmp_train.training import Training, assemble

TINY = {
    "mocov3": "tiny",
    "dino": "tiny_dino",
    "imix": "tiny_imix",
    "dacl": "tiny_dacl",
    "mochi": "tiny_mochi",
    "supervised": "tiny_supervised",
}
"""For each method, the fixture of `conftest.py` that is a tiny run of it."""
KINDS = [*(TINY[name] for name in METHODS), "tiny_resnet"]
"""The runs that are poisoned, resumed and exported: every method, and one whose backbone has batch norms."""

CPU = World(torch.device("cpu"))
CLASSES = 3


def at_step(step: int, steps: int = 8, steps_per_epoch: int = 4) -> At:
    """A place in a training of two epochs."""
    return At(step, steps, steps_per_epoch)


def build_training(config: Config, steps_per_epoch: int = 4, world: World = CPU, **options: Any) -> Training:
    """All that a loop needs, at step 0, float32 on the CPU."""
    return assemble(config, world, steps_per_epoch=steps_per_epoch, classes=CLASSES, **options)


def build_method(config: Config, world: World = CPU) -> Any:
    """The method of `config` at its start."""
    return build_training(config, world=world).method


def with_mixing(config: Config, **changes: Any) -> Config:
    """The configuration with default mixing settings but for these."""
    method = config.method
    names = ("mixing", "variant", "rules", "per", "alpha", "shared_lam", "source_weight", "pair_weight", "extra_weight")
    defaults = {name: getattr(type(method)(), name) for name in names}
    return replace(config, method=replace(method, **{**defaults, **changes}))


def random_views(config: Config, count: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """`count` batches of noise as a loader gives them, uint8, channels_last; and the local crops of a method of such."""
    generator = torch.Generator().manual_seed(seed)
    sides = [config.data.image_px] * count
    sides += [getattr(config.method, "local_px", 0)] * getattr(config.method, "local_crops_number", 0)
    return tuple(
        torch.randint(
            0, 256, (config.optim.batch_size, 3, side, side), generator=generator, dtype=torch.uint8
        ).contiguous(memory_format=torch.channels_last)
        for side in sides
    )


def as_batch(views: tuple[torch.Tensor, ...], first_id: int = 0) -> Batch:
    """Views as a loader's batch, with labels 0, 1, 2, 0, ..."""
    ids = torch.arange(first_id, first_id + len(views[0]))
    return Batch(views, ids, ids % CLASSES, torch.ones(len(ids), dtype=torch.bool))


def noise_batches(config: Config, steps: int, views: int = 2) -> Iterator[Batch]:
    """A loader's batches of noise, different at every step."""
    for step in range(steps):
        yield as_batch(random_views(config, views, seed=step), first_id=step * config.optim.batch_size)


def loss_of(method: Method, views: tuple[torch.Tensor, ...], plan: Any, at: At | None = None) -> Loss:
    """Mix, encode, loss."""
    batch = as_batch(views)
    return method.loss(method.encode(method.mix(batch, plan)), plan, batch, at or at_step(0))


def seen_by_encoders(method: Any, views: tuple[Tensor, ...], plan: Any) -> dict[str, Tensor]:
    """The images that reach each backbone, back on the 0 to 255 scale, by the name of the view."""
    inputs: dict[str, list[Tensor]] = {"q": [], "k": []}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].clone()))
        for name, module in (("q", method.student.encoder.backbone), ("k", method.momentum_encoder.backbone))
    ]
    method.encode(method.mix(as_batch(views), plan))
    for hook in hooks:
        hook.remove()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (method.setup.data.mean, method.setup.data.std))
    names = [f"q {view}" for view in method.query_views] + [f"k {view}" for view in method.key_views]
    return {name: (image * std + mean) * 255 for name, image in zip(names, inputs["q"] + inputs["k"], strict=True)}


def mixed_by_hand(clean: Tensor, plan, row: int) -> Tensor:
    """One row of a mixed view, from the formulas of the paper, in plain torch."""
    own, partner = clean[row].double(), clean[int(plan.partner[row])].double()
    rule, lam = Rule(int(plan.rule[row])), float(plan.lam[row])
    if rule == Rule.MIXUP:
        return lam * own + (1 - lam) * partner
    top, left, height, width = plan.box[row].tolist()
    patch = partner[:, top : top + height, left : left + width]
    if rule == Rule.RESIZEMIX and height and width:
        patch = interpolate(partner[None], (height, width), mode="bilinear", align_corners=False)[0]
    mixed = own.clone()
    mixed[:, top : top + height, left : left + width] = patch
    return mixed


def dense_loss(query: Tensor, key: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Soft cross-entropy with the label written out in full, float64, with MoCo v3's 2T."""
    logits = normalize(query.double(), dim=1) @ normalize(key.double(), dim=1).T / temperature
    return -(label * logits.log_softmax(dim=1)).sum(dim=1).mean() * 2 * temperature


def random_features(method: Any, seed: int = 0, *, gradient: bool = False) -> Features:
    """Unit vectors for every query and key of a contrastive method."""
    generator = torch.Generator().manual_seed(seed)
    shape = (method.setup.rows, method.heads.dim)

    def draw(names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: normalize(torch.randn(shape, generator=generator), dim=1) for name in names}

    queries = draw(method.query_views)
    if gradient:
        queries = {name: query.requires_grad_() for name, query in queries.items()}
    return Features(queries, draw(method.key_views))


def all_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Copies of every weight, buffer and moment."""
    found = {k: v.clone() for k, v in training.method.state.state_dict().items()}
    for number, (_, moments) in enumerate(training.optimizer.state.items()):
        found |= {f"moments/{number}/{k}": v.clone() for k, v in moments.items()}
    return found


def same_ends(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two run folders hold the same tensors, bit for bit."""
    parts, others = (load_checkpoint(newest_checkpoint(run / "checkpoints"))[0] for run in (one, other))
    tensors = {(part, name): tensor for part, held in parts.items() for name, tensor in held.items()}
    assert {(part, name) for part, held in others.items() for name in held} == set(tensors)
    return all(torch.equal(tensor, others[part][name]) for (part, name), tensor in tensors.items())


class Spy(Log):
    """A silent log that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.numbers: list[dict] = []

    def say(self, line: str = "") -> None:
        self.lines.append(line)

    def metrics(self, values) -> None:
        self.numbers.append(dict(values))
