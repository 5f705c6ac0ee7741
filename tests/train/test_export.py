"""What is exported loads through timm, with every tensor matched and equal features."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from sdmp_train import export
from sdmp_train.card import how_to_load, write_card
from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.export import export_backbone, load_exported
from sdmp_train.models import build_backbone

HERE = {**os.environ, "PYTHONPATH": str(Path(export.__file__).parents[1])}


def trained(config: Config) -> torch.nn.Module:
    """A backbone with statistics that are not those of the start."""
    backbone = build_backbone(config.model, config.data.image_px, seed=1)
    generator = torch.Generator().manual_seed(0)
    backbone.train()(torch.randn(4, 3, 32, 32, generator=generator))
    return backbone


def test_timm_loads_a_vit_by_its_own_means(tiny: Config, tmp_path: Path):
    backbone = trained(tiny)
    export_backbone(backbone, tiny, tmp_path / "exported", step=8)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    assert loaded.state_dict().keys() == backbone.state_dict().keys()
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in backbone.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(images), loaded(images))
    assert loaded.pretrained_cfg["mean"] == pytest.approx(tiny.data.mean)
    again = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    again.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"), strict=True)
    assert torch.equal(again.eval()(images), loaded(images))


def test_a_cifar_stem_comes_back(tiny_resnet: Config, tmp_path: Path):
    backbone = trained(tiny_resnet)
    export_backbone(backbone, tiny_resnet, tmp_path / "exported", step=8)
    loaded, description = load_exported(tmp_path / "exported")
    assert description["stem"] == "cifar"
    assert description["pretraining"]["steps"] == 8
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), backbone.eval()(images), rtol=1e-5, atol=1e-6)  # other memory format
    assert torch.equal(loaded.bn1.running_mean, backbone.bn1.running_mean)
    assert loaded.bn1.running_mean.any()


def test_an_export_that_differs_is_noticed(tiny: Config, tmp_path: Path, monkeypatch):
    def spoiled(tensors, path):
        tensors["norm.weight"] = tensors["norm.weight"] * 2
        save_file(tensors, path)

    monkeypatch.setattr(export, "save_file", spoiled)
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        export_backbone(trained(tiny), tiny, tmp_path / "exported", step=8)
    assert not (tmp_path / "exported").exists()


def test_a_folder_without_an_export_is_refused(tiny: Config, tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no exported backbone"):
        load_exported(tmp_path)
    export_backbone(trained(tiny), tiny, tmp_path / "exported", step=8)
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    del tensors["cls_token"]
    save_file(tensors, tmp_path / "exported" / "model.safetensors")
    with pytest.raises(ConfigError, match="missing cls_token"):
        load_exported(tmp_path / "exported")


@pytest.mark.parametrize("width", [None, 8])
def test_plain_timm_refuses_a_cifar_stem_in_every_call_and_ours_loads_it(
    width: int | None, tiny_resnet: Config, tmp_path: Path
):
    """timm would load the narrow one with another classifier, and leave its stem at random weights."""
    arch = "resnet10t" if width else "test_resnet"
    config = replace(tiny_resnet, model=ModelConfig(arch=arch, stem="cifar", width=width))
    backbone = trained(config)
    export_backbone(backbone, config, tmp_path / "net", step=8)
    for options in ({}, {"num_classes": 3}, {"in_chans": 1}, {"features_only": True}):
        for pretrained in (True, False):
            with pytest.raises(RuntimeError, match=f"{arch} with the CIFAR stem, .*sdmp_train.export.load_exported"):
                timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=pretrained, **options)
    description = load_exported(tmp_path / "net")[1]
    assert description["timm_architecture"] == arch
    of_before = {key: value for key, value in description.items() if key != "timm_architecture"}
    (tmp_path / "net" / "config.json").write_text(json.dumps({**of_before, "architecture": arch}))
    loaded, description = load_exported(tmp_path / "net")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in backbone.state_dict().items())
    assert description["model_args"].get("channels") == ([8, 16, 32, 64] if width else None)
    assert loaded(torch.zeros(2, 3, 32, 32)).shape == (2, 64 if width else 96)


class Bomb:
    """A pickle of this writes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def exported(tiny: Config, tmp_path: Path) -> Path:
    export_backbone(trained(tiny), tiny, tmp_path / "exported", step=8)
    return tmp_path / "exported"


def change(folder: Path, **changes: object) -> None:
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, **changes}))


PIXELS = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "file"])
def test_a_description_cannot_make_timm_open_a_file(key: str, exported: Path, tmp_path: Path):
    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    value = str(bomb) if key in ("checkpoint_path", "file") else {"file": str(bomb)}
    arguments = json.loads((exported / "config.json").read_text())["model_args"]
    change(exported, model_args={**arguments, key: value, "pretrained": True})
    with pytest.raises(ConfigError, match=f"a name in model_args is '{key}'"):
        load_exported(exported)
    (exported / "model.safetensors").write_bytes(bomb.read_bytes())
    change(exported, model_args=arguments)
    with pytest.raises(ConfigError, match="is no safetensors file"):
        load_exported(exported)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hf-hub:timm/resnet18.a1_in1k"}, "plain name"),
        ({"architecture": "local-dir:/tmp"}, "plain name"),
        ({"architecture": None}, "architecture is None"),
        ({"architecture": ["resnet18"]}, "architecture is"),
        ({"architecture": "resnet18"}, "does not fit this model|timm cannot build"),
        ({"timm_architecture": "local-dir:/tmp"}, "plain name"),
        ({"timm_architecture": None}, "timm_architecture is None"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"num_classes": 10**9}, "num_classes is 1000000000"),
        ({"num_classes": 5}, "does not fit this model"),
        ({"stem": "paper"}, "stem is 'paper'"),
        ({"stem": {}}, "stem is"),
        ({"stem": "cifar"}, "expected a ResNet"),
        ({"model_args": []}, "model_args is"),
        ({"model_args": {"depth": 10**9}}, "model_args: depth is"),
        ({"model_args": {"depth": True}}, "model_args: depth is True"),
        ({"model_args": {"depth": 2.0}}, "model_args: depth is 2.0"),
        ({"model_args": {"embed_dim": "32"}}, "model_args: embed_dim is"),
        ({"model_args": {"depth": 256, "embed_dim": 16384, "num_heads": 256}}, "does not fit this model"),
        ({"model_args": {"img_size": 16384, "patch_size": 1}}, "does not fit this model"),
        ({"model_args": {"num_heads": 7}}, "timm cannot build"),
        ({"model_args": {"in_chans": 1}}, "input_size is"),
        ({"model_args": {"features_only": 1}}, "a name in model_args is 'features_only'"),
        ({"model_args": {"channels": [8, 16, 32]}}, "model_args: channels is"),
        ({"model_args": {"channels": [8, 16, 32, 10**9]}}, "model_args: channels is"),
        ({"model_args": {"channels": "8888"}}, "model_args: channels is"),
        ({"model_args": {"stem_type": "/etc/passwd"}}, "model_args: stem_type is"),
        ({"pretrained_cfg": None}, "pretrained_cfg is None"),
        ({"pretrained_cfg": {}}, "input_size is None"),
        ({"pretrained_cfg": {**PIXELS, "input_size": [3, 32]}}, "input_size is"),
        ({"pretrained_cfg": {**PIXELS, "input_size": [4, 32, 32]}}, "input_size is"),
        ({"pretrained_cfg": {**PIXELS, "input_size": [3, 1e9, 1e9]}}, "input_size is"),
        ({"pretrained_cfg": {**PIXELS, "input_size": [3, -8, -8]}}, "input_size is"),
        ({"pretrained_cfg": {**PIXELS, "mean": [0.5, 0.5]}}, "mean is"),
        ({"pretrained_cfg": {**PIXELS, "mean": ["0.5"] * 3}}, "mean is"),
        ({"pretrained_cfg": {**PIXELS, "mean": [float("nan")] * 3}}, "it holds NaN"),
        ({"pretrained_cfg": {**PIXELS, "mean": [1e308 * 10] * 3}}, "it holds Infinity"),
        ({"pretrained_cfg": {**PIXELS, "std": [0, 0.2, 0.2]}}, "std is"),
        ({"padding": "x" * 2**18}, "larger than"),
    ],
)
def test_a_description_that_says_other_things_is_refused_by_name(changes: dict, message: str, exported: Path):
    change(exported, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        load_exported(exported)
    assert len(str(error.value)) < 2500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, '{"architecture": ' + "9" * 5000 + "}", "\x00"])
def test_a_description_that_is_no_object_is_refused(text: str, exported: Path):
    (exported / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="holds no exported backbone"):
        load_exported(exported)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_and_devices_are_not_waited_for(name: str, exported: Path):
    (exported / name).unlink()
    os.mkfifo(exported / name)
    with pytest.raises(ConfigError, match="regular file"):
        load_exported(exported)
    (exported / name).unlink()
    (exported / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="regular file"):
        load_exported(exported)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((32,), float("nan")), "holds numbers that are not finite"),
        (torch.ones(32, dtype=torch.float64), "has dtype torch.float64"),
        (torch.ones(33), r"has shape \(33,\)"),
    ],
)
def test_exported_weights_are_taken_as_they_are_or_not_at_all(weight: torch.Tensor, message: str, exported: Path):
    tensors = load_file(exported / "model.safetensors")
    save_file({**tensors, "norm.weight": weight}, exported / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"norm\.weight {message}"):
        load_exported(exported)


@pytest.mark.parametrize("arch", ["deit_tiny_patch16_224", "mobilenetv3_small_100", "test_vit", "test_convnext"])
def test_whatever_can_be_trained_comes_back(arch: str, tiny: Config, tmp_path: Path):
    config = replace(tiny, model=ModelConfig(arch=arch))
    backbone = trained(config)
    export_backbone(backbone, config, tmp_path / "exported", step=8)
    loaded, _ = load_exported(tmp_path / "exported")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in backbone.state_dict().items())


@pytest.mark.parametrize("linked", [False, True])
def test_what_a_user_put_beside_an_export_stays(linked: bool, tiny: Config, tmp_path: Path):
    place = tmp_path / "elsewhere" if linked else tmp_path / "exported"
    place.mkdir()
    if linked:
        (tmp_path / "exported").symlink_to(place)
    else:
        (place / "notes.txt").write_text("mine")
    for step in (4, 8):
        export_backbone(trained(tiny), tiny, tmp_path / "exported", step)
        assert load_exported(tmp_path / "exported")[1]["pretraining"]["steps"] == step
    assert linked or (place / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_folder_whose_name_is_not_utf8_can_be_written_and_read(tiny: Config, tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"run\xff")
    export_backbone(trained(tiny), tiny, folder, step=8)
    assert load_exported(folder)[1]["pretraining"]["steps"] == 8


def test_timm_gives_any_family_another_classifier_and_other_channels(tiny: Config, tmp_path: Path):
    images = torch.randn(2, 3, 64, 64)
    families = ("test_vit", "deit3_small_patch16_224", "test_convnext", "test_resnet", "mobilenetv3_small_100")
    for arch in families:
        config = replace(tiny, data=replace(tiny.data, image_px=64), model=ModelConfig(arch=arch))
        export_backbone(trained_at(config, 64), config, tmp_path / arch, step=8)
        place = f"local-dir:{tmp_path / arch}"
        assert timm.create_model(place, pretrained=True, num_classes=10).eval()(images).shape == (2, 10)
        for channels in (1, 4):
            model = timm.create_model(place, pretrained=True, in_chans=channels).eval()
            assert model(images[:, :1].expand(-1, channels, -1, -1)).ndim == 2
        averaged = timm.create_model(place, pretrained=True, global_pool="avg").state_dict()
        for name, tensor in load_file(tmp_path / arch / "model.safetensors").items():
            assert torch.equal(averaged[name], tensor), (arch, name)


def trained_at(config: Config, px: int) -> torch.nn.Module:
    backbone = build_backbone(config.model, px, seed=1)
    backbone.train()(torch.randn(4, 3, px, px, generator=torch.Generator().manual_seed(0)))
    return backbone


def test_the_card_s_lines_load_the_export(tiny: Config, tiny_resnet: Config, tmp_path: Path):
    """In a process that has imported nothing, from within the folder, and from elsewhere."""
    pasted, widths = [], []
    for config, name, library in ((tiny, "it's", "timm"), (tiny_resnet, "cifar's", "pytorch")):
        folder, backbone = tmp_path / name, trained(config)
        export_backbone(backbone, config, folder, step=8)
        card = (folder / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front["license"] == "other"
        assert front["library_name"] == library
        code = card.split("```python\n")[1].split("```")[0] + "print(backbone.num_features)"
        pasted.append(f"os.chdir({str(folder)!r}); exec({code!r}, {{}})")
        widths.append(str(backbone.num_features))
        names: dict = {}
        exec("\n".join(how_to_load(config, str(folder))), names)
        first, tensor = next(iter(backbone.state_dict().items()))
        assert torch.equal(names["backbone"].state_dict()[first], tensor)
    code = "\n".join(["import os", *pasted])
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=HERE)
    assert shown.stdout.split() == widths, shown.stderr


def test_a_card_that_was_edited_stays(tiny: Config, tmp_path: Path):
    export_backbone(trained(tiny), tiny, tmp_path / "exported", step=4)
    write_card(tiny, tmp_path / "exported", 4, {"kNN": "50.0%"})
    assert "| kNN | 50.0% |" in (tmp_path / "exported" / "README.md").read_text()
    (tmp_path / "exported" / "README.md").write_text("my card")
    export_backbone(trained(tiny), tiny, tmp_path / "exported", step=8)
    write_card(tiny, tmp_path / "exported", 8, {})
    assert (tmp_path / "exported" / "README.md").read_text() == "my card"
    assert load_exported(tmp_path / "exported")[1]["pretraining"]["steps"] == 8
