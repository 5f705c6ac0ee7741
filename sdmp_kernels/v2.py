"""torchvision v2's `MixUp` and `CutMix` as drop-ins, and `ResizeMix` beside them; torchvision itself is not needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sdmp_kernels._checks import check_choice, check_integer, check_number
from sdmp_kernels._drop_in import LABELS, Drawing, Draws, check_ignored, class_numbers, dense_target, soft_rows
from sdmp_kernels.ops.mix import mix
from sdmp_kernels.plan import MixPlan, Rule, TwoHot, check_size, draw_boxes, make_plan


class _Mixing(Drawing, nn.Module):
    """What the three classes share: finding images and labels in a sample, and mixing both by one plan."""

    rule: ClassVar[Rule]

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        num_classes: int | None = None,
        labels_getter: Callable[[Any], Any] | str | None = "default",
        per: str = "batch",
        labels: str = "dense",
        seed: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        """Make the transform; torchvision's arguments, and `per`, `labels`, `seed` and `ignore_index`.

        Args:
            alpha: lam ~ Beta(alpha, alpha), above 0.
            num_classes: K; needed where labels are class numbers and the result is dense.
            labels_getter: "default" takes the second input if it is a tensor, or what its key with "label" holds; or a
                callable from the inputs to the labels among them.
            per: "batch" draws one lam and box for the batch, as torchvision; "sample" one for every sample.
            labels: "dense" returns torchvision's (N, K) targets; "two_hot" a `TwoHot`, for this package's losses.
            seed: of this object's draws, an integer in [0, 2**64). By default one made of torch's seed
                (`torch.initial_seed()` when the object is made) and of how many such objects this process has made
                before: an object made anew for every batch or epoch draws afresh, and after `torch.manual_seed` a
                program that makes its objects in the same order draws the same. In DataLoader workers torch's seed of
                the worker, another one every epoch, is folded in. No global random state is read or written. Ranks
                that call `torch.manual_seed` with one number draw alike, as with torchvision: add the rank to it, or
                to `seed`. Processes forked by other means than a DataLoader draw alike too. `copy.deepcopy` of an
                object without `seed` draws afresh; a pickled object goes on where it was.
            ignore_index: a class number that stands for no label, as in `Mixup` of `sdmp_kernels.timm`.

        Raises:
            TypeError, ValueError: for anything else, naming the argument.
        """
        super().__init__()
        self.alpha = check_number("alpha", alpha, low=0.0, high=1e6, what="a number above 0")
        if self.alpha == 0:
            raise ValueError(f"alpha must be a number above 0, got {alpha!r}")
        self.num_classes = num_classes
        if num_classes is not None:
            self.num_classes = check_integer("num_classes", num_classes, low=1, what="a number of classes, or None")
        if labels_getter is not None and labels_getter != "default" and not callable(labels_getter):
            raise ValueError(f"labels_getter must be 'default', a callable or None, got {labels_getter!r}")
        self._labels_getter = labels_getter
        check_choice("per", per, ("batch", "sample"))
        self.per = per
        check_choice("labels", labels, LABELS)
        self.labels = labels
        self.ignore_index = check_ignored(ignore_index)
        self._draws = Draws(seed)

    def forward(self, *inputs: Any, plan: MixPlan | None = None) -> Any:
        """Mix the images and labels of a sample.

        Args:
            inputs: (images, labels), or any nested structure of tuples, lists and mappings that holds them. Mixed
                are all `tv_tensors.Image` (N, C, H, W) and `tv_tensors.Video` (N, T, C, H, W) in it, or, where it has
                none, the first tensor that is not the labels; everything else is passed through. Integer images too.
            plan: mix by this plan instead of drawing one.

        Returns:
            The same structure with new images and labels; the inputs are not changed.

        Raises:
            TypeError, ValueError: naming what is wrong, before anything is computed.
        """
        if not inputs:
            raise TypeError("forward needs images and labels, but nothing was given")
        sample = inputs if len(inputs) > 1 else inputs[0]
        leaves, spec = tree_flatten(sample)
        _refuse_others(leaves, type(self).__name__)
        labels = self._find_labels(sample, leaves)
        where = _image_places(leaves, labels)
        size = _check_images([leaves[i] for i in where], len(labels))
        if plan is None:
            plan = self.draw(len(labels), size)
        elif not isinstance(plan, MixPlan):
            raise TypeError(f"plan must be a MixPlan, got {type(plan).__name__}; make one with draw or draw_plan")
        mixed = self._mix_labels(labels, plan)
        outputs = [mixed if leaf is labels else leaf for leaf in leaves]
        for i in where:
            outputs[i] = _mix_images(leaves[i], plan.to(leaves[i].device))
        return tree_unflatten(outputs, spec)

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
        n = check_integer("n", n, low=0, what="a number of images, 0 or more")
        size = check_size(size)
        rng = self._draws.next()
        count = n if self.per == "sample" else min(n, 1)
        rule = np.full(count, int(self.rule), dtype=np.uint8)
        drawn = rng.beta(self.alpha, self.alpha, size=count)
        boxes = self._draw_boxes(rng, rule, drawn, size)
        rows = np.arange(n) if self.per == "sample" else np.zeros(n, dtype=np.int64)
        previous = (np.arange(n) - 1) % max(n, 1)
        return make_plan(
            self.rule.name.lower(),
            torch.from_numpy(drawn[rows].astype(np.float32)),
            size,
            box=torch.from_numpy(boxes[rows]),
            partner=torch.from_numpy(previous),
        )

    def _draw_boxes(
        self, rng: np.random.Generator, rule: np.ndarray, drawn: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        return draw_boxes(rng, rule, drawn, (0.1, 0.9), size, clip=False)

    def _find_labels(self, sample: Any, leaves: list[Any]) -> Tensor:
        getter = self._labels_getter
        if getter is None:
            raise ValueError("labels_getter=None finds no labels, but mixing needs them; give 'default' or a callable")
        labels = getter(sample) if callable(getter) else _default_labels(sample)
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be a tensor, got {type(labels).__name__}; check labels_getter")
        if labels.ndim not in (1, 2):
            raise ValueError(f"labels must have shape (N,) or (N, num_classes), got {tuple(labels.shape)}")
        if not any(leaf is labels for leaf in leaves):
            raise ValueError("labels must be a tensor of the sample itself, but labels_getter returned another one")
        if self.labels == "two_hot" and labels.ndim == 2:
            raise ValueError(f"labels='two_hot' needs class numbers (N,), got shape {tuple(labels.shape)}; use 'dense'")
        if labels.ndim == 2 and self.num_classes is not None and labels.shape[1] != self.num_classes:
            raise ValueError(f"labels must have num_classes={self.num_classes} columns, got {labels.shape[1]}")
        if labels.ndim == 1 and self.num_classes is None and self.labels == "dense":
            raise ValueError("num_classes must be given where labels are class numbers (N,)")
        return labels

    def _mix_labels(self, labels: Tensor, plan: MixPlan) -> Tensor | TwoHot:
        plan = plan.to(labels.device)
        if labels.ndim == 1:
            numbers = class_numbers(
                "labels", labels.as_subclass(Tensor), len(labels), self.num_classes, self.ignore_index
            )
            target = plan.label_target(numbers)
            if self.labels == "two_hot":
                return target
            assert self.num_classes is not None  # _find_labels refused
            return dense_target(target, self.num_classes, ignored=self.ignore_index)
        rows = plan.label_target(torch.arange(len(labels), device=labels.device))
        kind = labels.dtype if labels.is_floating_point() else torch.float32
        return soft_rows(labels, rows).to(kind)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, num_classes={self.num_classes}, per={self.per!r}, labels={self.labels!r}"


class MixUp(_Mixing):
    """Mixup of a batch of images and labels: lam * x_i + (1 - lam) * x_(i-1).

    Each sample is mixed with the one before it, the first with the last. The inputs are not changed; integer images
    are mixed in float32 and rounded once. Called as torchvision's: `images, labels = transform(images, labels)`, in a
    training loop or as part of a `collate_fn`.

    Attributes:
        seed: the seed, given or made: a new object with this `seed` repeats the draws of this one.
        step: number of draws so far. Draws depend on (seed, step, worker) alone: set it to resume.

    Source: Mixup, Zhang et al. 2018.
    """

    rule = Rule.MIXUP


class CutMix(_Mixing):
    """CutMix of a batch: a box of x_(i-1) at the same place of x_i; labels weigh by its area.

    The box has half sides floor(side * sqrt(1 - lam) / 2) about a centre anywhere, and is clipped at the border.

    Each sample is mixed with the one before it, the first with the last. The inputs are not changed; integer images
    are mixed in float32 and rounded once. Called as torchvision's: `images, labels = transform(images, labels)`, in a
    training loop or as part of a `collate_fn`.

    Attributes:
        seed: the seed, given or made: a new object with this `seed` repeats the draws of this one.
        step: number of draws so far. Draws depend on (seed, step, worker) alone: set it to resume.

    Source: CutMix, Yun et al. 2019.
    """

    rule = Rule.CUTMIX

    def _draw_boxes(
        self, rng: np.random.Generator, rule: np.ndarray, drawn: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        boxes = np.zeros((len(rule), 4), dtype=np.int32)
        for axis, extent in enumerate(size):
            half = np.floor(0.5 * np.sqrt(1 - drawn) * extent).astype(np.int64)
            centre = rng.integers(0, extent, size=len(rule))
            start = np.maximum(centre - half, 0)
            boxes[:, axis] = start
            boxes[:, 2 + axis] = np.minimum(centre + half, extent) - start
        return boxes


class ResizeMix(_Mixing):
    """ResizeMix of a batch: the whole of x_(i-1), resized into a box of x_i; labels weigh by its area.

    lam is mapped onto [0.1, 0.9], the box has sides floor(side * sqrt(1 - lam)) and lies inside, as in `draw_plan`.

    Each sample is mixed with the one before it, the first with the last. The inputs are not changed; integer images
    are mixed in float32 and rounded once. Called as torchvision's: `images, labels = transform(images, labels)`, in a
    training loop or as part of a `collate_fn`.

    Attributes:
        seed: the seed, given or made: a new object with this `seed` repeats the draws of this one.
        step: number of draws so far. Draws depend on (seed, step, worker) alone: set it to resume.

    Source: ResizeMix, Qin et al. 2020.
    """

    rule = Rule.RESIZEMIX


def _types(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a module if it is loaded at all: without it, no input can be of them."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names if hasattr(loaded, name)) if loaded else ()


def _refuse_others(leaves: list[Any], name: str) -> None:
    kinds = _types("PIL.Image", "Image") + _types("torchvision.tv_tensors", "BoundingBoxes", "Mask", "KeyPoints")
    found = [type(leaf).__name__ for leaf in leaves if kinds and isinstance(leaf, kinds)]
    if found:
        raise ValueError(f"{name} takes no PIL images, bounding boxes, masks or keypoints, but got {found[0]}")


def _default_labels(sample: Any) -> Any:
    """The labels of (images, labels), of (images, mapping) or of a mapping, by a key that says so."""
    second = sample[1] if isinstance(sample, (tuple, list)) and len(sample) > 1 else sample
    if isinstance(second, Tensor):
        return second
    keys = [key for key in second if isinstance(key, str)] if isinstance(second, Mapping) else []
    exact = [key for key in keys if key.lower() == "labels"]
    close = [key for key in keys if "label" in key.lower()]
    if not exact + close:
        raise ValueError(
            "labels were not found: the inputs must be (images, labels), or hold a mapping with a key such as "
            f"'labels', got {type(second).__name__}; or give labels_getter a callable"
        )
    return second[(exact + close)[0]]


def _image_places(leaves: list[Any], labels: Tensor) -> list[int]:
    """Positions of the images: all tv_tensors images and videos, else the first tensor that is not the labels."""
    explicit, any_tv = _types("torchvision.tv_tensors", "Image", "Video"), _types("torchvision.tv_tensors", "TVTensor")
    places = [i for i, leaf in enumerate(leaves) if explicit and isinstance(leaf, explicit) and leaf is not labels]
    if not places:
        tensors = (i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf is not labels)
        places = [i for i in tensors if not (any_tv and isinstance(leaves[i], any_tv))][:1]
    if not places:
        raise TypeError("no images were found: give a tensor (N, C, H, W) beside the labels")
    return places


def _check_images(images: list[Tensor], rows: int) -> tuple[int, int]:
    """The one (H, W) of all images."""
    video = _types("torchvision.tv_tensors", "Video")
    sizes = set()
    for image in images:
        ndim, shape = (5, "(N, T, C, H, W)") if video and isinstance(image, video) else (4, "(N, C, H, W)")
        if image.ndim != ndim:
            raise ValueError(f"images must be a batch of shape {shape}, got {tuple(image.shape)}")
        if image.shape[0] != rows:
            raise ValueError(f"images are {image.shape[0]} but labels {rows}; give one label per image")
        sizes.add((image.shape[-2], image.shape[-1]))
    if len(sizes) > 1:
        raise ValueError(f"images must be of one size to share a box, got {sorted(sizes)}")
    return sizes.pop()


def _mix_images(images: Tensor, plan: MixPlan) -> Tensor:
    """Mixed images or videos, of the class they came in; a video's frames are mixed alike."""
    pixels = images.as_subclass(Tensor)
    mixed = cast(Tensor, mix(pixels.flatten(1, 2) if pixels.ndim == 5 else pixels, plan)).view_as(pixels)
    tv_tensors = sys.modules.get("torchvision.tv_tensors")
    if type(images) is Tensor or tv_tensors is None or not isinstance(images, tv_tensors.TVTensor):
        return mixed
    return tv_tensors.wrap(mixed, like=images)
