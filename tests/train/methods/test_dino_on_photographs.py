"""Thirty steps of DINO, plain and with SDMP, on real photographs: never a NaN, and a loss that starts at chance and falls."""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sdmp_train.commands import pretrain
from sdmp_train.config import Config

SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "imagenet-sample.tar"
STEPS = 30


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second photograph of the sample, small, since full ones take most of the time to decode."""
    if not SAMPLE.exists():
        pytest.skip(f"needs {SAMPLE.name} in the shared data folder")
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(SAMPLE) as archive:
        for member in [member for member in archive.getmembers() if member.isfile()][::2]:
            image = Image.open(archive.extractfile(member)).convert("RGB")
            image.thumbnail((96, 96))
            path = folder / Path(member.name).parent.name / f"{Path(member.name).stem}.jpg"
            path.parent.mkdir(exist_ok=True)
            image.save(path)
    return folder


def for_photographs(config: Config, folder: Path, mixing: str) -> Config:
    """Thirty steps on 32 px views; BN, a wide bottleneck and a quick centre, so that the first loss is that of chance.

    Without, an untrained teacher says the same of every image, which the student learns before the centre takes it away.
    """
    method = replace(
        config.method,
        mixing=mixing,
        bottleneck_dim=256,
        head_dim=128,
        use_bn_in_head=True,
        drop_path_rate=0.1,
        center_momentum=0.2,
        momentum_teacher=0.99,
        warmup_teacher_temp=0.02,
        teacher_temp=0.02,
    )
    return replace(
        config,
        data=replace(config.data, data=str(folder)),
        method=method,
        optim=replace(config.optim, batch_size=16, epochs=10, warmup_epochs=1, base_lr=0.04, weight_decay=0.04),
        run=replace(config.run, max_steps=STEPS),
    )


@pytest.mark.parametrize("mixing", ["none", "sdmp"])
def test_dino_trains_on_photographs(mixing: str, photographs: Path, tiny_dino: Config, tmp_path: Path) -> None:
    assert pretrain(for_photographs(tiny_dino, photographs, mixing), tmp_path / "run") == 0
    chance = float(re.search(r"chance level ([\d.]+)", (tmp_path / "run" / "train.log").read_text()).group(1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(chance, rel=0.2)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
