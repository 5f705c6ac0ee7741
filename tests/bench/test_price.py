"""`bench price`: the arithmetic, the interval, and that the steps timed are those it names."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import pytest

from bench import price


def test_the_interval_is_that_of_the_order_statistics() -> None:
    """For 20 values the 6th and the 15th: P(fewer than 6 of 20 below the median) is 2.07 %."""
    assert price.interval(range(1, 21)) == (6, 15)
    assert price.interval(range(1, 7)) == (1, 6)
    assert price.interval([3.0]) == (3.0, 3.0)


def test_a_price_is_the_median_of_its_blocks(tmp_path: Path, capsys) -> None:
    file = tmp_path / "rows.json"
    assert price.run(argparse.Namespace(blocks=2, batch_size=8, seconds=0.0, json=file)) == 0
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == list(price.METHODS)
    for row in rows:
        times = row["times"]
        found = [s / (p + e) for p, e, s in zip(times["plain"], times["extra"], times["sdmp"], strict=True)]
        assert row["prices"] == pytest.approx(found)
        assert row["price"] == pytest.approx(statistics.median(found))
        assert price.line(row) in printed


@pytest.mark.parametrize("method", price.METHODS)
def test_sdmp_sees_just_the_extra_images_that_are_timed(method: str, monkeypatch) -> None:
    """Images through the backbones of both arms, counted: the difference is the batch of the extra forward."""
    from torch import nn

    counts = []
    honest = nn.Module.__call__

    def counted(self, *args, **kwargs):
        if hasattr(self, "patch_embed"):
            counts.append(len(args[0]) * args[0].shape[-1] ** 2)
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counted)

    def pixels(call) -> int:
        counts.clear()
        call()
        return sum(counts)

    plain, sdmp = (pixels(price.step_of(method, mixing, 4)) for mixing in ("none", "sdmp"))
    assert sdmp - plain == pixels(price.extra_of(method, 4)) > 0
