"""Images per second from files to the views of a step: our loaders, torchvision's own way, and DALI's decoder alone.

Every loader gets the same files, workers and batch size, and is opened anew in every round: its first batches, which
pay for starting, are not timed. The rounds are interleaved, and ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.harness import Absent, absence
from bench.peers import require
from sdmp_kernels import ViewRecipe, byol_views, dino_views

SAMPLE = "imagenet-sample.tar"
STARTING_BATCHES = 6
"""More than any loader here has ready when its first batch comes."""
OURS = "sdmp auto"

Batches = Iterator[object]


def run(args: argparse.Namespace) -> int:
    """Measure every loader on both sets of views, print rows, and write them where `--json` says."""
    print(f"loader on cpu, {args.workers} workers: {environment.line()}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or unpacked(Path(scratch))
        if folder is None:
            print(f"no photographs: give --data DIR (the shared data has no {SAMPLE})")
            return 2
        asked = {"MoCo v3, 2 x 224 px": byol_views(224), "DINO, 2 x 224 and 8 x 96 px": dino_views(224, 96, 8)}
        rows = [row for name, recipes in asked.items() for row in measured(name, recipes, folder, args)]
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": environment.describe(), "rows": rows}, indent=1) + "\n")
    return 0


def unpacked(scratch: Path) -> Path | None:
    """The sample of photographs in the shared data."""
    found = environment.shared_data(SAMPLE)
    if found is None:
        return None
    with tarfile.open(found) as archive:
        archive.extractall(scratch, filter="data")
    return scratch


def measured(
    name: str, recipes: Sequence[ViewRecipe], folder: Path, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row per loader: images per second in each round, and how ours compares."""
    files = Files(folder, recipes, args.batch_size, args.workers)
    rates: dict[str, list[float]] = {}
    gone: dict[str, str] = {}
    for _ in range(args.rounds):
        for arm, opened in arms().items():
            if arm in gone:
                continue
            try:
                rates.setdefault(arm, []).append(rate(opened, files, args.seconds))
            except (Absent, ImportError) as error:
                gone[arm] = str(error) if isinstance(error, Absent) else absence(error) or repr(error)
    print(f"{name}: {files.why}")
    for arm, found in rates.items():
        if arm in gone:
            continue
        ratio = statistics.median(ours / other for ours, other in zip(rates[OURS], found, strict=True))
        middle = statistics.median(found)
        print(f"  {arm:<34} {middle:8.0f} images/s  {OURS} is {ratio:.2f} of it", flush=True)
        yield {"views": name, "arm": arm, "images_per_second": found, "median": middle, "ours_over_it": ratio}
    for arm, why in gone.items():
        print(f"  {arm:<34} absent: {why}")
        yield {"views": name, "arm": arm, "absent": why}


class Files:
    """What every loader is asked to load.

    Attributes:
        index: the photographs, each many times over, so that an epoch is long.
        recipes: of the views.
        batch_size, workers: as asked for.
        why: the loader that `auto` took, once it was opened.
    """

    def __init__(self, folder: Path, recipes: Sequence[ViewRecipe], batch_size: int, workers: int) -> None:
        import numpy as np

        from sdmp_train.data import open_folder

        found = open_folder(folder, split=None)
        times = max(1, -(-4096 // len(found)))
        self.index = found.subset(np.tile(np.arange(len(found)), times))
        self.recipes, self.batch_size, self.workers, self.why = tuple(recipes), batch_size, workers, ""


def rate(opened: Callable[[Files], Any], files: Files, seconds: float) -> float:
    """Images per second once it runs."""
    with opened(files) as batches:
        for _ in islice(batches, STARTING_BATCHES):
            pass
        count, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < seconds:
            next(batches)
            count += files.batch_size
        return count / spent


def arms() -> dict[str, Callable[[Files], Any]]:
    """Every loader by name, ours first."""
    return {
        OURS: lambda files: _ours(files, "auto"),
        "sdmp dali": lambda files: _ours(files, "dali"),
        "sdmp torchvision (Pillow)": lambda files: _ours(files, "torchvision"),
        "torchvision, Pillow, DataLoader": _torchvision,
        "DALI, decoding alone": _dali,
    }


@contextmanager
def _ours(files: Files, loader: Any) -> Iterator[Batches]:
    from sdmp_train.data import DataError, make_loader

    try:
        made = make_loader(
            files.index,
            files.recipes,
            batch_size=files.batch_size,
            steps=10**6,
            seed=0,
            device="cpu",
            loader=loader,
            workers=files.workers,
        )
    except DataError as error:
        raise Absent(str(error)) from error
    if loader == "auto":
        files.why = made.why
    with made:
        yield iter(made)


class PillowBlur(torch.nn.Module):
    """The blur of MoCo's and DINO's own recipes: many times faster on a Pillow image than torchvision's."""

    def __init__(self, sigmas: tuple[float, float]) -> None:
        super().__init__()
        self.sigmas = sigmas

    def forward(self, image: Any) -> Any:
        from PIL import ImageFilter

        low, high = self.sigmas
        return image.filter(ImageFilter.GaussianBlur(low + (high - low) * float(torch.rand(()))))


class Photographs(torch.utils.data.Dataset[list[torch.Tensor]]):
    """Pillow's image through torchvision's own transforms to uint8, one chain per view."""

    def __init__(self, files: Files) -> None:
        from bench.augment import transforms

        v2 = require("torchvision.transforms.v2", "torchvision")
        self.files = files
        self.chains = [
            v2.Compose([transforms(recipe, PillowBlur(recipe.blur_sigma_px)), v2.PILToTensor()])
            for recipe in files.recipes
        ]

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        from PIL import Image

        with Image.open(self.files.index.path(number % len(self.files.index))) as file:
            image = file.convert("RGB")
        return [chain(image) for chain in self.chains]


@contextmanager
def _torchvision(files: Files) -> Iterator[Batches]:
    loader = torch.utils.data.DataLoader(
        Photographs(files), batch_size=files.batch_size, num_workers=files.workers, generator=torch.Generator()
    )
    batches = iter(loader)
    yield batches
    del batches


@contextmanager
def _dali(files: Files) -> Iterator[Batches]:
    fn = require("nvidia.dali.fn", "nvidia-dali-cuda130")
    types, dali = require("nvidia.dali.types", ""), require("nvidia.dali", "")
    paths = [files.index.path(row) for row in range(len(files.index))]
    options = {"batch_size": files.batch_size, "num_threads": files.workers, "device_id": None, "exec_dynamic": True}

    @dali.pipeline_def(**options)
    def decode() -> Any:
        encoded, _ = fn.readers.file(files=paths, random_shuffle=True, initial_fill=1024)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)

    pipeline = decode()
    yield iter(pipeline.run, None)
    del pipeline
