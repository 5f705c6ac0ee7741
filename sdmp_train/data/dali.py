"""Decoding and augmentation by NVIDIA DALI: one pipeline definition for the CPU and for NVIDIA GPUs.

DALI reads and decodes the files and carries out the numbers drawn in `views.py`; it draws nothing itself. The numbers
and the paths, a few hundred bytes per image, come in through `external_source`. Images of kinds that its decoder reads
otherwise than Pillow come in decoded by Pillow, as PPM files in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as math
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from torch import Tensor

from .batch import Batch, Loader
from .images import DECODE_ERRORS, BadFile, DataError, describe
from .index import Index, bad_files_error, find_bad, open_row
from .schedule import Schedule
from .views import EvalParams, EvalView, ViewParams, ViewRecipe, blur_windows

_PREFETCH_BATCHES = 2
_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

_GREY = [0.299, 0.587, 0.114] * 3
"""A 3 x 3 matrix on RGB, row by row: luma with the ITU-R 601 weights that Pillow uses, three times over."""

# DALI's graph is built from nodes that its own type stubs call DataNode; here they are only passed on.
Node = Any


class DaliLoader(Loader):
    """Carries out a schedule with a DALI pipeline. Decoding runs ahead of the caller by two batches."""

    name = "dali"

    def __init__(self, schedule: Schedule, *, device: torch.device, workers: int, why: str) -> None:
        self.why = why
        self._schedule = schedule
        self._device = device
        self._workers = workers
        self._pipeline: Any = None
        self._iteration = 0

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        if len(self) == 0:
            return
        self._pipeline = self._build()
        mine = self._iteration
        hold = _Hold()
        for position in range(len(self)):
            if self._iteration != mine:
                return
            views = self._run(position)
            if self._device.type == "cuda":
                views = hold.copy(views)
            rows = self._schedule.rows(position)
            yield Batch(
                views=tuple(view.permute(0, 3, 1, 2) for view in views),
                ids=torch.from_numpy(rows.astype(np.int64)),
                labels=torch.from_numpy(self._schedule.index.labels[rows]),
            )

    def close(self) -> None:
        # An iteration still under way sees the new number and ends.
        self._iteration += 1
        self._pipeline = None

    def _build(self) -> Any:
        gpu = self._device.type == "cuda"
        return _views_pipeline(
            feed=_Feed(self._schedule, self._workers),
            some_by_pillow=bool(self._schedule.index.pillow.any()),
            recipes=self._schedule.recipes,
            names=[_input_names(recipe) for recipe in self._schedule.recipes],
            gpu=gpu,
            batch_size=self._schedule.batch_size,
            num_threads=self._workers,
            device_id=self._device.index if gpu else None,
            prefetch_queue_depth=_PREFETCH_BATCHES,
            # The executor whose CPU outputs may be kept without a copy: each batch gets its own memory.
            exec_dynamic=True,
        )

    def _run(self, position: int) -> list[Tensor]:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = self._pipeline.run(stream)
        except DataError:
            raise
        except RuntimeError as error:
            raise self._explain(error, position) from error
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]

    def _explain(self, error: RuntimeError, position: int) -> Exception:
        """DALI names the operator that failed but not the file: look for it in this batch and those decoded ahead."""
        ahead = range(position, min(position + _PREFETCH_BATCHES + 1, len(self._schedule)))
        bad = find_bad(self._schedule.index, [row for step in ahead for row in self._schedule.rows(step)])
        if bad:
            return bad_files_error(bad)
        message = str(error).strip()
        if "decoders.image" in message or "file.read" in message:
            first = self._schedule.index.path(int(self._schedule.rows(position)[0]))
            return DataError(
                f"DALI could not read or decode an image that Pillow can, in the batch that starts with {first!r}; "
                f"loader='torchvision' uses Pillow. DALI says:\n{message}"
            )
        return error


class _Hold:
    """Copies DALI's GPU memory to torch's, and keeps DALI's alive until the copy has run.

    DALI may reuse memory as soon as nothing refers to it, while the copy is still queued on torch's stream. Waiting for
    it would stop the host; asking whether it is over does not.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        while self._pending and self._pending[0][0].query():
            self._pending.popleft()
        copies = [tensor.clone() for tensor in tensors]
        over = torch.cuda.Event()
        over.record(torch.cuda.current_stream(tensors[0].device))
        self._pending.append((over, tensors))
        return copies


class _Feed:
    """The source of the pipeline: iteration -> files, where some are Pillow's also which, then the views' arrays."""

    def __init__(self, schedule: Schedule, workers: int) -> None:
        self._schedule = schedule
        self._pool = ThreadPoolExecutor(workers)

    def __call__(self, position: int) -> list[Any]:
        schedule = self._schedule
        if position >= len(schedule):
            raise StopIteration
        rows = schedule.rows(position)
        by_pillow = schedule.index.pillow[rows]
        arrays: list[Any] = [self._files(rows)]
        if schedule.index.pillow.any():
            arrays.append(by_pillow)
        for recipe, drawn in zip(schedule.recipes, schedule.params(position, rows), strict=True):
            inputs = _inputs(drawn)
            arrays += [np.ascontiguousarray(inputs[name]) for name in _input_names(recipe)]
        return arrays

    def _files(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Per row its path, or where Pillow decodes the image as the bytes of a PPM file."""
        index = self._schedule.index
        each = self._pool.map if index.pillow[rows].any() else map
        files = list(each(partial(_path_or_ppm, index), rows.tolist()))
        bad = [file for file in files if isinstance(file, BadFile)]
        if bad:
            raise bad_files_error(bad)
        return [np.frombuffer(file, dtype=np.uint8) for file in files if isinstance(file, bytes)]


def _path_or_ppm(index: Index, row: int) -> bytes | BadFile:
    if not index.pillow[row]:
        return os.fsencode(index.path(row))
    try:
        image = open_row(index, row)
    except DECODE_ERRORS as error:
        return BadFile(index.path(row), describe(error))
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


def _input_names(recipe: ViewRecipe | EvalView) -> list[str]:
    """What the pipeline reads for a view; DALI wants nothing fed that is not used."""
    if isinstance(recipe, EvalView):
        return ["resized", "corner"]
    names = ["corner", "extent", "flip"]
    if recipe.jitter_prob > 0:
        strengths = zip(("brightness", "contrast", "saturation", "hue"), recipe.jitter, strict=True)
        names += [name for name, strength in strengths if strength > 0]
    if recipe.gray_prob > 0:
        names += ["gray"]
    if recipe.blur_prob > 0:
        names += ["blurred", "sigma", "window"]
    if recipe.solarize_prob > 0:
        names += ["solarized"]
    return names


def _inputs(drawn: ViewParams | EvalParams) -> dict[str, NDArray[Any]]:
    if isinstance(drawn, EvalParams):
        return {"resized": drawn.resized.astype(np.float32), "corner": drawn.corner}
    per_pixel = (-1, 1, 1, 1)
    saturation = drawn.saturation[:, None, None]
    return {
        "corner": drawn.box[:, :2],
        "extent": drawn.box[:, 2:],
        "flip": drawn.flip.astype(np.int32),
        "brightness": drawn.brightness,
        "contrast": drawn.contrast.reshape(per_pixel),
        "saturation": saturation * np.eye(3, dtype=np.float32)
        + (1 - saturation) * np.array(_GREY, dtype=np.float32).reshape(3, 3),
        "hue": drawn.hue.reshape(per_pixel),
        "gray": drawn.gray,
        "blurred": drawn.sigma > 0,
        # Rows without blur need a valid sigma too, although their branch is not taken.
        "sigma": np.where(drawn.sigma > 0, drawn.sigma, np.float32(1)),
        "window": blur_windows(drawn),
        "solarized": drawn.solarize,
    }


@pipeline_def(enable_conditionals=True)
def _views_pipeline(
    feed: Any, some_by_pillow: bool, recipes: tuple[ViewRecipe | EvalView, ...], names: list[list[str]], gpu: bool
) -> tuple[Node, ...]:
    """DALI rewrites this function, and those it calls, to make an `if` on a node a choice per image."""
    count = 1 + some_by_pillow + sum(len(mine) for mine in names)
    files, *nodes = fn.external_source(source=feed, num_outputs=count, batch=True)
    if some_by_pillow:
        encoded = _encoded(files, nodes[0])
        nodes = nodes[1:]
    else:
        encoded = fn.io.file.read(files)
    image = fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        # What libjpeg-turbo, and with it Pillow, does; the GPU decoder would otherwise repeat chroma pixels.
        jpeg_fancy_upsampling=True,
    )
    fed = iter(nodes)
    return tuple(
        _view(image, recipe, {name: next(fed) for name in mine}, gpu)
        for recipe, mine in zip(recipes, names)  # noqa: B905  # DALI's rewriting knows no strict=True
    )


def _encoded(files: Node, by_pillow: Node) -> Node:
    if by_pillow:
        encoded = files
    else:
        encoded = fn.io.file.read(files)
    return encoded


def _view(image: Node, recipe: ViewRecipe | EvalView, fed: dict[str, Node], gpu: bool) -> Node:
    interpolation = _INTERPOLATION[recipe.interpolation]
    if isinstance(recipe, EvalView):
        view = fn.resize(image, size=fed["resized"], interp_type=interpolation)
        return fn.slice(view, fed["corner"], [recipe.size_px, recipe.size_px], axes=[0, 1])
    view = fn.slice(image, fed["corner"], fed["extent"], axes=[0, 1])
    view = fn.resize(view, size=[recipe.size_px, recipe.size_px], interp_type=interpolation)
    if "brightness" in fed:
        view = fn.brightness_contrast(view, brightness=fed["brightness"])
    if "contrast" in fed:
        view = _contrast(view, fed["contrast"].gpu() if gpu else fed["contrast"])
    if "saturation" in fed:
        view = fn.coord_transform(view, M=fed["saturation"], dtype=types.UINT8)
    if "hue" in fed:
        view = _hue(view, fed["hue"].gpu() if gpu else fed["hue"], recipe.jitter[3])
    if "gray" in fed:
        view = _gray(view, fed["gray"])
    if "blurred" in fed:
        view = _blur(view, fed["blurred"], fed["sigma"], fed["window"])
    if "solarized" in fed:
        view = _solarize(view, fed["solarized"])
    # Last, also where nothing is flipped: an operator writes one dense batch, a merged branch does not.
    return fn.flip(view, horizontal=fed["flip"])


def _contrast(view: Node, factor: Node) -> Node:
    """Contrast is about the image's own mean luma, which only the data know: hence arithmetic, not an argument."""
    mean = fn.coord_transform(fn.reductions.mean(view, axes=[0, 1], keep_dims=True), M=_GREY)
    return fn.cast(mean + factor * (view - mean), dtype=types.UINT8)


def _hue(view: Node, turns: Node, largest: float) -> Node:
    """Turn the hue in HSV, as torchvision does; DALI's own operators turn it in YIQ, which moves colours twice as far.

    Turning by d sixths of the circle, |d| <= 1, keeps the largest channel value V and the smallest m, and changes
    channel x to clamp(2 x - mid - s d (V - m), m, V) with mid the middle value and s the sign of the difference of the
    two other channels. (In HSV a channel is V - (V - m) T(k), T a trapezoid of period 6 and k the hue plus 5, 3 or 1;
    2 x - mid is that trapezoid with its plateaus continued to peaks, on which a turn is a shift.)
    """
    passes = ceil(6 * largest)
    sixths = turns * (6 / passes)
    for _ in range(passes):
        # Wider than uint8, in which sums would wrap around. Single channels, because DALI broadcasts slowly on the CPU.
        r, g, b = (fn.cast(fn.slice(view, [c], [1], axes=[2]), dtype=types.INT16) for c in range(3))
        high = math.max(math.max(r, g), b)
        low = math.min(math.min(r, g), b)
        middle = r + g + b - high - low
        shift = sixths * (high - low)
        turned = [
            math.max(math.min(x + x - middle - math.clamp(difference, -1, 1) * shift, high), low)
            for x, difference in ((r, g - b), (g, b - r), (b, r - g))
        ]
        view = fn.cast(fn.cat(*turned, axis=2), dtype=types.UINT8)
    return view


def _gray(view: Node, gray: Node) -> Node:
    # An `if` on a node sends only those images of the batch for which it holds through the branch.
    if gray:
        view = fn.coord_transform(view, M=_GREY, dtype=types.UINT8)
    return view


def _blur(view: Node, blurred: Node, sigma: Node, window: Node) -> Node:
    if blurred:
        view = fn.gaussian_blur(view, sigma=sigma, window_size=window)
    return view


def _solarize(view: Node, solarized: Node) -> Node:
    if solarized:
        view = view ^ ((view >= 128) * types.Constant(255, dtype=types.UINT8))
    return view
