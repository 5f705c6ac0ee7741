"""What a run writes around its steps: checkpoints, kNN, the picture of the mixing, the exported backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import nn

from . import checkpoint
from .config import ConfigError, to_dict
from .data import Index, eval_loader
from .evaluate.knn import collapse, image_features, knn_images, spread, weighted_knn
from .export import export_backbone
from .log import Log
from .loop import Outcome
from .picture import save_mix_picture
from .splits import EMBEDDED, NO_CLASSES
from .training import Training, backbone_place, state_parts, versions

KNN_K = 20
SAVE_ATTEMPTS = 3


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
            "backbone": backbone_place(self.training.method),
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
            return NO_CLASSES
        if self.test_index is not None and len(self.test_index) == 0:
            return self.test_index.notes[-1]
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
        try:
            accuracy = weighted_knn(bank, queries, (KNN_K,))[KNN_K]
        except ConfigError as error:  # features that are not finite: no reason to end the run
            self.log.say(f"kNN      not measured, {what}: {error}")
            return
        if (remark := collapse(bank)) is not None:
            self.log.say(f"kNN      {what}: {remark}")
        self.log.say(
            f"kNN      {accuracy:6.1%} {what} (k = {KNN_K}, {len(bank.rows)} bank, {len(queries.rows)} queries)"
        )
        self.log.metrics({"step": self.training.step, key: accuracy})
        self.accuracies[what] = accuracy

    def picture(self) -> None:
        """mix.png, from the first images of the run."""
        px = self.training.config.data.image_px
        with eval_loader(spread(self.index, 8), px, batch_size=8, device="cpu") as batches:
            examples = self.training.method.example(next(iter(batches)))
        if examples:
            save_mix_picture(self.folder / "mix.png", examples)

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
