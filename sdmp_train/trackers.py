"""The numbers of a run, handed on to TensorBoard, Weights & Biases or MLflow as they are logged.

Each is an extra of its own and imported only where it was asked for. What one of them does wrong costs a notice, and
not the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from .advice import install
from .config import Config, ConfigError, flatten
from .settings import RunConfig

NOT_NUMBERS = ("step", "time")


class Tracker(Protocol):
    """Where numbers go besides metrics.jsonl."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of a step."""

    def close(self) -> None:
        """The run has ended or stopped."""


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUNS`."""

    package = "tensorboard"

    def __init__(self, config: Config, folder: Path, run_id: str, step: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # Of a resumed run, what was logged of steps that come again is not shown.
        self.writer = writer(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; project, entity and mode by its own environment variables."""

    package = "wandb"

    def __init__(self, config: Config, folder: Path, run_id: str, step: int) -> None:
        wandb = importlib.import_module("wandb")
        settings = dict(settings_of(config))
        self.run = wandb.init(name=folder.name, id=run_id or None, resume="allow", dir=str(folder), config=settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow, at the tracking server that its environment variables name."""

    package = "mlflow"

    def __init__(self, config: Config, folder: Path, run_id: str, step: int) -> None:
        self.mlflow = importlib.import_module("mlflow")
        known = self.mlflow.search_runs(filter_string=f"tags.sdmp_run = '{run_id}'", output_format="list")
        former = known[0].info.run_id if known else None
        self.mlflow.start_run(run_id=former, run_name=folder.name, tags={"sdmp_run": run_id})
        if former is None:
            self.mlflow.log_params(dict(settings_of(config)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
"""By the flag that asks for each."""


def settings_of(config: Config) -> Iterator[tuple[str, str | int | float | bool]]:
    """Every setting as a plain value, by its name in `config.yaml`."""
    for name, value in flatten(config):
        yield name, value if isinstance(value, (str, int, float, bool)) else str(value)


def asked_for(run: RunConfig) -> list[str]:
    """The flags that were given.

    Raises:
        ConfigError: the package of one is not installed; it names the extra.
    """
    flags = [flag for flag in TRACKERS if getattr(run, flag)]
    for flag in flags:
        package = TRACKERS[flag].package
        if not installed(package):
            raise ConfigError(f"--{flag} needs {package}, which is not installed: {install(flag)}")
    return flags


def installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None


def open_trackers(config: Config, folder: Path, run_id: str, step: int) -> list[Tracker]:
    """What the settings ask for, each begun or gone on with at `step`."""
    return [TRACKERS[flag](config, folder, run_id, step) for flag in asked_for(config.run)]


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """What of a logged object a tracker takes."""
    return {
        name: float(value)
        for name, value in values.items()
        if name not in NOT_NUMBERS and isinstance(value, (int, float)) and math.isfinite(value)
    }
