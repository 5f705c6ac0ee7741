"""`bench labels`: every way makes the same step, and its parts are parts of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench import labels

pytest.importorskip("timm", reason="timm is not installed")


def test_every_way_is_timed_in_its_parts(tmp_path: Path, capsys) -> None:
    file = tmp_path / "rows.json"
    args = argparse.Namespace(arch="test_resnet", px=32, classes=7, batch_size=6, blocks=2, json=file)
    assert labels.run(args) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["way"] for row in rows] == [way.name for way in labels.WAYS]
    printed = capsys.readouterr().out
    for row in rows:
        assert len(row["times"]["step"]) == 2
        assert all(m + s < step for m, s, step in zip(*(row["times"][part] for part in labels.PARTS), strict=True))
        assert labels.line(row) in printed
    assert rows[0]["times_first"] == 1


def test_two_hot_and_dense_targets_of_one_plan_give_one_loss() -> None:
    dense, hot = (way.make(5) for way in labels.WAYS if way.ours and way.mode == "elem")
    images, numbers = torch.rand(8, 3, 16, 16), torch.randint(0, 5, (8,))
    logits = torch.randn(8, 5)
    losses = []
    for mixing, loss in (dense, hot):
        mixed, target = mixing(images.clone(), numbers)
        losses.append((mixed, loss(logits, target)))
    assert torch.equal(losses[0][0], losses[1][0])
    torch.testing.assert_close(losses[0][1], losses[1][1])
