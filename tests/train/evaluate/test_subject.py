"""Where backbones come from, and where results go."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from subjects import export, results

from sdmp_train.commands import pretrain
from sdmp_train.config import Config, ConfigError
from sdmp_train.evaluate.linear import LinearConfig, evaluate_linear
from sdmp_train.evaluate.subject import SubjectConfig, keep_result, open_subject
from sdmp_train.run_folder import check_folder, strangers


def test_a_backbone_by_position_by_run_or_by_weights(tiny: Config, tmp_path: Path):
    run = tmp_path / "run"
    assert pretrain(replace(tiny, run=replace(tiny.run, max_steps=1)), run) == 0
    by_run = open_subject(SubjectConfig(run=str(run)), "knn")
    assert by_run.run == run and by_run.data.data == tiny.data.data
    assert open_subject(SubjectConfig(what=str(run)), "knn").digest == by_run.digest
    exported = str(run / "exported")
    for config in (SubjectConfig(what=exported, data="x"), SubjectConfig(weights=exported, data="x")):
        subject = open_subject(config, "knn")
        assert subject.digest == by_run.digest and subject.run is None
        assert (subject.data.data, subject.data.image_px, subject.data.mean) == ("x", 32, tiny.data.mean)
    with pytest.raises(ConfigError, match="there is no folder"):
        open_subject(SubjectConfig(what=str(tmp_path / "none")), "knn")
    shutil.rmtree(exported)
    with pytest.raises(ConfigError, match=f"no export yet, .* python -m sdmp_train export {run}$"):
        open_subject(SubjectConfig(what=str(run)), "knn")
    with pytest.raises(ConfigError, match="more than one backbone is given"):
        SubjectConfig(what="a", run="b")


def test_weights_of_timm(tiny: Config, monkeypatch, tmp_path: Path):
    """Fetched by timm, here in its place; in the size and range that they were trained with; refused in words."""
    import timm

    asked = []

    def fetched(name: str, *, pretrained: bool, **options):
        asked.append((name, pretrained, options))
        model = made(name, pretrained=False, **options)
        model.pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.1,) * 3, "std": (0.2,) * 3}
        return model

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("sdmp_train.weights.getproxies", dict)
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", fetched)
    subject = open_subject(SubjectConfig(what="timm:test_vit.r160_in1k", data="x"), "knn")
    assert asked == [("test_vit.r160_in1k", True, {"num_classes": 0})]
    assert (subject.name, subject.data.image_px, subject.data.mean) == ("timm:test_vit.r160_in1k", 64, (0.1,) * 3)
    assert not subject.backbone.training
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no network\nat all")))
    with pytest.raises(ConfigError, match=r"timm's weights of test_vit cannot be had: .*no network"):
        open_subject(SubjectConfig(weights="timm:test_vit", data="x"), "knn")
    monkeypatch.setattr(timm, "create_model", made)
    with pytest.raises(ConfigError, match=r"test_vit are not in the cache .*http://127.0.0.1:9 is not reached"):
        open_subject(SubjectConfig(weights="timm:test_vit", data="x"), "knn")
    with pytest.raises(ConfigError, match="unknown arch 'vit_smal'"):
        open_subject(SubjectConfig(weights="timm:vit_smal", data="x"), "knn")


def test_a_result_that_cannot_be_kept_is_said(tiny: Config, tmp_path: Path):
    subject = open_subject(SubjectConfig(weights=export(tiny, tmp_path / "net"), data="x"), "knn")
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with pytest.raises(ConfigError, match="the result cannot be written"):
        keep_result(tmp_path / "file", "knn", subject, {"top1": 1.0}, said.append)
    keep_result(None, "knn", subject, {"top1": 1.0}, said.append)  # nowhere asked for
    assert len(said) == 1 and "--output DIR keeps results" in said[0]
    for _ in range(2):
        keep_result(tmp_path / "made", "knn", subject, {"top1": 1.0}, said.append)
    assert [row["top1"] for row in results(tmp_path / "made")] == [1.0, 1.0]


def test_what_evaluations_leave_in_a_run_folder_is_the_runs_own(tiny: Config, tmp_path: Path):
    """--overwrite may delete it; not what a user has put there."""
    run = tmp_path / "run"
    assert pretrain(replace(tiny, run=replace(tiny.run, max_steps=1)), run) == 0
    evaluate_linear(LinearConfig(what=str(run), lr=(1.0,), epochs=1, batch_size=8, device="cpu"))
    assert (run / "evaluations" / "linear" / "checkpoints").is_dir() and results(run)[0]["protocol"] == "linear"
    assert list(strangers(run)) == []
    check_folder(run, "overwrite")
    (run / "evaluations" / "linear" / "notes.txt").write_text("mine")
    (run / "evaluations" / "link").symlink_to(tmp_path)
    assert {path.name for path in strangers(run)} == {"notes.txt", "link"}
    with pytest.raises(ConfigError, match="--overwrite deletes only what a run has written"):
        check_folder(run, "overwrite")
