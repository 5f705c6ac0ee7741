"""The subcommands that only read: `eval knn` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import ConfigError, DataConfig
from ..data import Index, open_folder
from ..distributed import join_world
from ..export import load_exported
from ..run_folder import stored_config
from ..splits import open_split, test_split
from .knn import collapse, image_features, knn_images, weighted_knn


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
) -> int:
    """Print the kNN accuracy of an exported backbone, and of raw pixels, for every k."""
    if (run is None) == (weights is None):
        raise ConfigError("eval knn needs a backbone: give --run RUN (a run folder) or --weights DIR (an export)")
    exported = Path(weights) if weights else Path(run or "") / "exported"
    backbone, description = load_exported(exported)
    settings = description["pretrained_cfg"]
    folder = data or (stored_config(Path(run)).data.data if run else None)
    if folder is None:
        raise ConfigError("data is missing; give --data DIR, a folder with one folder per class")
    pixel_settings = DataConfig(
        data=folder,
        image_px=settings["input_size"][1],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        workers=workers,
    )
    bank_images, query_images = labelled_images(pixel_settings, test_data)
    with join_world(device) as world:
        backbone.to(world.device)
        print(f"{exported}: {len(bank_images)} bank, {len(query_images)} queries, {len(bank_images.classes)} classes")
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
    """Bank and queries, all of them, with the same classes."""
    train = open_split(data, "train")
    if test_data is not None:
        test: Index | None = open_folder(test_data, split=None)
        if test is not None and test.classes != train.classes:
            raise ConfigError(f"{test_data} has classes {test.classes}; expected those of the bank: {train.classes}")
    else:
        test = test_split(data, train)
    if len(train.classes) < 2:
        raise ConfigError(f"kNN needs at least two class folders under {train.root}; found {len(train.classes)}")
    return knn_images(train, test, max_images=10**9)


def verify_folder(folder: str) -> int:
    """Decode every image once and print what is there; `DataError` names the files that are no readable images."""
    index = open_folder(folder, split=None, check="decode")
    print(index.summary())
    for number, name in enumerate(index.classes):
        print(f"  {int((index.labels == number).sum()):8}  {name}")
    print("every image decodes")
    return 0
