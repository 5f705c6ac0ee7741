"""The folder of one run: where it lies, when it may be used, and the files it holds from the start."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

from .config import Config, ConfigError, load_config

MARKER = "config.yaml"


def default_folder(preset: str) -> Path:
    """`runs/<date>-<time>-<preset>` under the current folder."""
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{preset.replace('/', '-')}"


def check_folder(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise `ConfigError` unless the folder may be used as asked. Nothing is written or deleted."""
    if resume:
        if not (path / MARKER).is_file():
            raise ConfigError(f"cannot resume: {path} is not a run folder (it has no {MARKER})")
        return
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"output is {str(path)!r}, which is a file; expected a folder")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"the run folder {path} is already in use; give --resume, --overwrite or another --output")
    if not (path / MARKER).is_file():
        raise ConfigError(f"--overwrite deletes run folders only, and {path} is not one (it has no {MARKER})")


def create_folder(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder, after deleting a former run with `overwrite`; `ConfigError` where that is not allowed."""
    try:
        if overwrite and not resume and path.exists():
            shutil.rmtree(path)
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run folder {path} cannot be made: {error}. Give another --output") from error


def stored_config(path: Path) -> Config:
    """The configuration that the run in this folder was started with."""
    return load_config(path / MARKER, Config())
