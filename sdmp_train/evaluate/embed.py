"""Features of images, written to files that numpy or safetensors read: for whatever is not measured here.

N images, T patch tokens, D width of the backbone, F features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from safetensors.numpy import save_file
from torch import Tensor

from ..data import Index, eval_loader
from ..distributed import join_world
from ..durable import replacing, write_durably
from ..log import Log
from ..settings import ConfigError, require
from ..splits import measured_images, open_split
from ..stop import StopRequest
from ..text import printable
from .features import feature_maker, has_tokens, last_tokens, standardise
from .settings.embed import EmbedConfig, EmbeddedName
from .subject import EVERY_IMAGE, Steps, Subject, knn_images, open_subject, resolved_precision

FILES, ABOUT = "files.jsonl", "embeddings.json"


def write_embeddings(config: EmbedConfig) -> dict[str, tuple[int, ...]]:
    """Write the features, in the order of the list of files beside them.

    Returns:
        The shape of each kind: (N, F), of patches (N, T, D).

    Raises:
        ConfigError, DataError: backbone or images cannot be used, or nothing can be written.
        Stopped: asked for meanwhile; no file is left.
    """
    with StopRequest() as stop, join_world(config.device) as world, Log(quiet=not world.is_first) as log:
        require(world.size == 1, "the number of processes", world.size, "1")
        subject = open_subject(config, "embed")
        if config.output is None:
            raise ConfigError("output is missing; give --output DIR, a folder for the features")
        folder = Path(config.output)
        check_free(folder, config)
        index = chosen_images(config, subject, log, stop)
        log.say(f"weights  {subject.name}")
        log.say(f"data     {index.summary()}")
        subject.backbone.to(world.device)
        readers = {name: reader(subject, name) for name in config.features}
        bf16 = resolved_precision(config.precision, world) == "bf16"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                sink = Sink(folder, config, len(index), stack)
                batches = stack.enter_context(
                    eval_loader(
                        index,
                        subject.data.image_px,
                        batch_size=config.batch_size,
                        device=world.device,
                        loader=subject.data.loader,
                        workers=subject.data.workers,
                    )
                )
                step = Steps(log, stop, len(index), config.batch_size, "images")
                stack.callback(log.stop_progress)
                for batch in batches:
                    step()
                    images = standardise(batch.views[0], subject.data.mean, subject.data.std)
                    with torch.inference_mode(), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                        sink.add({name: read(images) for name, read in readers.items()})
                step.end()
                shapes = sink.finish()
            write_lists(folder, config, subject, index, shapes)
        except OSError as error:
            raise ConfigError(f"the features cannot be written to {printable(folder)}: {error}") from error
        for name, shape in shapes.items():
            log.say(f"embed    {folder / file_name(name, config)}  {' x '.join(map(str, shape))} {config.dtype}")
        return shapes


def check_free(folder: Path, config: EmbedConfig) -> None:
    """Raise `ConfigError` where something would be written over that --overwrite does not allow."""
    there = [
        name for name in (*(file_name(n, config) for n in config.features), FILES, ABOUT) if (folder / name).exists()
    ]
    if there and not config.overwrite:
        raise ConfigError(
            f"{printable(folder)} holds {' '.join(there)} already; --overwrite writes over them, "
            "--output OTHER writes elsewhere"
        )


def chosen_images(config: EmbedConfig, subject: Subject, log: Log, stop: StopRequest) -> Index:
    """The images of `split`."""
    if config.split == "all":
        return open_split(subject.data, "train", stop.check, log.say)
    train, test = knn_images(*measured_images(subject.data, stop.check, log.say), max_images=EVERY_IMAGE)
    return train if config.split == "train" else test


def reader(subject: Subject, name: EmbeddedName) -> Callable[[Tensor], Tensor]:
    """Normalised images -> the features of this name."""
    if name != "patches":
        return feature_maker(subject.backbone, name)[0]
    if not has_tokens(subject.backbone):
        raise ConfigError("features is 'patches', which takes a ViT's tokens; expected 'output' for this backbone")
    return lambda images: last_tokens(subject.backbone, images, 1)[0][1]


def file_name(name: str, config: EmbedConfig) -> str:
    """The file of a kind of features."""
    return f"{name}.{config.format}"


class Sink:
    """Takes batches of features; their files are there once `finish` and the stack have ended, or not at all."""

    def __init__(self, folder: Path, config: EmbedConfig, count: int, stack: ExitStack) -> None:
        self._config, self._count, self._done = config, count, 0
        self._drafts: dict[str, Path] = {
            name: stack.enter_context(replacing(folder / file_name(name, config))) for name in config.features
        }
        self._arrays: dict[str, Any] = {}

    def add(self, features: dict[str, Tensor]) -> None:
        """The next rows of every kind."""
        rows = len(next(iter(features.values())))
        for name, tensor in features.items():
            values = tensor.float().cpu().numpy().astype(self._config.dtype)
            if name not in self._arrays:
                shape = (self._count, *values.shape[1:])
                self._arrays[name] = (
                    open_memmap(self._drafts[name], mode="w+", dtype=values.dtype, shape=shape)
                    if self._config.format == "npy"
                    else np.empty(shape, values.dtype)
                )
            self._arrays[name][self._done : self._done + rows] = values
        self._done += rows

    def finish(self) -> dict[str, tuple[int, ...]]:
        """Write what is still in memory; the shapes."""
        require(self._done == self._count, "the number of images embedded", self._done, str(self._count))
        for name, array in self._arrays.items():
            if self._config.format == "npy":
                array.flush()
            else:
                draft = self._drafts[name]
                draft.touch()
                mode = draft.stat().st_mode  # as the umask says; safetensors writes for the owner alone
                save_file({name: array}, draft)
                draft.chmod(mode)
        return {name: tuple(array.shape) for name, array in self._arrays.items()}


def write_lists(
    folder: Path, config: EmbedConfig, subject: Subject, index: Index, shapes: dict[str, tuple[int, ...]]
) -> None:
    """`files.jsonl`, a line for every row: file, and class where there is one; `embeddings.json`: what was read."""
    lines = [
        json.dumps({"file": path, "class": index.classes[label] if label >= 0 else None})
        for path, label in zip(index.paths, index.labels.tolist(), strict=True)
    ]
    write_durably(folder / FILES, "".join(line + "\n" for line in lines))
    about = {
        "root": printable(index.root),
        "weights": subject.name,
        "weights_sha256": subject.digest,
        "image_px": subject.data.image_px,
        "features": {name: {"file": file_name(name, config), "shape": list(shape)} for name, shape in shapes.items()},
        "dtype": config.dtype,
    }
    write_durably(folder / ABOUT, json.dumps(about, indent=2) + "\n")
