"""timm's losses of mixed batches, for two-hot targets as well: no dense target is made of class numbers.

Letters: N rows, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdmp_kernels._checks import check_choice, check_number
from sdmp_kernels._drop_in import class_numbers
from sdmp_kernels.ops.soft_cross_entropy import soft_cross_entropy
from sdmp_kernels.plan import TwoHot


class SoftTargetCrossEntropy(nn.Module):
    """timm's `SoftTargetCrossEntropy`: the mean of -sum_k target_k log softmax(x)_k.

    Args:
        smoothing: s in [0, 1] of targets that are class numbers or two-hot, which the maker of a two-hot target leaves
            to the loss: (1 - s) * target + s / K. Dense targets are taken as they are, as timm does.
        ignore_index: a class number that stands for no label; a mixed row keeps the label of its other image.
        class_weight: (K,) weights of the classes. Both as in `soft_cross_entropy`, and not for dense targets.
    """

    class_weight: Tensor | None

    def __init__(self, smoothing: float = 0.0, *, ignore_index: int = -100, class_weight: Tensor | None = None) -> None:
        super().__init__()
        self.smoothing = check_number("smoothing", smoothing, low=0.0, high=1.0, what="a number in [0, 1]")
        self.ignore_index = ignore_index
        self.register_buffer("class_weight", class_weight)

    def forward(self, x: Tensor, target: Tensor | TwoHot) -> Tensor:
        """The loss.

        Args:
            x: (N, K) logits.
            target: a `TwoHot` of N rows, (N,) class numbers, or (N, K) rows.

        Returns:
            () float32, or of the dtype that timm's has for a dense target. Half logits with float32 targets are taken
            to float32 first, also where autocast does not do that (bfloat16 on a CPU).
        """
        if isinstance(target, Tensor) and target.shape == x.shape:
            return -(target * F.log_softmax(x, dim=-1, dtype=torch.promote_types(x.dtype, target.dtype))).sum(-1).mean()
        return soft_cross_entropy(
            x,
            _two_hot(target, x, self.ignore_index),
            label_smoothing=self.smoothing,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
        )


class BinaryCrossEntropy(nn.Module):
    """timm's `BinaryCrossEntropy`: a binary cross-entropy per class, with timm's arguments.

    For class numbers and two-hot targets the loss of s / K in every column is corrected in the two columns that hold
    more, since it is linear in the target: (N, K) targets are never made.

    Args:
        smoothing: s in [0, 1) of class numbers and two-hot targets: (1 - s) * target + s / K.
        target_threshold: targets above it count as 1, all others as 0.
        weight: (K,) per class.
        reduction: "mean", "sum" or "none".
        sum_classes: sum over classes, then mean over rows.
        pos_weight: of the positive part, (K,) or a number.
        smooth_dense: dense targets are moved towards 0.5 by s.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        smoothing: float = 0.1,
        target_threshold: float | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        sum_classes: bool = False,
        pos_weight: Tensor | float | None = None,
        smooth_dense: bool = False,
    ) -> None:
        super().__init__()
        self.smoothing = check_number("smoothing", smoothing, low=0.0, high=1.0, what="a number in [0, 1)")
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.target_threshold = target_threshold
        self.reduction = "none" if sum_classes else reduction
        self.sum_classes = sum_classes
        self.smooth_dense = smooth_dense
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", None if pos_weight is None else torch.as_tensor(pos_weight))

    def forward(self, x: Tensor, target: Tensor | TwoHot) -> Tensor:
        """The loss.

        Args:
            x: (N, K) logits.
            target: a `TwoHot` of N rows, (N,) class numbers, or (N, K) rows.

        Returns:
            (), or (N, K) with reduction "none"; float32 for half logits, unless dense targets are half too.
        """
        if isinstance(target, Tensor) and target.shape == x.shape:
            losses = self._dense(x.to(torch.promote_types(x.dtype, target.dtype)), target)
        else:
            losses = self._sparse(x if x.dtype == torch.float64 else x.float(), _two_hot(target, x))
        if self.sum_classes:
            return losses.sum(-1).mean()
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def _dense(self, x: Tensor, target: Tensor) -> Tensor:
        if self.smooth_dense and self.smoothing:
            target = target * (1 - self.smoothing) + 0.5 * self.smoothing
        if self.target_threshold is not None:
            target = target.gt(self.target_threshold).to(target.dtype)
        return self._elements(x, target)

    def _elements(self, x: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, target, self.weight, pos_weight=self.pos_weight, reduction="none")

    def _sparse(self, x: Tensor, target: TwoHot) -> Tensor:
        """(N, K): the loss of s / K everywhere, and what the two columns of the target add to it."""
        off = self.smoothing / x.shape[-1]
        share = target.weight.to(x.dtype)
        same = target.first == target.second
        # The value of each of the two columns; where they are one, the first has it all.
        values = off + (1 - self.smoothing) * torch.stack([torch.where(same, 1.0, share), 1 - share], dim=1)
        if self.target_threshold is not None:
            off = float(off > self.target_threshold)
            values = values.gt(self.target_threshold).to(x.dtype)
        more = values - off
        more = torch.stack([more[:, 0], torch.where(same, 0.0, more[:, 1])], dim=1)
        columns = torch.stack([target.first, target.second], dim=1)
        base = self._elements(x, x.new_tensor(off).expand_as(x))
        return base.scatter_add(1, columns, more * self._slope(x, columns))

    def _slope(self, x: Tensor, columns: Tensor) -> Tensor:
        """(N, 2) by how much the loss of a column grows with its target."""
        at = x.gather(1, columns)
        slope = -at
        if self.pos_weight is not None:
            positive = self.pos_weight.to(x.dtype).expand(x.shape[-1])[columns]
            slope = slope + (positive - 1) * F.softplus(-at)
        return slope if self.weight is None else slope * self.weight.to(x.dtype).expand(x.shape[-1])[columns]


def _two_hot(target: Tensor | TwoHot, x: Tensor, ignored: int | None = None) -> TwoHot:
    if isinstance(target, TwoHot):
        return target
    labels = class_numbers("target", target, len(x), x.shape[-1], ignored)
    return TwoHot(labels, labels, torch.ones(len(labels), device=labels.device))
