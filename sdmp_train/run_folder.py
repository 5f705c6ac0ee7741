"""The folder of one run: where it lies, whose it is, when it may be used or deleted, and who is at work in it.

`.sdmp-run.json` says that the folder is ours and which run it holds; `.sdmp-run.lock` is locked by the process that
writes there. No other program writes files of these names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from .card import CARD, is_edited
from .config import Config, ConfigError, from_dict, read_settings
from .durable import remove_leftovers, write_durably
from .reading import open_for_append, parse_json, read_json, read_text
from .text import printable

MARKER, LOCK, SETTINGS = ".sdmp-run.json", ".sdmp-run.lock", "config.yaml"
FORMAT, PROGRAM = 1, "sdmp_train"
CHECKPOINTS, EXPORTED = "checkpoints", "exported"
EVALUATIONS, EVALUATED = "evaluations.jsonl", "evaluations"
"""A line for every result, and the folder of the trainings that evaluations make; each is a run folder of its own."""
SAVED = r"latest|step-\d+"
"""What is in the folder of checkpoints."""

FILES = (MARKER, LOCK, SETTINGS, EVALUATIONS, "metrics.jsonl", "train.log", "mix.png", "curves.png", "report.html")
"""What a run, and what reports on it, write beside its folders."""
_DRAFT = r"(\.tmp-\d+)?"
_TOP = rf"{'|'.join(re.escape(name) for name in FILES)}|images-[0-9a-f]{{16}}\.jsonl\.gz"
OURS = {
    "": rf"({_TOP}){_DRAFT}",
    CHECKPOINTS: rf"latest{_DRAFT}",
    f"{CHECKPOINTS}/*": rf"(manifest\.json|state\.json|\w+\.safetensors){_DRAFT}",
    EXPORTED: rf"((model|classifier)\.safetensors|(config|classes)\.json|README\.md){_DRAFT}",
    "report-figures": rf"(knn|losses|method|speed|optimiser|lam)\.png{_DRAFT}",
    "tensorboard": r"events\.out\.tfevents\..*",
    "pictures": rf"((attention|patches|neighbours|embedding)\.png|captions\.json){_DRAFT}",
}
"""The files that a run writes, by their folder (names of checkpoints stand as *)."""
_CHECKPOINT = re.compile(r"step-\d+(\.tmp-\d+|\.damaged(-\d+)?|\.abandoned-\d+)?")

Mode = Literal["new", "resume", "auto", "overwrite"]
"""How a folder is used: it must be free; it must hold a run; either; or a former run is deleted."""


class FolderInUse(ConfigError):
    """Another process is at work in a run folder."""


def default_folder(preset: str) -> Path:
    """`runs/<date>-<time>-<preset>` under the current folder."""
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{preset.replace('/', '-')}"


def is_run_folder(path: Path) -> bool:
    """Whether a run of ours is there: it has the marker, or settings and checkpoints (of a version before it)."""
    return (path / MARKER).is_file() or ((path / SETTINGS).is_file() and (path / CHECKPOINTS).is_dir())


def check_folder(path: Path, mode: Mode) -> None:
    """Raise `ConfigError` unless the folder may be used as asked. Nothing is written or deleted."""
    if mode == "resume" and not is_run_folder(path):
        raise ConfigError(f"cannot resume: {path} is not a run folder (it has no {MARKER})")
    if not path.exists() or (mode in ("resume", "auto") and is_run_folder(path)):
        return
    if not path.is_dir():
        raise ConfigError(f"output is {str(path)!r}, which is a file; expected a folder")
    if {entry.name for entry in path.iterdir()} <= {LOCK}:
        return  # free, or claimed by a process that died before it wrote anything
    if mode != "overwrite":
        if not is_run_folder(path):
            raise ConfigError(f"the folder {path} holds files and no run of ours; give another --output")
        how = finished(path) or f"holds an unfinished run{_since(path)}; --resume goes on with it"
        raise ConfigError(f"the run folder {path} {how}, --overwrite deletes it; or give another --output")
    check_deletable(path)


def _since(path: Path) -> str:
    """When a run last wrote its settings, as words to put after it; nothing where there are none yet."""
    try:
        seconds = (path / SETTINGS).stat().st_mtime
    except OSError:
        return ""
    return f" of {datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def finished(path: Path) -> str | None:
    """Where the run in a folder has come to its end, as its newest checkpoint tells: so, and how it can be lengthened.

    None where it has not, or where that cannot be told (a version that did not store it).
    """
    try:
        newest = path / CHECKPOINTS / read_text(path / CHECKPOINTS / "latest").strip()
        state = read_json(newest / "state.json")
        most = stored_config(path).run.max_steps
    except (OSError, ValueError):
        return None
    step, total = (state.get(name) for name in ("step", "total_steps"))
    if not isinstance(step, int) or not isinstance(total, int) or total < 1:
        return None
    if step >= total:
        longer = "its schedules end there: a longer run is a new one, with more --epochs"
        again = "--resume goes on only to make backbone and kNN again"
        return f"holds a run{_since(path)} that is finished: all {total} steps are made ({longer}); {again}"
    if most is not None and step >= most:
        end = f"finished at its --max-steps, {step} of {total}"
        return f"holds a run{_since(path)} that is {end}; --resume with a larger one goes on"
    return None


def check_deletable(path: Path) -> None:
    """Raise `ConfigError` unless the folder bears our marker and holds nothing that a run has not written.

    A run folder of a version without the marker is not deleted: it gets one when the run is resumed.
    """
    if read_marker(path) is None:
        raise ConfigError(
            f"--overwrite deletes run folders only, and {path} is not one (it has no {MARKER}); "
            "delete it yourself, or give another --output"
        )
    strange = next(strangers(path), None)
    if strange is not None:
        raise ConfigError(
            f"--overwrite deletes only what a run has written, and {strange} is something else; "
            "move it away, or give another --output"
        )


def read_marker(path: Path) -> dict[str, object] | None:
    """What the marker says; None where there is none. An empty one, of a process killed as it made it, says nothing."""
    try:
        text = read_text(path / MARKER)
        marker = parse_json(text) if text else {}
    except (OSError, ValueError):
        return None
    return marker if marker.get("program", PROGRAM) == PROGRAM else None


def strangers(path: Path) -> Iterator[Path]:
    """Everything in a run folder that a run has not written. Links count: what they lead to is not ours."""
    for entry in sorted(path.iterdir()):
        name, is_folder = entry.name, entry.is_dir() and not entry.is_symlink()
        if is_folder and name == CHECKPOINTS:
            for inner in sorted(entry.iterdir()):
                if inner.is_dir() and not inner.is_symlink() and _CHECKPOINT.fullmatch(inner.name):
                    if ".tmp-" not in inner.name:  # a draft may hold a writer's own half-written files
                        yield from _other_files(inner, OURS[f"{CHECKPOINTS}/*"])
                elif not _is_plain(inner, OURS[CHECKPOINTS]):
                    yield inner
        elif is_folder and name == EVALUATED:
            for inner in sorted(entry.iterdir()):
                is_ours = inner.is_dir() and not inner.is_symlink() and is_run_folder(inner)
                yield from strangers(inner) if is_ours else (inner,)
        elif is_folder and re.fullmatch(rf"{EXPORTED}\.tmp-\d+", name):
            continue
        elif is_folder and name in OURS:
            yield from _other_files(entry, OURS[name])
            if name == EXPORTED and is_edited(entry / CARD):
                yield entry / CARD
        elif not _is_plain(entry, OURS[""]):
            yield entry


def _other_files(folder: Path, ours: str) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if not _is_plain(path, ours))


def _is_plain(path: Path, ours: str) -> bool:
    return path.is_file() and not path.is_symlink() and re.fullmatch(ours, path.name) is not None


@dataclass
class RunFolder:
    """A claimed folder: ours, marked, and locked until it is closed. Only the first rank has one."""

    path: Path
    run_id: str
    unlocked: str | None
    """Why there is no lock, where the file system has none."""
    _lock: FileIO

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()  # which unlocks it


def claim(path: Path, mode: Mode, *, may_rename: bool = False) -> RunFolder:
    """Make the folder this process's own: lock it, mark it, delete a former run where that was asked for.

    `may_rename`: the name was not given by the user; where another run has it already, "-2", "-3", ... is added.

    Raises:
        ConfigError: it cannot be made or used as asked, or another process is at work in it, which is named.
    """
    try:
        if may_rename:
            path = _make_new(path)
        else:
            path.mkdir(parents=True, exist_ok=True)
        lock, unlocked = _lock_folder(path)
    except OSError as error:
        raise ConfigError(f"the run folder {path} cannot be made: {error}. Give another --output") from error
    try:
        # Once more, now that nobody else can claim it: another run may have, since it was looked at.
        check_folder(path, mode)
        if mode == "overwrite":
            _delete_run(path)
        marker = read_marker(path) or {}
        run_id = marker.get("run")
        if not isinstance(run_id, str) or mode == "overwrite":
            run_id = uuid.uuid4().hex
            created = datetime.now(UTC).isoformat(timespec="seconds")
            facts = {"program": PROGRAM, "format": FORMAT, "run": run_id, "created": created}
            write_durably(path / MARKER, json.dumps(facts, indent=2) + "\n")
        (path / CHECKPOINTS).mkdir(exist_ok=True)
        clean(path)
    except OSError as error:
        lock.close()
        raise ConfigError(f"the run folder {path} cannot be made: {error}. Give another --output") from error
    except BaseException:
        lock.close()
        raise
    return RunFolder(path, run_id, unlocked, lock)


def clean(path: Path) -> None:
    """Take away the drafts that killed processes left behind. Only with the lock: no run is writing."""
    remove_leftovers(path, f"{_TOP}|{EXPORTED}")
    remove_leftovers(path / CHECKPOINTS, SAVED)


def stored_config(path: Path) -> Config:
    """The configuration that the run in this folder was started with.

    Raises:
        ConfigError: it cannot be read, or is that of an evaluation that trains, which has other settings.
    """
    settings = read_settings(path / SETTINGS)
    if isinstance(settings, Mapping) and "evaluation" in settings:
        raise ConfigError(
            f"{printable(path)} is the folder of an evaluation's training, not of a run: `report` shows its numbers on "
            f"its run's page, and its classifier is in {printable(path / EXPORTED)}"
        )
    return from_dict(settings, Config(), str(path / SETTINGS))


def _make_new(path: Path) -> Path:
    """Make a folder of this name, or of the first that no other run has taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("counting has no end")


def _lock_folder(path: Path) -> tuple[FileIO, str | None]:
    """The locked file, and why it could not be locked, where the file system has no locks.

    A POSIX lock: the kernel takes it back when the process dies, however it dies, and forked workers, which outlive a
    killed run by some seconds, do not inherit it (they would inherit one by flock).
    """
    file = open_for_append(path / LOCK, follow=False)
    unlocked = None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            file.close()
            raise FolderInUse(
                f"the run folder {path} is in use by {holder}; wait for it, stop it, or give another --output"
            ) from error
        unlocked = f"{path} cannot be locked ({error}): see yourself that no other run uses it"
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file, unlocked


def _delete_run(path: Path) -> None:
    """Delete what a run has written, all but lock and marker, so that a kill leaves a folder that is still known."""
    for entry in path.iterdir():
        if entry.name in (MARKER, LOCK):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
