"""Runs that continue from trained weights: what follows them, what fits, what is fresh, what stays frozen."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import KINDS, build_training, noise_batches, same_ends
from torch import nn

from sdmp_train import run as run_module
from sdmp_train.cli import main, parse_pretrain
from sdmp_train.commands import pretrain
from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.continuing import Start, following, open_start, resolved
from sdmp_train.evaluate.record import read_record
from sdmp_train.evaluate.report import summary
from sdmp_train.export import export_backbone
from sdmp_train.guard import StopRequest
from sdmp_train.loop import step
from sdmp_train.models import build_backbone
from sdmp_train.run_folder import stored_config
from sdmp_train.weights import Weights, open_weights


def trained(config: Config) -> nn.Module:
    """A backbone of other weights than a run begins with, and of batch statistics that are not those of a new one."""
    backbone = build_backbone(
        config.model, config.data.image_px, 7, channels=config.data.channels, **config.backbone_options
    )
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.25)  # type: ignore[union-attr, operator]
    return backbone


def exported(config: Config, folder: Path) -> str:
    """The same in a folder."""
    export_backbone(trained(config), config, folder, 1)
    return str(folder)


def continuing(config: Config, what: str, **optim: Any) -> Config:
    """`config` for a run from these weights."""
    optim = {"heads_only_epochs": 0.5, "backbone_lr_scale": 0.25, **optim}
    return replace(
        config, model=replace(config.model, init_from=what), optim=replace(config.optim, warmup_epochs=0, **optim)
    )


def backbones_of(method: Any) -> list[nn.Module]:
    """What is trained, and what follows it, where something does."""
    return [
        part.backbone
        for module in method.state.values()
        for part in (module, getattr(module, "encoder", None))
        if hasattr(part, "backbone")
    ]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_backbone_begins_with_the_weights_and_moves_once_the_heads_have_been_alone(kind: str, request):
    """One step of two an epoch: heads move, backbones do not; batch norms go on counting. Then a slower backbone."""
    plain: Config = request.getfixturevalue(kind)
    weights, config = trained(plain).state_dict(), continuing(plain, "somewhere")
    start = Start(Weights(trained(plain), "somewhere", {}), weights)
    training, fresh = build_training(config, 2, start=start), build_training(plain)
    inside = backbones_of(training.method)
    assert len(inside) == (1 if kind == "tiny_supervised" else 2)
    assert all(same(module.state_dict(), weights) for module in inside)
    in_backbones = {id(t) for module in inside for t in [*module.parameters(), *module.buffers()]}
    unlike = fresh.method.state.state_dict(keep_vars=True)
    heads = {k: t for k, t in training.method.state.state_dict(keep_vars=True).items() if id(t) not in in_backbones}
    assert heads and all(torch.equal(tensor, unlike[name]) for name, tensor in heads.items())

    before, of_heads = parameters(inside[0]), {name: tensor.detach().clone() for name, tensor in heads.items()}
    for number, batch in enumerate(noise_batches(config, 2)):
        step(training, [batch], StopRequest())
        assert [same(parameters(module), before) for module in inside] == [number == 0] * len(inside)
        assert same(dict(inside[0].named_buffers()), dict(trained(plain).named_buffers())) == (kind != "tiny_resnet")
    assert not same({k: t.detach() for k, t in heads.items()}, of_heads)
    rates = {group["lr"] for group in training.optimizer.param_groups}
    assert sorted(rate / max(rates) for rate in rates) == pytest.approx([0.25, 1.0])
    assert training.optimizer.param_groups[0]["lr"] == max(rates)  # what is logged


@pytest.mark.parametrize(
    ("kind", "px", "channels"), [("tiny", 48, 3), ("tiny", (16, 40), 1), ("tiny", 32, 5), ("tiny_resnet", 48, 5)]
)
def test_other_sizes_and_channels_are_made_to_fit_as_timm_makes_them(
    kind: str, px: Any, channels: int, tiny: Config, tmp_path: Path
):
    plain = tiny if kind == "tiny" else replace(tiny, model=ModelConfig(arch="test_resnet"))
    what = exported(plain, tmp_path / "net")
    data = replace(plain.data, image_px=px, channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    start = open_start(continuing(replace(plain, data=data), what))
    assert start is not None
    sizes = {"img_size": px} if kind == "tiny" else {}
    by_timm = timm.create_model(f"local-dir:{what}", pretrained=True, num_classes=0, in_chans=channels, **sizes)
    assert same(dict(start.tensors), by_timm.state_dict())
    resized = kind == "tiny" and px != 32
    said = "; ".join(start.changed)
    assert ("positions from 4 x 4 to" in said) == resized
    assert (f"from 3 to {channels} channel" in said) == (channels != 3)


def test_positions_of_a_rectangle_are_resampled_as_one(tiny: Config, tmp_path: Path):
    """As many patches in another shape are not the same positions; timm takes every grid for a square."""
    wide = replace(tiny, data=replace(tiny.data, image_px=(16, 64)))
    start = open_start(continuing(tiny, exported(wide, tmp_path / "net")))
    assert start is not None and start.changed == ("positions from 2 x 8 to 4 x 4 patches",)
    before = trained(wide).pos_embed.detach()  # type: ignore[union-attr]
    grid = before[:, 1:].reshape(1, 2, 8, -1).permute(0, 3, 1, 2)  # type: ignore[index]
    moved = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    assert torch.equal(start.tensors["pos_embed"][:, 1:], moved.permute(0, 2, 3, 1).reshape(1, 16, -1))
    assert torch.equal(start.tensors["pos_embed"][:, :1], before[:, :1])  # type: ignore[index]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"arch": "deit_tiny_patch16_224"}, "arch is 'deit_tiny_patch16_224'; expected 'vit_tiny_patch16_224', as the"),
    ({"stem": "imagenet"}, "stem is 'imagenet'; expected 'cifar', as the weights of"),
    ({"heads": 4}, "heads is 4; expected 2, as the weights of"),
    ({"width": 16}, "width is 16; expected 32, as"),
    ({"depth": 3}, "depth is 3; expected 2, as"),
    ({"patch_px": 4}, "patch_px is 4; expected 8, as"),
    ({"init_sha256": "0" * 64}, "init_sha256 is 0000"),
]
"""Settings that are not those of the weights, and what is said of each."""


def test_settings_unlike_the_weights_are_refused_by_name(tiny: Config, tiny_resnet: Config, tmp_path: Path):
    configs = [continuing(plain, exported(plain, tmp_path / plain.model.arch)) for plain in (tiny, tiny_resnet)]
    for changes, message in WRONG:
        config = configs["stem" in changes]
        with pytest.raises(ConfigError, match=re.escape(message)):
            open_start(replace(config, model=replace(config.model, **changes)))


def test_timms_own_weights(tiny: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """By a name, of which nothing is fetched here, and in a folder as timm saves them."""
    made = timm.create_model

    def fetched(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        torch.manual_seed(7)
        return made(name, pretrained=False, **options)

    model = fetched("test_vit.r160_in1k", pretrained=True, num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    followed = following(tiny, "timm:test_vit.r160_in1k")
    assert (followed.model.arch, followed.data.image_px, followed.model.width) == ("test_vit", 160, None)
    config = replace(followed, data=replace(followed.data, image_px=32))
    with monkeypatch.context() as patch:
        patch.setattr(
            timm, "create_model", lambda name, **options: (fetched if options["pretrained"] else made)(name, **options)
        )
        start = open_start(config)
    assert start is not None and start.changed == ("positions from 10 x 10 to 2 x 2 patches",)
    by_folder = following(tiny, str(tmp_path / "saved"))
    assert by_folder.data == followed.data and by_folder.model.arch == "test_vit"
    saved = open_start(replace(by_folder, data=config.data))
    assert saved is not None and same(
        dict(saved.weights.backbone.state_dict()),
        {k: v for k, v in model.state_dict().items() if not k.startswith("head.")},
    )
    told = json.loads((tmp_path / "saved" / "config.json").read_text())
    told["model_args"] |= {"global_pool": "max", "fc_norm": False}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="global_pool is 'token'; expected max, as the weights of"):
        open_start(by_folder)
    assert build_training(replace(config, method=tiny.method), start=start).method.backbone.training


def test_what_is_left_open_is_decided_where_a_run_continues(tiny: Config):
    assert resolved(tiny) == tiny
    found = resolved(replace(continuing(tiny, "x", heads_only_epochs=None, backbone_lr_scale=None, epochs=60)))
    assert (found.optim.heads_only_epochs, found.optim.backbone_lr_scale) == (3.0, 0.1)
    assert found.run.knn_every_epochs == 6
    kept = replace(found, run=replace(found.run, knn_every_epochs=0), optim=replace(found.optim, heads_only_epochs=0))
    assert resolved(kept) == kept


def test_settings_follow_the_weights_but_for_flags_and_files(tiny: Config, tmp_path: Path):
    """preset < weights < --config < flags; and a resumed run needs the weights no more."""
    plain = replace(tiny, data=replace(tiny.data, mean=(0.1, 0.2, 0.3)))
    what = exported(plain, tmp_path / "net")
    words = ["--preset", "table1/mocov3-vit_s-sdmp", "--init-from", what, "--data", "x"]
    config = parse_pretrain("plan", words).config
    assert config.model == replace(tiny.model, init_from=what)
    assert (config.data.image_px, config.data.mean, config.optim.epochs) == (32, (0.1, 0.2, 0.3), 300)
    config = parse_pretrain("plan", [*words, "--image-px", "64", "--channels", "1", "--depth", "3"]).config
    assert (config.data.image_px, config.data.mean, config.model.depth) == (64, (0.449,), 3)
    (tmp_path / "c.yaml").write_text(f"model: {{init_from: {what}, depth: 4}}\n")
    config = parse_pretrain("plan", ["--config", str(tmp_path / "c.yaml")]).config
    assert config.model == replace(tiny.model, init_from=what, depth=4)
    again = parse_pretrain("plan", ["--config", str(tmp_path / "c.yaml"), "--init-from", "None"]).config
    assert again.model.init_from is None
    run = tmp_path / "run"
    assert main([*("pretrain", *words[2:]), "--output", str(run)]) == 2  # no images: nothing is there yet
    assert not run.exists()


def test_a_run_from_trained_weights_resumes_without_them_and_says_where_it_is_worse(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """The heads are alone for the first of two epochs; the run is stopped within it, and the weights are gone then."""
    first = exported(tiny, tmp_path / "net")
    config = continuing(tiny, first, heads_only_epochs=1.0)
    config = replace(config, run=replace(config.run, knn_max_images=30))
    found = iter([0.3, 0.625, 0.625, 0.6, 0.3, 0.625, 0.612, 0.625, 0.61])
    monkeypatch.setattr(run_module, "weighted_knn", lambda *_: {run_module.KNN_K: next(found)})
    assert pretrain(config, tmp_path / "whole") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^init     .*net \(SHA-256 [0-9a-f]{12}\); fresh heads$", printed, re.MULTILINE)
    assert "adamw; the backbone at 0.25 x that from epoch 1 on" in printed
    worse = (
        "kNN      60.0%: 2.5 points below the start (62.5%, give or take 19.8 with 6 queries). What keeps more of it: "
    )
    assert printed.count(worse) == printed.count("below the start") == 1
    assert (
        "kNN      30.0% raw pixels, 62.5% backbone at the start, 62.5% backbone after epoch 1, 60.0% trained" in printed
    )

    def limited(steps: int) -> Config:
        return replace(config, run=replace(config.run, max_steps=steps))

    assert pretrain(limited(3), tmp_path / "parts") == 0
    assert "kNN      61.2%: 1.3 points below the start" in capsys.readouterr().out
    (tmp_path / "net").rename(tmp_path / "gone")
    assert pretrain(limited(8), tmp_path / "parts", resume=True) == 0
    printed = capsys.readouterr().out
    assert "loaded when the run began" in printed and "61.0%: 1.5 points below the start (62.5%, " in printed
    assert same_ends(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ConfigError, match=r"there is no folder .*net; give that of an export"):
        pretrain(config, tmp_path / "third")

    digest = open_weights(str(tmp_path / "gone")).digest
    kept = stored_config(tmp_path / "parts")
    assert (kept.model.init_from, kept.model.init_sha256) == (first, digest)
    assert (kept.optim.heads_only_epochs, kept.optim.backbone_lr_scale, kept.run.knn_every_epochs) == (1.0, 0.25, 1)
    card = (tmp_path / "parts" / "exported" / "README.md").read_text()
    assert f"| began from | {first}, SHA-256 {digest} |" in card
    told = json.loads((tmp_path / "parts" / "exported" / "config.json").read_text())["pretraining"]
    assert (told["init_from"], told["init_sha256"]) == (first, digest)
    page = summary([read_record(tmp_path / "whole")])
    assert "2.5 points below" in page and f"{first} (SHA-256 {digest[:12]}); fresh heads" in page
    for other, message in (
        (str(tmp_path / "gone"), "model.init_from: "),
        (None, "model.init_from: "),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain(replace(config, model=replace(config.model, init_from=other)), tmp_path / "parts", resume=True)
    one_command = ["--preset", "quickstart", "--init-from", first, "--output", str(tmp_path / "parts"), "--resume"]
    assert parse_pretrain("pretrain", one_command).config.model == kept.model
