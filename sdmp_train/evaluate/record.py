"""What a run has left in its folder, read back: settings, logged numbers, lines it said, evaluations, pictures."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError, drift
from ..log import STAMP
from ..presets import Preset, presets
from ..reading import read_json, read_text
from ..run_folder import EVALUATED, EVALUATIONS, is_run_folder, stored_config
from ..text import printable

PICTURES, CAPTIONS = "pictures", "captions.json"
LOG_BYTES = 2**28
SAID = ("device", "kernels", "loader", "data", "model", "init", "loss", "batch", "steps", "lr", "split")
"""What begins a line of train.log that says what ran where; the last one of each counts."""
_MEASURED_ON = re.compile(r"\(k = \d+, \d+ bank, \d+ queries\)")

Series = tuple[list[float], list[float]]
"""Epochs, and the values there."""


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it. Nothing here is computed anew."""

    folder: Path
    name: str
    config: Config
    rows: tuple[dict[str, Any], ...]
    """metrics.jsonl: logged steps, and kNN measurements in lines of their own."""
    said: dict[str, str]
    """Lines of train.log by their first word; `knn`: k, bank and queries of its kNN measurements."""
    evaluations: tuple[dict[str, Any], ...]
    pictures: dict[str, str]
    """Captions by the name of the file in the folder of pictures."""

    @property
    def steps_per_epoch(self) -> float:
        """Steps of one pass over the images, as the logged lines say; NaN where there is none."""
        return next((row["step"] / row["epoch"] for row in reversed(self.rows) if row.get("epoch")), math.nan)

    @property
    def step(self) -> int:
        """The last step that a logged line is of."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def keys(self) -> list[str]:
        """The numbers that were logged, in the order in which they came first."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def series(self, key: str) -> Series:
        """The epochs at which a number was logged, and the number; NaN where it was not finite."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        epochs = [step / self.steps_per_epoch if step else 0.0 for step, _ in found]
        return epochs, [math.nan if value is None else float(value) for _, value in found]

    def last(self, key: str) -> float | None:
        """The last value of a number; None where it was never logged."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def mean(self, key: str) -> float | None:
        """The mean of a number over its lines, those that are not finite left out."""
        values = [value for value in self.series(key)[1] if math.isfinite(value)]
        return sum(values) / len(values) if values else None


def read_record(folder: Path) -> RunRecord:
    """Read a run folder. What is not there is empty; lines that a kill has torn are passed over.

    Raises:
        ConfigError: it is no run folder, or its settings or logs cannot be read.
    """
    if not is_run_folder(folder):
        raise ConfigError(f"{printable(folder)} is no run folder; give the folder that a run has written")
    try:
        rows = tuple(row for row in read_lines(folder / "metrics.jsonl") if type(row.get("step")) is int)
        return RunRecord(
            folder,
            printable(folder.resolve().name),
            stored_config(folder),
            tuple(plain_numbers(row) for row in rows),
            read_said(folder / "train.log"),
            read_evaluations(folder),
            read_captions(folder / PICTURES),
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{printable(folder)} cannot be read: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line; none where there is no file."""
    found = []
    for line in read_text(path, LOG_BYTES).splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def read_evaluations(folder: Path) -> tuple[dict[str, Any], ...]:
    """What evaluations have left in the run's folder, and in folders of their own (--output) among its trainings'."""
    own = sorted(folder.glob(f"{EVALUATED}/*/{EVALUATIONS}"))
    return tuple(row for path in (folder / EVALUATIONS, *own) for row in read_lines(path))


def plain_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a line of metrics; null is one that JSON lacks."""
    return {key: value for key, value in row.items() if value is None or type(value) in (int, float)}


def read_said(path: Path) -> dict[str, str]:
    """The last line of each kind that says what ran where."""
    said: dict[str, str] = {}
    for line in read_text(path, LOG_BYTES).splitlines() if path.exists() else ():
        line = STAMP.sub("", line)
        word, _, rest = line.partition(" ")
        if word in SAID and rest.startswith(" " * (8 - len(word))):
            said[word] = rest.strip()
        elif word == "kNN" and (found := _MEASURED_ON.search(line)):
            said["knn"] = found.group()[1:-1]
    return said


def read_captions(folder: Path) -> dict[str, str]:
    """Which pictures there are, and what each shows."""
    if not (folder / CAPTIONS).exists():
        return {}
    captions = read_json(folder / CAPTIONS).get("captions", {})
    plain = re.compile(r"[\w-]+\.png")
    return {
        name: str(text)
        for name, text in (captions.items() if isinstance(captions, dict) else ())
        if plain.fullmatch(name) and (folder / name).is_file()
    }


def paper_row(config: Config) -> Preset | None:
    """The preset that a run began from, where it is a row of the paper; else None."""
    preset = presets().get(config.run.preset)
    return preset if preset is not None and preset.source.startswith("paper") else None


def departures(record: RunRecord) -> list[str]:
    """In which ways a run is not the recipe of its preset, a phrase each."""
    preset = presets().get(record.config.run.preset)
    if preset is None:
        return [f"there is no preset {record.config.run.preset} in this version"]
    resolved = ("data.loader: 'auto'", "run.precision: 'auto'")  # stored as what was chosen
    changes = [line for line in drift(preset.config, record.config) if not line.startswith(resolved)]
    planned = record.config.optim.epochs * record.steps_per_epoch
    if record.step < round(planned if math.isfinite(planned) else 0):
        changes.append(f"{record.step} of {planned:.0f} steps are on record")
    return changes
