"""Reading and decoding by NVIDIA DALI: one pipeline definition for the CPU and for NVIDIA GPUs.

On the CPU DALI hands over whole decoded images, and `augment` cuts and makes the views from them where they lie. On a
GPU DALI also cuts and resizes the crops, and `augment` does the rest. The paths, and there the boxes, come in through
`external_source`. Images of kinds that DALI's decoder reads otherwise than Pillow come in decoded by Pillow, as PPM
files in memory.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from torch import Tensor

from sdmp_kernels import augment
from sdmp_kernels.views import EvalView, ViewRecipe, eval_geometry, view_size

from .ahead import Ahead
from .batch import Batch, Loader, Lost, made_batch, paint
from .decoders import looks_whole, needs_pillow
from .images import DECODE_ERRORS, MAX_PIXELS, BadFile, DataError, bad_file, read_size
from .index import bad_files_error, find_bad, open_row
from .schedule import Schedule
from .source import Source, at_once
from .torchvision import PillowBatches

_PREFETCH_BATCHES = 2
_HARDWARE_SHARE = 0.65
"""Of the JPEGs of a batch, what a GPU's hardware engines get, where it has any (DALI's own default)."""
_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

# DALI's graph is built from nodes that its own type stubs call DataNode; here they are only passed on.
Node = Any


class DaliLoader(Loader):
    """Carries out a schedule: DALI's threads decode ahead, and a thread of ours makes the views."""

    name = "dali"

    def __init__(self, schedule: Schedule, *, device: torch.device, workers: int, why: str) -> None:
        self.why = why
        self._schedule = schedule
        self._device = device
        self._workers = workers
        self._pipeline: Any = None
        self._ahead: Ahead | None = None
        self._hold = _Hold()
        self._known: dict[int, BadFile] = {}
        """Rows whose file could not be decoded, which are not tried again."""

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        if len(self) == 0:
            return iter(())
        self._pipeline = self._build(0)
        self._ahead = Ahead(self._make, len(self), self._device)
        return iter(self._ahead)

    def ready(self) -> int | None:
        return None if self._ahead is None else self._ahead.ready()

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._pipeline = None

    def _make(self, position: int) -> Batch:
        schedule = self._schedule
        rows = schedule.rows(position)
        make = self._cut_by_dali if self._device.type == "cuda" else self._cut_by_augment
        if self._pipeline is None:
            self._pipeline = self._build(position)
        try:
            views = make(position, rows)
            lost = {place: self._known[row] for place, row in enumerate(rows.tolist()) if row in self._known}
        except DataError:
            if schedule.fill is None:
                raise
            views, found = self._by_pillow(position, rows)
            lost = dict(found)
        if schedule.fill is not None:
            paint(views, lost, schedule.fill)
        return made_batch(views, rows, schedule.source.labels, lost)

    def _by_pillow(self, position: int, rows: NDArray[np.int64]) -> tuple[list[Tensor], Lost]:
        """A batch that DALI could not decode. It has lost the whole batch and those it was working on: it begins anew
        behind it, and never sees the files again that Pillow finds damaged."""
        views, lost = PillowBatches(self._schedule)[position]
        self._known.update({int(rows[place]): file for place, file in lost.items()})
        self._pipeline = None
        return [view.to(self._device, non_blocking=True) for view in views], lost

    def _cut_by_augment(self, position: int, rows: NDArray[np.int64]) -> list[Tensor]:
        schedule = self._schedule
        (decoded,) = self._run(position)
        images = [torch.from_dlpack(decoded[i]) for i in range(len(rows))]
        source = schedule.source
        for row, image in zip(rows.tolist(), images, strict=True):
            if image.shape[:2] != (source.heights[row], source.widths[row]):
                raise bad_files_error(find_bad(source, [row]), len(source))
        return [
            augment(images, drawn, recipe.size_px, interpolation=recipe.interpolation)
            for recipe, drawn in zip(schedule.recipes, schedule.draws(position, rows), strict=True)
        ]

    def _cut_by_dali(self, position: int, rows: NDArray[np.int64]) -> list[Tensor]:
        schedule = self._schedule
        crops = [torch.from_dlpack(output.as_tensor()) for output in self._run(position)]
        views = [
            augment(crop.permute(0, 3, 1, 2), drawn.whole(recipe.size_px).to(self._device), recipe.size_px)
            for crop, recipe, drawn in zip(crops, schedule.recipes, schedule.draws(position, rows), strict=True)
        ]
        self._hold.until_now(crops)
        return views

    def _build(self, first: int) -> Any:
        gpu = self._device.type == "cuda"
        feed = _Feed(self._schedule, self._workers, boxes=gpu, first=first, known=self._known)
        return _pipeline(
            feed=feed,
            some_in_memory=feed.some_in_memory,
            recipes=self._schedule.recipes if gpu else (),
            batch_size=self._schedule.batch_size,
            num_threads=self._workers,
            device_id=self._device.index if gpu else None,
            prefetch_queue_depth=_PREFETCH_BATCHES,
            # The executor whose CPU outputs may be kept without a copy: each batch gets its own memory.
            exec_dynamic=True,
        )

    def _run(self, position: int) -> Any:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            return self._pipeline.run(stream)
        except DataError:
            raise
        except RuntimeError as error:
            if self._schedule.fill is not None:
                raise DataError("DALI could not decode this batch") from error
            raise self._explain(error, position) from error

    def _explain(self, error: RuntimeError, position: int) -> Exception:
        """DALI names the operator that failed but not the file: look for it in this batch and those decoded ahead."""
        ahead = range(position, min(position + _PREFETCH_BATCHES + 1, len(self._schedule)))
        bad = find_bad(self._schedule.source, [row for step in ahead for row in self._schedule.rows(step)])
        if bad:
            return bad_files_error(bad, len(self._schedule.source))
        message = str(error).strip()
        if "decoders.image" in message or "file.read" in message:
            first = self._schedule.source.name(int(self._schedule.rows(position)[0]))
            return DataError(
                f"DALI could not read or decode an image that Pillow can, in the batch that starts with {first!r}; "
                f"loader='torchvision' uses Pillow. DALI says:\n{message}"
            )
        return error


class _Hold:
    """Keeps DALI's GPU memory alive until what reads it has run.

    DALI may reuse memory as soon as nothing refers to it, while a kernel that reads it is still queued. Waiting for the
    kernel would stop the host; asking whether it is over does not.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def until_now(self, tensors: list[Tensor]) -> None:
        """Hold `tensors` until everything that is queued on the current stream at this moment is over."""
        while self._pending and self._pending[0][0].query():
            self._pending.popleft()
        over = torch.cuda.Event()
        over.record(torch.cuda.current_stream(tensors[0].device))
        self._pending.append((over, tensors))


class _Feed:
    """The source of the pipeline: iteration -> files, where some are in memory also which, then the boxes DALI cuts.

    Files that DALI cannot read on its own, or that Pillow decodes, are fetched by threads as far ahead as DALI decodes.
    """

    def __init__(
        self, schedule: Schedule, workers: int, boxes: bool, first: int = 0, known: dict[int, BadFile] | None = None
    ) -> None:
        """`first`: the position of iteration 0. `known`: rows whose file cannot be decoded, black pictures from then
        on; those that Pillow finds damaged are added where the schedule has a colour for them."""
        self._schedule = schedule
        self._first = first
        self._known = {} if known is None else known
        self._boxes = boxes
        self._pool = ThreadPoolExecutor(max(workers, at_once(schedule.source)))
        self._ahead: dict[int, list[Future[bytes | BadFile]]] = {}
        source = schedule.source
        self.some_in_memory = (
            schedule.fill is not None or bool(source.pillow.any()) or (len(source) > 0 and source.file(0) is None)
        )

    def __call__(self, iteration: int) -> list[Any]:
        schedule, position = self._schedule, self._first + iteration
        if position >= len(schedule):
            raise StopIteration
        rows = schedule.rows(position)
        if self.some_in_memory:
            fetched = self._fetched(position)
            screened = schedule.fill is not None
            in_memory = np.array([screened or _in_memory(schedule.source, row) for row in rows.tolist()])
            arrays: list[Any] = [fetched, in_memory]
        else:
            arrays = [[_as_array(_path(schedule.source, int(row))) for row in rows]]
        if self._boxes:
            sizes = schedule.source.heights[rows], schedule.source.widths[rows]
            for recipe, drawn in zip(schedule.recipes, schedule.draws(position, rows), strict=True):
                if isinstance(recipe, EvalView):
                    resized, corner = eval_geometry(recipe, *sizes)
                    arrays += [corner.astype(np.int32), resized.astype(np.float32)]
                else:
                    box = drawn.box.numpy()
                    arrays += [np.ascontiguousarray(box[:, :2]), np.ascontiguousarray(box[:, 2:])]
        return arrays

    def _fetched(self, position: int) -> list[NDArray[np.uint8]]:
        """Per row its path, or its file's bytes, or where Pillow decodes it those of a PPM file."""
        source = self._schedule.source
        for later in range(position, min(position + 1 + _PREFETCH_BATCHES, len(self._schedule))):
            if later not in self._ahead:
                rows = self._schedule.rows(later).tolist()
                fetch = _fetch if self._schedule.fill is None else _fetch_screened
                self._ahead[later] = [self._pool.submit(fetch, source, row) for row in rows]
        files = [future.result() for future in self._ahead.pop(position)]
        bad = [file for file in files if isinstance(file, BadFile)]
        if bad and self._schedule.fill is None:
            raise bad_files_error(bad, len(source))
        arrays = []
        for row, file in zip(self._schedule.rows(position).tolist(), files, strict=True):
            if isinstance(file, BadFile):
                self._known.setdefault(row, file)
                file = b""
            arrays.append(_as_array(_black(source, row) if row in self._known else file))
        return arrays


def _in_memory(source: Source, row: int) -> bool:
    return bool(source.pillow[row]) or source.file(row) is None


def _fetch(source: Source, row: int) -> bytes | BadFile:
    if not _in_memory(source, row):
        return _path(source, row)
    try:
        return _ppm(open_row(source, row)) if source.pillow[row] else source.read(row)
    except DECODE_ERRORS as error:
        return bad_file(source.name(row), error)


def _fetch_screened(source: Source, row: int) -> bytes | BadFile:
    """The file's bytes where it looks whole and has the size that is expected; else Pillow decodes it, or says why.

    DALI 2.4 ends the process where it cannot make out one file of a batch while its threads decode others: none of that
    kind reaches it. What is damaged within the pixels does, and costs it the batch alone.
    """
    try:
        data = source.read(row)
        expected = int(source.heights[row]), int(source.widths[row])
        plain = not source.pillow[row] and looks_whole(data) and not needs_pillow(data)
        if plain and read_size(data, max(MAX_PIXELS, math.prod(expected))) == expected:
            return data
        return _ppm(open_row(source, row))
    except DECODE_ERRORS as error:
        return bad_file(source.name(row), error)


def _ppm(image: NDArray[np.uint8]) -> bytes:
    return b"P6 %d %d 255\n" % image.shape[1::-1] + image.tobytes()


def _black(source: Source, row: int) -> bytes:
    height, width = int(source.heights[row]), int(source.widths[row])
    return b"P6 %d %d 255\n" % (width, height) + bytes(3 * height * width)


def _path(source: Source, row: int) -> bytes:
    return os.fsencode(source.file(row) or "")


def _as_array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)


@pipeline_def(enable_conditionals=True)
def _pipeline(feed: Any, some_in_memory: bool, recipes: tuple[ViewRecipe | EvalView, ...]) -> Any:
    """The decoded images; with recipes one batch of crops per recipe instead, made on the GPU.

    DALI rewrites this function, and those it calls, to make an `if` on a node a choice per image.
    """
    files, *nodes = fn.external_source(source=feed, num_outputs=1 + some_in_memory + 2 * len(recipes), batch=True)
    if some_in_memory:
        encoded = _encoded(files, nodes[0])
        nodes = nodes[1:]
    else:
        encoded = fn.io.file.read(files)
    image = _decoded(encoded, "mixed" if recipes else "cpu", _HARDWARE_SHARE)
    if not recipes:
        return image
    pairs = zip(recipes, nodes[::2], nodes[1::2])  # noqa: B905  # DALI's rewriting knows no strict=True
    return tuple(_crop(image, recipe, corner, size) for recipe, corner, size in pairs)


@pipeline_def
def _plain_pipeline(files: list[NDArray[np.uint8]], device: str, share: float) -> Any:
    """The decoded images of one batch of files in memory."""
    return _decoded(fn.external_source(source=[files], batch=True), device, share)


def pixels_by_share(source: Source, rows: NDArray[np.integer], device: torch.device, share: float) -> list[Tensor]:
    """Images that DALI decodes, (H, W, 3) on the CPU, with this share of the JPEGs given to hardware engines."""
    gpu = device.type == "cuda"
    pipeline = _plain_pipeline(
        files=[_as_array(source.read(int(row))) for row in rows],
        device="mixed" if gpu else "cpu",
        share=share,
        batch_size=len(rows),
        num_threads=1,
        device_id=device.index if gpu else None,
    )
    (decoded,) = pipeline.run()
    return [torch.from_dlpack(decoded[i]).cpu().clone() for i in range(len(rows))]


def _decoded(encoded: Node, device: str, share: float) -> Node:
    return fn.decoders.image(
        encoded,
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        # What libjpeg-turbo, and with it Pillow, does; the GPU decoder would otherwise repeat chroma pixels.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=share,
    )


def _encoded(files: Node, in_memory: Node) -> Node:
    if in_memory:
        encoded = files
    else:
        encoded = fn.io.file.read(files)
    return encoded


def _crop(image: Node, recipe: ViewRecipe | EvalView, corner: Node, size: Node) -> Node:
    """Cut out, then resized: DALI's resize of a region would let its filter reach beyond the region's edges.

    `size`: of the crop, or for evaluation of the resized image that the view is cut out of.
    """
    interpolation, view = _INTERPOLATION[recipe.interpolation], list(view_size(recipe.size_px))
    if isinstance(recipe, EvalView):
        return fn.slice(fn.resize(image, size=size, interp_type=interpolation), corner, view, axes=[0, 1])
    return fn.resize(fn.slice(image, corner, size, axes=[0, 1]), size=view, interp_type=interpolation)
