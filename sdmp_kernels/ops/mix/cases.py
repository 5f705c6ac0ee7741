"""Inputs of `mix` for the tests, the benchmarks and anyone who wants to see it called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmp_kernels.ops.case import FLOATS, Case
from sdmp_kernels.ops.mix import mix, reference
from sdmp_kernels.ops.mix.arguments import Erasure, Norm, PlanRows
from sdmp_kernels.plan import MixPlan, Rule, draw_plan

MEAN, STD = (0.485, 0.456, 0.406, 0.5, 0.25), (0.229, 0.224, 0.225, 0.5, 0.125)
ALL = ("mixup", "cutmix", "resizemix")
MIXED = (*ALL, "keep")


def call(images: Tensor, plan: MixPlan, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The op itself."""
    return mix(images, plan, **options)


def eager(
    images: Tensor,
    plan: MixPlan,
    *,
    partners: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
    erase: Erasure | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A loop over the samples in the dtype of the images, as one would write it; uint8 is converted first."""
    result = dtype or (torch.float32 if images.dtype == torch.uint8 and std is not None else images.dtype)
    pixels = images.float() if images.dtype == torch.uint8 else images
    others = pixels if partners is None else partners.float() if partners.dtype == torch.uint8 else partners
    rows = []
    for i, (rule, j) in enumerate(zip(plan.rule.tolist(), plan.partner.tolist(), strict=True)):
        lam, (top, left, height, width) = float(plan.lam[i]), plan.box[i].tolist()
        row, patch = pixels[i], others[j][:, top : top + height, left : left + width]
        if rule == Rule.MIXUP:
            row = lam * row + (1 - lam) * others[j]
        elif rule != Rule.KEEP and height * width > 0:
            if rule == Rule.RESIZEMIX:
                patch = F.interpolate(others[j][None], size=(height, width), mode="bilinear", align_corners=False)[0]
            row = row.clone()
            row[:, top : top + height, left : left + width] = patch
        rows.append(row)
    mixed = torch.stack(rows) if rows else pixels.clone()
    outputs = [_stored(x, images.dtype, mean, std, result) for x in ([pixels, mixed] if clean else [mixed])]
    if erase is not None:
        outputs[-1] = filled(outputs[-1], erase)
    return (outputs[0], outputs[1]) if clean else outputs[0]


def filled(pixels: Tensor, erase: Erasure) -> Tensor:
    """The boxes of every image one after another, as timm erases them."""
    pixels, fill = pixels.clone(), reference.store(erase.fill, pixels.dtype)
    for i, boxes in enumerate(erase.boxes.tolist()):
        for top, left, height, width, first in boxes:
            for y in range(height):
                begin = first + y * width
                line = fill[begin : begin + width] if erase.per_pixel else fill[first].expand(width, -1)
                pixels[i, :, top + y, left : left + width] = line.T
    return pixels


def _stored(
    pixels: Tensor,
    source: torch.dtype,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    result: torch.dtype,
) -> Tensor:
    if mean is not None and std is not None:
        unit = pixels / 255 if source == torch.uint8 else pixels
        centre, spread = (torch.tensor(v, dtype=unit.dtype, device=unit.device).view(-1, 1, 1) for v in (mean, std))
        pixels = (unit - centre) / spread
    return pixels.round().clamp(0, 255).to(result) if result == torch.uint8 else pixels.to(result)


def truth(
    images: Tensor,
    plan: MixPlan,
    *,
    partners: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
    erase: Erasure | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The exact result in float64, rounded only where the result is uint8."""
    others = None if partners is None else partners.double()
    mixed = reference.mix_pixels(images.double(), others, PlanRows.of(plan))
    integers = (dtype or images.dtype) == torch.uint8 and std is None
    norm = None if mean is None or std is None else Norm(list(mean), list(std))
    outputs = [
        reference.store(reference.normalise(pixels, images.dtype, norm), torch.uint8).double()
        if integers
        else reference.normalise(pixels, images.dtype, norm)
        for pixels in ([images.double(), mixed] if clean else [mixed])
    ]
    if erase is not None:
        erased = reference.erase(outputs[-1], erase)
        outputs[-1] = reference.store(erased, torch.uint8).double() if integers else erased
    return (outputs[0], outputs[1]) if clean else outputs[0]


def largest_term(
    images: Tensor,
    plan: MixPlan,
    *,
    partners: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    erase: Erasure | None = None,
    **_: Any,
) -> float:
    """The largest pixel, weighted by 1, or, normalised, the larger of pixel / std and mean / std; or a colour."""
    if images.numel() == 0 or ((dtype or images.dtype) == torch.uint8 and std is None):
        return 1.0
    given = [images] if partners is None or partners.numel() == 0 else [images, partners]
    largest = max(float(t.double().abs().max()) for t in given)
    colour = 0.0 if erase is None else float(erase.fill.abs().max())
    if mean is None or std is None:
        return max(largest, colour)
    unit = largest / 255 if images.dtype == torch.uint8 else largest
    return max(max(unit, *map(abs, mean)) / min(std), colour)


def _result_bytes(images: Tensor, std: Sequence[float] | None, dtype: torch.dtype | None) -> int:
    """Of one result: the mixed images, or the clean ones."""
    return images.numel() * (dtype or (torch.float32 if images.dtype == torch.uint8 and std else images.dtype)).itemsize


def floor_bytes(
    images: Tensor,
    plan: MixPlan,
    *,
    partners: Tensor | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
    **_: Any,
) -> int:
    """Every image and partner read once, every result written once; where they want gradients, the results' gradients
    read once and theirs written once. What fills erased boxes is left out.
    """
    sources = [images] if partners is None else [images, partners]
    results = _result_bytes(images, std, dtype) * (2 if clean else 1)
    wanted = sum(t.nbytes for t in sources if t.requires_grad)
    return sum(t.nbytes for t in sources) + results + (wanted + results if wanted else 0)


def kernel_bytes(images: Tensor, plan: MixPlan, *, partners: Tensor | None = None, **options: Any) -> int:
    """What today's kernels move. For the flip that is the floor: a program owns both images of a pair. Any other
    partner is read for every row that has it, and so is the gradient of that row's result.
    """
    least = floor_bytes(images, plan, partners=partners, **options)
    if plan.mirrored and partners is None:
        return least
    again = max(0, images.nbytes - (0 if partners is None else partners.nbytes))
    if images.requires_grad or (partners is not None and partners.requires_grad):
        again += _result_bytes(images, options.get("std"), options.get("dtype"))
    return least + again


def flops(images: Tensor, plan: MixPlan, *, std: Sequence[float] | None = None, clean: bool = False, **_: Any) -> int:
    """Products and sums: 3 per blended element, 9 per resized one, 2 per normalised one."""
    plane = images.shape[2] * images.shape[3]
    per_rule = {Rule.MIXUP: 3.0 * plane, Rule.CUTMIX: 0.0, Rule.KEEP: 0.0}
    total = 0.0
    for rule, lam in zip(plan.rule.tolist(), plan.lam.tolist(), strict=True):
        total += images.shape[1] * per_rule.get(Rule(rule), 9.0 * (1 - lam) * plane)
    return round(total + (0 if std is None else 2 * images.numel() * (2 if clean else 1)))


# ---- layouts: the same values, elsewhere in memory ----


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def cropped(images: Tensor) -> Tensor:
    """The middle of larger images."""
    return F.pad(images, (2, 1, 1, 2), value=float("nan"))[:, :, 1:-2, 2:-1]


def offset(images: Tensor) -> Tensor:
    """Dense, but beginning one element into its storage: no 16-byte access is aligned."""
    room = torch.full((images.numel() + 1,), float("nan"), dtype=images.dtype)
    return room[1:].view(images.shape).copy_(images)


def spaced(images: Tensor) -> Tensor:
    """Every second image of a batch twice as large."""
    return torch.stack([images, torch.full_like(images, float("nan"))], 1)[:, 0]


def expanded(images: Tensor) -> Tensor:
    """One image for all rows, and one channel for all channels: strides of 0."""
    return images[:1, :1].expand(images.shape)


def sideways(images: Tensor) -> Tensor:
    """Columns side by side in memory instead of rows."""
    return images.transpose(2, 3).contiguous().transpose(2, 3)


# ---- plans ----


def by_hand(n: int, size: tuple[int, int]) -> MixPlan:
    """lam of 0 and 1, an empty box, the whole image as the box, one pixel, and boxes at the far corner."""
    height, width = size
    rows = [
        (Rule.MIXUP, 1.0, (0, 0, 0, 0)),
        (Rule.MIXUP, 0.0, (0, 0, 0, 0)),
        (Rule.CUTMIX, None, (2, 1, 0, 3)),
        (Rule.CUTMIX, None, (0, 0, height, width)),
        (Rule.RESIZEMIX, None, (0, 0, height, width)),
        (Rule.RESIZEMIX, None, (height - 1, width - 1, 1, 1)),
        (Rule.RESIZEMIX, None, (1, 2, height - 1, width - 2)),
        (Rule.CUTMIX, None, (height - 2, 0, 2, width)),
        (Rule.KEEP, 1.0, (0, 0, 0, 0)),
    ]
    chosen = [rows[i % len(rows)] for i in range(n)]
    lam = [1 - b[2] * b[3] / (height * width) if share is None else share for _, share, b in chosen]
    return MixPlan(
        rule=torch.tensor([int(r) for r, _, _ in chosen], dtype=torch.uint8),
        partner=torch.arange(n - 1, -1, -1),
        lam=torch.tensor(lam, dtype=torch.float32),
        partner_lam=torch.tensor(lam, dtype=torch.float32).flip(0),
        box=torch.tensor([b for _, _, b in chosen], dtype=torch.int32).view(n, 4),
        size=size,
        mirrored=True,
        rules=tuple(Rule),
    )


def partner_vector(plan: MixPlan, partner: Sequence[int], rows: int) -> MixPlan:
    """`plan` with other partners, among `rows` sources."""
    chosen = torch.tensor(partner, dtype=torch.int64)
    share = plan.lam[chosen % len(plan)] if len(plan) else plan.lam
    return MixPlan(plan.rule, chosen, plan.lam, share, plan.box, plan.size, False, plan.rules)


# ---- erasures ----


def erasure(n: int, channels: int, size: tuple[int, int], *, per_pixel: bool) -> Erasure:
    """Two boxes per image: none, one pixel, the whole image, one over another, at the far corner."""
    height, width = size
    half = (height // 2, width // 2)
    pairs = [
        ((0, 0, 0, 0), (1, 1, 0, 3)),
        ((0, 0, height, width), (half[0], half[1], 1, 1)),
        ((0, 0, half[0] + 1, half[1] + 1), (1, 1, height - 1, half[1])),
        ((half[0], 0, height - half[0], 2), (0, half[1], half[0] + 1, width - half[1])),
        ((height - 1, width - 1, 1, 1), (0, 0, 0, 0)),
    ]
    chosen = torch.tensor([pairs[(i + 1) % len(pairs)] for i in range(n)], dtype=torch.int32).view(n, 2, 4)
    used = chosen[..., 2] * chosen[..., 3] if per_pixel else torch.ones(n, 2, dtype=torch.int32)
    first = (used.flatten().cumsum(0, dtype=torch.int32) - used.flatten()).view(n, 2, 1)
    rows = max(1, int(used.sum()))
    fill = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows))
    return Erasure(torch.cat([chosen, first], dim=2), fill, per_pixel)


# ---- cases ----

# Triton's interpreter takes some tenths of a second for each: the whole op matrix runs it on these; the others it
# meets once, in tests/ops/test_mix_triton.py.
INTERPRETED = (
    "every_rule_odd_batch_prime_size",
    "no_rows",
    "channels_last_prime_normalised",
    "cropped",
    "normalised_clean",
    "to_uint8",
    "separate_partners_clean",
    "partner_vector",
    "uint8",
    "uint8_channels_last_to_float16",
    "erased",
    "erased_uint8_channels_last",
    "erased_partner_vector",
    "erased_nothing",
)


def _case(
    name: str,
    n: int,
    shape: tuple[int, int, int],
    *,
    rules: Sequence[str] = MIXED,
    layout: Callable[[Tensor], Tensor] | None = None,
    partners: int | None = None,
    partner: Sequence[int] | None = None,
    plan: Callable[[int, tuple[int, int]], MixPlan] | None = None,
    source: torch.dtype | None = None,
    normalise: bool = False,
    box: str = "inside",
    per_pixel: bool | None = None,
    **options: Any,
) -> Case:
    """One case. `shape`: (C, H, W). `partners`: rows of separate partners. `source`: uint8, or else every float.
    `per_pixel`: what is erased has a colour for each pixel, or (False) one for each box.
    """
    channels, height, width = shape
    seed = sum(name.encode())

    def images(rows: int, generator: torch.Generator) -> Tensor:
        if source == torch.uint8:
            return torch.randint(0, 256, (rows, *shape), generator=generator).double()
        return torch.rand((rows, *shape), generator=generator, dtype=torch.float64) * 2 - 0.5

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        made: dict[str, Any] = {"images": images(n, generator)}
        if layout is not None:
            made["images"] = layout(made["images"])
        drawn = plan(n, (height, width)) if plan else _drawn(n, (height, width), rules, box, seed)
        made["plan"] = drawn if partner is None else partner_vector(drawn, partner, partners or n)
        if partners is not None:
            made["partners"] = images(partners, generator)
        if normalise:
            made |= {"mean": MEAN[:channels], "std": STD[:channels]}
        if per_pixel is not None:
            made["erase"] = erasure(n, channels, (height, width), per_pixel=per_pixel)
        return made | options

    cast = ("images",) if partners is None else ("images", "partners")
    differentiable = source is None and options.get("dtype") != torch.uint8
    dtypes = (source,) if source is not None else FLOATS
    return Case(name, inputs, cast, cast if differentiable else (), dtypes, interpreter=name in INTERPRETED)


def _drawn(n: int, size: tuple[int, int], rules: Sequence[str], box: str, seed: int) -> MixPlan:
    """The plan of the first seed in which as many rules occur as can."""
    while True:
        plan = draw_plan(n, size, rules=rules, per="sample", box=box, seed=seed, step=0)
        if len(plan.rule.unique()) == min(n, len(rules)):
            return plan
        seed += 1


CASES = [
    _case("mixup", 4, (3, 8, 16), rules=("mixup",)),
    _case("cutmix", 4, (3, 8, 16), rules=("cutmix",)),
    _case("resizemix", 3, (3, 8, 16), rules=("resizemix",)),
    _case("keep", 2, (3, 4, 8), rules=("keep",)),
    _case("every_rule_odd_batch_prime_size", 5, (2, 13, 7)),
    _case("several_chunks", 3, (3, 48, 48), plan=by_hand),
    _case("by_hand", 9, (3, 16, 8), plan=by_hand),
    _case("clipped_boxes", 6, (3, 11, 17), rules=("cutmix", "resizemix"), box="clip"),
    _case("one_row", 1, (3, 6, 10), rules=ALL),
    _case("no_rows", 0, (3, 6, 10), rules=ALL),
    _case("one_pixel", 3, (2, 1, 1), rules=ALL),
    _case("one_channel", 4, (1, 8, 8)),
    _case("four_channels_normalised", 4, (4, 8, 8), normalise=True),
    _case("five_channels_normalised", 4, (5, 4, 8), normalise=True),
    _case("channels_last", 5, (3, 16, 16), layout=channels_last),
    _case("channels_last_prime_normalised", 4, (3, 7, 5), layout=channels_last, normalise=True),
    _case("channels_last_five_channels_normalised", 2, (5, 8, 8), layout=channels_last, normalise=True),
    _case("cropped", 2, (3, 8, 9), layout=cropped),
    _case("offset", 4, (3, 8, 8), layout=offset),
    _case("spaced", 4, (3, 8, 8), layout=spaced),
    _case("expanded", 4, (3, 8, 8), layout=expanded),
    _case("sideways", 4, (3, 6, 8), layout=sideways),
    _case("normalised_clean", 3, (2, 8, 16), normalise=True, clean=True),
    _case("clean", 4, (3, 9, 6), clean=True),
    _case("to_float16", 4, (3, 8, 8), dtype=torch.float16),
    _case("to_bfloat16_normalised", 4, (3, 8, 8), normalise=True, dtype=torch.bfloat16),
    _case("to_float32", 4, (3, 8, 8), dtype=torch.float32),
    _case("to_uint8", 4, (3, 8, 8), dtype=torch.uint8),
    _case("separate_partners", 5, (3, 8, 8), partners=5),
    _case("separate_partners_clean", 3, (2, 5, 8), partners=3, normalise=True, clean=True),
    _case("partner_vector", 4, (1, 8, 8), partner=(1, 1, 2, 1)),
    _case("partner_vector_of_others", 5, (3, 9, 7), partners=3, partner=(2, 0, 2, 2, 1)),
    _case("more_partners_than_rows", 2, (3, 8, 8), partners=5, partner=(4, 1), clean=True),
    _case("uint8", 3, (3, 8, 16), source=torch.uint8),
    _case("uint8_prime", 3, (3, 7, 5), source=torch.uint8),
    _case("uint8_to_float32", 4, (3, 8, 8), source=torch.uint8, dtype=torch.float32),
    _case("uint8_normalised_clean", 5, (3, 16, 16), source=torch.uint8, normalise=True, clean=True),
    _case("uint8_channels_last_to_float16", 3, (3, 16, 16), source=torch.uint8, layout=channels_last,
          normalise=True, dtype=torch.float16, clean=True),
    _case("uint8_channels_last_to_bfloat16", 4, (3, 9, 9), source=torch.uint8, layout=channels_last,
          normalise=True, dtype=torch.bfloat16),
    _case("erased", 5, (3, 9, 10), per_pixel=True, normalise=True),
    _case("erased_in_one_colour", 6, (2, 8, 16), per_pixel=False),
    _case("erased_several_chunks", 3, (3, 48, 48), plan=by_hand, per_pixel=True, normalise=True, clean=True),
    _case("erased_channels_last", 5, (3, 16, 16), layout=channels_last, per_pixel=True, dtype=torch.float16),
    _case("erased_uint8_channels_last", 5, (3, 9, 9), source=torch.uint8, layout=channels_last, normalise=True,
          dtype=torch.bfloat16, per_pixel=False, clean=True),
    _case("erased_uint8", 5, (5, 8, 12), source=torch.uint8, per_pixel=True),
    _case("erased_cropped_partners", 5, (3, 9, 7), layout=cropped, partners=3, partner=(2, 0, 2, 2, 1), per_pixel=True),
    _case("erased_partner_vector", 4, (3, 8, 8), source=torch.uint8, partner=(3, 3, 0, 3), per_pixel=True,
          normalise=True),
    _case("erased_nothing", 0, (3, 6, 10), rules=ALL, per_pixel=False),
    _case("uint8_partner_vector", 4, (3, 8, 8), source=torch.uint8, partner=(3, 3, 0, 3), normalise=True),
]  # fmt: skip
