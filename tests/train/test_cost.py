"""The arithmetic of hours: operations are those that torch counts, passes those that a method makes."""

from __future__ import annotations

import pytest

from sdmp_train.config import ModelConfig
from sdmp_train.cost import FORWARD_GFLOP, count_gflop, forward_gflop, gpu_hours, image_gflop
from sdmp_train.presets import get_preset


@pytest.mark.parametrize("known", FORWARD_GFLOP, ids=str)
def test_the_table_is_what_torch_counts(known: tuple[str, str, int]):
    arch, stem, px = known
    assert FORWARD_GFLOP[known] == pytest.approx(count_gflop(ModelConfig(arch=arch, stem=stem), px), rel=1e-3)


def test_a_backbone_that_is_not_in_the_table_is_counted():
    """A linear layer of a ViT: 12 D^2 multiplications a token and block; patches and attention come on top."""
    small = ModelConfig(arch="vit_small", depth=1)
    tokens, width = 197, 384
    layers = 2 * 12 * width**2 * tokens / 1e9
    patches = 2 * 196 * width * 3 * 16 * 16 / 1e9
    attention = 2 * 2 * tokens**2 * width / 1e9
    assert forward_gflop(small, 224) == pytest.approx(layers + patches + attention, rel=1e-3)


def test_sdmp_costs_one_momentum_forward_more():
    """Two queries with gradient and two keys, or three: 8 or 9 forward passes' worth (3 for each query)."""
    plain, ours = get_preset("table1/mocov3-vit_s"), get_preset("table1/mocov3-vit_s-sdmp")
    assert image_gflop(plain) == pytest.approx(8 * 9.197)
    assert image_gflop(ours) == pytest.approx(9 * 9.197)
    assert image_gflop(get_preset("table1/supervised-vit_s")) == pytest.approx(3 * 9.197)


def test_hours_by_hand():
    config = get_preset("table1/mocov3-vit_s-sdmp")
    assert gpu_hours(config, 1_000_000) == pytest.approx(1e6 * 300 * 9 * 9.197e9 / 280e12 / 3600)
    config = get_preset("table5/cifar10-r50")
    assert gpu_hours(config, 50_000) == pytest.approx(5e4 * 200 * 8 * 2.595e9 / 75e12 / 3600)
