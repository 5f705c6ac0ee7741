"""The symmetric loss of two towers, image and text, with mixed pairs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sdmp_kernels._checks import check_same_device, check_tensor
from sdmp_kernels.ops.info_nce import info_nce
from sdmp_kernels.ops.losses import FLOATS
from sdmp_kernels.plan import TwoHot


def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor,
    target: TwoHot | tuple[TwoHot, TwoHot] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Symmetric InfoNCE: half of the images' loss among the texts and half of the texts' among the images.

    With info_nce(q, k, target) as it is (Radford et al. 2021, Figure 3, and any two-hot target):

        loss = (info_nce(image, text, target) + info_nce(text, image, target)) / 2

    Gradients reach both towers. Logits are never kept, so that the batch is bounded by its features alone.

    Args:
        image: (N, D) float16, bfloat16, float32 or float64, as given: the caller normalises. Differentiable.
        text: (N, D) of the same dtype. Differentiable.
        temperature: above 0, or a tensor of one element, which gets a gradient if it requires one (CLIP learns
            logit_scale, the logarithm of its inverse: give `(-logit_scale).exp()`).
        target: which texts an image belongs to and which images a text; default each to its own. A `TwoHot` holds for
            both directions, as `MixPlan.source_target` gives it for mixed images; a pair of them for images and texts.
        reduction: "mean" (NaN for N = 0), "sum", or "none" for (N,), half the loss of image i and half that of text i.

    Returns:
        The loss in float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument.

    Over ranks: gather both towers with gradients (`torch.distributed.nn.functional.all_gather`), and give every rank
    all rows. Then all ranks have one loss and, once their gradients are averaged, those of one process.
    """
    check_tensor("image", image, dtypes=FLOATS, ndim=2, shape="(N, D)")
    check_tensor("text", text, dtypes=(image.dtype,), ndim=2, shape="(N, D)")
    if image.shape != text.shape:
        raise ValueError(
            f"image and text must have one row per pair and the same D, got {tuple(image.shape)} and "
            f"{tuple(text.shape)}; over ranks gather both"
        )
    check_same_device(text=text, image=image)
    if target is None:
        own = torch.arange(len(image), device=image.device)
        target = TwoHot(own, own, torch.ones(len(image), device=image.device))
    both = target if isinstance(target, tuple) and len(target) == 2 else (target, target)
    options = {"temperature": temperature, "reduction": reduction}
    losses = (info_nce(image, text, both[0], **options), info_nce(text, image, both[1], **options))  # type: ignore[arg-type]
    return 0.5 * (cast(Tensor, losses[0]) + cast(Tensor, losses[1]))
