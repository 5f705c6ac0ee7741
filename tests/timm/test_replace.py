"""A training script that knows nothing of this package, run with it: what its model gets is the plan in float64."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import float64
import numpy as np
import pytest
import torch

import sdmp_kernels.timm as ours
from sdmp_kernels.timm import replace

timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("timm.data", reason="timm is not installed")
image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
CLASSES, SIZE = 3, 16

# The calls of timm's own training script, in its order, and nothing of this package.
SCRIPT = """
import argparse
from collections import OrderedDict
import torch
from timm.data import create_dataset, create_loader, resolve_data_config, Mixup, FastCollateMixup, AugMixDataset
from timm.loss import *
from timm.models import create_model

parser = argparse.ArgumentParser()
parser.add_argument("data_dir")
parser.add_argument("--no-prefetcher", action="store_true")
parser.add_argument("--bce-loss", action="store_true")
parser.add_argument("--mixup-mode", default="batch")
parser.add_argument("--reprob", type=float, default=0.0)
args = parser.parse_args()
args.prefetcher = not args.no_prefetcher
device = torch.device("cpu")
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
seen, targets = [], []
model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))

mixup_args = dict(mixup_alpha=0.8, cutmix_alpha=1.0, cutmix_minmax=None, prob=1.0, switch_prob=0.5,
                  mode=args.mixup_mode, label_smoothing=0.1, num_classes=3)
collate_fn, mixup_fn = None, None
if args.prefetcher:
    collate_fn = FastCollateMixup(**mixup_args)
else:
    mixup_fn = Mixup(**mixup_args)
dataset = create_dataset("", root=args.data_dir, split="train", is_training=True, batch_size=4)
loader = create_loader(
    dataset, input_size=(3, 16, 16), batch_size=4, is_training=True, use_prefetcher=args.prefetcher, no_aug=False,
    re_prob=args.reprob, re_mode="pixel", re_count=1, re_split=False, hflip=0.5, vflip=0.0, color_jitter=0.4,
    num_aug_splits=0, interpolation="bilinear", num_workers=0, distributed=False, collate_fn=collate_fn,
    pin_memory=False, device=device, img_dtype=torch.float32, use_multi_epochs_loader=False, worker_seeding="all",
)
loss_fn = BinaryCrossEntropy(target_threshold=None) if args.bce_loss else SoftTargetCrossEntropy()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(2):
    if epoch == 1:
        if args.prefetcher and loader.mixup_enabled:
            loader.mixup_enabled = False
        elif mixup_fn is not None:
            mixup_fn.mixup_enabled = False
    for batch_idx, (input, target) in enumerate(loader):
        if not args.prefetcher:
            input, target = input.to(device), target.to(device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        targets.append(target)
        loss = loss_fn(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss {loss.item():.3f}")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "data" / "train" / str(i % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    "flags",
    [[], ["--bce-loss"], ["--reprob", "0.75"], ["--no-prefetcher"], ["--no-prefetcher", "--bce-loss"]],
    ids=" ".join,
)
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_an_unchanged_script_trains_on_what_the_plan_says(
    script: Path,
    drawn: list[Any],
    erasures: list[Any],
    flags: list[str],
    mode: str,
    capsys: pytest.CaptureFixture[str],
):
    names = replace.run(str(script), [str(script.parent / "data"), "--mixup-mode", mode, *flags])
    assert len(names["seen"]) == len(names["targets"]) == len(drawn) == 4
    assert len(erasures) == (4 if "--reprob" in flags else 0)
    keep = ours.Mixup(num_classes=CLASSES)
    keep.mixup_enabled = False
    for i, (images, target, (raw, labels, plan)) in enumerate(zip(names["seen"], names["targets"], drawn, strict=True)):
        assert (plan is not None) is (i < 2), "mixing was switched off for the second epoch"
        if plan is None:
            plan = keep.draw(4, (SIZE, SIZE))
        wanted = float64.mixed(raw, plan)
        if raw.dtype == torch.uint8:
            wanted = float64.normalised(wanted, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if "--reprob" in flags:
            wanted = float64.erased(wanted, erasures[i])
        torch.testing.assert_close(images.double(), wanted, atol=2e-6, rtol=0)
        torch.testing.assert_close(target.double(), float64.target(labels, plan, CLASSES, 0.1), atol=1e-6, rtol=0)
    kind = ours.BinaryCrossEntropy if "--bce-loss" in flags else ours.SoftTargetCrossEntropy
    assert type(names["loss_fn"]) is kind
    printed = capsys.readouterr()
    assert "timm.data.mixup.FastCollateMixup -> sdmp_kernels.timm.FastCollateMixup" in printed.err
    assert "loss " in printed.out


def test_timm_is_itself_again_afterwards(monkeypatch: pytest.MonkeyPatch):
    import timm.data
    import timm.loss

    before = (timm.data.Mixup, timm.data.loader.PrefetchLoader, timm.loss.SoftTargetCrossEntropy)
    with replace.replaced() as found:
        assert timm.data.Mixup is ours.Mixup and timm.data.mixup.Mixup is ours.Mixup
        assert timm.data.loader.PrefetchLoader is ours.PrefetchLoader
        assert timm.loss.BinaryCrossEntropy is ours.BinaryCrossEntropy
        assert all(found.values()), "everything named was found"
        later = types.ModuleType("timm.later")  # what timm imports only when a script asks for it
        later.Mixup = timm.data.Mixup  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "timm.later", later)
    assert later.Mixup is timm.data.Mixup  # type: ignore[attr-defined]
    assert before == (timm.data.Mixup, timm.data.loader.PrefetchLoader, timm.loss.SoftTargetCrossEntropy)


def test_naflex_is_refused_by_name():
    import timm.data

    if not hasattr(timm.data, "create_naflex_loader"):
        pytest.skip("this timm has no NaFlex loaders")
    with replace.replaced():
        for name in ("create_naflex_loader", "NaFlexMixup"):
            with pytest.raises(NotImplementedError, match=rf"timm.data.{name}: .* \(NaFlex\) are not mixed"):
                getattr(timm.data, name)()


@pytest.mark.slow
def test_the_command(script: Path):
    command = [sys.executable, "-m", "sdmp_kernels.timm", str(script), str(script.parent / "data"), "--reprob", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "timm.data.loader.PrefetchLoader -> sdmp_kernels.timm.PrefetchLoader" in done.stderr
    assert done.stdout.startswith("loss ")


def test_the_command_ends_with_the_scripts_names(script: Path, monkeypatch: pytest.MonkeyPatch):
    """As above without a process of its own: what `main` hands on, and that flags reach the script."""
    monkeypatch.setattr(sys, "argv", ["x", str(script), str(script.parent / "data"), "--reprob", "0.5"])
    before = sys.path[:]
    replace.main()
    assert sys.argv[1] == str(script) and sys.path == before


def test_the_command_says_how_it_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for arguments, code in ((["--help"], 0), ([], 2), (["no/such.py"], 2)):
        monkeypatch.setattr(sys, "argv", ["x", *arguments])
        with pytest.raises(SystemExit) as ended:
            replace.main()
        assert ended.value.code == code
    printed = capsys.readouterr()
    assert printed.out.count("usage: python -m sdmp_kernels.timm SCRIPT ARGS...") == 2
    assert "no/such.py is no file" in printed.err
    assert f"/pytorch-image-models/blob/v{timm.__version__}/train.py" in printed.err
