"""`augment` on a GPU: at most four launches for a batch, whatever was drawn, and two where nothing may be blurred.

Bytes of a 224 px view of three channels: the crop read once or, where it shrinks, about twice out of cache; 0.6 MB of
float32 planes written and read between launches, twice more where there is a blur; 0.15 MB written.
"""

import torch
import triton
from torch import Tensor

from sdmp_kernels import _launch
from sdmp_kernels._launch import Call, Compile
from sdmp_kernels.ops.augment.arguments import Draws
from sdmp_kernels.ops.augment.triton_kernels import (
    augment_blur_columns_kernel,
    augment_blur_rows_kernel,
    augment_colour_kernel,
    augment_resize_kernel,
)

KERNELS = (
    "augment_resize_kernel",
    "augment_colour_kernel",
    "augment_blur_rows_kernel",
    "augment_blur_columns_kernel",
)


def augment(images: list[Tensor], draws: Draws, cubic: bool, radius: int, out: Tensor) -> None:
    """Write one view of every image into `out`; one signature with `reference`."""
    arch = _launch.architecture(out.device)
    for call in calls(arch, images, Draws(*(rows.contiguous() for rows in draws)), cubic, radius, out):
        call.launch(out.device)


def calls(arch: str, images: list[Tensor], draws: Draws, cubic: bool, radius: int, out: Tensor) -> list[Call]:
    """The launches, in order; the rows of `draws` are contiguous."""
    n, channels, height, width = out.shape
    group = 3 if channels == 3 else 1
    units, area = channels // group, height * width
    view = torch.empty((n, channels, height, width), dtype=torch.float32, device=out.device)

    given = _launch.constants(arch, "augment.resize")
    block = min(given["block"], triton.next_power_of_2(area))
    tiles = triton.cdiv(area, block)
    sums = torch.empty(n * units * tiles, dtype=torch.float32, device=out.device)
    cut, flat = not draws.box.is_floating_point(), images[0].ndim == 1
    constants = {"FLAT": flat, "GROUP": group, "CUT": cut, "CUBIC": cubic, "BLOCK": block}
    # A dense batch has no table of places: its pointers are never read.
    places = images if flat else [images[0]] * 4
    strides = (0, 1, 0, channels, 0, 0) if flat else (*images[0].stride(), *images[0].shape[2:])
    sizes = (*strides, height, width, area, tiles, units)
    args = (*places, draws.box, draws.flip, draws.brightness, view, sums, *sizes)
    grid = (n * units * tiles,)
    found = [Call(augment_resize_kernel, grid, args, given["num_warps"], 1, constants)]

    constants = {"GROUP": group, "BLOCK": block, "SUMS": triton.next_power_of_2(units * tiles)}
    colours = (draws.contrast, draws.saturation, draws.hue, draws.gray, draws.sigma, draws.solarize)
    args = (view, sums, *colours, out, out.stride(0), area, tiles, units)
    found.append(Call(augment_colour_kernel, grid, args, given["num_warps"], 1, constants))
    if radius == 0:
        return found

    given = _launch.constants(arch, "augment.blur")
    block = min(given["block"], triton.next_power_of_2(area))
    tiles = triton.cdiv(area, block)
    blurred, grid = torch.empty_like(view), (n * channels * tiles,)
    sizes = (height, width, area, tiles, channels)
    args = (view, draws.sigma, blurred, *sizes)
    found.append(Call(augment_blur_rows_kernel, grid, args, given["num_warps"], 1, {"BLOCK": block}))
    args = (blurred, draws.sigma, draws.solarize, out, out.stride(0), *sizes)
    found.append(Call(augment_blur_columns_kernel, grid, args, given["num_warps"], 1, {"BLOCK": block}))
    return found


def compiles(arch: str) -> list[Compile]:
    """Every kernel for whole and fractional boxes, both filters, three channels and others, every memory order."""
    found = []
    for name, channels, fractional, cubic, order in (
        ("rgb", 3, False, False, "channels_last"),
        ("rgb planar", 3, False, False, "planar"),
        ("rgb flat", 3, False, False, "flat"),
        ("rgb flat cubic", 3, False, True, "flat"),
        ("rgb cubic", 3, False, True, "channels_last"),
        ("rgb evaluation", 3, True, False, "channels_last"),
        ("rgb evaluation cubic", 3, True, True, "channels_last"),
        ("grey", 1, False, False, "channels_last"),
        ("five channels cubic", 5, False, True, "channels_last"),
    ):
        n, size = 64, 224
        images = [torch.empty((n, channels, 256, 256), dtype=torch.uint8, device="meta")]
        if order == "channels_last":
            images = [images[0].to(memory_format=torch.channels_last)]
        if order == "flat":
            sizes = [torch.empty(n, dtype=dtype, device="meta") for dtype in (torch.int64, torch.int32, torch.int32)]
            images = [torch.empty(2**34, dtype=torch.uint8, device="meta"), *sizes]
        out = torch.empty((n, channels, size, size), dtype=torch.uint8, device="meta")
        out = out.to(memory_format=torch.channels_last)
        number = torch.empty(n, dtype=torch.float32, device="meta")
        switch = torch.empty(n, dtype=torch.bool, device="meta")
        box = torch.empty((n, 4), dtype=torch.float32 if fractional else torch.int32, device="meta")
        draws = Draws(box, switch, number, number, number, number, switch, number, switch)
        # Bytes are gathered and stored side by side with other channels'; planes of float32 are read and written wide.
        wide = {
            "resize": ("wide_stores",),
            "colour": ("wide_loads", "wide_stores"),
            "blur rows": ("wide_stores",),
            "blur columns": ("wide_loads",),
        }
        for (step, facts), call in zip(wide.items(), calls(arch, images, draws, cubic, 6, out), strict=True):
            if step == "resize" or name in ("rgb", "grey", "five channels cubic"):
                found.append(call.compilation(f"augment {step} {name}", ("no_spills", *facts)))
    return found
