"""`augment`: every operation against float64, PyTorch, Pillow and torchvision; what is exact; what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from sdmp_kernels import FlatImages, ViewDraws, ViewRecipe, _backends, augment, draw_views, use_backend
from sdmp_kernels.ops.augment import cases
from sdmp_kernels.views import eval_view

tv = pytest.importorskip("torchvision.transforms.v2.functional")
BACKENDS = [
    name
    for name in ("reference", "torch", "cpp")
    if _backends.OPS["augment"].serves(name) and _backends.unavailable(name, "cpu") is None
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param, "augment"):
        yield request.param


def photographs(n: int = 6, size: tuple[int, int] = (60, 80), channels: int = 3, seed: int = 0) -> Tensor:
    """(N, C, H, W) uint8, channels_last."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([cases.photograph(generator, *size, channels) for _ in range(n)]).permute(0, 3, 1, 2)


def neutral(n: int, size: tuple[int, int] = (60, 80), **changed: Tensor) -> ViewDraws:
    """Draws that change nothing but what is said."""
    one, zero, no = torch.ones(n), torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    box = torch.tensor([0, 0, *size], dtype=torch.int32).repeat(n, 1)
    plain = {"box": box, "flip": no, "brightness": one, "contrast": one, "saturation": one, "hue": zero}
    return ViewDraws(**{**plain, "gray": no, "sigma": zero, "solarize": no, **changed})


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max())


# ---- what is exact ----


def test_neutral_numbers_and_a_box_of_the_size_of_the_view_are_a_copy(backend: str) -> None:
    images = photographs()
    for interpolation in ("bilinear", "bicubic"):
        assert torch.equal(augment(images, neutral(6), (60, 80), interpolation=interpolation), images)
    box = torch.tensor([[3, 5, 20, 30]], dtype=torch.int32).repeat(6, 1)
    assert torch.equal(augment(images, neutral(6, box=box), (20, 30)), images[:, :, 3:23, 5:35])


def test_a_flip_is_exact(backend: str) -> None:
    images = photographs()
    flip = torch.tensor([True, False] * 3)
    got = augment(images, neutral(6, flip=flip), (60, 80))
    assert torch.equal(got, torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images))


def test_solarise_inverts_from_128_up(backend: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    got = augment(images, neutral(1, (16, 16), solarize=torch.tensor([True])), 16)
    assert torch.equal(got[0, 0].flatten(), torch.cat([torch.arange(128), torch.arange(127, -1, -1)]).to(torch.uint8))


def test_one_channel_knows_no_colour(backend: str) -> None:
    images = photographs(channels=1)
    draws = neutral(6, saturation=torch.zeros(6), hue=torch.full((6,), 0.3), gray=torch.ones(6, dtype=torch.bool))
    assert torch.equal(augment(images, draws, (60, 80)), images)


def test_a_list_of_images_is_the_batch_of_them(backend: str) -> None:
    images = photographs()
    draws = draw_views(cases.EVERYTHING, np.full(6, 60), np.full(6, 80), step=3)
    assert torch.equal(augment(images, draws, 16), augment([i.permute(1, 2, 0) for i in images], draws, 16))


def test_images_of_many_sizes_in_one_buffer_give_the_views_of_a_list(backend: str) -> None:
    """Rows chosen anew from one buffer, as a resident set is read; and of five channels."""
    for channels, recipe in ((3, cases.EVERYTHING), (5, cases.COLOURLESS)):
        generator = torch.Generator().manual_seed(3)
        images = [cases.photograph(generator, *size, channels) for size in ((20, 31), (9, 9), (40, 17))]
        sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32)
        ends = torch.tensor([image.numel() for image in images]).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
        rows = torch.tensor([2, 0, 0, 1])
        pixels = torch.cat([image.reshape(-1) for image in images])
        flat = FlatImages(pixels, offsets[rows], sizes[rows, 0], sizes[rows, 1], channels)
        draws = draw_views(recipe, sizes[rows, 0].numpy(), sizes[rows, 1].numpy(), step=0)
        chosen = [images[row] for row in rows.tolist()]
        got = augment(flat, draws, 16)
        assert torch.equal(got, augment(chosen, draws, 16))


@pytest.mark.parametrize(("change", "words"), [
    ({"offsets": torch.tensor([1, 700])}, "row 1 begins at byte 700"),
    ({"offsets": torch.tensor([-1, 0])}, "row 0 begins at byte -1"),
    ({"heights": torch.tensor([0, 4], dtype=torch.int32)}, "row 0"),
    ({"heights": torch.tensor([4, 4])}, "heights"),
    ({"widths": torch.tensor([4], dtype=torch.int32)}, "widths has 1 rows"),
    ({"pixels": torch.zeros(96)}, "pixels"),
    ({"channels": 0}, "channels"),
])  # fmt: skip
def test_a_buffer_that_does_not_hold_its_images_is_refused(change: dict[str, Any], words: str) -> None:
    four = torch.full((2,), 4, dtype=torch.int32)
    given = {"pixels": torch.zeros(96, dtype=torch.uint8), "offsets": torch.tensor([0, 48]), "heights": four}
    flat = FlatImages(**{**given, "widths": four, **change})
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        augment(flat, neutral(2, (4, 4)), 4)


def test_out_is_written_and_returned(backend: str) -> None:
    images = photographs()
    draws = draw_views(cases.EVERYTHING, np.full(6, 60), np.full(6, 80), step=3)
    out = torch.empty(6, 3, 16, 16, dtype=torch.uint8, memory_format=torch.channels_last)
    assert augment(images, draws, 16, out=out) is out
    assert torch.equal(out, augment(images, draws, 16))


def test_rows_do_not_depend_on_each_other_nor_on_threads(backend: str) -> None:
    images = photographs()
    draws = draw_views(cases.EVERYTHING, np.full(6, 60), np.full(6, 80), step=3)
    whole = augment(images, draws, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(6):
            row = ViewDraws(*(t[i : i + 1] for t in draws.tensors()))
            assert torch.equal(augment(images[i : i + 1], row, 16)[0], whole[i])
    finally:
        torch.set_num_threads(threads)


# ---- every operation, within one level of float64 and within a stated distance of Pillow and torchvision ----


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 16), (31, 33), (60, 80), (97, 120), (1, 1), (7, 160)])
def test_the_resize_is_that_of_pytorch(backend: str, interpolation: str, size: tuple[int, int]) -> None:
    images = photographs()
    box = torch.tensor([[3, 5, 40, 61]], dtype=torch.int32).repeat(6, 1)
    crop = images[:, :, 3:43, 5:66].double()
    wanted = F.interpolate(crop, size=size, mode=interpolation, antialias=True, align_corners=False)
    got = augment(images, neutral(6, box=box), size, interpolation=interpolation)
    assert apart(got, wanted.clamp(0, 255)) <= 0.5 + 1e-3  # one rounding of float32 arithmetic


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_resize_is_near_that_of_pillow(backend: str, interpolation: str) -> None:
    """Pillow rounds between its two passes and keeps weights of 22 bits: within one level (bicubic: two)."""
    images = photographs(2, (120, 160))
    box = torch.tensor([[10, 20, 100, 90]], dtype=torch.int32).repeat(2, 1)
    got = augment(images, neutral(2, box=box), 48, interpolation=interpolation)
    kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    for view, image in zip(got, images, strict=True):
        crop = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((20, 10, 110, 110))
        wanted = torch.from_numpy(np.asarray(crop.resize((48, 48), kind))).permute(2, 0, 1)
        assert apart(view, wanted) <= (1 if interpolation == "bilinear" else 2)


COLOURS = {
    "brightness": (lambda x, f: tv.adjust_brightness(x, f), [0.0, 0.6, 1.4]),
    "contrast": (lambda x, f: tv.adjust_contrast(x, f), [0.0, 0.6, 1.4]),
    "saturation": (lambda x, f: tv.adjust_saturation(x, f), [0.0, 0.8, 1.2]),
    "hue": (lambda x, f: tv.adjust_hue(x, f), [-0.5, -0.1, 0.07, 0.5]),
}


@pytest.mark.parametrize("operation", COLOURS)
def test_colours_are_near_those_of_torchvision(backend: str, operation: str) -> None:
    """In float64, where torchvision rounds nothing; its luma has 0.2989 for red: 0.03 levels, times a factor."""
    images = photographs()
    theirs, factors = COLOURS[operation]
    for factor in factors:
        draws = neutral(6, **{operation: torch.full((6,), factor)})
        wanted = theirs(images.double() / 255, float(np.float32(factor))) * 255
        assert apart(augment(images, draws, (60, 80)), wanted) <= 0.5 + 0.05


@pytest.mark.parametrize("operation", COLOURS)
def test_colours_are_near_those_of_pillow_images(backend: str, operation: str) -> None:
    """torchvision on Pillow images, as the recipes were published.

    It rounds after each step. Its hue is up to three of 255 steps off, six levels each: angle and turn are rounded down,
    and a turn past zero closes the circle at 256; saturation, value and result are whole numbers too: three more.
    """
    images = photographs()
    theirs, factors = COLOURS[operation]
    bound = {"brightness": 1, "contrast": 2, "saturation": 2, "hue": 21}[operation]
    for factor in factors:
        got = augment(images, neutral(6, **{operation: torch.full((6,), factor)}), (60, 80))
        for view, image in zip(got, images, strict=True):
            pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
            wanted = torch.from_numpy(np.asarray(theirs(pillow, factor))).permute(2, 0, 1)
            assert apart(view, wanted) <= bound


def test_grey_is_the_luma_of_pillow(backend: str) -> None:
    images = photographs()
    got = augment(images, neutral(6, gray=torch.ones(6, dtype=torch.bool)), (60, 80))
    for view, image in zip(got, images, strict=True):
        wanted = torch.from_numpy(np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")))
        assert apart(view, wanted.expand_as(view)) <= 1


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.3, 2.0, 7.0])
def test_the_blur_is_a_gaussian(backend: str, sigma: float) -> None:
    images = photographs()
    got = augment(images, neutral(6, sigma=torch.full((6,), sigma)), (60, 80))
    sigma = float(np.float32(sigma))
    radius = int(np.ceil(3 * sigma))
    x = torch.arange(-radius, radius + 1).double()
    weights = torch.exp(-x * x / (2 * sigma * sigma))
    weights /= weights.sum()
    padded = F.pad(images.double(), [radius] * 4, mode="reflect").reshape(18, 1, 60 + 2 * radius, 80 + 2 * radius)
    wanted = F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)).view(6, 3, 60, 80)
    assert apart(got, wanted) <= 0.5 + 1e-3


def test_the_blur_is_near_pillows(backend: str) -> None:
    """Pillow puts three box filters in the Gaussian's place: on photographs a few levels, at edges up to about 25."""
    images = photographs(3, (96, 96))
    got = augment(images, neutral(3, (96, 96), sigma=torch.full((3,), 1.5)), 96)
    for view, image in zip(got, images, strict=True):
        blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(1.5))
        wanted = torch.from_numpy(np.array(blurred)).permute(2, 0, 1)
        assert (view.float() - wanted.float()).abs().mean() <= 1.5


def test_edges_are_reflected_again_and_again(backend: str) -> None:
    image = torch.tensor([[0, 100, 200]], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    got = augment(image, neutral(1, (1, 3), sigma=torch.tensor([4.0])), (1, 3))
    period = np.array([0, 100, 200, 100], dtype=np.float64)
    x = np.arange(-12, 13)
    weights = np.exp(-(x**2) / 32)
    weights /= weights.sum()
    wanted = [round(float((weights * period[(i + x) % 4]).sum())) for i in range(3)]
    assert got[0, 0, 0].tolist() == wanted


@pytest.mark.parametrize("size_px", [32, (24, 40)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_views_are_torchvisions(backend: str, interpolation: str, size_px: int | tuple[int, int]) -> None:
    """Resize and CenterCrop on floats; the crop's place is a fraction kept in float32: within a level."""
    recipe = eval_view(size_px, 48, interpolation)  # type: ignore[arg-type]
    for height, width in ((60, 80), (97, 64), (200, 50)):
        images = photographs(2, (height, width))
        draws = draw_views(recipe, np.full(2, height), np.full(2, width), step=0)
        got = augment(images, draws, size_px, interpolation=interpolation)  # type: ignore[arg-type]
        view = (size_px, size_px) if isinstance(size_px, int) else size_px
        target = [round(side * 48 / min(view)) for side in view]
        scale = max(target[0] / height, target[1] / width)
        by_height = target[0] / height >= target[1] / width
        resized = (target[0], int(width * scale + 1e-9)) if by_height else (int(height * scale + 1e-9), target[1])
        whole = F.interpolate(images.double(), size=resized, mode=interpolation, antialias=True, align_corners=False)
        wanted = tv.center_crop(whole.clamp(0, 255), list(view))
        assert apart(got, wanted) <= 1


# ---- whole recipes ----


def test_recipes_give_the_distribution_of_torchvisions_transforms() -> None:
    """The recipe of BYOL's first view, many draws of one image: mean and spread of every channel over views.

    torchvision shuffles its four colour steps, and ours have a fixed order, so that only such moments can agree: the
    difference is within four standard errors of the difference, or half a level.
    """
    from torchvision.transforms import v2

    image = photographs(1, (96, 128), seed=3)[0]
    n, size = 600, 32
    recipe = ViewRecipe(size, (0.2, 1.0), jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, blur_sigma_px=(0.1, 1.0))
    draws = draw_views(recipe, np.full(n, 96), np.full(n, 128), step=1)
    ours = augment(image.expand(n, -1, -1, -1), draws, size).float()
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(7, (0.1, 1.0))], 0.5),
            v2.RandomHorizontalFlip(),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = torch.stack([theirs(image) for _ in range(n)]).float()
    for statistic in (
        lambda x: x.mean((2, 3)),  # the level of each channel
        lambda x: x.std((2, 3)),  # the contrast of each channel
        lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)).unsqueeze(1),  # the colourfulness
        lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)).unsqueeze(1),  # the sharpness
    ):
        a, b = statistic(ours), statistic(other)
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= (4 * error).clamp_min(0.5)).all()
        assert (a.std(0) / b.std(0)).log().abs().max() < 0.25


# ---- what is refused ----

WRONG = {
    "images": (lambda i, d: ((i.float(), d, 16), {}), TypeError, "images must be uint8"),
    "images shape": (lambda i, d: ((i[0], d, 16), {}), ValueError, r"images must have shape \(N, C, H, W\)"),
    "images kind": (lambda i, d: (("photo.jpg", d, 16), {}), TypeError, r"images\[0\]"),
    "rows": (lambda i, d: ((i[:2], d, 16), {}), ValueError, "draws has 6 rows but there are 2 images"),
    "draws": (lambda i, d: ((i, "blur", 16), {}), TypeError, "draws must be a ViewDraws"),
    "size_px": (lambda i, d: ((i, d, 0), {}), ValueError, "size_px"),
    "interpolation": (lambda i, d: ((i, d, 16), {"interpolation": "bilinaer"}), ValueError, "'bilinear'"),
    "box": (lambda i, d: ((i[:, :, :30], d, 16), {}), ValueError, "box of row 0"),
    "out shape": (lambda i, d: ((i, d, 16), {"out": i}), ValueError, "out must have shape"),
    "out strides": (
        lambda i, d: ((i, d, 16), {"out": torch.empty(6, 3, 16, 16, dtype=torch.uint8)}),
        ValueError,
        "channels_last",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong: str) -> None:
    make, kind, message = WRONG[wrong]
    args, options = make(photographs(), neutral(6))
    with pytest.raises(kind, match=message):
        augment(*args, **options)


def test_colours_of_images_that_have_none_are_refused() -> None:
    images = photographs(channels=5)
    assert augment(images, draw_views(cases.COLOURLESS, np.full(6, 60), np.full(6, 80), step=0), 16).shape[1] == 5
    with pytest.raises(ValueError, match="saturation must be neutral for images of 5 channels"):
        augment(images, neutral(6, saturation=torch.full((6,), 0.5)), 16)


def test_images_of_several_channel_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images\[1\] has 1 channels but images\[0\] has 3"):
        augment([torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(4, 4, 1, dtype=torch.uint8)], neutral(2), 4)


def test_no_images_give_no_views() -> None:
    assert augment([], neutral(0), 8).shape == (0, 3, 8, 8)
    assert augment(photographs()[:0], neutral(0), 8).shape == (0, 3, 8, 8)


# ---- by every instruction set ----


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ kernels are not built")
def test_large_views_agree_with_the_definition() -> None:
    """Longer than any vector, with remainders; every size from one vector short to one over."""
    images = photographs(2, (50, 70))
    recipe = replace(cases.EVERYTHING, blur_prob=1.0)
    for width in (*range(1, 36), 63, 64, 65):
        draws = draw_views(replace(recipe, size_px=(5, width)), np.full(2, 50), np.full(2, 70), step=width)
        with use_backend("cpp", "augment"):
            got = augment(images, draws, (5, width))
        with use_backend("reference", "augment"):
            assert apart(got, augment(images, draws, (5, width))) <= 1
