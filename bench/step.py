"""Is SDMP nearly free in a training step, and does the loader keep up? `python -m bench step`.

A step here is `sdmp_train.loop.step`, the trainer's own, on views that already lie on the device. The arm
"plain PyTorch" is the same step with the mixing and the loss that a user would write without this project.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import predict
from bench.environment import shared_data
from bench.harness import Absent, Arm, Call, Inputs, Setting
from bench.mix import eager_normalise, literal_loop
from sdmp_kernels import use_backend
from sdmp_kernels._backends import OPS

if TYPE_CHECKING:
    from sdmp_train.config import Config
    from sdmp_train.data import Batch
    from sdmp_train.methods.contrast import Features, Plan
    from sdmp_train.methods.method import At, Loss, Method
    from sdmp_train.methods.mocov3 import MoCoV3
    from sdmp_train.training import Training

PHOTOGRAPHS = "imagenet-sample.tar"


def settings(device: torch.device, size: str) -> Iterator[Setting]:
    """The step on resident views, then the loader alone and the step fed by it."""
    batch = {"tiny": 4, "quick": 64}.get(size, 64 if device.type == "cpu" else 256)
    yield step_setting(device, size, batch)
    if device.type == "cuda" and size in ("default", "full"):
        yield step_setting(device, size, 2 * batch)
    yield loader_setting(device, size, batch)
    yield fed_setting(device, size, batch)


def config_of(mixing: str, device: torch.device, size: str, batch: int) -> Config:
    """A small ViT on the CPU; ViT-S at 224 px in bf16 on a GPU."""
    from sdmp_train.presets import get_preset

    config = get_preset("quickstart" if device.type == "cpu" or size == "tiny" else "table1/mocov3-vit_s-sdmp")
    data, model = config.data, config.model
    if size == "tiny":
        data = dataclasses.replace(data, image_px=16)
        model = dataclasses.replace(model, width=16, depth=1, heads=2)
    method = dataclasses.replace(config.method, mixing=mixing)
    # Views come from `make_inputs`; the schedules only need a length.
    optim = dataclasses.replace(config.optim, batch_size=batch, epochs=max(2, int(config.optim.warmup_epochs) + 1))
    return dataclasses.replace(config, data=data, model=model, method=method, optim=optim)


def make_training(
    config: Config, device: torch.device, method_class: type[Method] | None = None, precision: Any = None
) -> Training:
    """A training at its first step; `precision`: default bf16 on a GPU, fp32 elsewhere."""
    from sdmp_train.distributed import World
    from sdmp_train.training import assemble

    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    # A step between two lines: where one is written the host waits for the device, and looks at the features.
    run = dataclasses.replace(config.run, precision=precision, log_every_steps=10**9)
    config = dataclasses.replace(config, run=run)
    return assemble(config, World(device), steps_per_epoch=1000, method_class=method_class)


def as_batch(views: tuple[Tensor, ...]) -> Batch:
    """Views as a loader hands them over; this method looks at no label."""
    from sdmp_train.data import Batch

    ids = torch.arange(len(views[0]))
    return Batch(views, ids, torch.full_like(ids, -1), torch.ones_like(ids, dtype=torch.bool))


def one_step(training: Training, batch: Batch) -> Tensor:
    """The trainer's own step; returns the loss."""
    from sdmp_train.guard import StopRequest
    from sdmp_train.loop import step

    return step(training, [batch], StopRequest()).loss.total


@functools.cache
def plain_class() -> type[MoCoV3]:
    """MoCo v3 + SDMP with plain PyTorch in place of `mix` and `info_nce`, as a user would write it."""
    from sdmp_train.methods.method import Loss
    from sdmp_train.methods.mocov3 import MoCoV3

    class PlainMoCoV3(MoCoV3):
        def mix(self, batch: Batch, plan: Plan) -> dict[str, Tensor]:
            views = batch.views
            ordered = (views[1], views[0], *views[2:]) if plan.swap else views
            images: dict[str, Tensor] = {}
            for view, raw in zip(self.view_names, ordered, strict=True):
                images[view] = normalised(raw, self.setup.data, self.setup.dtype)
                if view in plan.mixes:
                    # The plan is fetched to the host row by row, which is where such a loop waits for the GPU.
                    images[view + "~"] = literal_loop(images[view], plan.mixes[view])
            return images

        def loss(self, features: Features, plan: Plan, batch: Batch, at: At) -> Loss:
            total, scale = torch.zeros((), device=self.world.device), self.temperature
            for term in self.terms:
                logits = features.queries[term.query] @ features.keys[term.key].T / scale
                first, second, weight = self.target(term, plan)
                one, two = (F.one_hot(column, logits.shape[1]) for column in (first, second))
                dense = weight[:, None] * one + (1 - weight)[:, None] * two
                total = total + term.weight * 2 * scale * F.cross_entropy(logits, dense)
            return Loss(total, {})

    return PlainMoCoV3


def normalised(raw: Tensor, data: Any, dtype: torch.dtype) -> Tensor:
    """uint8 views as the encoder sees them, by three passes of plain PyTorch."""
    if data.mean == (0.485, 0.456, 0.406):
        return eager_normalise(raw, dtype)
    mean, std = (torch.tensor(v, device=raw.device).view(1, 3, 1, 1) for v in (data.mean, data.std))
    return raw.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


def step_setting(device: torch.device, size: str, batch: int) -> Setting:
    """One training step: plain MoCo v3, with SDMP, and with SDMP in plain PyTorch."""
    words = "ViT-S/16 bf16 224 px" if device.type == "cuda" and size != "tiny" else "small ViT float32"
    mocov3 = "sdmp_train: MoCo v3 without mixing (two momentum forwards, like SDMP's three)"
    arms = [
        _step_arm("MoCo v3 + SDMP", "sdmp_train: this project's trainer", "ours", device, size, batch, "sdmp", None),
        _step_arm("MoCo v3", mocov3, "eager", device, size, batch, "none", None),
        _step_arm(
            "MoCo v3 + SDMP, plain PyTorch",
            "the same step with a per-sample mixing loop and dense labels",
            "eager",
            device,
            size,
            batch,
            "sdmp",
            plain_class,
        ),
    ]
    if device.type == "cuda" and size != "tiny":
        compiled = "sdmp_train with --compile: the same step, its backbones by torch.compile"
        arms.append(
            _step_arm("MoCo v3 + SDMP, compiled", compiled, "compile", device, size, batch, "sdmp", None, compiled=True)
        )
    return Setting(
        op="step",
        name=f"training step, {words}, batch {batch}",
        config={"batch": batch, "images": batch},
        inputs=functools.partial(_noise, device, size, batch),
        truth=lambda _: [],
        plain=lambda _: [],
        outputs=(),
        dtype=torch.float32,
        arms=arms,
        paced=True,
        predict=functools.partial(predict.beside, device),
    )


def on_fake_images(mixing: str, batch: int) -> Callable[[], Tensor]:
    """A call of a GPU's step (`config_of`) whose tensors are made by torch's fake ones: shapes and dtypes alone.

    It is not the first, in which the optimiser makes its moments.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    training = make_training(config_of(mixing, gpu, "full", batch), cpu, precision="bf16")
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run() -> Tensor:
        with mode:
            px = training.config.data.size_px
            views = [torch.empty((batch, 3, *px), dtype=torch.uint8) for _ in range(2)]
            return one_step(training, as_batch(tuple(v.contiguous(memory_format=torch.channels_last) for v in views)))

    run()
    return run


def _noise(device: torch.device, size: str, batch: int, copy: int) -> Inputs:
    """Two uint8 views as the loader hands them over: channels_last, on the device."""
    px = {"tiny": 16}.get(size, 32 if device.type == "cpu" else 224)
    generator = torch.Generator(device).manual_seed(copy)
    shape = (batch, 3, px, px)
    views = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator) for _ in range(2)]
    return {"batch": as_batch(tuple(v.contiguous(memory_format=torch.channels_last) for v in views))}


def _step_arm(
    name: str,
    what: str,
    kind: str,
    device: torch.device,
    size: str,
    batch: int,
    mixing: str,
    method_class: Callable[[], type[MoCoV3]] | None,
    *,
    compiled: bool = False,
) -> Arm:
    def bind(inputs: Inputs) -> Call:
        config = config_of(mixing, device, size, batch)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, compile=compiled))
        training = make_training(config, device, method_class() if method_class else None)
        return Call(lambda: [one_step(training, inputs["batch"])])

    def check(inputs: Inputs, results: Sequence[Tensor]) -> float:
        """The first step's loss against the one that the references give from the same start."""
        training = make_training(config_of(mixing, device, size, batch), device)
        with contextlib.ExitStack() as stack:
            for op in OPS:
                stack.enter_context(use_backend("reference", op))
            expected = one_step(training, inputs["batch"])
        return float((results[0] - expected).abs())

    # bf16 encoders amplify a last-bit difference of the pixels; a wrong plan or target moves the loss far more.
    return Arm(name, what, kind, bind, check, tolerance=2e-2 if device.type == "cuda" else 1e-3)


# The loader. Batches it prepared while another arm ran are drawn untimed, and a timing spans several batches: else
# interleaving would make decoding look free.

DRAINED, TIMED = 4, 4


@functools.cache
def pictures(kind: str) -> Any:
    """The index of a folder: "photographs" beside the repository, the embedded "shapes", or a "few" gradients."""
    from sdmp_train.data import open_folder, shapes_folder

    folder = Path(_scratch().name)
    if kind == "shapes":
        return open_folder(shapes_folder(folder), cache_dir=folder)
    if kind == "few":
        from PIL import Image

        (folder / "few").mkdir()
        for number in range(8):
            Image.linear_gradient("L").rotate(45 * number).convert("RGB").save(folder / "few" / f"{number}.jpg")
        return open_folder(folder / "few", split=None, cache_dir=folder)
    found = shared_data(PHOTOGRAPHS)
    if found is None:
        raise Absent(f"the sample photographs are not here (shared/data/{PHOTOGRAPHS}, in the repository or beside it)")
    with tarfile.open(found) as archive:
        archive.extractall(folder / "photographs", filter="data")
    pictures = next(d for d in (folder / "photographs").iterdir() if d.is_dir())
    return open_folder(pictures, split=None, cache_dir=folder)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as the process, and is removed with it."""
    return tempfile.TemporaryDirectory(prefix="bench-")


@dataclasses.dataclass(frozen=True)
class Feed:
    """What the loader is asked for: photographs at 224 px on a GPU, elsewhere embedded shapes at the step's size."""

    device: torch.device
    size: str
    batch: int

    @property
    def kind(self) -> str:
        """Which pictures: see `pictures`."""
        return "few" if self.size == "tiny" else "photographs" if self.device.type == "cuda" else "shapes"

    @property
    def px(self) -> int:
        """Side of a view."""
        return 16 if self.size == "tiny" else 32 if self.device.type == "cpu" else 224

    @property
    def words(self) -> str:
        """For the setting's name."""
        source = "ImageNet photographs" if self.kind == "photographs" else "drawn shapes of 64 px"
        return f"{source} to two views of {self.px} px, batch {self.batch}"

    def batches(self, loader: str) -> Iterator[Any]:
        """Endless batches of two BYOL views, by this loader.

        Raises:
            Absent: where it cannot run here.
        """
        index = pictures(self.kind)
        from sdmp_train.data import DataError, byol_views, make_loader

        if len(index) < self.batch:
            raise Absent(f"there are {len(index)} pictures, fewer than one batch of {self.batch}")
        asked: Any = loader
        try:
            return iter(
                make_loader(
                    index,
                    byol_views(self.px),
                    batch_size=self.batch,
                    steps=10**6,
                    seed=0,
                    device=self.device,
                    loader=asked,
                )
            )
        except DataError as error:
            raise Absent(str(error)) from None


def draining(batches: Iterator[Any], each: Callable[[Batch], Sequence[Tensor]]) -> Call:
    """A call that takes several batches in a row, after drawing untimed what was prepared beforehand."""

    def reset() -> None:
        for _ in range(DRAINED):
            next(batches)

    def run() -> Sequence[Tensor]:
        results: Sequence[Tensor] = []
        for _ in range(TIMED):
            results = each(next(batches))
        return results

    return Call(run, reset, count=TIMED)


def loader_setting(device: torch.device, size: str, batch: int) -> Setting:
    """The loader alone: decode, two augmented views, on the device."""
    feed = Feed(device, size, min(batch, 64))
    return Setting(
        op="loader",
        name=f"loader alone, {feed.words}",
        config={"batch": feed.batch, "images": feed.batch, "px": feed.px, "pictures": feed.kind},
        inputs=lambda _: {},
        truth=lambda _: [],
        plain=lambda _: [],
        outputs=(),
        dtype=torch.float32,
        arms=[_loader_arm(loader, feed) for loader in ("dali", "torchvision")],
        paced=True,
    )


def _loader_arm(loader: str, feed: Feed) -> Arm:
    def bind(_: Inputs) -> Call:
        return draining(feed.batches(loader), lambda batch: batch.views)

    def check(_: Inputs, results: Sequence[Tensor]) -> float:
        """0 where the views have the promised form and hold pictures, not one colour."""
        shape = (feed.batch, 3, feed.px, feed.px)
        good = all(v.dtype == torch.uint8 and v.shape == shape and v.float().std() > 1 for v in results)
        return 0.0 if good and len(results) == 2 else float("inf")

    what = f"sdmp_train's {loader} loader"
    return Arm(loader, what, "ours" if loader == "dali" else "peer", bind, check, tolerance=0.0)


def fed_setting(device: torch.device, size: str, batch: int) -> Setting:
    """What waiting for data costs: the same step on resident views and on views that the loader brings."""
    feed = Feed(device, size, min(batch, 64))

    def training() -> Training:
        config = config_of("sdmp", device, size, feed.batch)
        return make_training(
            dataclasses.replace(config, data=dataclasses.replace(config.data, image_px=feed.px)), device
        )

    def resident(_: Inputs) -> Call:
        state, batch = training(), next(feed.batches("auto"))
        return Call(lambda: [one_step(state, batch)])

    def fed(loader: str, _: Inputs) -> Call:
        state = training()
        return draining(feed.batches(loader), lambda batch: [one_step(state, batch)])

    def check(_: Inputs, results: Sequence[Tensor]) -> float:
        return 0.0 if bool(results[0].isfinite()) else float("inf")

    arms = [Arm("resident views", "the step alone, the same views every time", "ours", resident, check, tolerance=0.0)]
    for loader in ("dali", "torchvision"):
        what = f"the step and sdmp_train's {loader} loader"
        arms.append(Arm(f"fed by {loader}", what, "eager", functools.partial(fed, loader), check, tolerance=0.0))
    return Setting(
        op="step",
        name=f"training step fed by the loader, {feed.words}",
        config={"batch": feed.batch, "images": feed.batch, "fed": True, "pictures": feed.kind},
        inputs=lambda _: {},
        truth=lambda _: [],
        plain=lambda _: [],
        outputs=(),
        dtype=torch.float32,
        arms=arms,
        paced=True,
    )
