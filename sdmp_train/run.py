"""What a run writes around its steps: checkpoints, kNN, the picture of the mixing, the exported backbone."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from . import checkpoint
from .advice import command, elsewhere
from .card import how_to_load, write_card
from .config import ConfigError, to_dict
from .curves import Curves
from .data import DataError, Index
from .data.images import DECODE_ERRORS
from .evaluate.knn import collapse, image_features, knn_images, spread, weighted_knn
from .evaluate.record import read_lines
from .export import export_backbone
from .log import Log
from .loop import Outcome
from .lost import NONE_LOST, Lost
from .picture import save_mix_picture, views_of
from .presets import FOR_OWN_IMAGES
from .run_folder import CHECKPOINTS, EXPORTED
from .saver import Saver
from .splits import EMBEDDED, NO_CLASSES
from .stop import Stopped, StopRequest
from .text import counted, duration, shown_size
from .training import Training, backbone_place, versions

KNN_K = 20
TRAINED = "trained backbone"
"""What the backbone is called after the last step."""
PICTURED = 16
"""Images that mix.png chooses from."""


@dataclass
class Run:
    """What a run writes around its steps. Every rank calls it; only the first one acts."""

    training: Training
    index: Index
    test_index: Index | None
    folder: Path
    run_id: str
    log: Log
    stop: StopRequest
    lost: Lost = NONE_LOST
    began_at: float = field(default_factory=time.monotonic)
    accuracies: dict[str, float] = field(default_factory=dict)
    queries: int = 0
    """Of the last kNN measurement."""

    def __post_init__(self) -> None:
        self.curves = Curves(self.folder, self.log)
        self.saver = Saver(self.training, self.folder / CHECKPOINTS, self.log, self.state)

    @property
    def place(self) -> str:
        """The absolute path of the folder, for commands."""
        return os.path.abspath(self.folder)

    @property
    def continues(self) -> bool:
        """Whether the backbone began from trained weights."""
        return self.training.config.model.init_from is not None

    def after_epoch(self, epoch: int) -> str:
        """What the backbone is called after so many epochs."""
        if epoch:
            return f"backbone after epoch {epoch}"
        return "backbone at the start" if self.continues else "untrained backbone"

    def before_training(self) -> None:
        """The picture of the mixing, a first checkpoint, kNN of pixels and of the backbone as it begins.

        Raises:
            Stopped: asked for meanwhile. Done again by a run that goes on from step 0.
            DataError: the images of kNN cannot be decoded.
        """
        if not self.training.world.is_first:
            return
        self.picture()
        self.saver.save()  # first of all: a disk that is too small is found now
        self.stop.check()
        if self.measures():
            try:
                self.say_knn("raw pixels", "knn_raw_pixels", None)
                self.say_knn(self.after_epoch(0), "knn", self.training.method.backbone)
            except DataError:
                self.say_nothing_trained()
                raise
        elif self.training.config.run.knn_max_images > 0:
            self.log.say(f"kNN      not measured: {self.no_knn}")

    def recall(self) -> None:
        """What was measured before a resume, from metrics.jsonl, so that the last lines and the card have it too."""
        if not self.training.world.is_first:
            return
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            rows = read_lines(self.folder / "metrics.jsonl")
        names = {"knn_raw_pixels": lambda epoch: "raw pixels", "knn": self.after_epoch}
        for row in rows:
            for key in names.keys() & row.keys():
                step, accuracy = row.get("step"), row[key]
                if type(step) is not int or type(accuracy) is not float or not 0 <= step < self.training.last_step:
                    continue
                epoch, within = divmod(step, self.training.steps_per_epoch)
                if within == 0:
                    self.accuracies[names[key](epoch)] = accuracy

    def after_step(self, training: Training) -> None:
        """Checkpoint and kNN, at the epochs that the settings name; checkpoints also by the clock.

        The first rank alone decides and acts; the others wait for it in their next step.
        """
        done = training.step >= training.last_step or self.stop.failure is not None
        if not training.world.is_first or done:
            return
        self.curves.after_step()
        epoch, within = divmod(training.step, training.steps_per_epoch)
        run = training.config.run
        if (within == 0 and epoch % run.save_every_epochs == 0) or self.saver.is_due():
            self.saver.save()
        if within == 0 and run.knn_every_epochs and epoch % run.knn_every_epochs == 0 and self.measures():
            self.measure_meanwhile(epoch)

    def measure_meanwhile(self, epoch: int) -> None:
        """kNN between two steps: what keeps it from being measured does not end the training."""
        try:
            self.say_knn(self.after_epoch(epoch), "knn", self.training.method.backbone)
        except Stopped:
            self.log.say(f"kNN      not measured after epoch {epoch}: stopping")
        except DataError as error:
            self.log.say(f"kNN      not measured after epoch {epoch}: {error}")

    def save_last(self, outcome: Outcome) -> None:
        """The last checkpoint, and what ended the training where it is not done."""
        if not self.training.world.is_first:
            return
        self.saver.save(last=True)
        self.curves.last()
        step, total = self.training.step, self.training.last_step
        if outcome is Outcome.NOT_FINITE:
            limit = self.training.config.run.max_bad_steps
            self.log.say(f"{limit} steps in a row were not finite: stopped at step {step}. Try a smaller --lr")
        if outcome is Outcome.STOPPED:
            self.log.say(f"stopped on request after step {step} of {total}")
        if outcome is Outcome.FAILED:
            saved = "; what was trained is saved" if step else ""
            self.log.say(f"the images of step {step + 1} of {total} cannot be had{saved}")
        if outcome is Outcome.LOST_IMAGES:
            self.log.say(f"too many images cannot be decoded: stopped after step {step} of {total}")
        if step == 0:
            self.say_nothing_trained()
        if outcome in (Outcome.STOPPED, Outcome.FAILED, Outcome.LOST_IMAGES):
            self.say_how_to_go_on()

    def say_nothing_trained(self) -> None:
        """What a run leaves behind that has failed before its first step."""
        self.log.say(f"no step was made: {self.place} holds the start alone, and may be deleted (--overwrite does)")

    def say_how_to_go_on(self) -> None:
        """The command."""
        for line in (f"go on with: {command('sdmp_train', 'pretrain', '--resume', self.place)}", *elsewhere()):
            self.log.say(line)

    def after_training(self) -> None:
        """The exported backbone, kNN, and what to do next.

        Raises:
            Stopped: asked for meanwhile. Done again by a run that goes on from the last step.
            Unwritable: the export.
        """
        if not self.training.world.is_first:
            return
        target = self.folder / EXPORTED
        try:
            export_backbone(self.training.method.backbone, self.training.config, target, self.training.step)
        except (OSError, SafetensorError) as error:
            raise checkpoint.Unwritable(f"the backbone cannot be exported to {target}: {error}") from error
        self.stop.check()
        if self.measures():
            self.say_knn(TRAINED, "knn", self.training.method.backbone)
            with contextlib.suppress(OSError):  # the card of the export stays as it was
                write_card(self.training.config, target, self.training.step, self.numbers())
            self.curves.last()
        for line in self.farewell():
            self.log.say(line)

    def numbers(self) -> dict[str, str]:
        """What was measured so far, for the model card."""
        return {f"kNN (k = {KNN_K}), {what}": f"{accuracy:.1%}" for what, accuracy in self.accuracies.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside its tensors."""
        return {
            "run": self.run_id,
            "config": to_dict(self.training.config),
            "images": self.index.fingerprint,
            "total_steps": self.training.total_steps,
            "world_size": self.training.world.size,
            "lost_images": self.lost.before(self.training.step),
            "versions": versions(),
            "backbone": backbone_place(self.training.method),
        }

    def measures(self) -> bool:
        """Whether kNN is measured: it is switched on, and the images have classes that it can tell apart."""
        return self.training.config.run.knn_max_images > 0 and self.no_knn is None

    @property
    def no_classes(self) -> str | None:
        """Why `eval knn` would refuse the run's own images, however many are taken."""
        if len(self.index.classes) < 2:
            return NO_CLASSES
        if self.test_index is not None and len(self.test_index) == 0:
            return self.test_index.notes[-1]
        return None

    @cached_property
    def no_knn(self) -> str | None:
        """Why the images' classes allow no kNN."""
        if (lacking := self.no_classes) is not None:
            return lacking
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
                between=self.stop.check,
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
        self.accuracies[what], self.queries = accuracy, len(queries.rows)
        # Of the trained backbone the last lines say it.
        if key == "knn" and what != TRAINED and (worse := self.below_the_start(accuracy)) is not None:
            self.log.say(worse)

    def below_the_start(self, accuracy: float) -> str | None:
        """Where a run has less kNN accuracy than the trained weights it began with: by how much, and what to turn.

        Beside it the standard error of the start's accuracy, as so many queries tell it.
        """
        start = self.accuracies.get(self.after_epoch(0))
        if not self.continues or start is None or accuracy >= start:
            return None
        error = 100 * math.sqrt(start * (1 - start) / max(self.queries, 1))
        told = f"{start:.1%}, give or take {error:.1f} with {counted(self.queries, 'query', 'queries')}"
        return (
            f"kNN      {accuracy:.1%}: {100 * (start - accuracy):.1f} points below the start ({told}). What keeps more "
            "of it: a smaller --lr or --backbone-lr-scale, or more --heads-only-epochs"
        )

    def picture(self) -> None:
        """mix.png, from some images of the run; a disk that is full costs the picture alone, as does a damaged file."""
        path, config = self.folder / "mix.png", self.training.config
        try:
            recipes = self.training.method.views(self.training.at)[:2]
            batch = views_of(spread(self.index, PICTURED), recipes, config.run.seed)
            examples = self.training.method.example(batch)
            if examples:
                second = batch.views[1] if len(batch.views) > 1 else None
                title = f"What {config.run.preset} mixes ({config.method_name})"
                grey = f", grey with chance {config.data.gray_prob:g} (--gray-prob)" if config.data.gray_prob else ""
                note = f"Views of {shown_size(config.data.image_px)} px, as training makes them{grey}"
                save_mix_picture(path, title, examples, second, note)
        except (OSError, *DECODE_ERRORS) as error:
            self.log.say(f"{path} cannot be written: {error}")

    def farewell(self) -> list[str]:
        """What came of it, where everything is, and after the embedded images the command for the user's own."""
        known = ", ".join(f"{accuracy:.1%} {what}" for what, accuracy in self.accuracies.items())
        gpu = self.training.world.device.type == "cuda"
        own = FOR_OWN_IMAGES["cuda" if gpu else "cpu"]
        embedded = self.training.config.data.data == EMBEDDED
        yours = ("pretrain", "--preset", *own.split(), "--data", "YOUR_IMAGES")
        first, *others = how_to_load(self.training.config, os.path.join(self.place, EXPORTED))
        written = ("metrics.jsonl", "train.log", "mix.png", "curves.png")
        logs = " ".join(name for name in written if (self.folder / name).exists())
        loss = "" if self.log.last_loss is None else f"final loss {self.log.last_loss:.3f}, "
        refused = self.no_knn if self.training.config.run.knn_max_images > 0 else self.no_classes
        others_classes = [] if refused is None else ["--data", "CLASS_FOLDERS"]
        worse = None if (last := self.accuracies.get(TRAINED)) is None else self.below_the_start(last)
        steps, took = counted(self.training.step, "step"), duration(time.monotonic() - self.began_at)
        return [
            f"done     {loss}{steps}; this took {took}",
            *([f"kNN      {known}"] if known else []),
            *([worse] if worse else []),
            f"run      {os.path.normpath(self.folder)}  (config.yaml {logs} checkpoints/ exported/)",
            f"load     {first}",
            *(f"         {line}" for line in others),
            *(f"shell    {line}" for line in elsewhere()),
            f"measure  {command('sdmp_train', 'eval', 'knn', '--run', self.place, *others_classes)}",
            f"report   {command('sdmp_train', 'report', self.place)}",
            *([f"yours    {command('sdmp_train', *yours)}"] if embedded else []),
        ]
