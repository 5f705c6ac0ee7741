"""What a backbone sees: attention of its heads, patch features in colour, nearest neighbours, a map of its features.

N images, T tokens, D features, h and w patches down and across.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..advice import install
from ..data import DataError, Index, eval_loader
from ..data.images import DECODE_ERRORS, read_size
from ..data.index import Paths
from ..distributed import join_world
from ..durable import replacing, write_durably
from ..settings import ConfigError, DataConfig, require
from ..splits import NO_CLASSES, open_split, test_split
from ..text import printable, printable_lines
from .knn import Features, collapse, image_features, standardise
from .record import CAPTIONS, PICTURES
from .settings.pictures import PicturesConfig
from .subject import Subject, knn_images, named_backbone, open_subject, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer

SHOWN_NEIGHBOURS = 6
MOST_HEADS = 12
CELL_INCHES = 1.15
PNG_DPI = 110
TSNE_SEED = 0
NO_TSNE = f"scikit-learn is not installed ({install('plots')})"
RIGHT, WRONG = "#009e73", "#d55e00"


@dataclass(frozen=True)
class Looking:
    """A backbone, and what it looks at."""

    config: PicturesConfig
    backbone: nn.Module
    data: DataConfig
    device: torch.device
    after: str
    """How far the backbone was trained, in words."""
    shown: Index
    pixels: Tensor
    """(N, 3, S, S) uint8 on the CPU: the images shown, as the backbone gets them."""
    images: Tensor
    """The same, normalised, on the device."""
    bank: Index
    queries: Index

    def features(self, index: Index) -> Features:
        """Unit-length features of an index."""
        return image_features(self.backbone, index, self.data, device=self.device, batch_size=self.config.batch_size)

    @cached_property
    def bank_features(self) -> Features:
        """Those of the images that neighbours are sought among."""
        return self.features(self.bank)


Picture = tuple[str, "Figure"]
"""A caption and what it is about."""


def make_pictures(config: PicturesConfig) -> dict[str, str]:
    """Write the pictures that apply to this backbone, and say which do not and why.

    Returns:
        Captions by the name of the file.

    Raises:
        ConfigError, DataError: there is no backbone, or there are no images; the message says what to give.
    """
    run, weights = named_backbone(config)
    if weights is not None and config.output is None:
        raise ConfigError("output is missing; give --output DIR for the pictures of an export")
    subject = open_subject(config, "pictures")
    folder = Path(config.output) if config.output is not None else Path(run or "") / PICTURES
    with join_world(config.device) as world:
        looking = look(config, subject, world.device)
        made = {name: make(looking) for name, make in MAKERS.items()}
    found = {name: picture for name, picture in made.items() if not isinstance(picture, str)}
    write_pictures(folder, found)
    for name, picture in made.items():
        text = f"not made: {name}: {picture}" if isinstance(picture, str) else f"{folder / name}: {picture[0]}"
        print(printable_lines(text))
    return {name: caption for name, (caption, _) in found.items()}


def look(config: PicturesConfig, subject: Subject, device: torch.device) -> Looking:
    """The backbone on the device, and the images to show. Raises `ConfigError`, `DataError`."""
    data = subject.data
    train = open_split(data, "train", say=print)
    test = test_split(data, train, None, print) if len(train.classes) > 1 else None
    bank, queries = knn_images(train, test, config.max_images)
    require(len(bank) > 0 and len(queries) > 0, "the number of images", len(train), "more: some to show, some to seek")
    shown = index_of_files(config.images) if config.images else spread(queries, config.count)
    pixels = pixels_of(shown, data)
    steps = subject.description.get("pretraining", {}).get("steps")
    return Looking(
        config,
        subject.backbone.to(device),
        data,
        device,
        f"after {steps} steps" if isinstance(steps, int) else "of a backbone that does not say how long it was trained",
        shown,
        pixels,
        standardise(pixels.to(device), data.mean, data.std),
        bank,
        queries,
    )


def attention_picture(looking: Looking) -> Picture | str:
    """What the heads of the last block attend to; or why there is no such picture."""
    attention = attention_maps(looking.backbone, looking.images)
    if attention is None:
        return "this backbone has no class token that attends to patches"
    heads = min(MOST_HEADS, attention.shape[1])
    caption = (
        f"Attention of the class token to the patches in the last block {looking.after}, {heads} of "
        f"{attention.shape[1]} heads; each map from 0 to its own largest value"
    )
    return caption, attention_figure(looking.pixels, attention[:, :heads].float().cpu())


def patches_picture(looking: Looking) -> Picture | str:
    """What the backbone says of each place; or why there is no such picture."""
    patches = patch_features(looking.backbone, looking.images)
    if patches is None or patches.shape[1] * patches.shape[2] < 4:
        return "this backbone keeps fewer than four patches of an image of this size"
    caption = (
        f"Patch features {looking.after}, their first three principal components over all images shown as red, "
        "green and blue"
    )
    return caption, patches_figure(looking.pixels, pca_colours(patches.float().cpu()))


def neighbours_picture(looking: Looking) -> Picture | str:
    """The nearest images of the bank; or why there is no such picture."""
    if (why := no_neighbours(looking)) is not None:
        return why
    rows = nn.functional.normalize(embed(looking.backbone, looking.images).float(), dim=1)
    similarity, nearest = nearest_rows(rows, looking.bank_features.rows, SHOWN_NEIGHBOURS + 1)
    caption = (
        f"Nearest neighbours among {len(looking.bank):,} images {looking.after}, with their cosine similarity; framed "
        "green where the class is that of the image on the left, orange where it is another"
    )
    return caption, neighbours_figure(looking, similarity, nearest)


def embedding_picture(looking: Looking) -> Picture | str:
    """A map of the queries' features; or why there is none."""
    if (why := no_neighbours(looking)) is not None:
        return why
    features = looking.features(looking.queries)
    points = embedding_of(looking.config, features.rows.float().cpu())
    if isinstance(points, str):
        return points
    caption = (
        f"Map of the features of {len(points):,} images {looking.after} by t-SNE (scikit-learn, seed {TSNE_SEED}), "
        "coloured by class: near means alike, far apart and large mean nothing"
    )
    return caption, embedding_figure(points, features.labels.cpu(), looking.bank.classes)


MAKERS: dict[str, Callable[[Looking], Picture | str]] = {
    "attention.png": attention_picture,
    "patches.png": patches_picture,
    "neighbours.png": neighbours_picture,
    "embedding.png": embedding_picture,
}


def no_neighbours(looking: Looking) -> str | None:
    """Why features of whole images are not to be compared, where that is so."""
    if len(looking.bank.classes) < 2:
        return NO_CLASSES
    return collapse(looking.bank_features)


def write_pictures(folder: Path, found: dict[str, tuple[str, Figure]]) -> None:
    """The PNG files and their captions; former ones that were not made this time go."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in MAKERS:
            if name not in found:
                (folder / name).unlink(missing_ok=True)
        for name, (_, figure) in found.items():
            with replacing(folder / name) as draft:
                figure.savefig(draft, format="png", dpi=PNG_DPI)
        captions = {name: caption for name, (caption, _) in found.items()}
        write_durably(folder / CAPTIONS, json.dumps({"captions": captions}, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"the pictures cannot be written to {printable(folder)}: {error}") from error


def index_of_files(files: Sequence[str]) -> Index:
    """Image files without a class, wherever they lie. Raises `DataError` for one that is no image."""
    sizes = []
    for file in files:
        try:
            sizes.append(read_size(file))
        except DECODE_ERRORS as error:
            raise DataError(f"{printable(file)} is no readable image: {error}") from error
    heights, widths = np.array(sizes, np.int32).T
    paths, labels = Paths(str(Path(file).absolute()) for file in files), np.full(len(files), -1, np.int64)
    return Index(Path("/"), paths, heights, widths, labels, (), np.ones(len(files), bool))


def pixels_of(index: Index, data: DataConfig) -> Tensor:
    """The images of an index, resized and cropped as for an evaluation: (N, 3, S, S) uint8 on the CPU."""
    with eval_loader(
        index, data.image_px, batch_size=len(index), device="cpu", loader=data.loader, workers=0
    ) as batches:
        return torch.cat([batch.views[0] for batch in batches])


@torch.inference_mode()
def embed(backbone: nn.Module, images: Tensor) -> Tensor:
    """(N, D) features."""
    return cast(Tensor, backbone(images))


@torch.inference_mode()
def attention_maps(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """(N, heads, h, w): how much the class token attends to each patch in the last block; None where there is none.

    A head's weights on all tokens add up to 1; those on the class token itself are left out.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(backbone, VisionTransformer) or backbone.cls_token is None:
        return None
    layer = getattr(backbone.blocks[-1], "attn", None)
    if not isinstance(layer, Attention):
        return None
    kept: list[Tensor] = []
    fused, hook = layer.fused_attn, layer.attn_drop.register_forward_hook(lambda _, __, out: kept.append(out))
    try:
        layer.fused_attn = False  # type: ignore[misc]  # the fused form keeps no weights
        backbone(images)
    finally:
        layer.fused_attn = fused  # type: ignore[misc]
        hook.remove()
    return as_grid(backbone, kept[0][:, :, 0, :].transpose(1, 2), images).permute(0, 3, 1, 2)


@torch.inference_mode()
def patch_features(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """(N, h, w, D): what the last block of a ViT, or the last stage of a ResNet, says of each place."""
    from timm.models.vision_transformer import VisionTransformer

    features = cast(Callable[[Tensor], Tensor], backbone.forward_features)(images)
    if isinstance(backbone, VisionTransformer):
        return as_grid(backbone, features, images)
    return features.permute(0, 2, 3, 1) if features.ndim == 4 else None


def as_grid(backbone: VisionTransformer, tokens: Tensor, images: Tensor) -> Tensor:
    """(N, T, D) tokens -> (N, h, w, D), without class token and registers."""
    height, width = backbone.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    return tokens[:, backbone.num_prefix_tokens :].unflatten(1, (height, width))


def pca_colours(patches: Tensor) -> Tensor:
    """(N, h, w, D) -> (N, h, w, 3) from 0 to 1: the first three principal components over all patches together.

    Each is stretched between its 1 % and 99 % quantiles; its sign is that of its largest weight, so that equal features
    have equal colours.
    """
    rows = patches.flatten(0, 2).double()
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    axes = vectors[:, values.argsort(descending=True)[:3]]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    parts = rows @ axes
    low, high = (parts.quantile(q, dim=0) for q in (0.01, 0.99))
    scaled = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return scaled.unflatten(0, patches.shape[:3]).float()


def nearest_rows(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and rows of the `count` nearest of unit-length features, nearest first."""
    similarity, nearest = (queries @ bank.T.to(queries.dtype)).topk(min(count, len(bank)), dim=1)
    return similarity.cpu(), nearest.cpu()


def embedding_of(config: PicturesConfig, rows: Tensor) -> np.ndarray | str:
    """(N, 2) by t-SNE, or why there is none.

    Raises:
        ConfigError: it was asked for, and scikit-learn is not installed.
    """
    if config.embedding == "none":
        return "switched off by --embedding none"
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        if config.embedding == "tsne":
            raise ConfigError(f"embedding is 'tsne': {NO_TSNE}") from error
        return NO_TSNE
    if len(rows) < 10:
        return f"{len(rows)} images are too few for a map"
    # The usual perplexity of 30 needs three times as many rows.
    perplexity = min(30.0, (len(rows) - 1) / 3)
    made = TSNE(2, perplexity=perplexity, init="pca", metric="cosine", random_state=TSNE_SEED)
    return np.asarray(made.fit_transform(rows.numpy()))


def grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure of so many square cells without axes."""
    from matplotlib.figure import Figure

    size = (CELL_INCHES * columns + 0.2, (CELL_INCHES + 0.16) * rows + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    for panel in cells.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure, cells


def show(panel: Any, picture: Tensor) -> None:
    """A (3, S, S) uint8 image, or one of shape (S, S, 3) from 0 to 1; blocky where it is small."""
    pixels = picture.permute(1, 2, 0) if picture.dtype == torch.uint8 else picture
    panel.imshow(pixels.numpy(), interpolation="nearest" if len(pixels) < 100 else "antialiased")


def attention_figure(pixels: Tensor, attention: Tensor) -> Figure:
    """A row for each image: itself, then a map for each head, the same size."""
    heads = attention.shape[1]
    figure, cells = grid(len(pixels), 1 + heads)
    for row, picture in enumerate(pixels):
        show(cells[row, 0], picture)
        for head in range(heads):
            values = attention[row, head].numpy()
            cells[row, 1 + head].imshow(values, cmap="magma", vmin=0, vmax=values.max(), interpolation="nearest")
            if row == 0:
                cells[row, 1 + head].set_title(f"head {head}", fontsize=7)
    return figure


def patches_figure(pixels: Tensor, colours: Tensor) -> Figure:
    """Images above, their patch features in colour below."""
    figure, cells = grid(2, len(pixels))
    for column, picture in enumerate(pixels):
        show(cells[0, column], picture)
        show(cells[1, column], colours[column])
    return figure


def neighbours_figure(looking: Looking, similarity: Tensor, nearest: Tensor) -> Figure:
    """A row for each image: itself, then its nearest ones. An image of the bank itself is not its own neighbour."""
    bank, shown = looking.bank, looking.shown
    figure, cells = grid(len(looking.pixels), 1 + SHOWN_NEIGHBOURS)
    for row, picture in enumerate(looking.pixels):
        show(cells[row, 0], picture)
        label = int(shown.labels[row])
        if label >= 0:
            cells[row, 0].set_title(printable(bank.classes[label])[:18], fontsize=7)
        pairs = zip(similarity[row].tolist(), nearest[row].tolist(), strict=True)
        others = [(score, place) for score, place in pairs if bank.path(place) != shown.path(row)][:SHOWN_NEIGHBOURS]
        found = pixels_of(bank.subset(np.array([place for _, place in others])), looking.data)
        for panel, (score, place), neighbour in zip(cells[row, 1:], others, found, strict=False):
            show(panel, neighbour)
            panel.set_title(f"{score:.3f}", fontsize=7)
            if label >= 0:
                panel.spines[:].set(visible=True, linewidth=2.5, color=RIGHT if bank.labels[place] == label else WRONG)
    return figure


def embedding_figure(points: np.ndarray, labels: Tensor, classes: Sequence[str]) -> Figure:
    """A dot for each image in the colour of its class; a legend where the classes are few."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    panel = figure.subplots()
    panel.set(xticks=[], yticks=[])
    present = sorted(set(labels.tolist()))
    colours = colormaps["tab10"] if len(present) <= 10 else colormaps["turbo"]
    size = min(14.0, 40 / math.sqrt(max(1, len(points) / 100)))
    for number, label in enumerate(present):
        here = labels.numpy() == label
        shade = colours(number) if len(present) <= 10 else colours(number / len(present))
        panel.scatter(
            points[here, 0], points[here, 1], s=size, color=shade, linewidths=0, label=printable(classes[label])[:24]
        )
    if len(present) <= 20:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
