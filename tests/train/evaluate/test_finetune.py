"""Fine-tuning: DeiT's recipe against timm's own parts, what is exported, stops and resumptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from subjects import DEEP_VIT, RESNET, export, results, run_lines
from tiny_runs import as_batch, random_views

from sdmp_kernels import Rule
from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.data import open_folder
from sdmp_train.distributed import World
from sdmp_train.evaluate import fitting as fitting_module
from sdmp_train.evaluate.classifier import load_classifier
from sdmp_train.evaluate.finetune import RECIPES, FinetuneConfig, FineTuning, evaluate_finetune, finetuning
from sdmp_train.evaluate.subject import labelled_images, open_subject
from sdmp_train.evaluate.subset import some_images
from sdmp_train.export import load_exported
from sdmp_train.loop import step
from sdmp_train.methods.method import At
from sdmp_train.stop import Stopped, StopRequest
from sdmp_train.training import Training, assemble

CPU = World(torch.device("cpu"))


def settings(tiny: Config, tmp_path: Path, **changes: Any) -> FinetuneConfig:
    """Two epochs of three steps on the tiny images, in `tmp_path/out`."""
    if not (tmp_path / "net").exists():
        export(tiny, tmp_path / "net", DEEP_VIT)
    given = {"weights": str(tmp_path / "net"), "data": tiny.data.data, "output": str(tmp_path / "out")}
    options = {"epochs": 2, "batch_size": 8, "device": "cpu", "workers": 0, "log_every_steps": 1, "lr": 0.05}
    return FinetuneConfig(**{**given, **options, **changes})


def built(config: FinetuneConfig) -> tuple[Training, Any]:
    """The training that `config` means, at step 0, and its method."""
    subject = open_subject(config, "finetune", drop_path=config.drop_path)
    wanted = finetuning(config, subject, CPU, labelled_images(subject.data)[0])
    training = assemble(
        wanted.config, CPU, steps_per_epoch=3, classes=3, method_class=lambda _c, _b, setup: wanted.make(setup)
    )
    return training, cast(FineTuning, training.method)


def test_the_loss_is_timms_soft_target_cross_entropy_of_its_mixup_target(tiny: Config, tmp_path: Path):
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    _, method = built(settings(tiny, tmp_path))
    batch = as_batch(random_views(tiny, 1))
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    rules = set()
    for number in range(12):
        at = At(number, 12, 3)
        plan = method.plan(at)
        rules.add(int(plan.rule[0]))
        ours = method.loss(logits, plan, batch, at).total
        rows = [mixup_target(batch.labels, 3, lam=float(lam), smoothing=0.1)[row] for row, lam in enumerate(plan.lam)]
        torch.testing.assert_close(ours, SoftTargetCrossEntropy()(logits, torch.stack(rows)), rtol=1e-5, atol=1e-6)
    assert rules == {Rule.MIXUP, Rule.CUTMIX}


def test_plans_follow_timms_laws(tiny: Config, tmp_path: Path):
    """One rule and lam a batch, half and half, Beta(0.8) and Beta(1), the flip, every row mixed."""
    from sdmp_kernels import draw_plan

    _, method = built(settings(tiny, tmp_path))
    plans = [method.plan(At(number, 2000, 3)) for number in range(2000)]
    assert all(len(set(plan.rule.tolist())) == 1 and plan.mirrored for plan in plans)
    mixup = np.array([float(plan.lam[0]) for plan in plans if plan.rule[0] == Rule.MIXUP])
    assert all(len(set(plan.lam.tolist())) == 1 for plan in plans if plan.rule[0] == Rule.MIXUP)
    assert 900 < len(mixup) < 1100
    # Beta(a, a) has variance 1 / (4 (2 a + 1)).
    assert mixup.mean() == pytest.approx(0.5, abs=0.03) and mixup.var() == pytest.approx(1 / 10.4, abs=0.012)
    clean = built(settings(tiny, tmp_path, mixup_alpha=0.0, cutmix_alpha=0.0))[1].plan(At(0, 10, 3))
    assert set(clean.rule.tolist()) == {Rule.KEEP}
    only = built(settings(tiny, tmp_path, cutmix_alpha=0.0))[1].plan(At(0, 10, 3))
    drawn = draw_plan(8, (32, 32), rules=("mixup",), alpha=0.8, shared_lam=True, box="clip", seed=0, step=0)
    assert torch.equal(only.lam, drawn.lam)


def test_the_optimiser_is_deits(tiny: Config, tmp_path: Path):
    config = FinetuneConfig(what=str(tmp_path / "net"), data=tiny.data.data, batch_size=1024)
    export(tiny, tmp_path / "net", DEEP_VIT)
    subject = open_subject(config, "finetune", drop_path=0.1)
    wanted = finetuning(config, subject, CPU, labelled_images(subject.data)[0])
    optim = wanted.config.optim
    assert optim.lr == pytest.approx(5e-4 * 1024 / 512)
    assert (optim.opt, optim.weight_decay, optim.warmup_epochs, optim.epochs) == ("adamw", 0.05, 5, 100)
    short, given = (
        finetuning(replace(config, epochs=4, **changes), subject, CPU, labelled_images(subject.data)[0]).config.optim
        for changes in ({}, {"warmup_epochs": 3.0})
    )
    assert (short.warmup_epochs, given.warmup_epochs) == (0.8, 3)
    with pytest.raises(ConfigError, match="warmup_epochs"):
        finetuning(replace(config, epochs=4, warmup_epochs=5.0), subject, CPU, labelled_images(subject.data)[0])
    assert optim.min_lr == 1e-5 and optim.betas == (0.9, 0.999)
    assert (wanted.repeats, wanted.host.randaugment, wanted.host.erase_prob) == (3, "rand-m9-mstd0.5-inc1", 0.25)
    _, method = built(settings(tiny, tmp_path))
    decaying, others = method.groups()
    names = {id(parameter): name for name, parameter in method.classifier.named_parameters()}
    still = {names[id(p)] for p in others.parameters}
    assert {"backbone.pos_embed", "backbone.cls_token", "head.bias", "backbone.norm.weight"} <= still
    assert all(names[id(p)].endswith(".weight") and p.ndim > 1 for p in decaying.parameters)
    assert len(decaying.parameters) + len(others.parameters) == len(names) and not others.decays
    drops = [float(getattr(block.drop_path2, "drop_prob", 0)) for block in method.backbone.blocks]
    assert drops == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    assert method.views(None)[0].interpolation == "bicubic"


def test_a_batch_that_shrinks_is_said_with_what_it_does_to_the_rate(tiny: Config, tmp_path: Path):
    """The schedule's end is never above its peak, whatever the rate."""
    for lr, share in ((2.5e-4, 1.0), (2.5e-4, 0.2), (1e-6, 1.0)):
        config = settings(tiny, tmp_path, batch_size=None, lr=lr, fraction=share)
        subject = open_subject(config, "finetune")
        train = some_images(labelled_images(subject.data)[0], share, None, 0)[0]
        wanted = finetuning(config, subject, CPU, train)
        optim = wanted.config.optim
        assert optim.min_lr == min(1e-5, lr * len(train) / 256) <= optim.lr
        (line,) = fitting_module.shrunk(wanted.usual_batch, optim, len(train))
        assert f"1,024 -> {len(train)}: there are {len(train)} images" in line
        assert f"{lr:g} x {len(train)} / 256 = {lr * len(train) / 256:.3g} in place of {4 * lr:g}" in line
        assert ("stays there" in line) == (optim.lr <= 1e-5)
    given = settings(tiny, tmp_path, batch_size=8)
    wanted = finetuning(given, open_subject(given, "finetune"), CPU, train)
    assert fitting_module.shrunk(wanted.usual_batch, wanted.config.optim, 29) == []


def test_every_weight_is_trained(tiny: Config, tmp_path: Path):
    training, method = built(settings(tiny, tmp_path))
    before = {name: p.detach().clone() for name, p in method.classifier.named_parameters()}
    for number in range(2):
        step(training, [as_batch(random_views(tiny, 1, seed=number))], StopRequest())
    still = [name for name, p in method.classifier.named_parameters() if torch.equal(before[name], p.detach())]
    assert still == []


def test_what_is_exported_has_the_accuracy_that_is_kept(tiny: Config, tmp_path: Path, capsys):
    """By another way: Pillow's images, timm's features, a product."""
    found = evaluate_finetune(settings(tiny, tmp_path, fraction=0.9))
    (row,) = results(tmp_path / "out")
    assert row["protocol"] == "finetune" and {name: row[name] for name in found} == found
    assert f"finetune {found['top1']:7.2%} top-1" in capsys.readouterr().out
    model, pixels, classes = load_classifier(tmp_path / "out" / "exported")
    assert classes == ("bars", "checks", "dots")
    subject = open_subject(settings(tiny, tmp_path), "finetune")
    test = labelled_images(subject.data)[1]
    mean, std = (torch.tensor(pixels[name]).view(3, 1, 1) for name in ("mean", "std"))
    right = 0
    for row_number in range(len(test)):
        image = Image.open(test.path(row_number)).resize((32, 32), Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        right += int(model(((tensor - mean) / std)[None]).argmax()) == test.labels[row_number]
    assert found["top1"] == pytest.approx(
        right / len(test), abs=1 / len(test) + 1e-9
    )  # Pillow rounds between its passes
    assert found["train_images"] == 9 + 9 + 8  # of 10, 10 and 9


@pytest.mark.parametrize("model", [DEEP_VIT, RESNET], ids=["vit", "cifar_stem"])
def test_the_classifier_is_used_as_printed(model: ModelConfig, tiny: Config, tmp_path: Path, capsys):
    """Plain timm loads it with its classifier; the lines that are printed name the class that the logits say."""
    export(tiny, tmp_path / "net", model)
    evaluate_finetune(settings(tiny, tmp_path, epochs=1))
    answer = run_lines(capsys.readouterr().out, capsys)
    exported = tmp_path / "out" / "exported"
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "classes.json",
        "config.json",
        "model.safetensors",
    ]
    ours, pixels, classes = load_classifier(exported)
    assert (pixels["num_classes"], classes) == (3, ("bars", "checks", "dots"))
    if model is DEEP_VIT:
        theirs = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
        assert theirs.num_classes == 3 and theirs.pretrained_cfg["label_names"] == list(classes)
        images = torch.randn(4, 3, 32, 32)
        assert torch.equal(theirs(images), ours(images))
        assert timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=5)(images).shape == (4, 5)
        transform = timm.data.resolve_model_data_config(theirs)
        assert (transform["crop_pct"], transform["interpolation"]) == (1.0, "bicubic")
    else:
        with pytest.raises(RuntimeError, match="with the CIFAR stem"):
            timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=3)
    test = labelled_images(open_subject(settings(tiny, tmp_path), "finetune").data)[1]
    image = torch.from_numpy(np.array(Image.open(test.path(0)).resize((32, 32), Image.Resampling.BICUBIC)))
    mean, std = (torch.tensor(pixels[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = ours(((image.permute(2, 0, 1) / 255 - mean) / std)[None])
    assert answer == classes[int(expected.argmax())]
    card = (exported / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "on 7 test images" in card
    assert load_exported(exported, classifier=False)[0](torch.zeros(1, 3, 32, 32)).shape[1] > 3


def test_a_model_with_two_heads_keeps_its_last_layer_beside_it(tiny: Config, tmp_path: Path, capsys):
    """And so does what earlier versions have written."""
    model = ModelConfig(arch="deit_tiny_distilled_patch16_224", patch_px=16, width=16, depth=1, heads=1)
    export(tiny, tmp_path / "net", model)
    evaluate_finetune(settings(tiny, tmp_path, epochs=1, randaugment=None, repeats=1))
    answer = run_lines(capsys.readouterr().out, capsys)
    assert (tmp_path / "out" / "exported" / "classifier.safetensors").exists()
    model, _, classes = load_classifier(tmp_path / "out" / "exported")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3) and answer in classes


def test_a_stopped_fine_tuning_goes_on_to_the_same_bits(tiny: Config, tmp_path: Path, monkeypatch):
    evaluate_finetune(settings(tiny, tmp_path))
    last = Path("checkpoints") / "step-000006" / "classifier.safetensors"
    whole = (tmp_path / "out" / last).read_bytes()
    train = fitting_module.train

    def stopping(training, loader, log, stop, after_step):
        def after(training):
            after_step(training)
            stop.asked = stop.asked or training.step == 2

        return train(training, loader, log, stop, after)

    halved = settings(tiny, tmp_path, output=str(tmp_path / "halved"))
    with monkeypatch.context() as patch:
        patch.setattr(fitting_module, "train", stopping)
        with pytest.raises(Stopped):
            evaluate_finetune(halved)
    assert not (tmp_path / "halved" / last).exists()
    evaluate_finetune(replace(halved, resume=True))
    assert (tmp_path / "halved" / last).read_bytes() == whole


def test_the_papers_rows():
    shares = {name: (recipe.epochs, recipe.fraction) for name, recipe in RECIPES.items()}
    assert shares == {"table2": (100, 1.0), "table3-10": (30, 0.1), "table3-1": (60, 0.01)}
    for name, numbers in {
        "table2": ("78.7", "79.1"),
        "table3-10": ("66.7", "67.4"),
        "table3-1": ("54.4", "55.5"),
    }.items():
        assert all(number in RECIPES[name].paper for number in numbers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.0}, "fraction is 0"),
        ({"fraction": 0.1, "train_list": "x"}, "train_list is 'x'"),
        ({"randaugment": "m9"}, "randaugment is 'm9'"),
        ({"erase_prob": 2.0}, "erase_prob is 2"),
        ({"repeats": 0}, "repeats is 0"),
        ({"drop_path": 1.0}, "drop_path is 1"),
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1"),
        ({"lr": 0.0}, "lr is 0"),
    ],
)
def test_settings_are_checked_before_anything_is_read(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**changes)


def test_a_backbone_without_a_classifier_is_no_classifier(tiny: Config, tmp_path: Path):
    with pytest.raises(ConfigError, match="holds a backbone without a classifier; `eval finetune` makes one"):
        load_classifier(Path(export(tiny, tmp_path / "net")))
    assert open_folder(tiny.data.data or "").classes == ("bars", "checks", "dots")
