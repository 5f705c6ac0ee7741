"""From a folder of image files to uint8 views on a device.

    index = open_folder("photos")
    with make_loader(index, byol_views(224), batch_size=256, steps=1000, seed=0, device="cuda") as loader:
        for batch in loader:
            first, second = batch.views  # (256, 3, 224, 224) uint8, channels_last

Which images a step sees, and how they are cropped and recoloured, is a pure function of (seed, step): it depends
on no worker count, no world size and no loader, and a resumed run sees what the unbroken run would have seen.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Literal

import torch

from sdmp_kernels import backends
from sdmp_kernels.views import EvalView, ViewRecipe, byol_views, crop_flip_view, dino_views, eval_view

from .batch import Batch, Loader
from .folders import find_splits, holds_images
from .images import BadFile, DataError, TooManyBadFiles
from .index import Index, open_folder
from .schedule import EvalSchedule, Schedule, TrainSchedule, as_recipes, steps_per_epoch
from .shapes import shapes_folder
from .source import Source

__all__ = [
    "BadFile",
    "Batch",
    "DataError",
    "EvalView",
    "Index",
    "Loader",
    "Source",
    "TooManyBadFiles",
    "ViewRecipe",
    "byol_views",
    "choose_loader",
    "crop_flip_view",
    "dino_views",
    "eval_loader",
    "eval_view",
    "find_splits",
    "holds_images",
    "make_loader",
    "open_folder",
    "shapes_folder",
    "steps_per_epoch",
]

LoaderName = Literal["auto", "dali", "torchvision"]


def make_loader(
    index: Source,
    recipes: Sequence[ViewRecipe],
    *,
    batch_size: int,
    steps: int,
    start_step: int = 0,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str,
    loader: LoaderName = "auto",
    workers: int | None = None,
) -> Loader:
    """Batches of augmented views for the steps `start_step` to `steps - 1`.

    `batch_size` is this rank's; `steps` counts from the start of the run, so `steps - start_step` batches come.
    `workers`: decoding threads (DALI) or processes (torchvision, 0 decodes in this process); default: the cores this
    process may use, divided by the ranks that share the machine.
    """
    schedule = TrainSchedule(
        index,
        as_recipes(recipes),
        batch_size,
        steps=steps,
        start_step=start_step,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return _carry_out(schedule, device, loader, workers, world_size)


def eval_loader(
    index: Source,
    size_px: int,
    *,
    batch_size: int,
    device: torch.device | str,
    resize_px: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    loader: LoaderName = "auto",
    workers: int | None = None,
) -> Loader:
    """Every image once, resized and centre cropped, in index order; the last batch may be short.

    `resize_px`: the shorter side before the crop; default `size_px * 256 / 224`, and `size_px` up to 64 px.
    With `world_size > 1` a rank gets one contiguous part of the rows (parts differ by at most one row).
    """
    recipes = as_recipes([eval_view(size_px, resize_px)])
    schedule = EvalSchedule(index, recipes, batch_size, rank=rank, world_size=world_size)
    return _carry_out(schedule, device, loader, workers, world_size)


def _carry_out(
    schedule: Schedule, device: torch.device | str, loader: LoaderName, workers: int | None, world_size: int
) -> Loader:
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, or None for the cores at hand, but is {workers}")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    name, why = choose_loader(loader, device)
    if workers is None:
        workers = _cores() // max(1, min(world_size, torch.cuda.device_count()))
    if name == "dali":
        from .dali import DaliLoader

        return DaliLoader(schedule, device=device, workers=max(1, workers), why=why)
    from .torchvision import TorchvisionLoader

    return TorchvisionLoader(schedule, device=device, workers=workers, why=why)


def choose_loader(loader: LoaderName, device: torch.device) -> tuple[Literal["dali", "torchvision"], str]:
    """The loader to use, and why, as a sentence. `DataError` where the one asked for is missing."""
    if loader not in ("auto", "dali", "torchvision"):
        raise ValueError(f"loader must be 'auto', 'dali' or 'torchvision', but is {loader!r}")
    if loader == "torchvision":
        return "torchvision", "torchvision was asked for; Pillow decodes on the CPU"
    missing = _dali_missing(device)
    if missing and loader == "dali":
        raise DataError(f"loader='dali' cannot be used: {missing}; use loader='torchvision'")
    if missing:
        return "torchvision", f"{missing}; Pillow decodes on the CPU"
    where = f"decodes and cuts on {device}" if device.type == "cuda" else "decodes on the CPU"
    asked = "was asked for" if loader == "dali" else "is installed"
    return "dali", f"DALI {asked}; it {where}, and augment ({backends()['augment'][device.type]}) makes the views"


def _dali_missing(device: torch.device) -> str:
    """Why DALI cannot serve this device, or an empty text. Looks for it without importing it."""
    if device.type not in ("cpu", "cuda"):
        return f"DALI does not serve {device.type} devices"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "DALI is not installed (pip install 'sdmp-kernels[dali]' on Linux)"
    return ""


def _cores() -> int:
    """Cores this process may use, which in a container or a job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
