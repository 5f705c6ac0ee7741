"""Presets carry the paper's rows: names, numbers and the settings that distinguish them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from tiny_runs import at_step, build_training, loss_of, random_views

from sdmp_train.cli import parse_pretrain
from sdmp_train.config import ConfigError, flatten
from sdmp_train.models import timm_arguments
from sdmp_train.presets import FOR_OWN_IMAGES, ROW, get_preset, matters, origins_of, presets

PRESETS = presets()
OF_THE_PAPER = [name for name in PRESETS if name.startswith("table")]


def both(rows: str) -> str:
    """Rows that MoCo v3 and DINO have."""
    return " ".join(f"{method}-{row}" for method in ("mocov3", "dino") for row in rows.split())


ROWS = {
    1: "supervised-vit_s mocov3-vit_s mocov3-vit_s-imix mocov3-vit_s-dacl mocov3-vit_s-mochi mocov3-vit_s-sdmp "
    "mocov3-vit_b mocov3-vit_b-sdmp mocov3-r50 mocov3-r50-imix mocov3-r50-sdmp dino-vit_s dino-vit_s-sdmp",
    2: "supervised-vit_s-100ep supervised-vit_s",
    5: " ".join(
        f"cifar{classes}-r{layers}{mixing}{tail}"
        for classes in (10, 100)
        for layers in (50, 101)
        for mixing in ("", "-imix", "-sdmp")
        for tail in ("", "-2000ep")
    ),
    6: both("vit_s vit_s-sdmp vit_s-sdmp-static-source vit_s-sdmp-static-pair"),
    7: both("vit_s vit_s-sdmp vit_s-sdmp-shared"),
    8: both("vit_s vit_s-sdmp vit_s-sdmp-mixup vit_s-sdmp-resizemix"),
    9: "mocov3-vit_s mocov3-vit_s-sdmp-replace mocov3-vit_s-sdmp-extra",
    10: " ".join(f"dino-vit_s-l{count}{mixing}" for count in (0, 2, 6, 8) for mixing in ("", "-sdmp")),
    11: "supervised-vit_s " + both("vit_s vit_s-sdmp"),
}
"""The rows of the paper's tables, by table."""


def test_there_is_a_preset_for_every_row_and_no_other():
    assert sorted(OF_THE_PAPER) == sorted(f"table{n}/{row}" for n, rows in ROWS.items() for row in rows.split())
    numbers = [int(name.split("/")[0].removeprefix("table")) for name in OF_THE_PAPER]
    assert numbers == sorted(numbers), "they are listed table by table"


def test_every_preset_names_itself_its_number_and_its_source():
    for name, preset in PRESETS.items():
        assert preset.config.run.preset == name
        if name in OF_THE_PAPER:
            assert preset.source == f"paper, Table {name.split('/')[0].removeprefix('table')}"
            assert preset.result == f"{preset.top1:.1f} % top-1 on {preset.images.name}"
            assert 0.5 < preset.gpu_hours < 200


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_every_setting_that_matters_says_where_it_comes_from(name: str):
    preset = PRESETS[name]
    settings = dict(flatten(preset.config))
    assert set(preset.origins) <= set(settings), "a source is given for a setting that does not exist"
    matter = {key for key, value in settings.items() if matters(key, value, preset.config)}
    assert matter - set(preset.origins) <= {"method.name", "data.channels", "data.loader", "optim.clip_mode"}


def test_what_a_row_changes_is_said_to_be_the_rows():
    preset = PRESETS["table6/mocov3-vit_s-sdmp-static-source"]
    assert preset.origins["method.source_weight"] == ROW != preset.origins["method.pair_weight"]
    assert preset.config.method.source_weight == "static"


FAMILIES = {(p.config.method, p.config.model, p.config.optim.opt): name for name, p in PRESETS.items()}
"""One preset of each kind: those of a kind differ in numbers alone."""


@pytest.mark.parametrize("name", FAMILIES.values())
def test_every_kind_of_preset_is_resolved_and_its_method_built(name: str):
    """What `plan` does and one loss, on a stand-in for the backbone: one narrow block, or the smallest ResNet."""
    config = PRESETS[name].config
    narrow = {"mlp_dim": 16, "dim": 8, "out_dim": 16, "head_dim": 16, "bottleneck_dim": 8, "local_px": 16}
    small = {key: value for key, value in narrow.items() if hasattr(config.method, key)}
    is_vit = config.model.arch.startswith("vit")
    model = (
        replace(config.model, patch_px=16, width=24, depth=1, heads=2)
        if is_vit
        else replace(config.model, arch="test_resnet")
    )
    config = replace(
        config,
        data=replace(config.data, image_px=32),
        model=model,
        method=replace(config.method, **small),
        optim=replace(config.optim, batch_size=8, min_lr=0.0),
        run=replace(config.run, device="cpu", precision="fp32"),
    )
    training = build_training(config)
    method = training.method
    plan = method.plan(at_step(0))
    count = sum(recipe.size_px == config.data.image_px for recipe in method.views(at_step(0)))
    loss = loss_of(method, random_views(config, count), plan)
    assert loss.total.isfinite()
    assert "chance level" in method.describe()


def test_one_preset_explains_itself():
    lines = origins_of("table1/mocov3-vit_s-sdmp")
    assert lines[0] == "table1/mocov3-vit_s-sdmp: 73.8 % top-1 on ImageNet [paper, Table 1]"
    assert "82.8 GFLOP an image" in lines[1]
    row = next(line for line in lines if line.startswith("--mix-alpha "))
    assert row.split(maxsplit=2)[1:] == ["1.0", "the paper's released code; the paper says Beta(alpha, alpha)"]


@pytest.mark.parametrize("name", ["quickstart", "quickstart-dino", "cifar10-r18-sdmp", "table5/cifar10-r50-imix"])
def test_what_a_preset_prints_are_its_settings_as_flags(name: str):
    """Given to the command line beside another preset, they make this one's settings."""
    lines = origins_of(name)
    table = lines[lines.index("") + 1 :]
    source = table[0].index("where it comes from")
    assert table[0].split(maxsplit=2) == ["flag", "value", "where it comes from"]
    assert all(row[source:].strip() for row in table), "each with a source"
    words = [word for row in table[1:] for word in row[:source].split()]
    arguments = parse_pretrain("pretrain", ["--method", PRESETS[name].config.method_name, *words])
    wanted, got = PRESETS[name].config, dict(flatten(arguments.config))
    assert {key: got[key] for key, value in flatten(wanted) if matters(key, value, wanted)} == {
        key: value for key, value in flatten(wanted) if matters(key, value, wanted)
    }


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
        ("table1/dino-vit_s-sdmp", "table1/dino-vit_s"),
        ("table10/dino-vit_s-l0-sdmp", "table10/dino-vit_s-l0"),
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
