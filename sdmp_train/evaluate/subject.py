"""What an evaluation measures, and on which images; where its result is kept.

Every protocol's settings begin with those of `SubjectConfig`. N images, D features.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from ..advice import command
from ..data import Index
from ..distributed import World
from ..log import LineFile, Log
from ..run_folder import EVALUATIONS, EXPORTED, is_run_folder, stored_config
from ..settings import ConfigError, DataConfig
from ..splits import Progress, Say, measured_images
from ..stop import StopRequest
from ..text import printable
from ..training import versions
from ..weights import TIMM, load_weights, weights_digest
from .settings.subject import Precision, SubjectConfig

EVERY_IMAGE = 10**9
IMAGENET_CLASSES = 1000
PLACES = ("what", "run", "weights", "output", "resume", "overwrite")
"""Settings that say where things lie, not how they are measured."""


@dataclass(frozen=True)
class Subject:
    """A backbone, and the settings of the images that it is measured on."""

    backbone: nn.Module
    """In eval mode, on the CPU until it is moved."""
    name: str
    """Where its weights come from."""
    run: Path | None
    """The run that it is of."""
    data: DataConfig
    description: Mapping[str, Any]
    """What an export's config.json says of it."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its weights: names and bytes."""
        return weights_digest(self.backbone)


def open_subject(config: SubjectConfig, protocol: str, *, drop_path: float = 0.0) -> Subject:
    """The backbone and the data settings that `config` means. `drop_path` takes effect in training mode alone.

    Raises:
        ConfigError: there is none, or its weights cannot be had; the message says what to give.
    """
    run, weights = named_backbone(config)
    if run is None and weights is None:
        raise ConfigError(
            f"eval {protocol} needs a backbone: give --run RUN (a run folder) or --weights DIR (an export)"
        )
    loaded = load_weights(weights if weights is not None else str(own_export(Path(run or ""))), drop_path=drop_path)
    pixels = loaded.description["pretrained_cfg"]
    data = measured_data(replace(config, what=None, run=run, weights=weights), pixels)
    return Subject(loaded.backbone, loaded.name, Path(run) if run is not None else None, data, loaded.description)


def named_backbone(config: SubjectConfig) -> tuple[str | None, str | None]:
    """(run folder, weights), of which at most one is given."""
    if config.what is None:
        return config.run, config.weights
    is_run = not config.what.startswith(TIMM) and is_run_folder(Path(config.what))
    return (config.what, None) if is_run else (None, config.what)


def own_export(run: Path) -> Path:
    """The folder of a run's export.

    Raises:
        ConfigError: there is none, as in a run that has not ended; the message has the command that writes one.
    """
    if is_run_folder(run) and not (run / EXPORTED).exists():
        raise ConfigError(
            f"{printable(run)} has no export yet, which the end of a run writes; of its newest checkpoint: "
            f"{command('sdmp_train', 'export', str(run))}"
        )
    return run / EXPORTED


def measured_data(config: SubjectConfig, pixels: Mapping[str, Any]) -> DataConfig:
    """The images that `config` means, as the run reads them, in the size and range of the export's `pretrained_cfg`."""
    stored = stored_config(Path(config.run)).data if config.run is not None else DataConfig()
    if config.data is None and stored.data is None:
        raise ConfigError("data is missing; give --data DIR, a folder with one folder per class")
    return replace(
        read_as_asked(stored, config),
        data=config.data or stored.data,
        # A split that belongs to the run's data belongs to no other.
        test_data=config.test_data or (stored.test_data if config.data is None else None),
        image_px=tuple(pixels["input_size"][1:]),
        channels=pixels["input_size"][0],
        mean=tuple(pixels["mean"]),
        std=tuple(pixels["std"]),
    )


def read_as_asked(data: DataConfig, config: SubjectConfig) -> DataConfig:
    """`data` with what `config` says of reading images; what that leaves open stays."""
    asked = {name: getattr(config, name) for name in ("bad_images", "max_bad_frac", "max_pixels", "loader")}
    return replace(data, workers=config.workers, **{name: value for name, value in asked.items() if value is not None})


def labelled_images(
    data: DataConfig, test_data: str | None = None, *, progress: Progress | None = None, say: Say | None = print
) -> tuple[Index, Index]:
    """Bank and queries, all of them, with the same class numbers; `test_data` goes before that of `data`."""
    asked = data if test_data is None else replace(data, test_data=test_data)
    return knn_images(*measured_images(asked, progress, say), max_images=EVERY_IMAGE)


def knn_images(train: Index, test: Index | None, max_images: int) -> tuple[Index, Index]:
    """Bank and queries, at most `max_images` together: the two splits, or four fifths and one fifth of the first."""
    if test is not None:
        return spread(train, max_images * 4 // 5), spread(test, max_images // 5)
    chosen = spread(train, max_images)
    is_query = np.arange(len(chosen)) % 5 == 4
    return chosen.subset(np.flatnonzero(~is_query)), chosen.subset(np.flatnonzero(is_query))


def spread(index: Index, count: int) -> Index:
    """At most `count` rows, evenly spread over the index, so over its classes."""
    if len(index) <= count:
        return index
    return index.subset(np.linspace(0, len(index) - 1, max(count, 1)).astype(np.int64))


class Steps:
    """Called before every batch of a measurement: hears signals, and says how far it is."""

    def __init__(self, log: Log, stop: StopRequest, images: int, batch_size: int, what: str) -> None:
        self._log, self._stop, self._what = log, stop, what
        self._images, self._batch_size, self._batches = images, batch_size, 0

    def __call__(self) -> None:
        self._stop.check()
        if self._batches == 0:
            self._log.start_progress(-(-self._images // self._batch_size), 0)
        self._log.advance(self._batches)
        done = min(self._batches * self._batch_size, self._images)
        self._log.progress(f"{done:,} of {self._images:,} {self._what}")
        self._batches += 1

    def end(self) -> None:
        """All batches are done."""
        self._log.end_progress(f"{self._images:,} of {self._images:,} {self._what}")


def resolved_precision(precision: Precision, world: World) -> Literal["bf16", "fp32"]:
    """What `auto` means here."""
    if precision == "auto":
        return "bf16" if world.device.type == "cuda" else "fp32"
    return precision


def plain_settings(config: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a frozen dataclass as JSON has them: tuples as lists, nested settings as objects."""
    found = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    return json.loads(json.dumps(found))


def result_folder(subject: Subject, output: str | None) -> Path | None:
    """Where `evaluations.jsonl` is: --output, else the run's folder, else nowhere."""
    return Path(output) if output is not None else subject.run


def keep_result(folder: Path | None, protocol: str, subject: Subject, found: Mapping[str, Any], say: Say) -> None:
    """Add a line to the folder's `evaluations.jsonl`: what was measured, of which weights, when and by what.

    Without a folder the result is printed only, which is said.

    Raises:
        ConfigError: where it cannot be written.
    """
    if folder is None:
        say("kept     nowhere: an export alone has no run folder; --output DIR keeps results")
        return
    row = {
        "protocol": protocol,
        **found,
        "weights": subject.name,
        "weights_sha256": subject.digest,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = LineFile(folder / EVALUATIONS)
        written = file.write(json.dumps(row))
        file.close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the result cannot be written to {printable(folder / EVALUATIONS)}: {error}") from error
    if not written:
        raise ConfigError(f"the result cannot be written to {printable(folder / EVALUATIONS)}: is the disk full?")
