"""Whole runs: what is in the folder, that a resumed run is the same run, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdmp_train import checkpoint
from sdmp_train.checkpoint import Unwritable, load_checkpoint, newest_checkpoint
from sdmp_train.commands import dry_run, pretrain
from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.data import DataError
from sdmp_train.evaluate.knn import image_features
from sdmp_train.run import Run
from sdmp_train.run_folder import stored_config
from sdmp_train.training import Training


def limit(config: Config, **run: object) -> Config:
    return replace(config, run=replace(config.run, **run))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_it_promises(tiny: Config, tmp_path: Path, capsys):
    config = limit(tiny, knn_max_images=30)
    assert pretrain(config, tmp_path / "run") == 0
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "train.log", "checkpoints", "exported", "mix.png"}
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "latest",
        "step-000000",
        "step-000008",
    ]
    assert stored_config(tmp_path / "run") == limit(config, precision="fp32")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "knn" in line] == [0, 8]
    assert [line["step"] for line in lines if "knn_raw_pixels" in line] == [0]
    printed, logged = capsys.readouterr().out, (tmp_path / "run" / "train.log").read_text()
    for text in (
        "global 8 = 1 x 8 x accum 1",
        "0.000625 = 0.02 x 8 / 256",
        "loader   torchvision",
        "kernels  ",
        "chance level 1.664",
        "raw pixels",
        "untrained backbone",
        "trained backbone",
        "eval knn --run",
    ):
        assert text in printed, text
        assert text in logged, text


@pytest.mark.parametrize("folders", ["one", "one_each"])
def test_without_classes_to_tell_apart_it_says_why_there_is_no_knn(tiny: Config, folders: str, tmp_path: Path, capsys):
    for i in range(10):
        folder = tmp_path / "images" / ("all" if folders == "one" else f"class{i}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(folder / f"{i}.jpg")
    config = replace(tiny, data=replace(tiny.data, data=str(tmp_path / "images")))
    assert pretrain(limit(config, knn_max_images=30, max_steps=1), tmp_path / "run") == 0
    why = {
        "one": "that takes images in at least two folders, one per class",
        "one_each": "none of the 2 queries has a class that is among the 8 images of the bank",
    }
    printed = capsys.readouterr().out
    assert printed.count("kNN") == 1
    assert f"kNN      not measured: {why[folders]}" in printed


def test_a_backbone_whose_features_are_not_finite_or_all_the_same_is_said_and_the_run_goes_on(
    tiny: Config, tmp_path: Path, monkeypatch
):
    honest = image_features

    def spoiled(backbone, *given, **more):
        found = honest(backbone, *given, **more)
        if backbone is None:
            return replace(found, rows=found.rows[:1].expand_as(found.rows))
        return replace(found, rows=found.rows * float("nan"))

    monkeypatch.setattr("sdmp_train.run.image_features", spoiled)
    assert pretrain(limit(tiny, knn_max_images=30, max_steps=1), tmp_path / "run") == 0
    logged = (tmp_path / "run" / "train.log").read_text()
    assert "raw pixels: the features of all 24 images are the same" in logged
    assert "not measured, untrained backbone: 24 of the 24 features of the bank are not finite" in logged
    assert not [line for line in metrics(tmp_path / "run") if "knn" in line]


@pytest.mark.parametrize(("kind", "stop"), [("tiny", 3), ("tiny", 4), ("tiny_resnet", 3)])  # 4: the end of an epoch
def test_a_resumed_run_is_bitwise_the_unbroken_one(kind: str, stop: int, request, tmp_path: Path):
    config = request.getfixturevalue(kind)
    assert pretrain(config, tmp_path / "whole") == 0
    assert pretrain(limit(config, max_steps=stop), tmp_path / "parts") == 0
    assert pretrain(config, tmp_path / "parts", resume=True) == 0
    whole, parts = (load_checkpoint(newest_checkpoint(tmp_path / n / "checkpoints")) for n in ("whole", "parts"))
    assert whole[1]["step"] == parts[1]["step"] == 8
    assert whole[0].keys() == parts[0].keys() == {"student", "momentum_encoder", "optim"}
    for part, tensors in whole[0].items():
        assert tensors.keys() == parts[0][part].keys()
        assert len(tensors) > 5
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts[0][part][name]), (part, name)
    losses = [[line["loss"] for line in metrics(tmp_path / n) if "loss" in line] for n in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_signal_saves_and_asks_to_be_resumed(tiny: Config, tmp_path: Path, monkeypatch, capsys):
    honest = Run.after_step

    def after_step(run: Run, training: Training) -> None:
        honest(run, training)
        if training.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "after_step", after_step)
        assert pretrain(tiny, tmp_path / "run") == 75
    assert signal.getsignal(signal.SIGTERM) == handler
    stopped_at = json.loads((newest_checkpoint(tmp_path / "run" / "checkpoints") / "state.json").read_text())["step"]
    assert 3 < stopped_at <= 5
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert pretrain(tiny, tmp_path / "run", resume=True) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, 9))


def test_metrics_of_steps_that_come_again_are_dropped(tiny: Config, tmp_path: Path):
    assert pretrain(limit(tiny, max_steps=3), tmp_path / "run") == 0
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # as if killed later than the last checkpoint
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    assert pretrain(tiny, tmp_path / "run", resume=True) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, 9))


def test_settings_that_change_the_training_stop_a_resume(tiny: Config, tmp_path: Path):
    assert pretrain(limit(tiny, max_steps=2), tmp_path / "run") == 0
    changed = replace(tiny, optim=replace(tiny.optim, base_lr=0.5), method=replace(tiny.method, temperature=0.3))
    with pytest.raises(ConfigError) as error:
        pretrain(changed, tmp_path / "run", resume=True)
    for text in ("optim.base_lr: 0.02 -> 0.5", "method.temperature: 0.2 -> 0.3"):
        assert text in str(error.value)
    assert stored_config(tmp_path / "run").optim.base_lr == 0.02
    assert pretrain(limit(tiny, max_steps=3, log_every_steps=2), tmp_path / "run", resume=True) == 0


def test_other_images_stop_a_resume(tiny: Config, tmp_path: Path, image_folder: Path):
    other = tmp_path / "images"
    for path in image_folder.rglob("*.jpg"):
        target = other / path.relative_to(image_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    config = replace(tiny, data=replace(tiny.data, data=str(other)))
    assert pretrain(limit(tiny, max_steps=2), tmp_path / "run") == 0
    assert pretrain(limit(config, max_steps=3), tmp_path / "run", resume=True) == 0  # moved, but the same files
    next(other.rglob("*.jpg")).unlink()
    with pytest.raises(ConfigError, match="images: "):
        pretrain(config, tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_stops_a_resume_unless_the_one_before_is_asked_for(tiny: Config, tmp_path: Path):
    assert pretrain(limit(tiny, max_steps=2), tmp_path / "run") == 0
    path = newest_checkpoint(tmp_path / "run" / "checkpoints") / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"student\.safetensors is damaged"):
        pretrain(tiny, tmp_path / "run", resume=True)
    assert pretrain(limit(tiny, max_steps=2), tmp_path / "run", resume=True, previous=True) == 0
    load_checkpoint(newest_checkpoint(tmp_path / "run" / "checkpoints"))  # made again, whole


def refused(config: Config, folder: Path, message: str, **given: bool) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises((ConfigError, DataError), match=message):
        pretrain(config, folder, **given)
    assert sorted(folder.parent.rglob("*")) == before


def test_bad_input_is_refused_before_anything_is_written(tiny: Config, tmp_path: Path):
    def with_data(path: Path) -> Config:
        return replace(tiny, data=replace(tiny.data, data=str(path)))

    run, empty, text = tmp_path / "run", tmp_path / "empty", tmp_path / "text"
    empty.mkdir()
    text.mkdir()
    (text / "notes.txt").write_text("no image")
    (text / "broken.jpg").write_text("no image either")
    refused(with_data(tmp_path / "missing"), run, "there is no folder")
    refused(with_data(empty), run, "is empty")
    refused(with_data(text), run, "broken.jpg")
    (text / "broken.jpg").unlink()
    refused(with_data(text), run, "no image under")
    refused(replace(tiny, data=replace(tiny.data, data=None)), run, "data is missing")
    refused(replace(tiny, optim=replace(tiny.optim, batch_size=64)), run, "batch_size is 64, more than the 36 images")
    refused(replace(tiny, model=replace(tiny.model, arch="vit_smal")), run, "Did you mean vit_small")
    deit = replace(tiny, model=ModelConfig(arch="deit_tiny_patch16_224"), data=replace(tiny.data, image_px=40))
    refused(deit, run, "leave 8 of 40 rows")
    with pytest.raises(ConfigError, match="leave 8 of 40 rows"):
        dry_run(deit, run, overwrite=False)
    refused(tiny, run, "not a run folder", resume=True)
    if not torch.cuda.is_available():
        refused(limit(tiny, device="cuda"), run, "sees no GPU")


def test_a_run_folder_in_use_is_refused_and_overwritten_only_on_request(tiny: Config, tmp_path: Path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    short = limit(tiny, max_steps=1)
    assert pretrain(short, run) == 0
    refused(short, run, "already in use")
    assert pretrain(short, run, overwrite=True) == 0
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused(short, mine, "already in use")
    refused(short, mine, "deletes run folders only", overwrite=True)
    assert (mine / "thesis.txt").exists()
    refused(short, mine / "thesis.txt" / "run", "cannot be made")


def test_checkpoints_that_cannot_be_written_end_the_run_only_at_the_third_failure(
    tiny: Config, tmp_path: Path, monkeypatch
):
    config = limit(replace(tiny, optim=replace(tiny.optim, epochs=4)), save_every_epochs=1)
    honest, failures = checkpoint.save_checkpoint, [0]

    def failing(limit_of_failures: int):
        def save(folder, step, parts, state):
            if step and failures[0] < limit_of_failures:
                failures[0] += 1
                raise OSError(28, "No space left on device")
            return honest(folder, step, parts, state)

        return save

    monkeypatch.setattr(checkpoint, "save_checkpoint", failing(2))
    assert pretrain(config, tmp_path / "two") == 0
    assert "could not be written" in (tmp_path / "two" / "train.log").read_text()
    failures[0] = 0
    monkeypatch.setattr(checkpoint, "save_checkpoint", failing(3))
    with pytest.raises(Unwritable, match="No space left"):
        pretrain(config, tmp_path / "three")
    assert newest_checkpoint(tmp_path / "three" / "checkpoints").name == "step-000000"
