"""Whole runs: what is in the folder, that a resumed run is the same run, and that bad input leaves nothing behind."""

from __future__ import annotations

import gzip
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_runs import KINDS, build_training
from torch.utils.data import DataLoader

from sdmp_train import checkpoint, commands, run_folder
from sdmp_train import run as run_module
from sdmp_train.checkpoint import Unwritable, load_checkpoint, newest_checkpoint
from sdmp_train.cli import main
from sdmp_train.commands import dry_run, pretrain
from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.data import Choice, DataError
from sdmp_train.evaluate.knn import image_features
from sdmp_train.loop import Outcome
from sdmp_train.run import Run
from sdmp_train.run_folder import stored_config
from sdmp_train.stop import Stopped, StopRequest
from sdmp_train.training import Training, rank_remarks


def limit(config: Config, **run: object) -> Config:
    return replace(config, run=replace(config.run, **run))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_why_no_faster_kernels_run_is_said_once(monkeypatch):
    slow = "torch (cpp: not built; a C++ compiler and `make setup` build it)"
    found = {"info_nce": {"cpu": slow}, "mix": {"cpu": "cpp"}, "augment": {"cpu": slow}}
    monkeypatch.setattr(commands, "backends", lambda: found)
    assert commands.serving("cpu") == f"info_nce, augment: {slow}; mix: cpp"


def test_a_run_leaves_everything_it_promises(tiny: Config, tmp_path: Path, capsys):
    config = limit(tiny, knn_max_images=30)
    assert pretrain(config, tmp_path / "run") == 0
    names = {p.name for p in (tmp_path / "run").iterdir()}
    (file_list,) = (name for name in names if name.startswith("images-"))
    assert re.fullmatch(r"images-[0-9a-f]{16}\.jsonl\.gz", file_list)
    names.remove(file_list)
    assert names == {
        ".sdmp-run.json",
        ".sdmp-run.lock",
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "exported",
        "mix.png",
    }
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
    assert f"eval knn --run {tmp_path / 'run'} --data CLASS_FOLDERS\n" in printed, (
        "of its own images it would be refused"
    )


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


@pytest.mark.parametrize(("kind", "stop"), [("tiny", 4), *((kind, 3) for kind in KINDS)])  # 4: the end of an epoch
def test_a_resumed_run_is_bitwise_the_unbroken_one(kind: str, stop: int, request, tmp_path: Path):
    config = request.getfixturevalue(kind)
    assert pretrain(config, tmp_path / "whole") == 0
    assert pretrain(limit(config, max_steps=stop), tmp_path / "parts") == 0
    assert pretrain(config, tmp_path / "parts", resume=True) == 0
    whole, parts = (load_checkpoint(newest_checkpoint(tmp_path / n / "checkpoints")) for n in ("whole", "parts"))
    assert whole[1]["step"] == parts[1]["step"] == 8
    assert whole[0].keys() == parts[0].keys() == {*build_training(config).method.state, "optim"}
    for part, tensors in whole[0].items():
        assert tensors.keys() == parts[0][part].keys()
        assert tensors
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
    for text in ("optim.base_lr: 0.02 -> 0.5", "method.temperature: None -> 0.3"):
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


def test_a_resume_says_which_files_came_and_went_and_goes_on_where_accepted(
    tiny: Config, tmp_path: Path, image_folder: Path, capsys
):
    own = tmp_path / "images"
    shutil.copytree(image_folder, own)
    config, run = replace(tiny, data=replace(tiny.data, data=str(own))), tmp_path / "run"
    assert pretrain(limit(config, max_steps=2), run) == 0
    (own / "bars" / "3.jpg").unlink()
    shutil.copy(own / "dots" / "1.jpg", own / "dots" / "ne\nw.jpg")
    Image.open(own / "dots" / "2.jpg").resize((50, 30)).save(own / "dots" / "2.jpg")
    said = r"of 36 images 1 came \(dots/ne\\nw.jpg\), 1 went \(bars/3.jpg\), 1 changed size \(dots/2.jpg\)"
    with pytest.raises(ConfigError, match=rf"images: {said}; --accept-changed-data"):
        pretrain(limit(config, max_steps=4), run, resume=True)
    assert pretrain(limit(config, max_steps=4), run, resume=True, accept_changed_data=True) == 0
    assert re.search(rf"changed  {said}", capsys.readouterr().out)
    assert pretrain(config, run, resume=True) == 0  # the new files are those of the new checkpoint
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 9))


@pytest.mark.parametrize("spoil", ["gone", "garbage", "no list", "endless"])
def test_a_list_of_files_that_cannot_be_read_is_said(tiny: Config, tmp_path: Path, image_folder: Path, spoil: str):
    own, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder, own)
    config = replace(tiny, data=replace(tiny.data, data=str(own)))
    assert pretrain(limit(config, max_steps=1), run) == 0
    (path,) = run.glob("images-*.jsonl.gz")
    contents = {
        "garbage": b"x",
        "no list": gzip.compress(b"[1, 2, 3]\n"),
        "endless": gzip.compress(b"[" * 2**24),
    }
    path.unlink()
    if spoil in contents:
        path.write_bytes(contents[spoil])
    (own / "bars" / "3.jpg").unlink()
    with pytest.raises(ConfigError, match="the images are not the same \\(which ones cannot be said"):
        pretrain(config, run, resume=True)


def test_a_damaged_file_is_found_before_the_first_step_and_left_out_by_run_and_resume(
    tiny: Config, tmp_path: Path, image_folder: Path
):
    own, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder, own)
    for i in range(12, 80):
        shutil.copy(own / "bars" / f"{i % 12}.jpg", own / "bars" / f"{i}.jpg")
    cut = own / "dots" / "5.jpg"
    cut.write_bytes(cut.read_bytes()[:-40])
    config = replace(tiny, data=replace(tiny.data, data=str(own), bad_images="skip"))
    assert pretrain(limit(config, max_steps=14), run) == 0  # a whole epoch
    assert "1 bad file left out" in (run / "train.log").read_text()
    cut.unlink()
    assert pretrain(limit(config, max_steps=15), run, resume=True) == 0


def test_a_damaged_checkpoint_stops_a_resume_unless_the_one_before_is_asked_for(tiny: Config, tmp_path: Path):
    assert pretrain(limit(tiny, max_steps=2), tmp_path / "run") == 0
    path = newest_checkpoint(tmp_path / "run" / "checkpoints") / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"student\.safetensors is damaged"):
        pretrain(tiny, tmp_path / "run", resume=True)
    assert pretrain(limit(tiny, max_steps=2), tmp_path / "run", resume=True, previous=True) == 0
    load_checkpoint(newest_checkpoint(tmp_path / "run" / "checkpoints"))  # made again, whole


def stopped(config: Config, folder: Path) -> Path:
    """The checkpoint of a run that was stopped at step 2."""
    assert pretrain(limit(config, max_steps=2), folder) == 0
    return newest_checkpoint(folder / "checkpoints")


def rewrite(path: Path, **changes: object) -> None:
    """Other values in a checkpoint's state.json, with a manifest that is true of them."""
    state = {**json.loads((path / "state.json").read_text()), **changes}
    (path / "state.json").write_text(json.dumps(state))
    files = {f.name: checkpoint.fingerprint(f) for f in path.iterdir() if f.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3}, "names step 3"),
        ({"step": "2"}, "names step '2'"),
        ({"config": []}, r"config is \[\]; expected dict"),
        ({"config": {"optm": {}}}, "unknown group 'optm'"),
        ({"config": {"optim": {"epochs": "x" * 100_000}}}, "expected int"),
        ({"images": 5}, "images is 5; expected str"),
        ({"world_size": 0}, "world_size is 0"),
        ({"world_size": "two"}, "world_size is 'two'"),
        ({"lost_images": -1}, "lost_images is -1"),
        ({"lost_images": "two"}, "lost_images is 'two'; expected a whole number"),
    ],
)
def test_a_state_that_no_run_writes_is_refused(changes: dict, message: str, tiny: Config, tmp_path: Path):
    rewrite(stopped(tiny, tmp_path / "run"), **changes)
    with pytest.raises(ConfigError, match=message) as error:
        pretrain(tiny, tmp_path / "run", resume=True)
    assert len(str(error.value)) < 1500


def test_a_checkpoint_without_moments_or_without_a_part_is_refused(tiny: Config, tmp_path: Path):
    path = stopped(tiny, tmp_path / "run")
    whole = (path / "optim.safetensors").read_bytes()
    save_file({}, path / "optim.safetensors")
    rewrite(path)
    with pytest.raises(ConfigError, match="the optimiser's state does not fit this model: missing step/"):
        pretrain(tiny, tmp_path / "run", resume=True)
    (path / "optim.safetensors").rename(path / "moments.safetensors")
    rewrite(path)
    with pytest.raises(ConfigError, match="holds the parts moments, momentum_encoder, student"):
        pretrain(tiny, tmp_path / "run", resume=True)
    (path / "moments.safetensors").unlink()
    (path / "optim.safetensors").write_bytes(whole)
    rewrite(path)
    assert pretrain(tiny, tmp_path / "run", resume=True) == 0


def test_the_loader_that_ran_is_stored_and_another_one_stops_a_resume(
    tiny: Config, tmp_path: Path, monkeypatch, capsys
):
    config = replace(tiny, data=replace(tiny.data, loader="auto"))
    monkeypatch.setattr("sdmp_train.data.choice.dali_missing", lambda *_: "there is no DALI here")
    path = stopped(config, tmp_path / "run")
    assert stored_config(tmp_path / "run").data.loader == "torchvision"
    assert json.loads((path / "state.json").read_text())["config"]["data"]["loader"] == "torchvision"
    assert "loader   torchvision: there is no DALI here" in capsys.readouterr().out
    assert pretrain(limit(config, max_steps=3), tmp_path / "run", resume=True) == 0
    # As if it had begun where DALI is: neither auto nor the other one may take its place here.
    path = newest_checkpoint(tmp_path / "run" / "checkpoints")
    state = json.loads((path / "state.json").read_text())
    state["config"]["data"]["loader"] = "dali"
    rewrite(path, **state)
    for loader in ("auto", "torchvision"):
        with pytest.raises(ConfigError, match=r"data\.loader: 'dali' -> 'torchvision' \(--loader\)"):
            pretrain(replace(config, data=replace(config.data, loader=loader)), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"--loader dali: .*there is no DALI here"):
        pretrain(replace(config, data=replace(config.data, loader="dali")), tmp_path / "run", resume=True)


@pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="DALI is not installed")
@pytest.mark.parametrize("faster", ["dali", "torchvision"])
def test_the_measured_choice_is_stored_and_kept(faster: str, tiny: Config, tmp_path: Path, monkeypatch, capsys):
    config = replace(tiny, data=replace(tiny.data, loader="auto"))
    monkeypatch.setattr("sdmp_train.data.faster_loader", lambda *_: Choice(faster, "measured"))
    path = stopped(config, tmp_path / "run")
    assert f"loader   {faster}: measured" in capsys.readouterr().out
    assert stored_config(tmp_path / "run").data.loader == faster
    assert json.loads((path / "state.json").read_text())["config"]["data"]["loader"] == faster
    other = "torchvision" if faster == "dali" else "dali"
    monkeypatch.setattr("sdmp_train.data.faster_loader", lambda *_: Choice(other, "measured again"))
    assert pretrain(limit(config, max_steps=3), tmp_path / "run", resume=True) == 0
    assert f"loader   {faster}: this run began with {faster}" in capsys.readouterr().out


def test_going_on_with_another_number_of_processes_is_said(tiny: Config, tmp_path: Path, capsys):
    path = stopped(tiny, tmp_path / "run")
    assert pretrain(limit(tiny, max_steps=2), tmp_path / "run", resume=True) == 0
    assert "ranks " not in capsys.readouterr().out
    rewrite(path, world_size=4)
    assert pretrain(limit(tiny, max_steps=3), tmp_path / "run", resume=True) == 0
    assert "ranks    1 in place of 4: " in capsys.readouterr().out
    assert "ranks    1 in place of 4: " in (tmp_path / "run" / "train.log").read_text()
    assert "another partner" in rank_remarks(4, 1, partners_follow_ranks=True)[0]
    assert "another partner" not in rank_remarks(4, 1, partners_follow_ranks=False)[0]


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
    refused(short, run, r"holds a run of \d{4}-\d\d-\d\d \d\d:\d\d that is finished at its --max-steps, 1 of ")
    assert pretrain(short, run, overwrite=True) == 0
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused(short, mine, "holds files and no run of ours")
    refused(short, mine, "deletes run folders only", overwrite=True)
    (mine / "config.yaml").write_text("defaults: []")  # as Hydra and web sites have one
    refused(short, mine, "deletes run folders only", overwrite=True)
    (run / "thesis.txt").write_text("years of work")
    refused(short, run, "thesis.txt is something else", overwrite=True)
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


def test_two_runs_of_one_default_name_get_a_folder_each(tiny: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_folder, "default_folder", lambda preset: tmp_path / "runs" / "now")
    for seed in (0, 1):
        assert pretrain(limit(tiny, max_steps=1, seed=seed), None) == 0
    assert [stored_config(tmp_path / "runs" / name).run.seed for name in ("now", "now-2")] == [0, 1]


def test_a_damaged_newest_checkpoint_never_costs_the_good_ones(tiny: Config, tmp_path: Path):
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert pretrain(limit(tiny, max_steps=6), run) == 0
    path = checkpoints / "step-000006" / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert pretrain(limit(tiny, max_steps=2), run, resume=True, previous=True) == 0
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-000000", "step-000002", "step-000006.damaged"]
    assert "step-000006 is damaged; it is now called step-000006.damaged" in (run / "train.log").read_text()
    assert pretrain(limit(tiny, max_steps=5), run, resume=True) == 0
    assert pretrain(limit(tiny, max_steps=3), run, resume=True, previous=True) == 0
    assert sorted(p.name for p in checkpoints.glob("step-*")) == [
        "step-000002",
        "step-000003",
        "step-000005.abandoned-1",
        "step-000006.damaged",
    ]
    assert pretrain(tiny, run, resume=True) == 0
    assert pretrain(tiny, tmp_path / "whole") == 0
    parts, whole = (load_checkpoint(newest_checkpoint(f / "checkpoints"))[0] for f in (run, tmp_path / "whole"))
    for name, tensor in whole["student"].items():
        assert torch.equal(parts["student"][name], tensor), name


@pytest.mark.parametrize("where", ["indexing", "picture", "kNN", "after the last step"])
def test_a_stop_outside_the_steps_leaves_something_to_go_on_with(
    where: str, tiny: Config, tmp_path: Path, monkeypatch, capsys
):
    config, folder = limit(tiny, knn_max_images=30), tmp_path / "run"
    stop = StopRequest()

    def ask(function, when=lambda *_: True):
        def asking(*args, **kwargs):
            stop.asked = stop.asked or when(*args)
            return function(*args, **kwargs)

        return asking

    with monkeypatch.context() as patch:
        if where == "indexing":
            patch.setattr(commands, "open_images", ask(commands.open_images))
        if where == "picture":
            patch.setattr(Run, "picture", ask(Run.picture))
        if where == "kNN":
            patch.setattr(run_module, "image_features", ask(run_module.image_features))
        if where == "after the last step":
            patch.setattr(Run, "say_knn", ask(Run.say_knn, lambda run, what, *_: what.startswith("trained")))
        with pytest.raises(Stopped):
            pretrain(config, folder, stop=stop)
    assert folder.exists() == (where != "indexing")
    assert (f"pretrain --resume {folder}" in capsys.readouterr().out) == (where != "indexing")
    if where != "indexing":
        with pytest.raises(ConfigError, match="--resume goes on"):
            pretrain(config, folder)
    assert pretrain(config, folder, resume=True, or_start=True) == 0
    lines = metrics(folder)
    assert [line["step"] for line in lines if "knn_raw_pixels" in line] == [0]
    assert [line["step"] for line in lines if "knn" in line] == [0, 8]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert (folder / "exported" / "model.safetensors").exists()


def test_a_kill_while_a_resume_rewrites_its_files_leaves_a_run_that_goes_on(tiny: Config, tmp_path: Path, monkeypatch):
    """Every write of the beginning of a resume fails in turn; config.yaml and metrics.jsonl stay whole."""
    run, config = tmp_path / "run", limit(tiny, max_steps=2, log_every_steps=2)
    assert pretrain(limit(tiny, max_steps=2), run) == 0
    settings, numbers = (run / "config.yaml").read_text(), (run / "metrics.jsonl").read_text()

    def resume(fail_at: int) -> int:
        calls = [0]

        def wrap(function):
            def wrapped(*args, **kwargs):
                calls[0] += 1
                if calls[0] == fail_at:
                    raise OSError(28, "No space left on device")
                return function(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ("write_text", "replace"):
                patch.setattr(Path, name, wrap(getattr(Path, name)))
            patch.setattr(os, "fsync", wrap(os.fsync))
            patch.setattr(commands, "train", lambda *_: Outcome.STOPPED)
            patch.setattr(Run, "save_last", lambda *_: None)
            assert pretrain(config, run, resume=True) == 75
        return calls[0]

    writes = resume(0)
    assert writes == 8  # two files: written, flushed, renamed, folder flushed
    (run / "config.yaml").write_text(settings)
    for number in range(1, writes + 1):
        with pytest.raises(ConfigError, match="No space left"):
            resume(number)
        assert stored_config(run).run.log_every_steps == (1 if number < 4 else 2)
        assert (run / "metrics.jsonl").read_text() == numbers
        assert not list(run.glob("*.tmp-*"))
    assert pretrain(tiny, run, resume=True) == 0


def test_checkpoints_come_by_the_clock_too(tiny: Config, tmp_path: Path, monkeypatch):
    saved: list[int] = []
    honest = checkpoint.save_checkpoint

    def save(folder, step, parts, state):
        saved.append(step)
        return honest(folder, step, parts, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert pretrain(limit(tiny, save_every_minutes=1e-9, max_steps=3), tmp_path / "often") == 0
    assert saved == [0, 1, 2, 3]
    saved.clear()
    assert pretrain(limit(tiny, save_every_minutes=0, max_steps=3), tmp_path / "never") == 0
    assert saved == [0, 3]


def test_a_full_disk_is_survived_and_ends_the_run_with_five_at_the_third_save(
    tiny: Config, tmp_path: Path, monkeypatch, capsys
):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def no_picture(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "save_mix_picture", no_picture)
    monkeypatch.setattr("sdmp_train.saver.RETRY_SECONDS", 0.0)
    assert pretrain(limit(tiny, max_steps=1), tmp_path / "one") == 0
    assert "mix.png cannot be written: [Errno 28]" in capsys.readouterr().out
    monkeypatch.setattr(checkpoint, "save_file", full)
    words = ["pretrain", "--config", str(tmp_path / "one" / "config.yaml"), "--output", str(tmp_path / "two")]
    assert main(words) == 5
    printed = capsys.readouterr()
    assert printed.out.count("could not be written") == 3
    assert printed.err.startswith("error: checkpoints cannot be written to")
    assert "No space left" in printed.err


def test_an_image_that_vanishes_stops_the_run_once_it_is_saved(
    tiny: Config, tmp_path: Path, image_folder: Path, monkeypatch, capsys
):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    config = replace(tiny, data=replace(tiny.data, data=str(images)))
    assert pretrain(config, tmp_path / "whole") == 0
    hidden = tmp_path / "hidden"
    honest = Run.after_step

    def after_step(run: Run, training: Training) -> None:
        if training.step == 3 and images.exists():
            images.rename(hidden)
        honest(run, training)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "after_step", after_step)
        with pytest.raises(DataError, match="could not be decoded"):
            pretrain(config, tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-000003"
    printed = capsys.readouterr().out
    assert "the images of step 4 of 8 cannot be had; what was trained is saved" in printed
    assert "was not finite" not in printed
    hidden.rename(images)
    assert pretrain(config, tmp_path / "run", resume=True) == 0
    whole, parts = (load_checkpoint(newest_checkpoint(tmp_path / n / "checkpoints"))[0] for n in ("whole", "run"))
    for part, tensors in whole.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts[part][name]), (part, name)


@pytest.mark.parametrize("others", [False, True], ids=["", "after somebody else's DataLoader"])
def test_a_killed_decoding_process_stops_the_run_once_it_is_saved(
    others: bool, tiny: Config, tmp_path: Path, monkeypatch
):
    if others:  # the first one with workers in a process sets torch's handler of SIGCHLD, for good
        list(DataLoader(range(2), num_workers=1))
    config = replace(tiny, data=replace(tiny.data, workers=1), optim=replace(tiny.optim, epochs=20))
    honest = Run.after_step

    def after_step(run: Run, training: Training) -> None:
        if training.step == 3:
            for child in multiprocessing.active_children():
                child.kill()
        honest(run, training)

    monkeypatch.setattr(Run, "after_step", after_step)
    with pytest.raises(DataError, match="a decoding process has died"):
        pretrain(config, tmp_path / "run")
    step = int(newest_checkpoint(tmp_path / "run" / "checkpoints").name.removeprefix("step-"))
    assert 3 <= step < 10
