"""From a folder, list or archive of images to uint8 views on a device.

    index = open_folder("photos")
    with make_loader(index, byol_views(224), batch_size=256, steps=1000, seed=0, device="cuda") as loader:
        for batch in loader:
            first, second = batch.views  # (256, 3, 224, 224) uint8, channels_last

Which images a step sees, and how they are cropped and recoloured, is a pure function of (seed, step): it depends
on no worker count, no world size and no loader, and a resumed run sees what the unbroken run would have seen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from sdmp_kernels.views import (
    EvalView,
    Interpolation,
    Size,
    ViewRecipe,
    byol_views,
    crop_flip_view,
    dino_views,
    eval_view,
)

from .batch import Batch, Loader
from .choice import LOADERS, Choice, LoaderName, choose_loader, faster_loader, open_loader
from .folders import find_splits, holds_images
from .host import HostTransform, RandAugmentErase
from .images import BadFile, DataError, TooManyBadFiles
from .index import Index, open_folder
from .schedule import Colour, EvalSchedule, TrainSchedule, as_recipes, steps_per_epoch
from .shapes import shapes_folder
from .shards import has_test_shards
from .source import Source, channels_of
from .sources import kind_of, open_source, place_of

__all__ = [
    "LOADERS",
    "BadFile",
    "Batch",
    "Choice",
    "Colour",
    "DataError",
    "EvalView",
    "HostTransform",
    "Index",
    "Loader",
    "LoaderName",
    "RandAugmentErase",
    "Source",
    "TooManyBadFiles",
    "ViewRecipe",
    "byol_views",
    "choose_loader",
    "cores",
    "crop_flip_view",
    "dino_views",
    "eval_loader",
    "eval_view",
    "find_splits",
    "has_test_shards",
    "holds_images",
    "kind_of",
    "make_loader",
    "open_folder",
    "open_source",
    "place_of",
    "shapes_folder",
    "steps_per_epoch",
]


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
    loader: LoaderName | Choice = "auto",
    workers: int | None = None,
    repeats: int = 1,
    host: HostTransform | None = None,
    fill: Colour | None = None,
) -> Loader:
    """Batches of augmented views for the steps `start_step` to `steps - 1`.

    `batch_size` is this rank's; `steps` counts from the start of the run, so `steps - start_step` batches come.
    `loader`: "auto" measures both for about a second where 20,000 images or more are to come, takes the faster and says
    both rates (`Loader.why`); with fewer it is DALI where that is installed. Of several ranks let one measure, and give
    all its `Choice`: on a GPU the loaders' pixels differ by up to two levels. "resident" decodes every image once, when
    it is opened, and keeps all of them on the device; `DataError` where they do not fit.
    `workers`: decoding threads (DALI) or processes (torchvision, 0 decodes in this process); default: the cores this
    process may use, divided by the ranks that share the machine.
    `repeats`: how often an image comes in a row, in views of its own (repeated augmentation).
    `host`: what is done to each image's first view on the host; the torchvision loader alone does that.
    `fill`: the colour of rows whose file cannot be decoded: `Batch.valid` is False for them and `Batch.bad` names them.
    Without it such a file is an error.
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
        repeats=repeats,
        host=host,
        fill=fill,
    )
    device, workers = _place(device), _worker_count(workers, world_size)
    if host is not None:
        choice = _choice_for_host(loader)
    elif isinstance(loader, Choice):
        choice = loader
    elif loader == "auto":
        choice = faster_loader(schedule, device, workers)
    else:
        choice = choose_loader(loader, device, channels_of(index))
    return open_loader(choice, schedule, device, workers)


def _choice_for_host(loader: LoaderName | Choice) -> Choice:
    name = loader.name if isinstance(loader, Choice) else loader
    if name == "dali":
        raise DataError("loader='dali' cannot be used: these views are changed image by image; use 'torchvision'")
    return Choice("torchvision", "the views are changed image by image on the host, which Pillow's processes do")


def eval_loader(
    index: Source,
    size_px: Size,
    *,
    batch_size: int,
    device: torch.device | str,
    resize_px: int | None = None,
    interpolation: Interpolation = "bilinear",
    rank: int = 0,
    world_size: int = 1,
    loader: LoaderName = "auto",
    workers: int | None = None,
) -> Loader:
    """Every image once, resized and centre cropped, in index order; the last batch may be short.

    `resize_px`: the shorter side before the crop; default `size_px * 256 / 224`, and `size_px` up to 64 px.
    With `world_size > 1` a rank gets one contiguous part of the rows (parts differ by at most one row).
    `loader`: "resident", which would decode all for one look at each, is "torchvision" here: the same pixels.
    """
    recipes = as_recipes([eval_view(size_px, resize_px, interpolation)])
    if loader == "resident":
        loader = "torchvision"  # the same pixels, and each image is needed once
    schedule = EvalSchedule(index, recipes, batch_size, rank=rank, world_size=world_size)
    device = _place(device)
    return open_loader(
        choose_loader(loader, device, channels_of(index)), schedule, device, _worker_count(workers, world_size)
    )


def _place(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    unnumbered = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if unnumbered else device


def _worker_count(workers: int | None, world_size: int) -> int:
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, or None for the cores at hand, but is {workers}")
    return cores() // max(1, min(world_size, torch.cuda.device_count())) if workers is None else workers


def cores() -> int:
    """Cores this process may use, which in a container or a job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
