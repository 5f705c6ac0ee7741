"""ImageNet-A, -R and -C: slices and means with answers that are known."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from subjects import export, results
from torch import Tensor, nn
from written_runs import write_run

from sdmp_train.config import Config, ConfigError, DataConfig
from sdmp_train.data import DataError, open_folder
from sdmp_train.distributed import World
from sdmp_train.evaluate.finetune import FinetuneConfig, evaluate_finetune
from sdmp_train.evaluate.robustness import (
    CORRUPTIONS,
    SEVERITIES,
    Measuring,
    RobustnessConfig,
    columns_of,
    corrupted_folders,
    evaluate_robustness,
    imagenet_classes,
    mean_of_means,
    measure_corruptions,
)
from sdmp_train.log import Log
from sdmp_train.stop import StopRequest

CLASSES = tuple(f"n{number:02}" for number in range(10))


class ByBrightness(nn.Module):
    """Says class g // 20 for an image of grey g, and class 9 more loudly still."""

    def forward(self, images: Tensor) -> Tensor:
        grey = (images * 0.5 + 0.5).mean((1, 2, 3)) * 255
        scores = -(grey[:, None] / 20 - torch.arange(10.0)).abs()
        scores[:, 9] += 100
        return scores


def measuring(model: nn.Module | None = None, classes: tuple[str, ...] = CLASSES) -> Measuring:
    data = DataConfig(image_px=16, mean=(0.5,) * 3, std=(0.5,) * 3, loader="torchvision", workers=0)
    world = World(torch.device("cpu"))
    return Measuring(model or ByBrightness(), classes, data, world, False, 4, Log(quiet=True), StopRequest())


def write(folder: Path, greys: dict[str, list[int]]) -> Path:
    """16 px images of one grey each, by class."""
    for name, values in greys.items():
        (folder / name).mkdir(parents=True)
        for number, grey in enumerate(values):
            Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(folder / name / f"{number}.png")
    return folder


def test_the_classifier_chooses_among_the_classes_of_the_set(tmp_path: Path):
    """Of the ten logits class 9 is always the highest; the set has 2, 5 and 7, which then decide."""
    images = write(tmp_path / "a", {"n02": [40, 140], "n05": [100, 90], "n07": [139, 125]})
    index = open_folder(images, split=None)
    assert columns_of(CLASSES, index).tolist() == [2, 5, 7]
    # 40 -> 2 right, 140 -> 7 wrong; 100 -> 5 right, 90 -> 5 (4.5) right; 139 -> 7 right, 125 (6.25) -> 7 right
    assert measuring().top1(index, "a") == pytest.approx(5 / 6)
    with_nine = write(tmp_path / "b", {"n02": [40], "n09": [180]})
    assert measuring().top1(open_folder(with_nine, split=None), "b") == pytest.approx(1 / 2)


def test_slices_are_those_of_timms_lists(tmp_path: Path):
    """The 200 classes of A and R among ImageNet's 1000, by their WordNet ids; 86 are in both."""
    from importlib import resources

    info = resources.files("timm.data") / "_info"
    model = nn.Identity()
    model.num_classes = 1000
    classes = imagenet_classes(model)
    assert list(classes) == sorted(classes) and len(classes) == 1000
    slices = {}
    for name in ("a", "r"):
        ids = (info / f"imagenet_{name}_synsets.txt").read_text().split()
        numbers = [int(number) for number in (info / f"imagenet_{name}_indices.txt").read_text().split()]
        for wnid in ids:
            (tmp_path / name / wnid).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / wnid / "0.png")
        columns = columns_of(classes, open_folder(tmp_path / name, split=None)).tolist()
        assert columns == numbers and len(columns) == 200
        slices[name] = set(columns)
    assert len(slices["a"] & slices["r"]) == 86


def test_a_set_with_other_classes_is_refused(tmp_path: Path):
    images = write(tmp_path / "a", {"n02": [40], "cat": [0]})
    with pytest.raises(ConfigError, match=r"1 of the 2 class folders of .* \(cat\) are none of the classifier's 10"):
        measuring().top1(open_folder(images, split=None), "a")


def make_corrupted(root: Path, *, nested: bool) -> dict[str, list[float]]:
    """A tree of ImageNet-C whose answers are known: at severity s of corruption c, (c + s) % 3 of 2 images are wrong."""
    expected: dict[str, list[float]] = {}
    for number, name in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            wrong = (number + severity) % 3
            greys = {"n01": [20 if wrong < 1 else 60], "n03": [60 if wrong < 2 else 20]}
            write(root / "group" / name / str(severity) if nested else root / name / str(severity), greys)
            expected.setdefault(name, []).append(1 - wrong / 2)
    return expected


@pytest.mark.parametrize("nested", [False, True])
def test_the_mean_over_severities_then_corruptions(tmp_path: Path, nested: bool):
    expected = make_corrupted(tmp_path, nested=nested)
    found = measure_corruptions(measuring(), corrupted_folders(tmp_path))
    assert {name: [pytest.approx(share) for share in shares] for name, shares in expected.items()} == found
    everything = [share for shares in expected.values() for share in shares]
    assert len(everything) == 75 and len(set(everything)) == 3
    assert mean_of_means(found) == pytest.approx(sum(everything) / 75)


def test_corrupted_images_are_not_resized(tmp_path: Path):
    """A frame of 2 px around the image reaches the net as it is; a resize to 18 px would cut into it."""
    seen = []

    class Looking(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return torch.zeros(len(images), 10)

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("n01", "n03"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    measured = measuring(Looking())
    measured.top1(open_folder(tmp_path, split=None), "c", resize_px=16)
    expected = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(seen[0][0], expected)


def test_an_incomplete_tree_is_refused(tmp_path: Path):
    make_corrupted(tmp_path, nested=False)
    (tmp_path / "snow" / "3").rename(tmp_path / "snow" / "three")
    with pytest.raises(ConfigError, match="lacks 1 of the 75 folders of ImageNet-C: snow/3"):
        corrupted_folders(tmp_path)


def test_a_fine_tuned_run_is_measured_and_the_result_kept(tiny: Config, tmp_path: Path, image_folder: Path, capsys):
    """On its own training folder as the set: all its classes, so plain accuracy."""
    export(tiny, tmp_path / "net")
    tuned = tmp_path / "tuned"
    options = {"device": "cpu", "workers": 0}
    evaluate_finetune(
        FinetuneConfig(
            weights=str(tmp_path / "net"), data=tiny.data.data, output=str(tuned), epochs=1, batch_size=8, **options
        )
    )
    config = RobustnessConfig(what=str(tuned), imagenet_r=str(image_folder), **options)
    found = evaluate_robustness(config)
    assert set(found) == {"imagenet_r"} and 0 <= found["imagenet_r"] <= 1
    assert f"imagenet_r {found['imagenet_r']:7.2%} top-1 among its 3 classes" in capsys.readouterr().out
    same = evaluate_robustness(
        RobustnessConfig(weights=str(tuned / "exported"), imagenet_a=str(image_folder), output=str(tmp_path), **options)
    )
    assert same == {"imagenet_a": found["imagenet_r"]}
    with pytest.raises(DataError, match="pixels"):
        evaluate_robustness(replace(config, max_pixels=1))
    some = next(path for path in image_folder.iterdir() if path.is_dir())
    torn = shutil.copytree(image_folder, tmp_path / "torn") / some.name / "torn.png"
    torn.write_bytes(b"\x89PNG")
    config = replace(config, imagenet_r=str(tmp_path / "torn"), bad_images="skip")
    with pytest.raises(DataError, match="--max-bad-frac"):
        evaluate_robustness(config)
    assert evaluate_robustness(replace(config, max_bad_frac=0.1, output=str(tmp_path))) == found
    assert results(tuned)[-1]["imagenet_r"] == found["imagenet_r"]
    assert results(tmp_path)[0]["protocol"] == "robustness"


def test_what_cannot_be_measured_is_refused(tiny: Config, tmp_path: Path):
    with pytest.raises(ConfigError, match="name at least one of --imagenet-a"):
        RobustnessConfig(what="x")
    with pytest.raises(ConfigError, match="data is 'x'; expected none"):
        RobustnessConfig(data="x", imagenet_a="y")
    with pytest.raises(ConfigError, match="needs a classifier"):
        evaluate_robustness(RobustnessConfig(imagenet_a=str(tmp_path)))
    with pytest.raises(ConfigError, match="a backbone without a classifier"):
        evaluate_robustness(RobustnessConfig(what=export(tiny, tmp_path / "net"), imagenet_a=str(tmp_path)))


def test_a_run_without_a_classifier_is_told_what_makes_one(tiny: Config, tmp_path: Path):
    run = write_run(tmp_path / "run", tiny)
    config = RobustnessConfig(what=str(run), imagenet_a=str(tmp_path))
    with pytest.raises(ConfigError, match=f"holds no classifier; first: .* eval finetune {run}$"):
        evaluate_robustness(config)
    other = run / "evaluations" / "finetune-10" / "exported"
    other.mkdir(parents=True)
    (other / "classes.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"give one of those it holds: {other.parent}$"):
        evaluate_robustness(config)
