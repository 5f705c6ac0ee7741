"""Presets carry the paper's rows: names, numbers and the settings that distinguish them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from sdmp_train.__main__ import parse_pretrain
from sdmp_train.config import ConfigError
from sdmp_train.models import timm_arguments
from sdmp_train.presets import FOR_OWN_IMAGES, get_preset, presets


def test_every_preset_names_itself_its_number_and_its_source():
    for name, preset in presets().items():
        assert preset.config.run.preset == name
        if name.startswith("table"):
            assert preset.source == f"paper, Table {name.split('/')[0].removeprefix('table')}"
            assert "%" in preset.result


def test_every_preset_names_a_model_that_timm_has():
    for preset in presets().values():
        timm_arguments(preset.config.model, preset.config.data.image_px, **preset.config.backbone_options)


@pytest.mark.parametrize("words", FOR_OWN_IMAGES.values())
def test_what_is_proposed_for_own_images_is_understood(words: str):
    arguments = parse_pretrain("pretrain", ["--preset", *words.split(), "--data", "photos"])
    assert arguments.config.run.preset == words.split()[0]
    assert arguments.config.data.data == "photos"


def test_the_paper_vit_s_has_twelve_heads():
    config = get_preset("table1/mocov3-vit_s-sdmp")
    name, arguments = timm_arguments(config.model, 224, **config.backbone_options)
    assert (name, arguments["num_heads"]) == ("vit_small_patch16_224", 12)


@pytest.mark.parametrize(
    ("name", "baseline"),
    [
        ("table1/mocov3-vit_s-sdmp", "table1/mocov3-vit_s"),
        ("table1/mocov3-r50-sdmp", "table1/mocov3-r50"),
        ("table5/cifar10-r50-sdmp", "table5/cifar10-r50"),
        ("table5/cifar100-r101-sdmp-2000ep", "table5/cifar100-r101-2000ep"),
        ("table11/mocov3-vit_s-sdmp", "table11/mocov3-vit_s"),
    ],
)
def test_sdmp_and_its_baseline_differ_in_the_mixing_alone(name: str, baseline: str):
    ours, theirs = get_preset(name), get_preset(baseline)
    assert {f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)} == {"method", "run"}
    assert replace(ours.method, mixing="none") == theirs.method


def test_ablations_set_one_thing():
    assert get_preset("table6/mocov3-vit_s-sdmp-static-source").method.source_weight == "static"
    assert get_preset("table6/mocov3-vit_s-sdmp-static-pair").method.pair_weight == "static"
    assert get_preset("table7/mocov3-vit_s-sdmp-shared").method.shared_lam
    assert get_preset("table8/mocov3-vit_s-sdmp-mixup").method.rules == ("mixup",)
    assert get_preset("table9/mocov3-vit_s-sdmp-extra").method.variant == "extra"


def test_unknown_names_get_near_matches():
    with pytest.raises(ConfigError, match="Did you mean quickstart"):
        get_preset("quikstart")
