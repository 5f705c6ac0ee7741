"""What a goal should come out at on a GPU that nobody has tried yet: by bytes, instructions and launches.

A first run confirms or refutes these numbers instead of starting from nothing: `python -m bench table --write` puts
them, each with its formula, beside what was measured, in docs/gpu-run.md. What is off by more than `APART` wants a
reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench import info_nce
from bench.goals import CLAIMS, Outcome, outcomes
from bench.roofline import Machine

APART = 0.15


@dataclass(frozen=True)
class Prediction:
    """A number in the unit of its claim, and how it comes about."""

    value: float
    formula: str


LANES = 6
"""Instructions of a lane for every logit beside its exponential: scale, subtract, compare, add, convert."""


def predictions(machine: Machine | None = None) -> dict[tuple[str, str], Prediction]:
    """By (goal, words) of a claim. Ratios to other people's code are not predicted."""
    gpu = machine or Machine()
    found: dict[tuple[str, str], Prediction] = {}
    for rule in ("mixup", "cutmix"):
        found["G1", f"{rule} bf16, n = 1024: time over a copy's"] = Prediction(
            1.0, "each byte read and written once, one launch: a copy's time"
        )
    found["G1", "resizemix bf16, n = 1024: time over a copy's"] = Prediction(
        1.25,
        "the box, half an image on average, is written twice; its 155 instructions for a pixel of three channels, "
        "with twelve taps in flight, take 0.6 of a copy's time and hide",
    )
    found["G1", "mixup: launches"] = Prediction(1, "counted in the code")
    found["G1", "mixup: host syncs"] = Prediction(0, "counted in the code")
    found["G2", "uint8 to bf16, clean and mixed, n = 1024: time over a copy's"] = Prediction(
        1.0, "one byte read and four written a value, each once"
    )
    big = info_nce.model(n=32768, width=256, dtype=torch.bfloat16)
    found["G3", "info_nce bf16, n = m = 32768, d = 256: Triton"] = Prediction(
        big.flops / attention_seconds(gpu, 32768, 32768, big.flops) / 1e12,
        "operations / (products + exponentials + other instructions): a program's softmax and its products take turns",
    )
    found["G3", "the same: over one flash attention"] = Prediction(1.0, "the same products and exponentials")
    both = info_nce.model(n=32768, width=256, dtype=torch.bfloat16, key_grad=True)
    again = attention_seconds(gpu, 32768, 32768, big.flops) + attention_seconds(
        gpu, 32768, 32768, both.flops - big.flops
    )
    found["G4", "info_nce with key gradients, 32768: Triton"] = Prediction(
        both.flops / again / 1e12, "the same, and once more for the gradient of the keys, which makes the products anew"
    )
    for n in (1024, 4096):
        small = info_nce.model(n=n, width=256, dtype=torch.bfloat16, terms=2)
        words = f"info_nce both terms, n = {n}, CUDA graph"
        seconds = 3 * gpu.launch_s + attention_seconds(gpu, n, 2 * n, small.flops)
        found["G5", words] = Prediction(
            seconds * 1e6, "3 launches (attend, merge, scale) + products, exponentials and other instructions"
        )
        found["G5", f"{words}: launches"] = Prediction(
            3, "attend and merge for both terms, and the scale of the backward"
        )
    formulas = {
        "G6": "bytes that must move / bytes that the kernels move",
        "G7": "bytes that the kernels move / bytes that must move",
    }
    for claim in CLAIMS:
        if claim.reach is not None:
            found[claim.goal, claim.words] = Prediction(claim.reach, formulas[claim.goal])
    found["G10", "ViT-S/16 step, batch 512: images per second"] = Prediction(
        1650.0,
        "eager: 1,500 to 1,800 by counting launches and bytes of its layers; 82.8 GFLOP an image alone allow 7,970",
    )
    return found


def attention_seconds(gpu: Machine, n: int, m: int, flops: int) -> float:
    """Products, then exponentials, then other instructions of n x m logits, one after the other."""
    logits = n * m
    return flops / gpu.tensor_flops + logits / gpu.exps_per_s + LANES * logits / gpu.lanes_per_s


def table(document: dict[str, Any] | None) -> str:
    """Every goal on a GPU: asked, predicted by which formula, and measured, if a GPU has run; what is off is marked."""
    known = predictions()
    lines = [
        f"Assumed of the machine: {Machine().line()}.",
        "",
        "| goal | | asked | predicted | because |" + (" measured |" if document else ""),
        "|---|---|---|---|---|" + ("---|" if document else ""),
    ]
    for outcome in outcomes(document, "cuda"):
        claim = outcome.claim
        asked = f"{'<=' if claim.at_most else '>='} {claim.bound:g}{claim.unit}"
        guess = known.get((claim.goal, claim.words))
        predicted, why = ("", "") if guess is None else (f"{guess.value:.3g}{claim.unit}", guess.formula)
        came_out = f" {measured(outcome, guess)} |" if document else ""
        lines.append(f"| {claim.goal} | {claim.words} | {asked} | {predicted} | {why} |{came_out}")
    return "\n".join(lines)


def measured(outcome: Outcome, guess: Prediction | None) -> str:
    """What came out, beside its prediction."""
    if outcome.value is None:
        return f"no: {outcome.why}"
    said = f"{outcome.value:.3g}{outcome.claim.unit}" + ("" if outcome.held else ", **missed**")
    if guess is None or abs(outcome.value - guess.value) <= APART * max(abs(guess.value), 1e-9):
        return said
    return (
        f"{said}, **{outcome.value / guess.value:.2f} of the prediction**"
        if guess.value
        else f"{said}, **not as predicted**"
    )
