"""`bench small`: every pair is timed, and the eager forms compute what the op does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench import small
from bench.mix import eager_forms
from sdmp_kernels import draw_plan, mix

FORMS = [(rule, form) for rule in small.RULES for form in eager_forms(rule)]


@pytest.mark.parametrize(("rule", "form"), FORMS)
def test_an_eager_form_computes_what_the_op_does(rule: str, form: str) -> None:
    images, out = torch.rand(9, 3, 16, 16), torch.empty(9, 3, 16, 16)
    plan = draw_plan(9, (16, 16), rules=(rule,), step=3)
    _, function, tolerance = eager_forms(rule)[form]
    function(images, plan, plan, out)
    assert torch.allclose(out, mix(images, plan), atol=tolerance or 1e-6)


def test_every_pair_has_a_row_and_no_thread_is_lost(tmp_path: Path, capsys) -> None:
    pytest.importorskip("timm")
    threads = torch.get_num_threads()
    file = tmp_path / "rows.json"
    assert small.run(argparse.Namespace(seconds=0.0, json=file)) == 0
    assert torch.get_num_threads() == threads
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * 2 + len(FORMS)
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
