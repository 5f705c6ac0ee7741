"""The performance goals as claims about rows of the results: what is asked, what was measured, whether it holds.

A goal is a ratio taken in one run, against a copy of the same bytes or a named peer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench import distillation, soft_cross_entropy
from bench.harness import Model

Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One thing a goal asks for.

    Attributes:
        goal: "G1" and so on.
        words: what is compared, with the size.
        device: where it is measured.
        op, config: which row; every entry of `config` must match the row's.
        value: reads the number off the row; None where an arm it needs has no time.
        bound: what the number must reach.
        at_most: True where it must stay at or below the bound.
        unit: printed after the number.
        reach: for a goal about a copy's bandwidth: the best value that the bytes of today's kernels allow.
    """

    goal: str
    words: str
    device: str
    op: str
    config: dict[str, Any]
    value: Callable[[Row], float | None]
    bound: float
    at_most: bool = False
    unit: str = "x"
    reach: float | None = None

    @property
    def limit(self) -> str:
        """What today's kernels can reach, in words, where that falls short of the bound; else nothing."""
        if self.reach is None or (self.reach <= self.bound if self.at_most else self.reach >= self.bound):
            return ""
        return f"today's kernels move bytes for {'at least' if self.at_most else 'at most'} {self.reach:.2f}{self.unit}"


@dataclass(frozen=True)
class Outcome:
    """A claim beside what a document holds for it."""

    claim: Claim
    value: float | None
    why: str

    @property
    def held(self) -> bool | None:
        """Whether the claim holds; None where nothing was measured."""
        if self.value is None:
            return None
        return self.value <= self.claim.bound if self.claim.at_most else self.value >= self.claim.bound


def arm(row: Row, name: str) -> Row | None:
    """The arm of that name, if it has a time."""
    return next((a for a in row["arms"] if a["name"] == name and a["status"] == "ok"), None)


def ours(row: Row) -> Row | None:
    """The arm of ours that ratios refer to."""
    return arm(row, row["ours"]) if row["ours"] else None


def over_copy(row: Row) -> float | None:
    """Our time as a multiple of a copy's of the same bytes."""
    own = ours(row)
    return 1 / own["share_of_copy"]["p50"] if own and "share_of_copy" in own else None


def of_copy(row: Row) -> float | None:
    """The share of a copy's bandwidth that ours reaches."""
    own = ours(row)
    return own["share_of_copy"]["p50"] if own and "share_of_copy" in own else None


def over(*names: str) -> Callable[[Row], float | None]:
    """How many times longer the fastest of the named arms takes; names match as prefixes."""

    def value(row: Row) -> float | None:
        ratios = [
            a["times_ours"]["p50"]
            for a in row["arms"]
            if a["status"] == "ok" and not a["graph"] and "times_ours" in a and a["name"].startswith(names)
        ]
        return min(ratios) if ratios else None

    return value


def over_in_place(name: str) -> Callable[[Row], float | None]:
    """How many times longer the named arm, which overwrites its input, takes than ours over the input.

    The quotient of the two arms' ratios to ours into another tensor, each a median.
    """

    def value(row: Row) -> float | None:
        other, own = over(name)(row), over("sdmp cpp, in place")(row)
        return other / own if other and own else None

    return value


def over_graph(*names: str) -> Callable[[Row], float | None]:
    """The same among CUDA-graph replays."""

    def value(row: Row) -> float | None:
        ratios = [
            a["times_ours"]["p50"]
            for a in row["arms"]
            if a["status"] == "ok" and a["graph"] and "times_ours" in a and a["name"].startswith(names)
        ]
        return min(ratios) if ratios else None

    return value


def best_of(backend: str, field: str) -> Callable[[Row], float | None]:
    """A number of one backend's arm."""

    def value(row: Row) -> float | None:
        found = arm(row, f"sdmp {backend}")
        return found.get(field) if found else None

    return value


def counted(field: str) -> Callable[[Row], float | None]:
    """A count of our arm: launches, host_syncs."""

    def value(row: Row) -> float | None:
        own = ours(row)
        return own.get(field) if own else None

    return value


def graph_microseconds(row: Row) -> float | None:
    """Our fastest graph replay."""
    times = [a["seconds"]["p50"] for a in row["arms"] if a["kind"] == "ours" and a["graph"] and a["status"] == "ok"]
    return min(times) * 1e6 if times else None


def memory_share(name: str) -> Callable[[Row], float | None]:
    """Our extra peak memory as a share of another arm's."""

    def value(row: Row) -> float | None:
        own, other = ours(row), arm(row, name)
        if own is None or other is None or own["extra_peak_bytes"] is None or not other["extra_peak_bytes"]:
            return None
        return own["extra_peak_bytes"] / other["extra_peak_bytes"]

    return value


def step_over_flops(row: Row) -> float | None:
    """The step with SDMP over the plain one, divided by what its extra momentum forward costs (82.8 / 73.6 GFLOP)."""
    plain = arm(row, "MoCo v3")
    return 1 / plain["times_ours"]["p50"] / (82.8 / 73.6) if plain and "times_ours" in plain else None


def step_rate(row: Row) -> float | None:
    """Images per second of our step."""
    own = ours(row)
    return own.get("images_per_s") if own else None


def stall(row: Row) -> float | None:
    """1 - time on resident views / time fed by DALI."""
    fed = arm(row, "fed by dali")
    return 1 - 1 / fed["times_ours"]["p50"] if fed and "times_ours" in fed else None


MIX1024 = {"source": "bfloat16", "n": 1024, "px": 224, "channels_last": False}
BIG = {"n": 32768, "d": 256, "dtype": "bfloat16", "terms": 1, "key_grad": False}
CPU_MIX = {"source": "float32", "n": 128, "px": 224, "channels_last": False}
EAGER = "eager"


def _gpu_claims() -> list[Claim]:
    claims = [
        Claim("G1", f"{rule} bf16, n = 1024: time over a copy's", "cuda", "mix", {"rule": rule, **MIX1024}, over_copy,
              1.25 if rule == "resizemix" else 1.05, at_most=True)
        for rule in ("mixup", "cutmix", "resizemix")
    ]  # fmt: skip
    mixup, big = {"rule": "mixup", **MIX1024}, BIG
    claims += [
        Claim("G1", "mixup: best eager", "cuda", "mix", mixup, over(EAGER), 4),
        Claim("G1", "mixup: torch.compile", "cuda", "mix", mixup, over("torch.compile"), 1.3),
        Claim("G1", "mixup: timm elem", "cuda", "mix", mixup, over("timm elem"), 50),
        Claim("G1", "mixup: launches", "cuda", "mix", mixup, counted("launches"), 1, at_most=True, unit=""),
        Claim("G1", "mixup: host syncs", "cuda", "mix", mixup, counted("host_syncs"), 0, at_most=True, unit=""),
    ]
    decoded = {"rule": "mixture", "source": "uint8", "n": 1024, "channels_last": True, "clean": True}
    claims += [
        Claim("G2", "uint8 to bf16, clean and mixed, n = 1024: time over a copy's", "cuda", "mix", decoded, over_copy,
              1.15, at_most=True),
        Claim("G2", "the same: torch.compile", "cuda", "mix", decoded, over("torch.compile"), 2.5),
        Claim("G2", "the same: eager", "cuda", "mix", decoded, over(EAGER), 8),
        Claim("G3", "info_nce bf16, n = m = 32768, d = 256: Triton", "cuda", "info_nce", big,
              best_of("triton", "tflops"), 500, unit=" TFLOP/s"),
        Claim("G3", "the same: over one flash attention", "cuda", "info_nce", big, _inverse(over("SDPA identity")),
              1.05, at_most=True),
        Claim("G3", "the same: eager Algorithm 1", "cuda", "info_nce", big, over("eager Algorithm 1"), 5),
        Claim("G3", "the same: Inf-CL", "cuda", "info_nce", big, over("Inf-CL"), 4),
        Claim("G3", "the same: cut-cross-entropy, exact", "cuda", "info_nce", big, over("cut-cross-entropy"), 2),
        Claim("G3", "the same: extra memory in MB", "cuda", "info_nce", big, _megabytes, 101, at_most=True, unit=" MB"),
        Claim("G4", "info_nce with key gradients, 32768: Triton", "cuda", "info_nce", {**big, "key_grad": True},
              best_of("triton", "tflops"), 450, unit=" TFLOP/s"),
    ]  # fmt: skip
    for n, microseconds in ((1024, 15), (4096, 70)):
        small = {"n": n, "d": 256, "dtype": "bfloat16", "terms": 2, "key_grad": False}
        words = f"info_nce both terms, n = {n}, CUDA graph"
        claims += [
            Claim("G5", words, "cuda", "info_nce", small, graph_microseconds, microseconds, at_most=True, unit=" us"),
            Claim("G5", f"{words}: best eager", "cuda", "info_nce", small, over_graph("eager"), 10),
            Claim("G5", f"{words}: torch.compile", "cuda", "info_nce", small, over_graph("torch.compile"), 4),
            Claim("G5", f"{words}: launches", "cuda", "info_nce", small, counted("launches"), 4, at_most=True, unit=""),
        ]
    logits = {"n": 8192, "k": 65536, "dtype": "bfloat16", "forward": False}
    crops = {"n": 64, "v": 10, "t": 2, "k": 65536, "dtype": "bfloat16"}
    half = torch.bfloat16
    once = soft_cross_entropy.model(n=8192, columns=65536, dtype=half)
    pairs = distillation.model(distillation.Crops(v=10, t=2, n=64, k=65536), half)
    claims += [
        Claim("G6", f"soft_cross_entropy bf16 8192 x 65536, {_billions(once)}: share of a copy's bandwidth", "cuda",
              "soft_cross_entropy", logits, of_copy, 0.93, reach=once.floor_bytes / once.kernel_bytes),
        Claim("G6", "the same: torch.compile", "cuda", "soft_cross_entropy", logits, over("torch.compile"), 1.4),
        Claim("G6", "the same: QuACK (hard labels)", "cuda", "soft_cross_entropy", logits, over("QuACK"), 1),
        Claim("G7", f"distillation bf16, n = 64, k = 65536, {_billions(pairs)}: time over a copy's", "cuda",
              "distillation", crops, over_copy, 1.35, at_most=True, reach=pairs.kernel_bytes / pairs.floor_bytes),
        Claim("G7", "the same: double loop", "cuda", "distillation", crops, over("eager double loop"), 10),
        Claim("G7", "the same: torch.compile", "cuda", "distillation", crops, over("torch.compile"), 4),
        Claim("G8", "loader: torchvision loader", "cuda", "loader", {}, over("torchvision"), 10),
        Claim("G9", "stall: 1 - resident / fed by DALI", "cuda", "step", {"fed": True}, stall, 0.02, at_most=True,
              unit=""),
        Claim("G10", "ViT-S/16 step, batch 512: images per second", "cuda", "step", {"batch": 512}, step_rate, 3400,
              unit=" images/s"),
        Claim("G10", "the same: over the plain step's FLOP", "cuda", "step", {"batch": 512}, step_over_flops, 1.02,
              at_most=True),
        Claim("G10", "the same: plain PyTorch mixing and loss", "cuda", "step", {"batch": 512},
              over("MoCo v3 + SDMP, plain PyTorch"), 1.5),
    ]  # fmt: skip
    return claims


def _cpu_claims() -> list[Claim]:
    decoded = {"rule": "mixup", "source": "uint8", "n": 128, "channels_last": True, "clean": False}
    resize = {"rule": "resizemix", **CPU_MIX}
    contrast = {"n": 4096, "d": 256, "dtype": "float32", "terms": 1, "key_grad": False}
    given = {"n": 4096, "k": 4096, "dtype": "float32", "forward": False}
    crops = {"n": 32, "v": 10, "t": 2, "k": 65536, "dtype": "float32"}
    claims = []
    for rule in ("mixup", "cutmix"):
        config = {"rule": rule, **CPU_MIX}
        claims += [
            Claim("G12", f"{rule} float32: share of a copy's bandwidth", "cpu", "mix", config, of_copy, 0.9),
            Claim("G12", f"{rule} float32: torch.compile", "cpu", "mix", config, over("torch.compile"), 1.5),
            Claim("G12", f"{rule} float32: timm elem", "cpu", "mix", config, over("timm elem"), 4),
            Claim("G12", f"{rule} float32: timm elem, both in place", "cpu", "mix", config,
                  over_in_place("timm elem"), 4),
        ]  # fmt: skip
    claims += [
        Claim("G12", "resizemix float32: loop over F.interpolate", "cpu", "mix", resize,
              over("eager F.interpolate loop"), 3),
        Claim("G12", "uint8 channels_last to normalised mixed bf16: torch.compile", "cpu", "mix", decoded,
              over("torch.compile"), 6),
        Claim("losses", "info_nce float32, n = m = 4096, d = 256: eager Algorithm 1", "cpu", "info_nce", contrast,
              over("eager Algorithm 1"), 2),
        Claim("losses", "the same: extra peak memory, share of eager Algorithm 1's", "cpu", "info_nce", contrast,
              memory_share("eager Algorithm 1"), 0.25, at_most=True),
        Claim("losses", "soft_cross_entropy float32, 4096 x 4096: dense soft targets", "cpu", "soft_cross_entropy",
              given, over("eager dense target"), 2),
        Claim("losses", "distillation float32, n = 32, k = 65536: double loop", "cpu", "distillation", crops,
              over("eager double loop"), 2),
    ]  # fmt: skip
    return claims


def _billions(model: Model) -> str:
    return f"{model.floor_bytes / 1e9:.3g} GB once"


def _inverse(value: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
    def inverted(row: Row) -> float | None:
        number = value(row)
        return 1 / number if number else None

    return inverted


def _megabytes(row: Row) -> float | None:
    own = ours(row)
    return own["extra_peak_bytes"] / 1e6 if own and own["extra_peak_bytes"] is not None else None


CLAIMS = (*_gpu_claims(), *_cpu_claims())
NOT_BUILT = {
    "G3": "the CUDA version (>= 650 TFLOP/s)",
    "G4": "the CUDA version (>= 600 TFLOP/s)",
    "G7": "the CUDA cluster version (<= 1.15x a copy)",
    "G11": "a data set that lives in GPU memory, cropped, flipped, normalised and mixed in one kernel",
}


def outcomes(document: dict[str, Any] | None, device: str) -> list[Outcome]:
    """Every claim about a device beside what the document holds; `None`: no machine of that kind has run."""
    return [_outcome(document, claim) for claim in CLAIMS if claim.device == device]


def _outcome(document: dict[str, Any] | None, claim: Claim) -> Outcome:
    if document is None:
        return Outcome(claim, None, f"no {'GPU' if claim.device == 'cuda' else 'CPU'} run yet")
    row = find(document, claim)
    if row is None:
        return Outcome(claim, None, "this run has no such row")
    value = claim.value(row)
    return Outcome(claim, value, "" if value is not None else _why(row))


def find(document: dict[str, Any], claim: Claim) -> Row | None:
    """The row a claim speaks of."""
    for row in document["rows"]:
        matches = row["op"] == claim.op and row["device"] == claim.device
        if matches and all(row["config"].get(key) == value for key, value in claim.config.items()):
            return row
    return None


def _why(row: Row) -> str:
    missing = [f"{a['name']}: {a['reason']}" for a in row["arms"] if a["status"] != "ok"]
    return "; ".join(missing) or "the arm it needs was not run"


def summary(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The outcomes as the results file stores them."""
    device = "cuda" if document["environment"]["gpu"] else "cpu"
    return [
        {
            "goal": outcome.claim.goal,
            "words": outcome.claim.words,
            "bound": f"{'<=' if outcome.claim.at_most else '>='} {outcome.claim.bound:g}{outcome.claim.unit}",
            "value": outcome.value,
            "held": outcome.held,
            "why": "; ".join(words for words in (outcome.why, outcome.claim.limit) if words),
        }
        for outcome in outcomes(document, device)
    ]
