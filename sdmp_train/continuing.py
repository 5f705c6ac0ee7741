"""A run that continues from trained weights: which settings follow them, and how they are put into the new backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import compare, load_module
from .config import Config
from .export import plain_name
from .models import make_model, timm_arguments
from .settings import ConfigError, ModelConfig, require, with_channels
from .text import counted, one_line, printable
from .weights import Weights, describe_weights, open_weights

HEADS_ONLY = 20
"""One of so many epochs is for the heads alone: fresh ones would pull trained weights anywhere."""
LR_SCALE = 0.1
"""The backbone's learning rate, as a share of the heads'."""
MEASURED = 10
"""Times that kNN is measured in between."""


def following(config: Config, what: str) -> Config:
    """`config` for a run from these weights: model, image size, channels, mean and std are theirs.

    Raises:
        ConfigError: there are no such weights.
    """
    description = describe_weights(what)
    pixels = description["pretrained_cfg"]
    channels, *size = pixels["input_size"]
    data = with_channels(config.data, channels)
    data = replace(data, image_px=tuple(size), mean=tuple(pixels["mean"]), std=tuple(pixels["std"]))
    return replace(config, data=data, model=replace(model_of(description), init_from=what))


def following_run(config: Config, run: Config) -> Config:
    """The same from what a run with these settings has stored, which needs the weights no more."""
    held, data = run.data, config.data
    data = replace(with_channels(data, held.channels), image_px=held.image_px, mean=held.mean, std=held.std)
    return replace(config, data=data, model=run.model)


def model_of(description: Mapping[str, Any]) -> ModelConfig:
    """The settings of which `timm_arguments` makes the model that a checked description is of."""
    given = description["model_args"]
    width = given["channels"][0] if "channels" in given else given.get("embed_dim")
    return ModelConfig(
        arch=plain_name(description),
        stem=description.get("stem", "imagenet"),
        patch_px=given.get("patch_size"),
        width=width,
        depth=given.get("depth"),
        heads=given.get("num_heads"),
    )


def resolved(config: Config) -> Config:
    """`config` with what is left open where a run continues from trained weights; any other as it is."""
    if config.model.init_from is None:
        return config
    optim, run = config.optim, config.run
    if optim.heads_only_epochs is None:
        optim = replace(optim, heads_only_epochs=optim.epochs / HEADS_ONLY)
    if optim.backbone_lr_scale is None:
        optim = replace(optim, backbone_lr_scale=LR_SCALE)
    if run.knn_every_epochs is None:
        run = replace(run, knn_every_epochs=max(1, optim.epochs // MEASURED))
    return replace(config, optim=optim, run=run)


@dataclass(frozen=True)
class Start:
    """Trained weights, made to fit the backbone of a run."""

    weights: Weights
    tensors: Mapping[str, Tensor]
    """As the backbone names them, in its shapes."""
    changed: tuple[str, ...] = ()
    """What was made to fit, in words."""

    def filling(self, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """What builds a backbone, with these weights in what it builds."""

        def filled(**options: Any) -> nn.Module:
            backbone = build(**options)
            load_module(backbone, self.tensors, self.weights.name)
            return backbone

        return filled


def open_start(config: Config) -> Start | None:
    """The weights that a run begins with; None where it begins at random ones.

    Raises:
        ConfigError: they cannot be had, are not those that `init_sha256` names, or are of another model; the message
            names the setting.
    """
    what = config.model.init_from
    if what is None:
        return None
    weights = open_weights(what)
    wanted = config.model.init_sha256
    if wanted not in (None, weights.digest):
        raise ConfigError(f"init_sha256 is {wanted}, and the weights of {printable(what)} have {weights.digest}")
    name, arguments = timm_arguments(
        config.model, config.data.image_px, channels=config.data.channels, **config.backbone_options
    )
    said = f"as the weights of {printable(what)} have"
    theirs, stem = plain_name(weights.description), weights.description.get("stem", "imagenet")
    require(name.partition(".")[0] == theirs, "arch", config.model.arch, f"{theirs!r}, {said}")
    require(config.model.stem == stem, "stem", config.model.stem, f"{stem!r}, {said}")
    with torch.random.fork_rng(devices=[]):
        model = make_model(config.model, name, arguments, "meta")
    sizes = sizes_of(weights.backbone)
    for setting, value in sizes_of(model).items():
        require(value == sizes.get(setting), setting, value, f"{sizes.get(setting)}, {said}")
    return fitted(weights, model)


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """What decides a model's shape and features, as far as its family has it, read from the model itself."""
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, ResNet):
        return {"width": model.layer1[0].conv1.out_channels, "global_pool": model.global_pool.pool_type}
    if not isinstance(model, VisionTransformer):
        return {}
    sides = getattr(model.patch_embed, "patch_size", None)
    heads = getattr(getattr(model.blocks[0], "attn", None), "num_heads", None)
    patch = sides[0] if isinstance(sides, tuple) and len(set(sides)) == 1 else sides
    sizes = {"patch_px": patch, "width": model.embed_dim, "depth": len(model.blocks), "heads": heads}
    return {**sizes, "global_pool": model.global_pool}


def fitted(weights: Weights, model: nn.Module) -> Start:
    """The weights for a model on the meta device: positions resampled, and the first layer adapted, as timm does.

    Raises:
        CheckpointError: something else differs; the message lists what.
    """
    expected, tensors = model.state_dict(), dict(weights.backbone.state_dict())
    channels, changed = weights.description["pretrained_cfg"]["input_size"][0], []
    if "pos_embed" in tensors and "pos_embed" in expected:
        tensors["pos_embed"], words = resampled(tensors["pos_embed"], weights.backbone, model)
        changed += words
    for name, own in expected.items():
        found = tensors.get(name)
        if found is not None and is_other_input(found, own) and found.shape[1] == channels:
            tensors[name] = adapted(found, own.shape[1], weights.name)
            changed.append(f"{name} from {found.shape[1]} to {counted(own.shape[1], 'channel')}")
            break  # the first of them is the one that sees the image
    compare(f"what {printable(weights.name)} holds", expected, tensors)
    return Start(weights, tensors, tuple(changed))


def resampled(positions: Tensor, trained: Any, model: Any) -> tuple[Tensor, list[str]]:
    """(1, prefix + rows * columns, D) positions for the model's grid of patches, by timm's antialiased bicubic."""
    from timm.layers import resample_abs_pos_embed

    old, new = (getattr(getattr(net, "patch_embed", None), "grid_size", None) for net in (trained, model))
    if old == new or old is None or new is None or positions.ndim != 3:
        return positions, []
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    if positions.shape[1] != prefix + math.prod(old):
        return positions, []
    moved = resample_abs_pos_embed(positions, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    return moved, [f"positions from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"]


def is_other_input(found: Tensor, own: Tensor) -> bool:
    """Whether two weights of a convolution differ in their input channels alone."""
    return found.ndim == own.ndim == 4 and found.shape[1] != own.shape[1] and found[:, 0].shape == own[:, 0].shape


def adapted(weight: Tensor, channels: int, name: str) -> Tensor:
    """(O, C, H, W) the first layer for images of so many channels: their sum for one, else repeated and scaled."""
    from timm.models import adapt_input_conv

    before = weight.shape[1]
    try:
        return adapt_input_conv(channels, weight, **({} if before == 3 else {"base_chans": before})).contiguous()
    except (NotImplementedError, TypeError) as error:  # an earlier timm knows three channels alone
        raise ConfigError(
            f"channels is {channels}; expected {before}, as {printable(name)} has: {one_line(error)}"
        ) from error


def line_of(config: Config, start: Start | None) -> str:
    """From what a run began, for people; without `start` where the weights were loaded once and are not again."""
    where = printable(config.model.init_from if start is None else start.weights.name)
    how = ["loaded when the run began"] if start is None else [*start.changed, "fresh heads"]
    return f"init     {where} (SHA-256 {(config.model.init_sha256 or '')[:12]}); {'; '.join(how)}"
