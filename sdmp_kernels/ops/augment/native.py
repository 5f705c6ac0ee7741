"""`augment` by the compiled kernels of csrc/: backend `cpp`.

`_backends.native_library` has loaded the library before this is called. One signature with `reference`.
"""

import torch
from torch import Tensor

from sdmp_kernels.ops.augment.arguments import Draws
from sdmp_kernels.ops.augment.reference import one_by_one


def augment(images: list[Tensor], draws: Draws, cubic: bool, radius: int, out: Tensor) -> None:
    """Write one view of every image into `out`: one image at a time in cache, parallel over images."""
    images = one_by_one(images, out.shape[1])
    torch.ops.sdmp.augment_cpu(images, *(rows.contiguous() for rows in draws), cubic, out)
