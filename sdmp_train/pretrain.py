"""From a configuration to a run folder: check everything, then write, train, measure and export."""

from __future__ import annotations

import importlib.metadata
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import nn

from sdmp_kernels import backends

from . import checkpoint, run_folder
from .config import Config, ConfigError, DataConfig, drift, from_dict, save_config, to_dict
from .data import DataError, Index, Loader, eval_loader, make_loader, open_folder, shapes_folder, steps_per_epoch
from .distributed import World, join_world, wait_for_all
from .evaluate.knn import image_features, knn_images, spread, weighted_knn
from .export import export_backbone
from .guard import BufferGuard, StopRequest
from .log import Log
from .loop import Outcome, Training, train
from .methods.mocov3 import MoCoV3
from .models import build_backbone
from .optim import AdamW, make_optimizer
from .picture import save_mix_picture

EXIT_CODES = {Outcome.DONE: 0, Outcome.NOT_FINITE: 3, Outcome.STOPPED: 75}
KNN_K = 20
SAVE_ATTEMPTS = 3
EMBEDDED = "embedded"


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
        index, test_index = open_images(config)
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


def open_images(config: Config) -> tuple[Index, Index | None]:
    """The images of --data, and those of its test split where it has one with the same classes."""
    index = open_split(config.data, "train")
    if len(index) < config.optim.batch_size:
        raise ConfigError(
            f"batch_size is {config.optim.batch_size}, more than the {len(index)} images under {index.root}; "
            f"expected at most {len(index)}: give a smaller --batch-size"
        )
    return index, test_split(config.data, index)


def open_split(data: DataConfig, split: Literal["train", "val"]) -> Index:
    """One split of --data; `embedded` is drawn on first use."""
    if data.data is None:
        raise ConfigError("data is missing; give --data DIR, a folder of images (or --data embedded)")
    path = shapes_folder() if data.data == EMBEDDED else Path(data.data)
    return open_folder(path, split=split, on_bad=data.bad_images)


def test_split(data: DataConfig, train: Index) -> Index | None:
    """The test split of --data; None where it has none with the classes of `train`."""
    try:
        test = open_split(data, "val")
    except DataError:
        return None
    return test if test.classes == train.classes else None


def build(config: Config, world: World, index: Index) -> Training:
    """Model, optimiser and schedules at step 0."""
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    backbone = build_backbone(config.model, config.data.image_px, config.run.seed)
    method = MoCoV3(config, backbone, world, dtype)
    optimizer = make_optimizer(config.optim, method.student.parameters())
    buffers = BufferGuard(method.student, method.momentum_encoder)
    return Training(config, world, method, optimizer, buffers, steps_per_epoch(len(index), config.optim.batch_size))


def open_loader(training: Training, index: Index) -> Loader:
    """The views of the steps still to be made."""
    config, world = training.config, training.world
    return make_loader(
        index,
        training.method.recipes(),
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
    chance = method.chance()
    terms = " + ".join(f"{term.weight:g} {term.name}({term.query} -> {term.key})" for term in method.terms)
    rows = optim.batch_size // world.size
    lines = [
        f"preset   {config.run.preset}",
        f"device   {device} ({why}), {config.run.precision}",
        f"kernels  {', '.join(f'{op}: {name}' for op, name in serving.items())}",
        f"data     {index.summary()}",
        f"model    {config.model.arch} at {config.data.image_px} px: {millions(method.backbone)} M parameters, "
        f"{millions(method.student)} M with heads",
        f"loss     {terms}; chance level {chance['loss']:.3f}",
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


def load_state(training: Training, folder: Path, index: Index, *, previous: bool) -> None:
    """Put the newest checkpoint (or the one before) into `training`.

    Raises:
        ConfigError: where it is damaged, of another model, of other images, or of settings that change the training;
            the differences are listed.
    """
    path = checkpoint.newest_checkpoint(folder / "checkpoints", previous=previous)
    parts, state = checkpoint.load_checkpoint(path)
    changes = drift(from_dict(state["config"], Config(), str(path)), training.config)
    if state["images"] != index.fingerprint:
        changes.append(f"images: {state['images']} -> {index.fingerprint}")
    if changes:
        raise ConfigError(
            f"cannot resume {folder}: these settings would change the training: {'; '.join(changes)}. "
            "Leave them as they were, or start a new run"
        )
    checkpoint.load_module(training.method.student, parts["model"], f"{path}/model")
    checkpoint.load_module(training.method.momentum_encoder, parts["ema"], f"{path}/ema")
    checkpoint.load_optimizer(training.optimizer, parts["optim"], parameter_names(training.method))
    training.step = int(state["step"])


def versions() -> dict[str, str]:
    """The software that a run's bits depend on."""
    names = ("torch", "timm", "numpy", "safetensors", "sdmp-kernels")
    installed = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: installed.get(name, "unknown") for name in names}


@dataclass
class Run:
    """What a run writes around its steps. Every rank calls it; only the first one acts."""

    training: Training
    index: Index
    test_index: Index | None
    folder: Path
    log: Log
    failed_saves: int = 0
    accuracies: dict[str, float] = field(default_factory=dict)

    def before_training(self) -> None:
        """kNN of pixels and of the untrained backbone, the picture of the mixing, a first checkpoint."""
        if not self.training.world.is_first:
            return
        self.picture()
        if self.measures():
            self.say_knn("raw pixels", "knn_raw_pixels", None)
            self.say_knn("untrained backbone", "knn", self.training.method.backbone)
        elif self.training.config.run.knn_max_images > 0:
            self.log.say(f"kNN      not measured: {self.no_knn}")
        self.save()

    def after_step(self, training: Training) -> None:
        """Checkpoint and kNN, at the epochs that the settings name."""
        if not training.world.is_first or training.step % training.steps_per_epoch:
            return
        epoch, run = training.step // training.steps_per_epoch, training.config.run
        if training.step < training.last_step:
            if epoch % run.save_every_epochs == 0:
                self.save()
            if run.knn_every_epochs and epoch % run.knn_every_epochs == 0 and self.measures():
                self.say_knn(f"backbone after epoch {epoch}", "knn", training.method.backbone)

    def after_training(self, outcome: Outcome) -> None:
        """Last checkpoint; where training is done also kNN, the exported backbone and what to do next."""
        if not self.training.world.is_first:
            return
        self.save(last=True)
        step, total = self.training.step, self.training.last_step
        if outcome is Outcome.NOT_FINITE:
            limit = self.training.config.run.max_bad_steps
            self.log.say(f"{limit} steps in a row were not finite: stopped at step {step}. Try a smaller --lr")
        if outcome is Outcome.STOPPED:
            self.log.say(f"stopped on request after step {step} of {total}")
            self.log.say(f"go on with: python -m sdmp_train pretrain --resume {self.folder}")
        if outcome is not Outcome.DONE:
            return
        if self.measures():
            self.say_knn("trained backbone", "knn", self.training.method.backbone)
        export_backbone(self.training.method.backbone, self.training.config, self.folder / "exported", step)
        for line in self.farewell():
            self.log.say(line)

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint. A failure is reported and survived, unless it is the last or the third in a row."""
        config = self.training.config
        state = {
            "config": to_dict(config),
            "images": self.index.fingerprint,
            "world_size": self.training.world.size,
            "versions": versions(),
        }
        target = self.folder / "checkpoints"
        try:
            checkpoint.save_checkpoint(target, self.training.step, state_parts(self.training), state)
            checkpoint.delete_old_checkpoints(target, config.run.keep_checkpoints)
            self.failed_saves = 0
        except OSError as error:
            self.failed_saves += 1
            self.log.say(f"the checkpoint of step {self.training.step} could not be written: {error}")
            if last or self.failed_saves >= SAVE_ATTEMPTS:
                raise checkpoint.Unwritable(f"checkpoints cannot be written to {target}: {error}") from error

    def measures(self) -> bool:
        """Whether kNN is measured: it is switched on, and the images have classes that it can tell apart."""
        return self.training.config.run.knn_max_images > 0 and self.no_knn is None

    @cached_property
    def no_knn(self) -> str | None:
        """Why the images' classes allow no kNN."""
        if len(self.index.classes) < 2:
            return "that takes images in at least two folders, one per class"
        bank, queries = knn_images(self.index, self.test_index, self.training.config.run.knn_max_images)
        if not set(bank.labels.tolist()) & set(queries.labels.tolist()):
            return f"none of the {len(queries)} queries has a class that is among the {len(bank)} images of the bank"
        return None

    def say_knn(self, what: str, key: str, backbone: nn.Module | None) -> None:
        """Measure, print and record the kNN accuracy of a backbone, or of the pixels themselves."""
        config = self.training.config
        bank, queries = (
            image_features(
                backbone,
                images,
                config.data,
                device=self.training.world.device,
                bf16=config.run.precision == "bf16",
            )
            for images in knn_images(self.index, self.test_index, config.run.knn_max_images)
        )
        accuracy = weighted_knn(bank, queries, (KNN_K,))[KNN_K]
        self.log.say(
            f"kNN      {accuracy:6.1%} {what} (k = {KNN_K}, {len(bank.rows)} bank, {len(queries.rows)} queries)"
        )
        self.log.metrics({"step": self.training.step, key: accuracy})
        self.accuracies[what] = accuracy

    def picture(self) -> None:
        """mix.png, from the first images of the run."""
        config = self.training.config
        if config.mixing.mixing == "none":
            return
        with eval_loader(spread(self.index, 8), config.data.image_px, batch_size=8, device="cpu") as batches:
            views = next(iter(batches)).views[0]
        save_mix_picture(
            self.folder / "mix.png", views, config.mixing.rules, alpha=config.mixing.alpha, seed=config.run.seed
        )

    def farewell(self) -> list[str]:
        """What came of it, where everything is, and after the embedded images the command for the user's own."""
        known = ", ".join(f"{accuracy:.1%} {what}" for what, accuracy in self.accuracies.items())
        gpu = self.training.world.device.type == "cuda"
        own = "table1/mocov3-vit_s-sdmp --batch-size 256" if gpu else "quickstart --image-px 64 --gray-prob 0.2"
        embedded = self.training.config.data.data == EMBEDDED
        return [
            *([f"kNN      {known}"] if known else []),
            f"run      {self.folder}  (config.yaml metrics.jsonl train.log mix.png checkpoints/ exported/)",
            f'load     timm.create_model("local-dir:{self.folder}/exported", pretrained=True)',
            f"measure  python -m sdmp_train eval knn --run {self.folder}",
            *([f"yours    python -m sdmp_train pretrain --preset {own} --data YOUR_IMAGES"] if embedded else []),
        ]


def dry_run(config: Config, output: Path | None, overwrite: bool) -> int:
    """Check everything that `pretrain` would check, and print what it would do; nothing is written."""
    with join_world(config.run.device) as world:
        config = resolve(config, world)
        run_folder.check_folder(
            output or run_folder.default_folder(config.run.preset), resume=False, overwrite=overwrite
        )
        index, _ = open_images(config)
        training = build(config, world, index)
        with open_loader(training, index) as loader:
            for line in describe(training, index, loader):
                print(line)
        print(f"memory   {memory_bytes(training) / 2**20:.0f} MiB for weights, gradients, moments; activations on top")
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
    return 0


def memory_bytes(training: Training) -> int:
    """Bytes of the student, its gradients and moments, and the momentum encoder, all float32."""
    method = training.method
    moments = 2 if isinstance(training.optimizer, AdamW) else 1
    trained = sum(p.numel() for p in method.student.parameters() if p.requires_grad)
    held = sum(p.numel() for module in (method.student, method.momentum_encoder) for p in module.parameters())
    return 4 * (held + (1 + moments) * trained)


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
    prefix = "encoder.backbone."
    tensors = {name.removeprefix(prefix): t for name, t in parts["model"].items() if name.startswith(prefix)}
    backbone = build_backbone(config.model, config.data.image_px, config.run.seed)
    checkpoint.load_module(backbone, tensors, f"{path}/model")
    export_backbone(backbone, config, output, int(state["step"]))
    print(f"exported {path} to {output}")
    return 0
