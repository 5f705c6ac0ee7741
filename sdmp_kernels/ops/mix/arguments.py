"""What the functions of every backend of `mix` take, grouped by what belongs together.

Letters: N images, M partners, C channels, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sdmp_kernels.plan import MixPlan


class PlanRows(NamedTuple):
    """What a `MixPlan` says about the pixels of each row, as it goes through an operator.

    Attributes:
        rule: (N,) uint8, values of `Rule`.
        partner: (N,) int64, the row of the partners that is mixed in; where mirrored, N - 1 - i.
        lam: (N,) float32 in [0, 1], the share of the row's own pixels.
        box: (N, 4) int32, top, left, height, width in pixels.
        mirrored: whether `partner` is the flip, known without reading it.
        rules: the values of `Rule` that may occur, known likewise.
    """

    rule: Tensor
    partner: Tensor
    lam: Tensor
    box: Tensor
    mirrored: bool
    rules: list[int]

    @classmethod
    def of(cls, plan: MixPlan) -> PlanRows:
        """Those of a plan."""
        return cls(plan.rule, plan.partner, plan.lam, plan.box, plan.mirrored, [int(rule) for rule in plan.rules])


class Norm(NamedTuple):
    """Normalise to (x - mean) / std with x on the 0 to 1 scale: C values each."""

    mean: list[float]
    std: list[float]

    @classmethod
    def of(cls, mean: list[float] | None, std: list[float] | None) -> Norm | None:
        """None where nothing is normalised: both are given or neither."""
        return None if mean is None or std is None else cls(mean, std)


class Outputs(NamedTuple):
    """Where the results are written.

    Attributes:
        mixed: (N, C, H, W), of any strides.
        clean: likewise and of the same dtype, for the unmixed images; None where they are not wanted.
    """

    mixed: Tensor
    clean: Tensor | None


class Erasure(NamedTuple):
    """What is written over boxes of each mixed image, after it was mixed and normalised (random erasing).

    Attributes:
        boxes: (N, R, 5) int32: top, left, height, width in pixels, within the image, and the row of `fill` that the
            box begins with. Later boxes lie over earlier ones; one without height or width erases nothing.
        fill: (F, C) float32, one row or more: the values themselves, on the scale of the result.
        per_pixel: whether every pixel of a box has a row of `fill` of its own, line by line from the first on; else all
            have the first.
    """

    boxes: Tensor
    fill: Tensor
    per_pixel: bool

    @classmethod
    def of(cls, boxes: Tensor | None, fill: Tensor | None, per_pixel: bool) -> Erasure | None:
        """None where nothing is erased: both are given or neither."""
        return None if boxes is None or fill is None else cls(boxes, fill, per_pixel)


class Upstream(NamedTuple):
    """The gradients of the results, (N, C, H, W) of one dtype and any strides; at least one of them."""

    mixed: Tensor | None
    clean: Tensor | None


class Gradients(NamedTuple):
    """Where the gradients of the arguments are written.

    Attributes:
        images: (N, C, H, W), of any strides.
        partners: (M, C, H, W) of the same dtype; None where the images are the partners.
    """

    images: Tensor
    partners: Tensor | None
