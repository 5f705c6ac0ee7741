"""This package's classes in timm's place, for a script that knows nothing of them."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from sdmp_kernels.timm.loader import FastCollateMixup, PrefetchLoader
from sdmp_kernels.timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from sdmp_kernels.timm.mixup import Mixup
from sdmp_train.advice import no_traceback

USAGE = """usage: python -m sdmp_kernels.timm SCRIPT ARGS...

Runs SCRIPT ARGS... with this package's Mixup, FastCollateMixup, PrefetchLoader, SoftTargetCrossEntropy and
BinaryCrossEntropy in the place of timm's, and prints what it replaced. The script is not changed, and neither is timm
on disk. With several GPUs: torchrun --nproc-per-node 8 -m sdmp_kernels.timm SCRIPT ARGS...
"""
_OURS = {
    "timm.data.mixup": (Mixup, FastCollateMixup),
    "timm.data.loader": (PrefetchLoader,),
    "timm.loss.cross_entropy": (SoftTargetCrossEntropy,),
    "timm.loss.binary_cross_entropy": (BinaryCrossEntropy,),
}
# What mixes sequences of patches of several sizes, which this package does not.
_REFUSED = {"timm.data.naflex_loader": ("create_naflex_loader",), "timm.data.naflex_mixup": ("NaFlexMixup",)}


def _refusal(name: str) -> Any:
    def refuse(*args: object, **options: object) -> None:
        raise NotImplementedError(
            f"timm.data.{name}: images of several sizes (NaFlex) are not mixed by this package; run the script without "
            "`python -m sdmp_kernels.timm`"
        )

    return refuse


@contextmanager
def replaced() -> Iterator[dict[str, list[str]]]:
    """timm with this package's classes in it, until the end of the block.

    Yields:
        The full name of everything replaced, and the modules of timm in which it was.

    Raises:
        ModuleNotFoundError: if timm is not installed.
    """
    importlib.import_module("timm.data")
    importlib.import_module("timm.loss")
    swaps: list[tuple[str, object, object]] = []
    for module, classes in _OURS.items():
        for ours in classes:
            theirs = getattr(importlib.import_module(module), ours.__name__)
            swaps.append((f"{module}.{ours.__name__}", theirs, ours))
    for module, names in _REFUSED.items():
        for name in names:
            theirs = getattr(sys.modules.get(module), name, None)  # an older timm has none
            if theirs is not None:
                swaps.append((f"{module}.{name}", theirs, _refusal(name)))
    forth = {id(theirs): (name, theirs, ours) for name, theirs, ours in swaps}
    back = {id(ours): (name, ours, theirs) for name, theirs, ours in swaps}
    found: dict[str, list[str]] = {name: [] for name, _, _ in swaps}
    try:
        for name, module in _exchange(forth):
            found[name].append(module)
        yield found
    finally:
        for _ in _exchange(back):  # also in what timm imported meanwhile
            pass


def _exchange(swaps: Mapping[int, tuple[str, object, object]]) -> Iterator[tuple[str, str]]:
    """Put the third of (name, old, new) wherever a module of timm has the second; keys are `id(old)`.

    Yields:
        The name and the module of everything exchanged.
    """
    for module_name, module in sorted(sys.modules.items()):
        if module_name.split(".")[0] != "timm" or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            name, old, new = swaps.get(id(value), ("", None, None))
            if name and old is value:
                setattr(module, attribute, new)
                yield name, module_name


def run(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script as `python SCRIPT ARGUMENTS...` would, with this package's classes in timm's place.

    Args:
        script: a path.
        arguments: of the script.

    Returns:
        The script's global names, when it has ended.
    """
    argv, path = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:  # else python puts no folder of its own first, which the script's would replace
        sys.path[0:1] = [os.path.dirname(os.path.abspath(script))]
    try:
        with replaced() as found:
            print(words(found), file=sys.stderr, flush=True)
            return runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def words(found: dict[str, list[str]]) -> str:
    """What was replaced, a line each."""
    lines = ["sdmp_kernels.timm: in timm's place in this process"]
    for name, modules in found.items():
        short = name.rsplit(".", 1)[-1]
        refused = any(short in names for names in _REFUSED.values())
        ours, where = "refused" if refused else f"sdmp_kernels.timm.{short}", ", ".join(modules)
        lines.append(f"  {name} -> {ours} ({where})")
    return "\n".join(lines)


def _where_train_py_is() -> str:
    """The address of timm's training script, of the installed version where there is one."""
    try:
        tag = f"v{metadata.version('timm')}"
    except metadata.PackageNotFoundError:
        tag = "main"
    return f"https://github.com/huggingface/pytorch-image-models/blob/{tag}/train.py"


def main() -> None:
    """The command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        with no_traceback("sdmp_kernels.timm"):  # not around a script, whose errors are its own
            print(USAGE, end="")
        raise SystemExit(0 if arguments else 2)
    if not os.path.isfile(arguments[0]):
        print(
            f"{arguments[0]} is no file; give the path of a training script first. timm's own train.py is not in its "
            f"package, but at {_where_train_py_is()}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    run(arguments[0], arguments[1:])
