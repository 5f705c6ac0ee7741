"""The registered operator of `augment`: schema, fake, and which backend serves which call. It has no derivative."""

from torch import Tensor

from sdmp_kernels import _backends
from sdmp_kernels._operators import operator
from sdmp_kernels.ops.augment.arguments import Draws

OP = _backends.register("augment", cpu=("cpp", "torch", "reference"), cuda=("triton", "torch", "reference"))


def _refuse(backend: str, images: list[Tensor]) -> str | None:
    if backend == "triton" and images[0].ndim == 3:
        return "triton takes one batch (N, C, H, W) or FlatImages, not a list of images"
    return None


@operator("augment", mutates=("out",))
def augment_op(
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
    """`images`: one (N, C, H, W) batch, N images (H, W, C), or the four tensors of `FlatImages`.

    `radius`: of the widest blur; -1 where unknown.
    """
    if out.numel():
        draws = Draws(box, flip, brightness, contrast, saturation, hue, gray, sigma, solarize)
        backend = _backends.choose(OP, out.device, lambda name: _refuse(name, images))
        OP.module(backend).augment(images, draws, cubic, radius, out)


@augment_op.register_fake
def _(images, box, flip, brightness, contrast, saturation, hue, gray, sigma, solarize, cubic, radius, out):
    return None
