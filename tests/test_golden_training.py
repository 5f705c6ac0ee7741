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
    if name not in KNOWN[environment()]:
        pytest.skip(f"{name} has not been recorded for {environment()}")
    assert digests(name) == KNOWN[environment()][name]


def test_every_run_has_a_digest_in_some_environment_and_none_is_of_no_run():
    assert set().union(*KNOWN.values()) == set(RUNS)
    for recorded in KNOWN.values():
        for parts in recorded.values():
            assert sorted(parts) == ["momentum_encoder", "optim", "student"]
