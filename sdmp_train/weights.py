"""Trained backbones, wherever they lie: timm's own, an exported folder, the folder of a run."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from . import checkpoint
from .config import Config
from .export import DESCRIPTION, description_of, load_exported, read_description
from .models import build_backbone, check_name
from .run_folder import CHECKPOINTS, EXPORTED, is_run_folder, stored_config
from .settings import ConfigError, require
from .text import one_line, printable

TIMM = "timm:"
"""What begins the name of weights that timm knows."""


@dataclass(frozen=True)
class Weights:
    """A trained backbone and what is known of it."""

    backbone: nn.Module
    """Without classifier, in eval mode, on the CPU."""
    name: str
    """Where it was read."""
    description: Mapping[str, Any]
    """What an export's config.json says of it."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its weights: names and bytes."""
        return weights_digest(self.backbone)


def load_weights(what: str, *, drop_path: float = 0.0) -> Weights:
    """What `timm:NAME` or an exported folder holds. `drop_path` takes effect in training mode alone.

    Raises:
        ConfigError: it cannot be had.
    """
    if what.startswith(TIMM):
        name = what.removeprefix(TIMM)
        backbone, pixels = load_timm(name, **({"drop_path_rate": drop_path} if drop_path else {}))
        return Weights(backbone, what, {**describe_timm(name, pixels), "num_features": int(backbone.num_features)})  # type: ignore[arg-type]
    backbone, description = load_exported(what, drop_path=drop_path, classifier=False)
    return Weights(backbone, str(Path(what)), description)


def open_weights(what: str) -> Weights:
    """The same, and of a run folder its export; where it has none yet, the backbone of its newest checkpoint.

    Of both it is the one that the run's method has evaluated: MoCo v3's student, DINO's teacher.

    Raises:
        ConfigError: it cannot be had.
    """
    check_place(what)
    if not is_unfinished_run(what):
        return load_weights(exported_of(what))
    config = stored_config(Path(what))
    path = checkpoint.newest_checkpoint(Path(what) / CHECKPOINTS)
    backbone, step = checkpoint_backbone(path, config)
    return Weights(backbone.eval(), str(path), description_of(backbone, config, step))


def describe_weights(what: str) -> Mapping[str, Any]:
    """The description of `open_weights(what)`, with as little read and nothing fetched.

    Raises:
        ConfigError: there is none.
    """
    if what.startswith(TIMM):
        import timm

        name = what.removeprefix(TIMM)
        check_name(name)
        try:
            known = timm.get_pretrained_cfg(name)  # type: ignore[attr-defined]
        except RuntimeError as error:  # an unknown tag
            raise ConfigError(f"timm has no weights of {name}: {one_line(error)}") from error
        if known is None or not known.has_weights:
            raise ConfigError(f"timm has no weights of {name}")
        return describe_timm(name, known.to_dict())
    check_place(what)
    return open_weights(what).description if is_unfinished_run(what) else read_description(Path(exported_of(what)))


def check_place(what: str) -> None:
    """Raise `ConfigError` for a folder that is not there."""
    if not what.startswith(TIMM) and not Path(what).is_dir():
        raise ConfigError(f"there is no folder {printable(what)}; give that of an export, that of a run, or timm:NAME")


def is_unfinished_run(what: str) -> bool:
    """Whether it is the folder of a run that has exported nothing."""
    return (
        not what.startswith(TIMM) and is_run_folder(Path(what)) and not (Path(what) / EXPORTED / DESCRIPTION).exists()
    )


def exported_of(what: str) -> str:
    """The export in a run folder; anything else is what it is."""
    return str(Path(what) / EXPORTED) if not what.startswith(TIMM) and is_run_folder(Path(what)) else what


def checkpoint_backbone(path: Path, config: Config) -> tuple[nn.Module, int]:
    """The evaluated backbone that a checkpoint of a run with these settings holds, and its step.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    parts, state = checkpoint.load_checkpoint(path)
    found = state.get("backbone")
    part, _, place = found.partition(".") if isinstance(found, str) else ("", "", "")
    if part not in parts:
        raise checkpoint.CheckpointError(
            f"{path} does not say where its backbone is: it was written by another version"
        )
    prefix = f"{place}." if place else ""
    tensors = {name.removeprefix(prefix): t for name, t in parts[part].items() if name.startswith(prefix)}
    backbone = build_backbone(
        config.model, config.data.image_px, config.run.seed, channels=config.data.channels, **config.backbone_options
    )
    checkpoint.load_module(backbone, tensors, f"{path}/{part}")
    return backbone, int(state["step"])


@contextlib.contextmanager
def _quick_hub() -> Iterator[None]:
    """Let huggingface_hub use its cache alone where no connection to its server can be made.

    Its own retries take about a minute to find that out. One connection is tried, with the hub's own timeout, so that a
    slow network still serves; behind a proxy, which may be the only way, nothing is tried.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reached(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reached(url: str, timeout: float) -> bool:
    """Whether a connection to the server of a URL can be made, or a proxy stands before it."""
    place = urlsplit(url)
    proxies = getproxies()
    if place.scheme in proxies or "all" in proxies:
        return True
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), timeout).close()
    except OSError:
        return False
    return True


def load_timm(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with the weights that timm knows by this name, in eval mode, and its `pretrained_cfg`.

    Without classifier, unless `options` of `timm.create_model` say otherwise.

    Raises:
        ConfigError: there is no such model, it has no weights, or they cannot be fetched.
    """
    import timm
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    check_name(name)
    options = {"num_classes": 0, **options}
    try:
        with torch.random.fork_rng(devices=[]), _quick_hub():
            model = timm.create_model(name, pretrained=True, **options)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"timm's weights of {name} are not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} is not "
            "reached (no network, or HF_HUB_OFFLINE is set): run this once where there is a network, or copy that "
            "machine's cache here (HF_HOME names its folder)"
        ) from error
    except Exception as error:  # the hub, the network and timm raise whatever they like
        raise ConfigError(f"timm's weights of {name} cannot be had: {one_line(error)}") from error
    pixels = dict(model.pretrained_cfg)
    _, height, width = pixels["input_size"]
    require(height == width, f"the image size of {name}", (height, width), "a square")
    return model.eval(), pixels


def describe_timm(name: str, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of an export of timm's weights says, but for `num_features`; pixels: their `pretrained_cfg`."""
    cfg = {"input_size": list(pixels["input_size"]), "mean": list(pixels["mean"]), "std": list(pixels["std"])}
    return {
        "architecture": name,
        "num_classes": 0,
        "model_args": {},
        "pretrained_cfg": {**cfg, "num_classes": 0},
        "stem": "imagenet",
    }


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
