"""timm's prefetching route as drop-ins: workers collate bytes and draw a plan; the device mixes in one fused pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from sdmp_kernels._drop_in import keep_plan
from sdmp_kernels.ops.mix import mix
from sdmp_kernels.plan import MixPlan, TwoHot
from sdmp_kernels.timm.erasing import RandomErasing
from sdmp_kernels.timm.mixup import Mixup

# Those of ImageNet, timm's defaults.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Collated(NamedTuple):
    """A batch on its way from a worker to the device: nothing of it is mixed yet.

    Attributes:
        images: (N, C, H, W) uint8.
        target: (N,) int64 class numbers, or (N, K) rows.
        plan: what is to be mixed with what.
        lam: (N,) float32 that labels take instead of the plan's, where `correct_lam` is False; else None.
    """

    images: Tensor
    target: Tensor
    plan: MixPlan
    lam: Tensor | None


class FastCollateMixup(Mixup):
    """timm's `FastCollateMixup`: a `collate_fn` for uint8 images, with the arguments and laws of `Mixup`.

    timm mixes here, on the CPU, in the workers, image by image, and rounds to bytes. This one only stacks the bytes and
    draws the plan; this package's `PrefetchLoader` mixes on the device, in the pass that normalises, without rounding
    in between. Batches of an odd length work. timm's own `PrefetchLoader` cannot unpack what this returns, and raises.

    Attributes:
        mixup_enabled: read by `PrefetchLoader` for every batch it hands out, so that False acts at once, also where
            workers persist. A plan is drawn all the same.
        last_plan: of the last batch that was handed out, in the process that holds the loader.
    """

    def __call__(self, batch: Sequence[tuple[Any, Any]], _: object = None) -> Collated:  # type: ignore[override]
        """Stack a batch and draw its plan.

        Args:
            batch: pairs of a (C, H, W) uint8 array or tensor, and a class number or a row.

        Returns:
            `Collated`.

        Raises:
            TypeError, ValueError: for images of another dtype or of several sizes, or labels that do not fit.
        """
        images = default_collate([_as_tensor(image) for image, _ in batch])
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(
                f"images must be (C, H, W) uint8, got a batch of {tuple(images.shape)} {images.dtype}; give "
                "use_prefetcher=True, with which timm's transforms leave images as bytes, or use Mixup after the loader"
            )
        target = self._check_target(torch.as_tensor(default_collate([label for _, label in batch])), len(images))
        plan, lam = self._draw(len(images), (images.shape[2], images.shape[3]), enabled=True)
        return Collated(images, target, plan, lam)

    def __getstate__(self) -> dict[str, Any]:
        # Spawned workers get a copy, and have no use for a plan that may lie on a GPU.
        return self.__dict__ | {"last_plan": None}

    def finish(self, batch: Collated) -> tuple[MixPlan | None, Tensor | TwoHot]:
        """The plan to mix a batch by (None: not at all), and its target, where the batch is.

        Args:
            batch: what a call returned, on any one device.

        Returns:
            (plan, target): target as `Mixup` makes it.
        """
        if not self.mixup_enabled:
            kept = keep_plan(len(batch.images), batch.plan.size).to(batch.target.device)
            return None, self._target(kept, None, batch.target)
        return batch.plan, self._target(batch.plan, batch.lam, batch.target)


class PrefetchLoader:
    """timm's `PrefetchLoader`: batches of bytes go to the device ahead of time and come out as a model takes them.

    Mixing, normalising and then random erasing by timm's laws are one fused pass, which reads the bytes and writes
    `img_dtype`. On a GPU it runs on a stream of its own, while the step before computes.

    Args:
        loader: of `Collated` batches, from a `FastCollateMixup`, or of (images, target) with (N, C, H, W) uint8.
        mean, std: on the 0 to 1 scale. Where they are not `channels` many, their average is taken, as timm does.
        channels: C.
        device: where batches go. "cpu" works as well.
        img_dtype: of the images that come out; default float32.
        fp16: timm's old spelling of `img_dtype=torch.float16`.
        re_prob, re_mode, re_count, re_num_splits: `RandomErasing`'s probability, mode, max_count and num_splits.

    Attributes:
        mixup_enabled: whether the `FastCollateMixup` behind it mixes; set it to False to end mixing, at once.

    Example::

        collate = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
        for images, target in PrefetchLoader(DataLoader(data, 128, collate_fn=collate), device=torch.device("cpu")):
            ...
    """

    def __init__(
        self,
        loader: Any,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
        channels: int = 3,
        device: torch.device | str = torch.device("cuda"),  # noqa: B008  timm's
        img_dtype: torch.dtype | None = None,
        fp16: bool = False,
        re_prob: float = 0.0,
        re_mode: str = "const",
        re_count: int = 1,
        re_num_splits: int = 0,
    ) -> None:
        self.loader = loader
        self.device = torch.device(device)
        self.img_dtype = torch.float16 if fp16 else img_dtype or torch.float32
        self.mean, self.std = _per_channel(mean, channels), _per_channel(std, channels)
        self.random_erasing: RandomErasing | None = None
        if re_prob > 0:
            self.random_erasing = RandomErasing(re_prob, mode=re_mode, max_count=re_count, num_splits=re_num_splits)
        self._stream: torch.cuda.Stream | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        cuda = self.device.type == "cuda"
        if cuda and self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        stream = self._stream
        waiting: tuple[Tensor, Any, MixPlan | None] | None = None
        for batch in self.loader:
            if stream is not None:
                # What the step freed may be handed out below; nothing writes to it before that step is done.
                stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                coming = self._prepare(batch)
            if waiting is not None:
                yield self._handed_out(*waiting)
            if stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
            waiting = coming
        if waiting is not None:
            yield self._handed_out(*waiting)

    def _handed_out(self, images: Tensor, target: Any, plan: MixPlan | None) -> tuple[Tensor, Any]:
        if self._mixup is not None and plan is not None:
            self._mixup.last_plan = plan
        return images, target

    def _prepare(self, batch: Any) -> tuple[Tensor, Any, MixPlan | None]:
        """A batch of the loader, on the device: normalised, mixed and erased, with its target and its plan."""
        parts, plan, mixup = [_moved(part, self.device) for part in batch], None, self._mixup
        if mixup is not None:
            plan, target = mixup.finish(Collated(*parts))
            images = parts[0]
        else:
            images, target = parts
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise TypeError(f"images of the loader must be uint8, or floats of 0 to 255, got {images.dtype}")
        if images.dtype != torch.uint8:
            images = images / 255
        n, channels, size = len(images), images.shape[1], (images.shape[2], images.shape[3])
        used = keep_plan(n, size).to(images.device) if plan is None else plan
        erasing = self.random_erasing
        erased = None if erasing is None else erasing.erasure(n, channels, size, images.device)
        images = cast(Tensor, mix(images, used, mean=self.mean, std=self.std, dtype=self.img_dtype, erase=erased))
        return images, target, plan

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Any:
        """The sampler of the loader, whose `set_epoch` a training loop calls."""
        return self.loader.sampler

    @property
    def batch_sampler(self) -> Any:
        """The batch sampler of the loader."""
        return self.loader.batch_sampler

    @property
    def dataset(self) -> Any:
        """The data set of the loader."""
        return self.loader.dataset

    @property
    def _mixup(self) -> FastCollateMixup | None:
        collate = getattr(self.loader, "collate_fn", None)
        return collate if isinstance(collate, FastCollateMixup) else None

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed."""
        return self._mixup is not None and self._mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self._mixup is not None:
            self._mixup.mixup_enabled = enabled


def create_loader(*args: Any, **options: Any) -> Any:
    """timm's `create_loader`, with this package's `PrefetchLoader` where timm would put its own.

    Args:
        args, options: those of the installed timm's `create_loader`, in its order, with its defaults.

    Returns:
        A `PrefetchLoader`, or with `use_prefetcher=False` the loader that timm makes.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: for a `FastCollateMixup` without the prefetcher: nothing would mix.
    """
    from timm.data import loader as theirs

    given = inspect.signature(theirs.create_loader).bind(*args, **options)
    given.apply_defaults()
    asked = given.arguments
    if isinstance(asked["collate_fn"], FastCollateMixup) and not asked["use_prefetcher"]:
        raise ValueError(
            "collate_fn=FastCollateMixup needs use_prefetcher=True, since the prefetcher mixes; "
            "without it use Mixup after the loader"
        )
    made = theirs.create_loader(*args, **options)
    if not asked["use_prefetcher"] or isinstance(made, PrefetchLoader):
        return made
    erasing = made.random_erasing
    return PrefetchLoader(
        made.loader,
        mean=asked["mean"],
        std=asked["std"],
        channels=made.mean.numel(),
        device=asked["device"],
        img_dtype=made.img_dtype,
        re_prob=0.0 if erasing is None else erasing.probability,
        re_mode=asked["re_mode"],
        re_count=asked["re_count"],
        re_num_splits=0 if erasing is None else erasing.num_splits,
    )


def _per_channel(values: Sequence[float] | float, channels: int) -> tuple[float, ...]:
    given = tuple(float(v) for v in values) if isinstance(values, (tuple, list)) else (float(cast(float, values)),)
    return given if len(given) == channels else (sum(given) / len(given),) * channels


def _as_tensor(image: Any) -> Tensor:
    # Arrays of flipped images have negative strides, which torch does not take.
    return torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else torch.as_tensor(image)


def _moved(part: Any, device: torch.device) -> Any:
    return part.to(device, non_blocking=True) if hasattr(part, "to") else part
