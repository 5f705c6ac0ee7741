"""timm's `Mixup` as a drop-in: its arguments, its laws, its results, with one fused call in every mode."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from sdmp_kernels._checks import check_channels_first, check_choice, check_integer, check_number, check_tensor
from sdmp_kernels._drop_in import (
    LABELS,
    Drawing,
    Draws,
    check_ignored,
    choose,
    class_numbers,
    dense_target,
    law_of,
    soft_rows,
)
from sdmp_kernels._operators import unwatched
from sdmp_kernels.ops.mix import mix
from sdmp_kernels.plan import (
    MixPlan,
    Rule,
    TwoHot,
    check_size,
    compiled_draws,
    compiled_law,
    draw_boxes,
    flipped_plan,
    signed,
    trusted,
)

_MODES = ("batch", "pair", "elem")
_IMAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Shares that ResizeMix maps its draw onto, as `draw_plan` does (paper: the pasted image is never hidden nor all).
_RESIZEMIX_RANGE = (0.1, 0.9)


class Mixup(Drawing):
    """Mixup and CutMix of a labelled batch as `timm.data.Mixup` does them, and ResizeMix beside them.

    Row i is mixed with row N-1-i. Every mode is one fused call, on the device of the images. What timm gets wrong is
    right here: odd batches work (the middle row is its own partner), uint8 images are mixed in float32 and rounded
    once, and lam and the targets are float32 whatever the dtype of the images. Features are mixed as images are, with
    gradients to the layer they come from.

    Args:
        mixup_alpha: Mixup's lam ~ Beta(alpha, alpha); 0 switches Mixup off.
        cutmix_alpha: the same for CutMix. Its box has sides floor(side * sqrt(1 - lam)), a centre anywhere, and is
            clipped at the border.
        cutmix_minmax: (low, high) shares of the sides within [0, 1]; then CutMix is on, its sides are drawn from that
            range independently, its box lies inside, and `cutmix_alpha` is not used.
        prob: chance that a batch (mode "batch"), pair or element is mixed at all.
        switch_prob: chance to paste (CutMix, ResizeMix) instead of blending (Mixup) where both are on. With CutMix
            and ResizeMix both on, each takes half of it; without Mixup, half of everything. 2/3 makes three equal.
        mode: "batch" draws one rule, lam and box for the batch, "pair" one for rows i and N-1-i, "elem" one per row.
        correct_lam: labels weigh by the clipped box (True) or, for CutMix, by lam as drawn (False).
        label_smoothing: s in [0, 1]: dense targets are (1 - s) * target + s / K; multi-label ones go towards 0.5.
            Not applied to `labels="two_hot"`: give it to `soft_cross_entropy` then.
        num_classes: K.
        multi_label: targets are (N, K) rows of independent labels, smoothed towards 0.5. Floating (N, K) rows without
            it are shares of classes (soft labels), smoothed towards 1 / K. Both are mixed row by row.
        resizemix_alpha: ResizeMix's drawn lam ~ Beta(alpha, alpha), mapped onto [0.1, 0.9]; its box lies inside the
            image and labels weigh by its area. 0 (the default) switches it off: timm has none.
        labels: "dense" returns timm's (N, K) float32 target; "two_hot" a `TwoHot`, for this package's losses.
        seed: of this object's draws, an integer in [0, 2**64). By default one made of torch's seed
            (`torch.initial_seed()` when the object is made) and of how many such objects this process has made
            before: an object made anew for every batch or epoch draws afresh, and after `torch.manual_seed` a program
            that makes its objects in the same order draws the same. In DataLoader workers torch's seed of the worker,
            another one every epoch, is folded in. No global random state is read or written. Ranks that call
            `torch.manual_seed` with one number draw alike, as with torchvision: add the rank to it, or to `seed`.
            Processes forked by other means than a DataLoader draw alike too. `copy.deepcopy` of an object without
            `seed` draws afresh; a pickled object goes on where it was.
        ignore_index: a class number that stands for no label, such as -100. A mixed image keeps the label of its other
            source, at that one's share; dense rows of none are zeros, and two-hot ones keep the number, for the loss.

    Attributes:
        mixup_enabled: set to False to switch mixing off; targets are made all the same, and nothing is drawn.
        seed: the seed, given or made: a new object with this `seed` repeats the draws of this one.
        step: number of draws so far. Draws depend on (seed, step, worker) alone: set it to resume.
        last_plan: the `MixPlan` of the last call, to mix another view alike with `plan=`.

    Example::

        mixup = Mixup(0.8, 1.0, mode="elem", resizemix_alpha=1.0)
        images, target = mixup(images, target)  # images: (N, C, H, W), changed in place

    Source: Mixup, Zhang et al. 2018; CutMix, Yun et al. 2019; ResizeMix, Qin et al. 2020.
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        multi_label: bool = False,
        *,
        resizemix_alpha: float = 0.0,
        labels: str = "dense",
        seed: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        self.mixup_alpha = _alpha("mixup_alpha", mixup_alpha)
        self.cutmix_alpha = _alpha("cutmix_alpha", cutmix_alpha)
        self.resizemix_alpha = _alpha("resizemix_alpha", resizemix_alpha)
        self.cutmix_minmax = _minmax(cutmix_minmax)
        if self.cutmix_minmax is not None:
            self.cutmix_alpha = 1.0
        self.mix_prob = check_number("prob", prob, low=0.0, high=1.0, what="a probability in [0, 1]")
        self.switch_prob = check_number("switch_prob", switch_prob, low=0.0, high=1.0, what="a probability in [0, 1]")
        self.label_smoothing = check_number(
            "label_smoothing", label_smoothing, low=0.0, high=1.0, what="a number in [0, 1]"
        )
        self.num_classes = check_integer("num_classes", num_classes, low=1, what="a number of classes, 1 or more")
        self.multi_label = bool(multi_label)
        check_choice("mode", mode, _MODES)
        self.mode = mode
        self.correct_lam = bool(correct_lam)
        check_choice("labels", labels, LABELS)
        if labels == "two_hot" and self.multi_label:
            raise ValueError("labels='two_hot' needs class numbers, but multi_label=True has dense rows; use 'dense'")
        self.labels = labels
        self.mixup_enabled = True
        self.last_plan: MixPlan | None = None
        self.ignore_index = check_ignored(ignore_index)
        self._draws = Draws(seed)

    def __call__(self, x: Tensor, target: Tensor, plan: MixPlan | None = None) -> tuple[Tensor, Tensor | TwoHot]:
        """Mix `x` in place and make its target.

        Args:
            x: (N, C, H, W) uint8, float16, bfloat16 or float32, any N. Overwritten, also where it requires a
                gradient (features of a layer): that flows through the mixing, unless the layer saved its output, as
                ReLU does; give x.clone() then. Of more dimensions, such as (N, C, T, H, W), the last two are H and W;
                with Mixup alone fewer do, such as (N, D).
            target: (N,) integer class numbers in [0, K), or (N, K) rows: with `multi_label`, or floating.
            plan: replay this plan instead of drawing one (needs `correct_lam=True`: a plan holds the counted lam).

        Returns:
            (x, target): the same tensor `x`, and (N, K) float32, or a `TwoHot`.

        Raises:
            TypeError, ValueError: naming the argument, before anything is written.
        """
        if plan is None and (found := self._at_once(x, target)) is not None:
            self.last_plan, dense = found
            _mix_in_place(x, x, self.last_plan)
            return x, dense
        if plan is not None and not isinstance(plan, MixPlan):
            raise TypeError(f"plan must be a MixPlan, got {type(plan).__name__}; make one with draw or draw_plan")
        if plan is not None and not self.correct_lam:
            raise ValueError("plan cannot be replayed with correct_lam=False: a plan holds the counted lam only")
        rules = self._rules(self.mixup_enabled) if plan is None else plan.rules
        images = _as_images(x, rules)
        target = self._check_target(target, len(x))
        lam = None
        if plan is None:
            plan, lam = self._draw(len(x), (images.shape[2], images.shape[3]))
        if len(plan) != len(x):
            raise ValueError(f"plan has {len(plan)} rows but x {len(x)}; draw it with n={len(x)}")
        here = plan.to(x.device)
        labels = self._target(here if target.device == x.device else plan.to(target.device), lam, target)
        if rules != (Rule.KEEP,):
            _mix_in_place(x, images, here)
        self.last_plan = here
        return x, labels

    def _at_once(self, x: Tensor, target: Tensor) -> tuple[MixPlan, Tensor] | None:
        """The plan and dense target of a call on plain images and class numbers on a CPU, by one compiled call, the
        same numbers; None for any other, before anything is drawn.
        """
        unusual = self.cutmix_minmax is not None or self.ignore_index is not None or self.multi_label
        if unusual or not (self.mixup_enabled and self.correct_lam and self.labels == "dense"):
            return None
        if not (type(x) is type(target) is Tensor and x.is_cpu and target.is_cpu and target.dtype == torch.int64):
            return None
        if x.ndim != 4 or target.shape != x.shape[:1] or not target.is_contiguous() or x.dtype not in _IMAGES:
            return None
        if (torch.is_grad_enabled() and x.requires_grad) or not (
            x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        ):
            return None
        n, _, height, width = x.shape
        compiled = compiled_draws()
        if compiled is None or n == 0 or (width <= 4 and not x.is_floating_point()) or not unwatched():
            return None
        alphas = (self.mixup_alpha, self.cutmix_alpha, self.resizemix_alpha)
        law, rules = _compiled_law(alphas, self.switch_prob, self.mix_prob, (height, width))
        if law is None:
            return None
        units = n if self.mode == "elem" else 1 if self.mode == "batch" else (n + 1) // 2
        words = map(signed, self._draws.words())
        *columns, labels = compiled.draw_mixup_cpu.default(
            law, target, n, units, *words, self.num_classes, self.label_smoothing
        )
        if len(labels) != n:  # there is a label that is no class
            return None
        self._draws.step += 1
        return trusted(*columns, (height, width), True, rules), labels

    def draw(self, n: int, size: tuple[int, int]) -> MixPlan:
        """Draw the plan of the next step, as a call would.

        Args:
            n: number of images, 0 or more.
            size: (H, W) of the images in pixels.

        Returns:
            A `MixPlan` of n rows, on the CPU.

        Raises:
            TypeError, ValueError: for anything else, naming the argument.
        """
        return self._draw(check_integer("n", n, low=0, what="a number of images, 0 or more"), check_size(size))[0]

    def _draw(self, n: int, size: tuple[int, int], *, enabled: bool | None = None) -> tuple[MixPlan, Tensor | None]:
        """The plan, and without `correct_lam` the (N,) lam that labels take instead of the plan's.

        enabled: whether anything is mixed; default `mixup_enabled`.
        """
        enabled = self.mixup_enabled if enabled is None else enabled
        unit = self._units(n)
        count = int(unit.max(initial=-1)) + 1
        if enabled:
            rng = self._draws.next()
            rule, drawn = self._draw_rules(rng, count)
            boxes = self._draw_boxes(rng, rule, drawn, size)
        else:
            rule, drawn = np.full(count, int(Rule.KEEP), dtype=np.uint8), np.ones(count)
            boxes = np.zeros((count, 4), dtype=np.int32)
        rule, drawn = rule[unit], drawn[unit].astype(np.float32)
        plan = flipped_plan(rule, drawn, boxes[unit], size, self._rules(enabled))
        if self.correct_lam or self.cutmix_minmax is not None:
            return plan, None
        uncorrected = np.where(rule == Rule.CUTMIX, drawn, plan.lam.numpy())
        return plan, torch.from_numpy(uncorrected)

    def _units(self, n: int) -> np.ndarray:
        """(n,) which of the draws each row takes: one for all, one per pair (the middle row its own), one per row."""
        if self.mode == "batch":
            return np.zeros(n, dtype=np.int64)
        rows = np.arange(n)
        return rows if self.mode == "elem" else np.minimum(rows, n - 1 - rows)

    def _chances(self) -> dict[Rule, float]:
        """How likely each rule is for what is mixed at all."""
        return _chances((self.mixup_alpha, self.cutmix_alpha, self.resizemix_alpha), self.switch_prob)

    def _rules(self, enabled: bool) -> tuple[Rule, ...]:
        """The rules that may occur, the same for every call."""
        return _occurring(self._chances(), self.mix_prob) if enabled else (Rule.KEEP,)

    def _draw_rules(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) rules and drawn lam."""
        mixed = rng.random(count) < self.mix_prob
        rule = choose(rng, self._chances(), count)
        alphas = (1.0, self.mixup_alpha, self.cutmix_alpha, self.resizemix_alpha)
        if count == 1:  # the same numbers, without arrays of parameters
            alpha = alphas[rule[0]]
            drawn = rng.beta(alpha, alpha, size=1)
        else:
            each = np.array(alphas)[rule]
            drawn = rng.beta(each, each)
        if not mixed.all():
            rule[~mixed] = Rule.KEEP
        return rule, drawn

    def _draw_boxes(
        self, rng: np.random.Generator, rule: np.ndarray, drawn: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        """(count, 4) boxes: clipped or min-max ones for CutMix, inside ones for ResizeMix, zeros elsewhere."""
        cuts = rule == int(Rule.CUTMIX)
        boxes = draw_boxes(rng, np.where(cuts, np.uint8(Rule.KEEP), rule), drawn, _RESIZEMIX_RANGE, size, clip=False)
        if not cuts.any():
            return boxes
        if self.cutmix_minmax is not None:
            cut = _minmax_boxes(rng, len(rule), self.cutmix_minmax, size)
        else:
            cut = draw_boxes(rng, rule, drawn, _RESIZEMIX_RANGE, size, clip=True)
        return cut if cuts.all() else np.where(cuts[:, None], cut, boxes)

    def _check_target(self, target: Tensor, rows: int) -> Tensor:
        soft = isinstance(target, Tensor) and target.ndim == 2 and target.is_floating_point()
        if not self.multi_label and not soft:
            return class_numbers("target", target, rows, self.num_classes, self.ignore_index)
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor of shape (N, {self.num_classes}), got {type(target).__name__}")
        if target.shape != (rows, self.num_classes):
            why = "with multi_label=True" if self.multi_label else "where labels are soft"
            raise ValueError(f"target must have shape ({rows}, {self.num_classes}) {why}, got {tuple(target.shape)}")
        if self.labels == "two_hot":
            raise ValueError("labels='two_hot' needs class numbers, but target has rows; use 'dense'")
        return target

    def _target(self, plan: MixPlan, lam: Tensor | None, target: Tensor) -> Tensor | TwoHot:
        rows = torch.arange(len(target), device=target.device) if target.ndim == 2 else target
        two_hot = plan.label_target(rows)
        if lam is not None:
            two_hot = two_hot._replace(weight=lam.to(target.device, non_blocking=True))
        if target.ndim == 2:
            towards = 0.5 if self.multi_label else 1 / self.num_classes
            return soft_rows(target.float() * (1 - self.label_smoothing) + towards * self.label_smoothing, two_hot)
        if self.labels == "two_hot":
            return two_hot
        return dense_target(two_hot, self.num_classes, self.label_smoothing, self.ignore_index)


def _chances(alphas: tuple[float, float, float], switch_prob: float) -> dict[Rule, float]:
    """How likely each rule is for what is mixed at all; alphas: of Mixup, CutMix and ResizeMix."""
    blend = alphas[0] > 0
    paste = [rule for rule, alpha in zip((Rule.CUTMIX, Rule.RESIZEMIX), alphas[1:], strict=True) if alpha > 0]
    if not blend and not paste:
        raise ValueError(
            "mixup_alpha, cutmix_alpha and resizemix_alpha are all 0 and cutmix_minmax is None: give one of them, "
            "or set mixup_enabled=False to make targets only"
        )
    share = switch_prob if blend and paste else float(bool(paste))
    return ({Rule.MIXUP: 1 - share} if blend else {}) | {rule: share / len(paste) for rule in paste}


def _occurring(chances: dict[Rule, float], mix_prob: float) -> tuple[Rule, ...]:
    """The rules that may occur, where each is mixed with chance `mix_prob`."""
    rules = [rule for rule, chance in chances.items() if chance > 0 and mix_prob > 0]
    return tuple(([Rule.KEEP] if mix_prob < 1 else []) + rules)


@functools.lru_cache(maxsize=256)
def _compiled_law(
    alphas: tuple[float, float, float], switch_prob: float, mix_prob: float, size: tuple[int, int]
) -> tuple[Tensor | None, tuple[Rule, ...]]:
    """The law of a drop-in as compiled code reads it, None where it cannot draw by that; and the rules that may occur.

    One rule and lam for all rows are a matter of how many rows are drawn; CutMix's boxes are clipped, ResizeMix's not.
    """
    chances = _chances(alphas, switch_prob)
    rules, edges = law_of(chances)
    numbers = compiled_law(rules, edges, (1.0, *alphas), size, mix_prob, *_RESIZEMIX_RANGE, False, False, False, False)
    return numbers, _occurring(chances, mix_prob)


def _as_images(x: Tensor, rules: tuple[Rule, ...]) -> Tensor:
    """`x` as (N, C, H, W), a view where its strides allow one; refused where it cannot be mixed in place."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor of shape (N, C, H, W), got {type(x).__name__}")
    if x.ndim == 0 or (x.ndim < 4 and any(rule > Rule.MIXUP for rule in rules)):
        raise ValueError(
            f"x must have shape (N, C, H, W), got {tuple(x.shape)}; what has no height and width is mixed by Mixup "
            "alone, with cutmix_alpha=0, resizemix_alpha=0 and cutmix_minmax=None"
        )
    check_tensor("x", x, dtypes=_IMAGES, ndim=x.ndim, shape="(N, C, H, W)")
    if x.ndim == 4:
        check_channels_first("x", x)
    if rules != (Rule.KEEP,):
        if any(length > 1 and stride == 0 for length, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError("x is an expanded tensor whose elements share memory; give x.contiguous() to mix in place")
        owner = x if x._base is None else x._base
        if torch.is_grad_enabled() and owner.requires_grad and owner.is_leaf:
            raise ValueError(
                "x is a leaf that requires a gradient, which nothing may change in place; give x.clone(), or use "
                "torch.no_grad()"
            )
    if x.ndim < 4:
        rows = x.reshape(len(x), 1, 1, *x.shape[1:]) if x.ndim < 3 else x[:, None]
        return rows[..., None] if x.ndim == 1 else rows
    return x if x.ndim == 4 else x.flatten(1, -3)


def _mix_in_place(x: Tensor, images: Tensor, plan: MixPlan) -> None:
    """Mix `x` by `plan`, `images` being `x` as (N, C, H, W): at once, or through a copy that autograd can follow."""
    followed = torch.is_grad_enabled() and x.requires_grad
    if not followed and images.data_ptr() == x.data_ptr():
        mix(images, plan, out=images)
    else:
        x.copy_(cast(Tensor, mix(images, plan)).view_as(x))


def _alpha(name: str, alpha: float) -> float:
    return check_number(name, alpha, low=0.0, high=1e6, what="a number in [0, 1e6], 0 to switch it off")


def _minmax(minmax: Sequence[float] | None) -> tuple[float, float] | None:
    if minmax is None:
        return None
    if isinstance(minmax, str) or not isinstance(minmax, Sequence) or len(minmax) != 2:
        raise TypeError(f"cutmix_minmax must be (low, high) within [0, 1] or None, got {minmax!r}")
    low = check_number("cutmix_minmax[0]", minmax[0], low=0.0, high=1.0, what="a share in [0, 1]")
    high = check_number("cutmix_minmax[1]", minmax[1], low=low, high=1.0, what=f"a share in [{low:g}, 1]")
    return low, high


def _minmax_boxes(
    rng: np.random.Generator, count: int, minmax: tuple[float, float], size: tuple[int, int]
) -> np.ndarray:
    """(count, 4) boxes inside the image whose sides are uniform integers in [int(low * side), int(high * side))."""
    boxes = np.zeros((count, 4), dtype=np.int32)
    for axis, extent in enumerate(size):
        low, high = int(extent * minmax[0]), int(extent * minmax[1])
        cut = rng.integers(low, max(high, low + 1), size=count)  # a range that rounds to nothing is its lower end
        boxes[:, axis] = rng.integers(0, extent - cut + 1)
        boxes[:, 2 + axis] = cut
    return boxes
