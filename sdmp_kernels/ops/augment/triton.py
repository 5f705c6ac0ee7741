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
    for call in calls(arch, images[0], Draws(*(rows.contiguous() for rows in draws)), cubic, radius, out):
        call.launch(out.device)


def calls(arch: str, images: Tensor, draws: Draws, cubic: bool, radius: int, out: Tensor) -> list[Call]:
    """The launches, in order; the rows of `draws` are contiguous."""
    n, channels, height, width = out.shape
    group = 3 if channels == 3 else 1
    units, area = channels // group, height * width
    view = torch.empty((n, channels, height, width), dtype=torch.float32, device=out.device)

    given = _launch.constants(arch, "augment.resize")
    block = min(given["block"], triton.next_power_of_2(area))
    tiles = triton.cdiv(area, block)
    sums = torch.empty(n * units * tiles, dtype=torch.float32, device=out.device)
    constants = {"GROUP": group, "CUT": not draws.box.is_floating_point(), "CUBIC": cubic, "BLOCK": block}
    sizes = (*images.stride(), *images.shape[2:], height, width, area, tiles, units)
    args = (images, draws.box, draws.flip, draws.brightness, view, sums, *sizes)
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
    """Every kernel for whole and fractional boxes, both filters, three channels and others, both memory orders."""
    found = []
    for name, channels, fractional, cubic, planar in (
        ("rgb", 3, False, False, False),
        ("rgb planar", 3, False, False, True),
        ("rgb cubic", 3, False, True, False),
        ("rgb evaluation", 3, True, False, False),
        ("rgb evaluation cubic", 3, True, True, False),
        ("grey", 1, False, False, False),
        ("five channels cubic", 5, False, True, False),
    ):
        n, size = 64, 224
        images = torch.empty((n, channels, 256, 256), dtype=torch.uint8, device="meta")
        if not planar:
            images = images.to(memory_format=torch.channels_last)
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
