"""timm's own training script, unchanged, run with this package in timm's place.

The script lies in timm's repository, not in its package: SDMP_TIMM_TRAIN says where. What its model and its loss are
given is compared with the files of the data set and the plans drawn, carried out in float64.

Letters: N images of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import float64
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sdmp_kernels.timm as ours
from sdmp_kernels.timm import replace

pytest.importorskip("timm.data", reason="timm is not installed")
image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
modules = torch.nn.modules.module
SCRIPT = os.environ.get("SDMP_TIMM_TRAIN", "")
pytestmark = pytest.mark.skipif(
    not os.path.isfile(SCRIPT), reason="SDMP_TIMM_TRAIN is not the path of train.py of timm's repository"
)
CLASSES, SIZE, BATCH, FILES, EPOCHS = 3, 32, 4, 12, 2
STEPS = FILES // BATCH * EPOCHS
MEAN, STD = (0.25, 0.5, 0.75), (0.5, 0.25, 0.2)


class Step(NamedTuple):
    """What the model and the loss got in a step of training, and the loss that came out."""

    images: Tensor
    logits: Tensor
    target: Tensor
    loss: Tensor
    kind: str


class Run:
    """The script in this process, on files that its transforms leave as they are.

    Attributes:
        files, validation: (N, 3, SIZE, SIZE) uint8, the data set; file i is of class i % CLASSES.
        steps: those of training, in order.
        evaluated: what the model was given in evaluation.
    """

    def __init__(self, folder: Path, device: list[str]) -> None:
        self.files = _write(folder / "data" / "train", FILES, 0)
        self.validation = _write(folder / "data" / "validation", BATCH, 1)
        self.steps: list[Step] = []
        self.evaluated: list[Tensor] = []
        self._given: Tensor | None = None
        self._arguments = [
            *["--data-dir", str(folder / "data"), "--output", str(folder / "output"), "--model", "test_resnet"],
            *["--num-classes", str(CLASSES), "--input-size", "3", str(SIZE), str(SIZE), "--batch-size", str(BATCH)],
            *["--mean", *map(str, MEAN), "--std", *map(str, STD), "--crop-pct", "1", "--hflip", "0"],
            *["--scale", "1", "1", "--ratio", "1", "1", "--color-jitter", "0", "--train-interpolation", "bilinear"],
            *["--epochs", str(EPOCHS), "--warmup-epochs", "0", "--lr", "0.01", "--workers", "0", *device],
        ]

    def __call__(self, *flags: str) -> list[Step]:
        """Run it with these flags too."""
        hooks = [
            modules.register_module_forward_pre_hook(self._before),
            modules.register_module_forward_hook(self._after),
        ]
        try:
            replace.run(SCRIPT, [*self._arguments, *flags])
        finally:
            for hook in hooks:
                hook.remove()
        assert len(self.steps) == STEPS
        return self.steps

    def _before(self, called: Any, given: tuple[Any, ...]) -> None:
        if hasattr(called, "pretrained_cfg"):  # the model itself: none of its layers has one
            self._given = given[0].detach().clone() if called.training else None
            if not called.training:
                self.evaluated.append(given[0].detach().clone())

    def _after(self, called: Any, given: tuple[Any, ...], result: Any) -> None:
        if "CrossEntropy" in type(called).__name__ and self._given is not None:
            logits, target = given  # copies of both and of the loss, which is divided in place
            kind = type(called).__name__
            self.steps.append(Step(self._given, logits.detach().clone(), target.clone(), result.detach().clone(), kind))
            self._given = None


def _write(folder: Path, count: int, seed: int) -> Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        (folder / str(i % CLASSES)).mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(folder / str(i % CLASSES) / f"{i}.png")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    if "'--device'" in Path(SCRIPT).read_text(encoding="utf-8"):
        yield Run(tmp_path, ["--device", "cpu"])
        return
    # Versions without that flag read the device from a configuration file as well, but hand the step and the
    # evaluation a GPU whatever it says.
    (tmp_path / "cpu.yaml").write_text("device: cpu\n")
    move = torch.Tensor.to

    def stay(self: Tensor, *args: Any, **options: Any) -> Tensor:
        return move(self, *("cpu" if isinstance(arg, torch.device) else arg for arg in args), **options)

    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    yield Run(tmp_path, ["--config", str(tmp_path / "cpu.yaml")])


def normalised(images: Tensor) -> Tensor:
    return float64.normalised(images, MEAN, STD)


def check_files(run: Run, images: Tensor, labels: Tensor) -> None:
    """Every row is a file of its class: bytes, or floats that were normalised before they were mixed."""
    files = run.files if images.dtype == torch.uint8 else normalised(run.files)
    for row, label in zip(images, labels.tolist(), strict=True):
        distance = (files.double() - row.double()).abs().amax((1, 2, 3))
        assert distance.min() < 2e-6 and int(distance.argmin()) % CLASSES == label


def check_mixed(batch: Any, step: Step, smoothing: float) -> Tensor:
    """What the step got is the plan in float64. Returns (N, C, H, W) what it should have got before any erasing."""
    plan = batch.plan
    if plan is None:
        keep = ours.Mixup(num_classes=CLASSES)
        keep.mixup_enabled = False
        plan = keep.draw(BATCH, (SIZE, SIZE))
    images = float64.mixed(batch.images, plan)
    target = float64.target(batch.labels, plan, CLASSES, smoothing)
    torch.testing.assert_close(step.target.double(), target, atol=1e-6, rtol=0)
    return normalised(images) if batch.images.dtype == torch.uint8 else images


def check_loss(step: Step) -> None:
    logits, target = step.logits.double(), step.target.double()
    if step.kind == "BinaryCrossEntropy":
        wanted = (F.softplus(logits) - target * logits).mean()
    else:
        assert step.kind == "SoftTargetCrossEntropy"
        wanted = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(step.loss.double(), wanted, atol=1e-5, rtol=1e-5)


def check_evaluation(run: Run) -> None:
    wanted = normalised(run.validation)
    for images in run.evaluated:
        rows = [(wanted - row.double()).abs().amax((1, 2, 3)) for row in images]
        assert max(float(row.min()) for row in rows) < 2e-6
        assert sorted(int(row.argmin()) for row in rows) == list(range(BATCH))


BOTH = ["--mixup", "0.8", "--cutmix", "1.0"]


@pytest.mark.parametrize("prefetcher", [[], ["--no-prefetcher"]], ids=["prefetcher", "no prefetcher"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--mixup-mode", "batch"],
        ["--mixup-mode", "pair"],
        ["--mixup-mode", "elem"],
        ["--mixup-mode", "elem", "--mixup-prob", "0.5", "--smoothing", "0"],
        ["--mixup-mode", "elem", "--bce-loss"],
        ["--mixup-mode", "pair", "--cutmix-minmax", "0.2", "0.8", "--mixup-off-epoch", "1"],
        ["--mixup-mode", "elem", "--workers", "2", "--use-multi-epochs-loader", "--channels-last", "--model-ema"],
        ["--mixup-mode", "batch", "--amp", "--amp-dtype", "bfloat16", "--grad-accum-steps", "2"],
        ["--mixup-mode", "elem", "--amp", "--amp-dtype", "bfloat16", "--bce-loss"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_the_model_and_the_loss_get_what_the_plan_says(
    train: Run, drawn: list[Any], flags: list[str], prefetcher: list[str], capsys: pytest.CaptureFixture[str]
):
    steps = train(*BOTH, *flags, *prefetcher)
    assert len(drawn) == STEPS
    for i, (step, batch) in enumerate(zip(steps, drawn, strict=True)):
        check_files(train, batch.images, batch.labels)
        wanted = check_mixed(batch, step, 0.0 if "--smoothing" in flags else 0.1)
        torch.testing.assert_close(step.images.double(), wanted, atol=2e-6, rtol=0)
        check_loss(step)
        assert (batch.plan is None) == ("--mixup-off-epoch" in flags and i >= STEPS // EPOCHS)
    check_evaluation(train)
    assert "timm.data.mixup.FastCollateMixup -> sdmp_kernels.timm.FastCollateMixup" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_what_is_erased_after_mixing(train: Run, drawn: list[Any], erasures: list[Any], mode: str):
    steps = train(*BOTH, "--mixup-mode", "elem", "--reprob", "0.75", "--remode", mode, "--recount", "2")
    assert len(erasures) == len(drawn) == STEPS
    for step, batch, erasure in zip(steps, drawn, erasures, strict=True):
        wanted = float64.erased(check_mixed(batch, step, 0.1), erasure)
        torch.testing.assert_close(step.images.double(), wanted, atol=2e-6, rtol=0)
        assert erasure.per_pixel is (mode == "pixel") and bool((erasure.fill == 0).all()) is (mode == "const")
    areas = torch.cat([erasure.boxes[..., 2] * erasure.boxes[..., 3] for erasure in erasures]).sum(1)
    assert 0.5 < (areas > 0).float().mean() < 0.95


def test_timms_own_erasing_before_mixup_without_the_prefetcher(train: Run, drawn: list[Any]):
    steps = train(*BOTH, "--mixup-mode", "elem", "--reprob", "1", "--remode", "const", "--no-prefetcher")
    assert all(bool((batch.images == 0).all(1).any()) for batch in drawn)
    for step, batch in zip(steps, drawn, strict=True):
        torch.testing.assert_close(step.images.double(), check_mixed(batch, step, 0.1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("prefetcher", [[], ["--no-prefetcher"]], ids=["prefetcher", "no prefetcher"])
def test_without_mixing_images_are_normalised_alone(train: Run, drawn: list[Any], prefetcher: list[str]):
    for step in train(*prefetcher):
        check_files(train, step.images, step.target)
        assert step.kind == "LabelSmoothingCrossEntropy"
    assert drawn == []


def test_augmentation_splits_of_which_the_first_is_not_erased(train: Run, erasures: list[Any]):
    flags = ["--aug-splits", "2", "--jsd-loss", "--resplit", "--reprob", "1"]
    for step, erasure in zip(train(*flags), erasures, strict=True):
        clean, other = step.images.chunk(2)
        check_files(train, clean, step.target[:BATCH])
        boxes = erasure.boxes[BATCH:]
        assert (erasure.boxes[:BATCH, :, 2:4] == 0).all() and (boxes[:, :, 2:4] > 0).all()
        assert torch.equal(other.double(), float64.erased(clean, erasure._replace(boxes=boxes)))
