"""Checkpoints that are complete or invisible: safetensors, JSON, a SHA-256 manifest, one rename.

A checkpoint is a folder `step-000123` with a safetensors file per part, `state.json` and, written last,
`manifest.json`. A folder without a manifest is unfinished and ignored. There is no pickle: nothing read can run code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ConfigError
from .durable import draft_of, remove_leftovers, sync, write_durably
from .reading import is_whole_number, open_regular, read_json, read_tensors
from .run_folder import SAVED
from .text import brief, one_line

if TYPE_CHECKING:
    from .optim import Optimizer

MANIFEST = "manifest.json"
# Far above what a state or a manifest takes.
STATE_BYTES = 2**24


class CheckpointError(ConfigError):
    """A checkpoint is missing, damaged, or does not fit this run. Exit code 2."""


class Unwritable(OSError):
    """Checkpoints could not be written several times in a row. Exit code 5."""

    exit_code = 5


def save_checkpoint(folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `folder/step-<step>` so that a kill at any instant leaves it whole or absent; verify it; return its path.

    A checkpoint of that step which is already there stays if it is of the same run (`state["run"]`), whole, and holds
    the same tensors; any other is set aside first.

    Raises:
        OSError: where it cannot be written; what was there before is untouched.
    """
    target = folder / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    draft = draft_of(target)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        files = write_parts(draft, parts, {"step": step, **state})
        if target.exists():
            if is_equal(target, files, state.get("run")):
                shutil.rmtree(draft)
                return target
            set_aside(target, "abandoned" if is_whole(target) else "damaged")
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(folder)
    try:
        verify(target)
    except CheckpointError as error:
        delete(target)
        raise OSError(f"what was written is not what is read back: {error}") from error
    write_durably(folder / "latest", target.name)
    return target


def write_parts(
    draft: Path, parts: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Fill the folder of a checkpoint, on disk when this returns; gives what its manifest names."""
    for name, tensors in parts.items():
        # Cloned, because batch-norm buffers are views of one storage, which safetensors refuses.
        copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        try:
            save_file(copies, draft / f"{name}.safetensors")
        except SafetensorError as error:  # how safetensors reports a full disk: no OSError
            raise OSError(f"{draft / name}.safetensors cannot be written: {error}") from error
    (draft / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    for name in parts:
        # safetensors writes for the owner alone, whatever the umask says
        (draft / f"{name}.safetensors").chmod((draft / "state.json").stat().st_mode)
    files = {path.name: fingerprint(path) for path in sorted(draft.iterdir())}
    write_durably(draft / MANIFEST, json.dumps({"format": 1, "files": files}, indent=2))
    for path in draft.iterdir():
        sync(path)
    sync(draft)
    return files


def is_equal(path: Path, files: Mapping[str, dict[str, Any]], run: str | None) -> bool:
    """Whether a checkpoint is whole, of that run, and has the tensors of `files` (a manifest's)."""
    try:
        own = verify(path)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (CheckpointError, OSError, ValueError):
        return False
    changed = {name for name in own.keys() | files.keys() if own.get(name) != files.get(name)}
    return run is not None and state.get("run") == run and changed <= {"state.json"}


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that nothing takes it for one: `step-000123.<why>`, or `.<why>-1`, `-2`, ...; its name.

    `why`: "damaged" or "abandoned".
    """
    names = itertools.count(1)
    target = path.with_name(f"{path.name}.damaged" if why == "damaged" else f"{path.name}.{why}-{next(names)}")
    while target.exists():
        target = path.with_name(f"{path.name}.{why}-{next(names)}")
    path.rename(target)
    sync(path.parent)
    return target


def set_later_aside(folder: Path, step: int) -> list[str]:
    """Set aside every checkpoint of a later step than `step`, where a resumed run goes on; what was done, in words."""
    lines = []
    for path in step_folders(folder):
        if step_of(path) > step:
            whole = is_whole(path)
            aside = set_aside(path, "abandoned" if whole else "damaged")
            what = "is not gone on with" if whole else "is damaged"
            lines.append(f"the checkpoint {path.name} {what}; it is now called {aside.name}")
    return lines


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts (on the CPU) and the state of a checkpoint, or of one set aside, once its manifest is verified."""
    verify(path)
    try:
        state = read_json(path / "state.json", STATE_BYTES)
        parts = {file.stem: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    step = state.get("step")
    if not is_whole_number(step, 0, 2**62) or path.name.partition(".")[0] != f"step-{step:06d}":
        raise CheckpointError(
            f"{path / 'state.json'} names step {brief(step)}; expected the one its folder is named by"
        )
    return parts, state


def newest_checkpoint(folder: Path, *, previous: bool = False) -> Path:
    """The finished checkpoint of the highest step, or with `previous` the one before it."""
    finished = finished_checkpoints(folder)
    wanted = 2 if previous else 1
    if len(finished) < wanted:
        raise CheckpointError(f"{folder} holds {len(finished)} finished checkpoints; expected at least {wanted}")
    return finished[-wanted]


def finished_checkpoints(folder: Path) -> list[Path]:
    """Folders `step-<number>` that have a manifest, in order of their steps."""
    return [path for path in step_folders(folder) if (path / MANIFEST).is_file()]


def step_folders(folder: Path) -> list[Path]:
    """Folders `step-<number>`, finished or not, in order of their steps."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def delete_old_checkpoints(folder: Path, keep: int) -> list[str]:
    """Delete what is older than the `keep` newest whole checkpoints, and drafts; returns what else was done, in words.

    Only checkpoints that verify are counted. A damaged one is set aside: it neither counts nor is deleted.
    """
    whole, lines = 0, []
    for path in reversed(finished_checkpoints(folder)):
        if whole >= keep:
            delete(path)
        elif is_whole(path):
            whole += 1
        else:
            lines.append(f"the checkpoint {path.name} is damaged; it is now called {set_aside(path, 'damaged').name}")
    remove_leftovers(folder, SAVED)
    return lines


def delete(path: Path) -> None:
    """Delete a checkpoint; killed in the midst of it, a draft is left, which nothing takes for one."""
    draft = draft_of(path)
    path.rename(draft)
    shutil.rmtree(draft, ignore_errors=True)


def is_whole(path: Path) -> bool:
    """Whether a finished, undamaged checkpoint is there."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def verify(path: Path) -> dict[str, dict[str, Any]]:
    """Compare every file with the manifest, and return that; `CheckpointError` names the first that differs."""
    try:
        files = read_json(path / MANIFEST, STATE_BYTES).get("files")
        present = {p.name for p in path.iterdir()} - {MANIFEST}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {one_line(error)}") from error
    if not isinstance(files, dict):
        raise CheckpointError(f"{path / MANIFEST} names no files; expected an object of sizes and digests by name")
    if present != set(files):  # so a name can only be that of a file in this folder
        raise CheckpointError(f"{path} holds {brief(sorted(present))}; its manifest names {brief(sorted(files))}")
    for name, expected in files.items():
        try:
            found = fingerprint(path / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / name} cannot be read: {one_line(error)}") from error
        if found != expected:
            raise CheckpointError(
                f"{path / name} is damaged: its size or SHA-256 differs from the manifest. "
                "`--resume-previous` takes the checkpoint before this one"
            )
    return files


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file; `ValueError` for a pipe or another thing that is none."""
    with open_regular(path) as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], part: str) -> None:
    """Copy tensors into a module; each must fit as `compare` says, or `CheckpointError` lists what does not."""
    own = module.state_dict()
    compare(part, own, tensors)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimiser's state as "moment/parameter" -> tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {f"{key}/{names[p]}": value for p in parameters for key, value in optimizer.state.get(p, {}).items()}


def load_optimizer(
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    names: Mapping[nn.Parameter, str],
    *,
    last_epoch: float,
) -> None:
    """The inverse of `optimizer_tensors`, into an optimiser that has made no step.

    last_epoch: epochs that had passed at the last step made, below 0 where none was. Every parameter that was trained
        by then must have all its moments; one whose group is frozen for longer (`from_epoch`) may have none.

    Raises:
        CheckpointError: for moments that are missing, unknown, of another shape or dtype, or not finite.
    """
    trained = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    expected: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = {f"{moment}/{names[parameter]}": moment for moment in optimizer.moments}
            if last_epoch >= group.get("from_epoch", 0) or not own.keys().isdisjoint(tensors):
                step = torch.empty((), device="meta")
                expected |= {name: step if moment == "step" else parameter for name, moment in own.items()}
    for full_name in tensors:
        name = full_name.partition("/")[2]
        if name not in trained:
            raise CheckpointError(f"the checkpoint's optimiser trains {brief(name)}, which this run does not")
    compare("the optimiser's state", expected, tensors)
    for full_name, tensor in tensors.items():
        moment, _, name = full_name.partition("/")
        layout = torch.empty_like(trained[name]) if moment != "step" else torch.empty((), device=trained[name].device)
        optimizer.state[trained[name]][moment] = layout.copy_(tensor)


def compare(part: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` listing what keeps `found` from standing in for `expected`, if anything does.

    Names, shapes and dtypes must be equal, and every floating-point number of `found` finite: a run never saves
    others. `expected` may lie on the meta device.
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unknown {name}" for name in found if name not in expected]
    problems += [
        f"{name} {problem}"
        for name, own in expected.items()
        if name in found and (problem := misfit(own, found[name])) is not None
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{part} does not fit this model: {'; '.join(map(one_line, problems[:10]))}{more}")


def misfit(expected: Tensor, found: Tensor) -> str | None:
    """Why `found` cannot be copied to where `expected` is."""
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"has dtype {found.dtype}, expected {expected.dtype}"
    if found.is_floating_point() and not bool(found.isfinite().all()):
        return "holds numbers that are not finite"
    return None
