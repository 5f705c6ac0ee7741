"""timm backbones. N batch, D features.

timm is imported when a model is built, not before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdmp_kernels.views import Size, view_size

from .settings import ConfigError, ModelConfig, near, require
from .text import brief, one_line

if TYPE_CHECKING:
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

# Names that leave the number of heads to the method.
SHORT_NAMES = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}
# The families of one model, the ViT of Dosovitskiy et al. 2021, whose sizes are settings here.
PLAIN_VITS = ("vit_", "deit_")


def timm_arguments(
    config: ModelConfig, image_px: Size, *, channels: int = 3, heads: int | None = 12
) -> tuple[str, dict[str, Any]]:
    """The name and keyword arguments that make `timm.create_model` build this backbone (but for a CIFAR stem).

    heads: of the ViTs that have a short name, unless `config` says otherwise (the SDMP paper: 12); None keeps timm's.
    """
    name = SHORT_NAMES.get(config.arch, config.arch)
    check_name(name)
    sizes = {"patch_size": config.patch_px, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    given: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    if given and not name.startswith(PLAIN_VITS):
        if given.keys() != {"embed_dim"} or not is_resnet(name):
            raise ConfigError(f"{', '.join(given)} can be set for a ViT only, and arch is {config.arch!r}")
        given = resnet_widths(given["embed_dim"], config.stem)
    by_method = {"num_heads": heads} if config.arch in SHORT_NAMES and heads is not None else {}
    size = (
        {"img_size": image_px if isinstance(image_px, int) else list(image_px)}
        if takes(name, "img_size", image_px)
        else {}
    )
    inputs = {} if channels == 3 else {"in_chans": channels}
    return name, {**size, **by_method, **given, **inputs}


@cache
def is_resnet(name: str) -> bool:
    """Whether timm's model of that name is of its one family of ResNets."""
    from timm.models.resnet import ResNet

    return isinstance(create(name, {}, "meta"), ResNet)


def resnet_widths(width: int, stem: str) -> dict[str, Any]:
    """timm's arguments for a ResNet whose first stage has `width` channels, and each further one twice as many.

    The CIFAR stem has as many as the first stage. timm sizes that of ImageNet by its kind alone, so it keeps its own.
    """
    stages = {"channels": [width * 2**stage for stage in range(4)]}
    if stem != "cifar":
        return stages
    require(width % 2 == 0, "width", width, "an even number, for a ResNet with the CIFAR stem")
    # Of timm's stems only the deep one has a width; `use_cifar_stem` replaces its three convolutions by one.
    return {**stages, "stem_type": "deep", "stem_width": width // 2}


def check_name(name: str) -> None:
    """Raise `ConfigError` unless `name` is a model that timm itself builds, with or without a tag of weights.

    A prefix such as `hf-hub:` or `local-dir:` would make timm download or open a file, and is refused.
    """
    import timm

    if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", name):
        raise ConfigError(f"arch is {brief(name)}; expected the plain name of a timm model, without prefix or path")
    if not timm.is_model(name):
        raise ConfigError(f"unknown arch {brief(name)}.{near(name, [*SHORT_NAMES, *timm.list_models()])}")


@cache
def takes(name: str, argument: str, value: Any) -> bool:
    """Whether the model has an argument of this name, such as the size of its images (for positions or windows)."""
    try:
        create(name, {argument: value}, "meta")
    except TypeError as error:
        return argument not in str(error)
    except Exception:  # the value itself does not please it: `build_backbone` says so
        pass
    return True


def create(name: str, arguments: dict[str, Any], device: str, classes: int = 0) -> nn.Module:
    """`timm.create_model` without weights, and without classifier unless there are `classes`.

    On the device "meta" it takes no memory and no time.
    """
    import timm

    with torch.device(device):
        return timm.create_model(name, pretrained=False, num_classes=classes, **arguments)


_CHECKED: set[str] = set()
"""What `check_forward` has passed in this process: student and teacher, or the runs of a benchmark, are alike."""


def build_backbone(
    config: ModelConfig,
    image_px: Size,
    seed: int,
    *,
    channels: int = 3,
    drop_path: float = 0.0,
    start: Callable[[VisionTransformer], None] | None = None,
    more_px: Sequence[int] = (),
    **options: Any,
) -> nn.Module:
    """A timm model without classifier, (N, channels, H, W) of `image_px` -> (N, D), started from `seed` alone.

    drop_path: chance in [0, 1) that the last residual branch is left out for a sample while training, falling to 0
        towards the first.
    start: what to do to a ViT after timm has started it, with random numbers of the same stream.
    more_px: sides of smaller images that it is to take as well; a ViT then interpolates its positions for them.
    options: of `timm_arguments`.

    Raises:
        ConfigError: for a model that timm cannot build, that does not take images of this size or leaves some of
            their pixels unread, and whose features are not (N, D).
    """
    from timm.models.vision_transformer import VisionTransformer

    name, arguments = timm_arguments(config, image_px, channels=channels, **options)
    if drop_path:
        arguments = {**arguments, "drop_path_rate": drop_path}
    if more_px and takes(name, "dynamic_img_size", True):
        arguments = {**arguments, "dynamic_img_size": True}
    with torch.random.fork_rng(devices=[]):
        for px in (image_px, *more_px):
            asked = repr((config, arguments, px, channels))
            if asked not in _CHECKED:
                check_forward(make_model(config, name, arguments, "meta"), name, px, channels)
                _CHECKED.add(asked)
        torch.manual_seed(seed)
        backbone = make_model(config, name, arguments, "cpu")
        if isinstance(backbone, VisionTransformer) and start is not None:
            start(backbone)
    return backbone if isinstance(backbone, VisionTransformer) else backbone.to(memory_format=torch.channels_last)


def make_model(config: ModelConfig, name: str, arguments: dict[str, Any], device: str, classes: int = 0) -> nn.Module:
    """The model that `timm_arguments` describes, with its stem; with timm's classifier where there are `classes`."""
    from timm.models.resnet import ResNet

    try:
        backbone = create(name, arguments, device, classes)
    except Exception as error:  # timm and its models raise whatever an assertion or a shape makes of it
        raise ConfigError(f"timm cannot build {name} with {arguments}: {one_line(error)}") from error
    if config.stem == "cifar":
        if not isinstance(backbone, ResNet):
            raise ConfigError(f"stem is 'cifar'; expected a ResNet, and arch is {config.arch!r}")
        with torch.device(device):
            use_cifar_stem(backbone, arguments.get("in_chans", 3))
    return backbone


def check_forward(backbone: nn.Module, name: str, image_px: Size, channels: int = 3) -> None:
    """Raise `ConfigError` unless a model on the meta device makes (2, D) of two images and reads all their pixels."""
    unread: list[str] = []

    def look(path: str, layer: nn.Conv2d, images: Tensor, output: Tensor) -> None:
        for axis, what in ((0, "rows"), (1, "columns")):
            lost = rows_unread(layer, images.shape[axis - 2], output.shape[axis - 2], axis)
            if lost and (images.shape[1] == channels or "patch_embed" in path):
                unread.append(
                    f"{lost} of {images.shape[axis - 2]} {what} (its patches are {layer.stride[axis]} a side)"
                )

    hooks = [
        module.register_forward_hook(lambda layer, given, output, path=path: look(path, layer, given[0], output))
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        features = backbone.train()(torch.empty(2, channels, *view_size(image_px), device="meta"))
    except Exception as error:  # as above
        raise ConfigError(f"{name} cannot take images of {image_px} px: {one_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if unread:
        raise ConfigError(
            f"image_px is {image_px}, of which {name} would leave {' and '.join(unread[:2])} unread; "
            "expected a multiple of patch_px, the side of a patch"
        )
    if not isinstance(features, Tensor) or features.shape != (2, feature_width(backbone)):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(
            f"{name} makes features of shape {got} of two images; expected (2, {feature_width(backbone)}), "
            "one vector an image"
        )


def rows_unread(layer: nn.Conv2d, rows: int, output_rows: int, axis: int = 0) -> int:
    """Rows at the bottom, or with axis 1 columns at the right, that a convolution in patches never reads.

    0 for one whose windows overlap or are padded.
    """
    kernel, stride = layer.kernel_size[axis], layer.stride[axis]
    if stride < 2 or kernel > stride or layer.padding not in ((0, 0), "valid"):
        return 0
    return max(0, rows - ((output_rows - 1) * stride + kernel))


def feature_width(backbone: nn.Module) -> int:
    """D of the features (N, D) that a timm model without classifier gives."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


def use_cifar_stem(resnet: ResNet, channels: int = 3) -> None:
    """Replace the 7x7 stride-2 convolution and max-pool by one 3x3 stride-1 convolution (paper, section 4.2)."""
    resnet.conv1 = nn.Conv2d(channels, resnet.bn1.num_features, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()
