"""Predictions: of claims that exist, by arithmetic that can be done again, and marked where a run says otherwise."""

from __future__ import annotations

import dataclasses

import pytest
from bench_documents import arm, document, row

from bench import goals, predict


def test_every_prediction_is_of_a_claim() -> None:
    claims = {(claim.goal, claim.words) for claim in goals.CLAIMS if claim.device == "cuda"}
    assert set(predict.predictions()) <= claims
    assert {"G1", "G2", "G3", "G4", "G5", "G6", "G7", "G10"} == {goal for goal, _ in predict.predictions()}


def test_an_attention_is_its_products_exponentials_and_other_instructions() -> None:
    """32768 x 32768 logits of 256: 1.10e12 operations, 1.07e9 exponentials."""
    known = predict.predictions()["G3", "info_nce bf16, n = m = 32768, d = 256: Triton"].value
    logits = 32768**2
    flops = 4 * logits * 256
    seconds = flops / 660e12 + logits / (132 * 16 * 1.755e9) + 6 * logits / (132 * 128 * 1.755e9)
    assert known == pytest.approx(flops / seconds / 1e12, rel=0.02)
    slower = dataclasses.replace(predict.Machine(), exps_per_s=1e12)
    assert predict.predictions(slower)["G3", "info_nce bf16, n = m = 32768, d = 256: Triton"].value < known


def test_what_is_far_from_its_prediction_is_marked() -> None:
    config = {"rule": "mixup", "source": "bfloat16", "n": 1024, "px": 224, "channels_last": False, "clean": False}
    gpu = {"cpu": "Test CPU", "cores": 2, "gpu": {"name": "Test GPU"}, "packages": {}}
    for share, marked in ((0.9, False), (0.5, True)):
        ours = arm("sdmp triton", "ours", 1.0, share_of_copy={"p20": share, "p50": share, "p80": share})
        entry = row(device="cuda", config=config, ours="sdmp triton", arms=[arm("copy", "ceiling"), ours])
        text = predict.table(document(environment=gpu, rows=[entry]))
        line = next(line for line in text.splitlines() if "mixup bf16, n = 1024: time over" in line)
        assert ("of the prediction" in line) is marked
    assert "measured" in text and "measured" not in predict.table(None), "without a run there is no such column"
