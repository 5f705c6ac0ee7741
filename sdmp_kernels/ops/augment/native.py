"""`augment` by the compiled kernels of csrc/: backend `cpp`.

`_backends.native_library` has loaded the library before this is called. One signature with `reference`.
"""

import torch
from torch import Tensor


def augment(
    images: list[Tensor],
    box: Tensor,
    flip: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    hue: Tensor,
    gray: Tensor,
    sigma: Tensor,
    solarize: Tensor,
    cubic: bool,
    radius: int,
    out: Tensor,
) -> None:
    """Write one view of every image into `out`: one image at a time in cache, parallel over images."""
    draws = (box, flip, brightness, contrast, saturation, hue, gray, sigma, solarize)
    torch.ops.sdmp.augment_cpu(images, *(tensor.contiguous() for tensor in draws), cubic, out)
