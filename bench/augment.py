"""`augment`: one view of each of a batch of decoded photographs, beside torchvision and kornia on the same images.

Peers with the same numbers carry out what `draw_views` drew, one image at a time as their users do; peers that draw for
themselves are held to shape and range alone. They round after every step, and theirs is the looser bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import Arm, Call, Inputs, Model, Setting, backends_of, ceiling_copy, model_of, on_backend
from bench.large import BEYOND, fits
from bench.peers import require
from sdmp_kernels import ViewDraws, ViewRecipe, augment, byol_views, dino_views, draw_views, use_backend
from sdmp_kernels.ops.augment import cases

PHOTOGRAPH = (375, 500)
"""Height and width: the median of ImageNet's."""
LEVELS = 3.0
"""How far a peer with the same numbers may be off in the mean: it rounds after every step."""


def settings(device: torch.device, size: str) -> Iterator[Setting]:
    """Both of BYOL's recipes, and DINO's local view."""
    n, shape, px = (4, (24, 30), 16) if size == "tiny" else (32, PHOTOGRAPH, 224)
    first, second = byol_views(px)
    yield setting("BYOL, first view", first, n=n, shape=shape, device=device, size=size)
    if size != "quick":
        yield setting("BYOL, second view", second, n=n, shape=shape, device=device, size=size)
        local = dino_views(px, max(8, px * 96 // 224), 1)[2]
        yield setting("DINO, local view", local, n=n, shape=shape, device=device, size=size)


def setting(
    what: str, recipe: ViewRecipe, *, n: int, shape: tuple[int, int], device: torch.device, size: str
) -> Setting:
    """One view of n images of `shape`, drawn by `recipe`."""
    return Setting(
        op="augment",
        name=f"{what}, {n} photographs of {shape[0]} x {shape[1]} to {recipe.size_px} px",
        config={"recipe": what, "n": n, "height": shape[0], "width": shape[1], "px": recipe.size_px},
        inputs=functools.partial(_inputs, recipe, n, shape, device),
        truth=_truth,
        plain=_truth,
        outputs=("views",),
        dtype=torch.float32,
        arms=list(_arms(recipe, n, shape, device, size)),
        model=model(recipe, n, shape),
    )


def model(recipe: ViewRecipe, n: int, shape: tuple[int, int]) -> Model:
    """Bytes of a setting, for the crops of its first inputs."""
    images = torch.empty(n, 3, *shape, dtype=torch.uint8, device="meta")
    return model_of("augment", images=images, draws=_draws(recipe, n, shape, 0), size_px=recipe.size_px)


def _draws(recipe: ViewRecipe, n: int, shape: tuple[int, int], step: int) -> ViewDraws:
    return draw_views(recipe, np.full(n, shape[0]), np.full(n, shape[1]), step=step)


def _inputs(recipe: ViewRecipe, n: int, shape: tuple[int, int], device: torch.device, copy: int) -> Inputs:
    generator = torch.Generator().manual_seed(copy)
    rows = torch.stack([cases.photograph(generator, *shape) for _ in range(n)])
    images = rows.permute(0, 3, 1, 2).to(device)
    return {"images": images, "draws": _draws(recipe, n, shape, copy).to(device), "recipe": recipe}


def _truth(inputs: Inputs) -> list[Tensor]:
    recipe = inputs["recipe"]
    with use_backend("reference", "augment"):
        return [augment(inputs["images"], inputs["draws"], recipe.size_px, interpolation=recipe.interpolation)]


def _arms(recipe: ViewRecipe, n: int, shape: tuple[int, int], device: torch.device, size: str) -> Iterator[Arm]:
    yield ceiling_copy(model(recipe, n, shape).floor_bytes, device)
    for backend in backends_of("augment", device):
        if backend != "reference" or size == "full":
            yield _ours(backend, device)
    yield Arm(
        "torchvision v2, tensors",
        "torchvision v2 functional, same numbers",
        "peer",
        _tensors,
        check=_near,
        tolerance=LEVELS,
    )
    if device.type == "cpu":
        yield Arm(
            "torchvision, Pillow", "torchvision on Pillow, same numbers", "peer", _pillow, check=_near, tolerance=LEVELS
        )
    yield Arm(
        "torchvision v2 transforms", "torchvision v2, own draws", "peer", _transforms, check=_plausible, tolerance=0.5
    )
    yield Arm("kornia", "kornia on a float batch, own draws", "peer", _kornia, check=_plausible, tolerance=0.5)
    yield Arm("albumentations", "albumentations, own draws", "peer", _albumentations, check=_plausible, tolerance=0.5)


def _ours(backend: str, device: torch.device) -> Arm:
    def bind(inputs: Inputs) -> Call:
        images, draws, recipe = inputs["images"], inputs["draws"], inputs["recipe"]
        out = augment(images, draws, recipe.size_px, interpolation=recipe.interpolation)

        def run() -> Sequence[Tensor]:
            return [augment(images, draws, recipe.size_px, interpolation=recipe.interpolation, out=out)]

        return Call(on_backend("augment", backend, device, run))

    return Arm(f"sdmp {backend}", f"this project, {backend} backend", "ours", bind, tolerance=1.0)


def _near(inputs: Inputs, results: Sequence[Tensor]) -> float:
    """Mean difference from ours, in levels."""
    return float((results[0].float() - _truth(inputs)[0].float()).abs().mean())


def _plausible(inputs: Inputs, results: Sequence[Tensor]) -> float:
    """0 where the views have the right shape and are pictures; their draws are their own."""
    wanted = _truth(inputs)[0]
    return 0.0 if results[0].shape == wanted.shape and float(results[0].float().std()) > 0 else 1.0


def _rows(inputs: Inputs) -> list[dict[str, Any]]:
    names = ("box", "flip", "brightness", "contrast", "saturation", "hue", "gray", "sigma", "solarize")
    columns = [tensor.tolist() for tensor in inputs["draws"].tensors()]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _carry_out(image: Any, row: dict[str, Any], recipe: ViewRecipe, blur: Callable[[Any, float], Any]) -> Any:
    """One image by torchvision's functional operators, which take tensors and Pillow images alike."""
    tv = require("torchvision.transforms.v2.functional", "torchvision")
    modes = require("torchvision.transforms.v2", "torchvision").InterpolationMode
    size = [recipe.size_px, recipe.size_px]
    mode = modes.BILINEAR if recipe.interpolation == "bilinear" else modes.BICUBIC
    view = tv.resized_crop(image, *row["box"], size, mode, antialias=True)
    if row["flip"]:
        view = tv.horizontal_flip(view)
    for name in ("brightness", "contrast", "saturation"):
        if row[name] != 1:
            view = getattr(tv, f"adjust_{name}")(view, row[name])
    if row["hue"] != 0:
        view = tv.adjust_hue(view, row["hue"])
    if row["gray"]:
        view = tv.rgb_to_grayscale(view, num_output_channels=3)
    if row["sigma"] > 0:
        view = blur(view, row["sigma"])
    return tv.solarize(view, 128) if row["solarize"] else view


def _tensors(inputs: Inputs) -> Call:
    tv = require("torchvision.transforms.v2.functional", "torchvision")
    rows, recipe = _rows(inputs), inputs["recipe"]

    def blur(view: Tensor, sigma: float) -> Tensor:
        return tv.gaussian_blur(view, [2 * int(np.ceil(3 * sigma)) + 1] * 2, [sigma] * 2)

    return Call(
        lambda: [torch.stack([_carry_out(i, r, recipe, blur) for i, r in zip(inputs["images"], rows, strict=True)])]
    )


def _pillow(inputs: Inputs) -> Call:
    pillow = require("PIL.Image", "pillow")
    filters = require("PIL.ImageFilter", "pillow")
    rows, recipe = _rows(inputs), inputs["recipe"]
    images = [pillow.fromarray(image.permute(1, 2, 0).numpy()) for image in inputs["images"]]

    def run() -> Sequence[Tensor]:
        views = [
            np.asarray(_carry_out(i, r, recipe, lambda view, sigma: view.filter(filters.GaussianBlur(sigma))))
            for i, r in zip(images, rows, strict=True)
        ]
        return [torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)]

    return Call(run)


def transforms(recipe: ViewRecipe, blur: torch.nn.Module | None = None) -> Any:
    """The recipe as torchvision's users write it; `blur` in place of torchvision's own."""
    v2 = require("torchvision.transforms.v2", "torchvision")
    mode = v2.InterpolationMode.BILINEAR if recipe.interpolation == "bilinear" else v2.InterpolationMode.BICUBIC
    steps = [v2.RandomResizedCrop(recipe.size_px, recipe.scale, interpolation=mode, antialias=True)]
    steps.append(v2.RandomApply([v2.ColorJitter(*recipe.jitter)], recipe.jitter_prob))
    steps.append(v2.RandomGrayscale(recipe.gray_prob))
    if recipe.blur_prob > 0:
        width = 2 * int(np.ceil(3 * recipe.blur_sigma_px[1])) + 1
        steps.append(v2.RandomApply([blur or v2.GaussianBlur(width, recipe.blur_sigma_px)], recipe.blur_prob))
    if recipe.solarize_prob > 0:
        steps.append(v2.RandomSolarize(128, recipe.solarize_prob))
    return v2.Compose([*steps, v2.RandomHorizontalFlip(recipe.flip_prob)])


def _transforms(inputs: Inputs) -> Call:
    chain = transforms(inputs["recipe"])
    return Call(lambda: [torch.stack([chain(image) for image in inputs["images"]])])


def _kornia(inputs: Inputs) -> Call:
    aug = require("kornia.augmentation", "kornia")
    recipe, px = inputs["recipe"], inputs["recipe"].size_px
    width = 2 * int(np.ceil(3 * recipe.blur_sigma_px[1])) + 1
    steps = [
        aug.RandomResizedCrop((px, px), scale=recipe.scale),
        aug.ColorJitter(*recipe.jitter, p=recipe.jitter_prob),
        aug.RandomGrayscale(p=recipe.gray_prob),
    ]
    if recipe.blur_prob > 0:
        steps.append(aug.RandomGaussianBlur((width, width), recipe.blur_sigma_px, p=recipe.blur_prob))
    if recipe.solarize_prob > 0:
        steps.append(aug.RandomSolarize(0.0, 0.0, p=recipe.solarize_prob))
    chain = torch.nn.Sequential(*steps, aug.RandomHorizontalFlip(p=recipe.flip_prob))
    return Call(lambda: [(chain(inputs["images"].float() / 255) * 255).round().to(torch.uint8)])


def _albumentations(inputs: Inputs) -> Call:
    lib = require("albumentations", "albumentations")
    recipe = inputs["recipe"]
    b, c, s, h = recipe.jitter
    chain = lib.Compose(
        [
            lib.RandomResizedCrop((recipe.size_px, recipe.size_px), scale=recipe.scale),
            lib.ColorJitter(b, c, s, h, p=recipe.jitter_prob),
            lib.ToGray(p=recipe.gray_prob),
            lib.GaussianBlur(sigma_limit=recipe.blur_sigma_px, p=recipe.blur_prob),
            lib.Solarize(p=recipe.solarize_prob),
            lib.HorizontalFlip(p=recipe.flip_prob),
        ]
    )
    images = [image.permute(1, 2, 0).cpu().numpy() for image in inputs["images"]]
    return Call(lambda: [torch.from_numpy(np.stack([chain(image=i)["image"] for i in images])).permute(0, 3, 1, 2)])


# More than 2^31 elements.


def large(device: torch.device, tiny: bool, backend: str) -> float:
    """The last image of a batch too large for 32-bit offsets: its view is that of the image alone."""
    height, width = (8, 8) if tiny else (1024, 1024)
    n = 4 if tiny else BEYOND // (3 * height * width) + 1
    fits(device, 4 * n * height * width)
    images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, device=device)
    draws = _draws(ViewRecipe(8, jitter_prob=1.0), n, (height, width), 1).to(device)
    with use_backend(backend, "augment"):
        views = augment(images, draws, 8)
    last = draws[n - 1 :]
    with use_backend("reference", "augment"):
        alone = augment(images[n - 1 :], last, 8)
    # As a share of the one level that rounding allows.
    return float((views[n - 1 :].float() - alone.float()).abs().max()) / 2
