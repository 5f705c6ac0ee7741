"""Small trainings give, bit for bit, the weights that were recorded for this environment."""

from __future__ import annotations

import json

import pytest
from golden_training import RECORDED, RUNS, digests, environment

KNOWN = json.loads(RECORDED.read_text(encoding="utf-8"))
QUICK = "quickstart"


@pytest.mark.skipif(environment() not in KNOWN, reason=f"no digests were recorded for {environment()}")
@pytest.mark.parametrize(
    "name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name != QUICK)]
)
def test_twenty_steps_give_the_recorded_weights(name: str):
    """Where a change is meant to move numbers: `python tests/golden_training.py --record`, and say why."""
    assert digests(name) == KNOWN[environment()][name]


def test_every_run_has_a_digest_in_every_environment():
    assert KNOWN
    for recorded in KNOWN.values():
        assert {name: sorted(parts) for name, parts in recorded.items()} == {
            name: ["momentum_encoder", "optim", "student"] for name in RUNS
        }
