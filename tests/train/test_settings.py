"""Settings are validated on construction and named in errors."""

from __future__ import annotations

import pytest

from sdmp_train.cli import parse_pretrain
from sdmp_train.config import from_dict
from sdmp_train.presets import get_preset
from sdmp_train.settings import GREY_MEAN, GREY_STD, RGB_MEAN, ConfigError, DataConfig, OptimConfig, RunConfig, near


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: OptimConfig(batch_size=1), "batch_size"),
        (lambda: OptimConfig(epochs=10, warmup_epochs=40), "warmup_epochs"),
        (lambda: OptimConfig(base_lr=float("nan")), "lr"),
        (lambda: OptimConfig(base_lr=0.0), "lr"),
        (lambda: DataConfig(crop_min_frac=0.0), "crop_min"),
        (lambda: DataConfig(std=(0.2, 0.0, 0.2)), "std"),
        (lambda: DataConfig(image_px=4), "image_px"),
        (lambda: RunConfig(seed=-1), "seed"),
        (lambda: RunConfig(max_steps=0), "max_steps"),
        (lambda: OptimConfig(min_lr=1.0), "min_lr"),
        (lambda: OptimConfig(clip_grad=0.0), "clip_grad"),
        (lambda: OptimConfig(weight_decay_end=-0.1), "weight_decay_end"),
    ],
)
def test_a_wrong_value_is_refused_by_name(build, names):
    with pytest.raises(ConfigError, match=names):
        build()


def test_effective_learning_rate_scales_with_the_global_batch():
    assert OptimConfig(base_lr=1.5e-4, batch_size=1024).lr == pytest.approx(6e-4)


def test_a_presets_mean_of_three_colours_gives_way_to_the_default_of_other_channels():
    quickstart = get_preset("quickstart")
    assert quickstart.data.mean != RGB_MEAN
    for given, mean in ([], GREY_MEAN), (["--mean", "0.3"], 0.3):
        data = parse_pretrain("pretrain", ["--preset", "quickstart", "--channels", "1", *given]).config.data
        assert (data.mean, data.std) == ((mean,), (GREY_STD,))
    assert from_dict({"data": {"channels": 2}}, quickstart).data.mean == (GREY_MEAN,) * 2
    assert from_dict({"data": {"channels": 3}}, quickstart).data == quickstart.data
    with pytest.raises(ConfigError, match="expected a number for each of the 1 channels"):
        from_dict({"data": {"channels": 1, "mean": [0.5, 0.5, 0.5]}}, quickstart)


def test_only_words_that_are_about_as_close_are_suggested():
    assert near("mixupp", ["mixup", "cutmix", "resizemix"]) == " Did you mean mixup?"
    assert near("pretrian", ["pretrain", "plan", "presets"]) == " Did you mean pretrain?"
    assert near("table1", ["table2", "table3"]) == " Did you mean table3, table2?"
    assert near("zzz", ["mixup"]) == near(3, ["mixup"]) == ""
