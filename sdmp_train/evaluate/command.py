"""The subcommands that only read: `eval knn` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..config import ConfigError, DataConfig
from ..data import DataError, Index, open_folder
from ..distributed import join_world
from ..export import load_exported
from ..run_folder import stored_config
from ..splits import NO_CLASSES, describe_split, open_split, reporting, test_split
from ..text import printable
from .knn import collapse, image_features, knn_images, weighted_knn

EVERY_IMAGE = 10**9


def evaluate_knn(
    *,
    run: str | None,
    weights: str | None,
    data: str | None,
    test_data: str | None,
    k: Sequence[int],
    temperature: float,
    batch_size: int,
    device: str,
    workers: int | None,
    raw_pixels: bool,
    bad_images: Literal["stop", "skip"] | None = None,
    loader: Literal["auto", "dali", "torchvision"] | None = None,
) -> int:
    """Print the kNN accuracy of an exported backbone, and of raw pixels, for every k."""
    if (run is None) == (weights is None):
        raise ConfigError("eval knn needs a backbone: give --run RUN (a run folder) or --weights DIR (an export)")
    exported = Path(weights) if weights else Path(run or "") / "exported"
    backbone, description = load_exported(exported)
    settings = description["pretrained_cfg"]
    stored = stored_config(Path(run)).data if run else DataConfig()
    if data is None and stored.data is None:
        raise ConfigError("data is missing; give --data DIR, a folder with one folder per class")
    pixel_settings = replace(
        stored,
        data=data or stored.data,
        # A split that belongs to the run's data belongs to no other.
        test_data=test_data or (stored.test_data if data is None else None),
        image_px=settings["input_size"][1],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        workers=workers,
        bad_images=bad_images or stored.bad_images,
        loader=loader or stored.loader,
    )
    train, test = measured_images(pixel_settings)
    bank_images, query_images = knn_images(train, test, max_images=EVERY_IMAGE)
    print(describe_split(pixel_settings, train, test))
    with join_world(device) as world:
        backbone.to(world.device)
        sizes = f"{len(bank_images)} bank, {len(query_images)} queries, {len(bank_images.classes)} classes"
        print(f"{printable(exported)}: {sizes}")
        for name, model in (("backbone", backbone), ("raw pixels", None)):
            if model is None and not raw_pixels:
                continue
            bank, queries = (
                image_features(model, images, pixel_settings, device=world.device, batch_size=batch_size)
                for images in (bank_images, query_images)
            )
            if (remark := collapse(bank)) is not None:
                print(f"{name}: {remark}")
            for count, accuracy in weighted_knn(bank, queries, k, temperature=temperature).items():
                print(f"kNN {accuracy:6.2%}  {name}, k = {count}")
    return 0


def labelled_images(data: DataConfig, test_data: str | None) -> tuple[Index, Index]:
    """Bank and queries, all of them, with the same class numbers; `test_data` goes before that of `data`."""
    train, test = measured_images(data if test_data is None else replace(data, test_data=test_data))
    return knn_images(train, test, max_images=EVERY_IMAGE)


def measured_images(data: DataConfig) -> tuple[Index, Index | None]:
    """The images of the bank, and those of the queries where they are of another split.

    Raises:
        ConfigError, DataError: they cannot be measured on; the message says why, and what to give.
    """
    train = open_split(data, "train", say=print)
    if len(train.classes) < 2:
        raise ConfigError(f"{printable(train.root)} cannot be measured on: {NO_CLASSES}; found {len(train.classes)}")
    return train, test_split(data, train, None, print)


def verify_folder(folder: str) -> int:
    """Decode every image once and print what is there, and what of it no run would use.

    Raises:
        DataError: some files are no readable images, or a class folder has none; it names them.
    """
    index = open_folder(folder, split=None, on_bad="list", check="decode", progress=reporting(print, None))
    print(index.summary())
    for number, name in enumerate(index.classes):
        print(f"  {int((index.labels == number).sum()):8}  {printable(name)}")
    if index.faults:
        raise DataError(index.faults)
    print("every image decodes")
    return 0
