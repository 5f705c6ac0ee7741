"""Trained backbones, wherever they lie."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdmp_train.commands import pretrain
from sdmp_train.config import Config, ConfigError
from sdmp_train.models import build_backbone
from sdmp_train.weights import describe_weights, open_weights, weights_digest


def test_digests_tell_weights_apart(tiny: Config):
    first, same, other = (build_backbone(tiny.model, 32, seed=seed) for seed in (0, 0, 1))
    assert weights_digest(first) == weights_digest(same) != weights_digest(other)
    with torch.no_grad():
        same.norm.bias[3] += 1e-7
    assert weights_digest(first) != weights_digest(same)


@pytest.mark.parametrize("kind", ["tiny", "tiny_dino"])
def test_of_a_run_it_is_the_export_or_the_evaluated_backbone_of_the_newest_checkpoint(
    kind: str, request, tmp_path: Path
):
    """The same in either way: MoCo v3's student, DINO's teacher."""
    config: Config = request.getfixturevalue(kind)
    assert pretrain(replace(config, run=replace(config.run, max_steps=2)), tmp_path / "run") == 0
    run = str(tmp_path / "run")
    exported, told = open_weights(run), describe_weights(run)
    assert exported.name == f"{run}/exported" and open_weights(exported.name).digest == exported.digest
    (tmp_path / "run" / "exported").rename(tmp_path / "moved")
    saved = open_weights(run)
    assert saved.name == f"{run}/checkpoints/step-000002" and saved.digest == exported.digest
    assert saved.description == exported.description == told == describe_weights(run)
    assert not saved.backbone.training
    assert open_weights(str(tmp_path / "moved")).digest == exported.digest
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        path.rename(path.with_name("gone-" + path.name))
    with pytest.raises(ConfigError, match="holds 0 finished checkpoints"):
        open_weights(run)


def test_what_timm_has_no_weights_of_is_said_before_anything_is_fetched():
    assert describe_weights("timm:test_vit.r160_in1k")["pretrained_cfg"]["input_size"] == [3, 160, 160]
    for name in ("vit_tiny_patch16_224.nosuch", "vit_small_resnet26d_224"):
        with pytest.raises(ConfigError, match=f"timm has no weights of {re.escape(name)}"):
            describe_weights(f"timm:{name}")
    with pytest.raises(ConfigError, match="expected the plain name of a timm model"):
        describe_weights("timm:local-dir:/etc")
