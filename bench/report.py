"""Rows of the results as text for people."""

from __future__ import annotations

from typing import Any


def seconds(value: float) -> str:
    """A duration with three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def size(value: int | None) -> str:
    """Bytes with a unit, decimal."""
    if value is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"


def ratio(value: float) -> str:
    """A ratio with two digits after the point below 10, none above 100."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def row(entry: dict[str, Any]) -> str:
    """One setting as a small table: every arm with its time, rates, ratio to ours, memory and error."""
    bound = "copy" if any("share_of_copy" in arm for arm in entry["arms"]) else "matmul"
    images = any("images_per_s" in arm for arm in entry["arms"])
    hosts = any("host_us" in arm for arm in entry["arms"])
    predicted = [arm for arm in entry["arms"] if "predicted" in arm and arm["status"] == "ok"]
    heads = [
        "arm",
        "p20",
        "p50",
        "p80",
        "images/s" if images else f"of {bound}",
        "x ours",
        "extra memory",
        *(["host"] if hosts else []),
        *(["predicted"] if predicted else []),
        "launches",
        "error",
    ]
    lines = [heads]
    for arm in entry["arms"]:
        if arm["status"] != "ok":
            continue
        times, share, times_ours = arm["seconds"], arm.get(f"share_of_{bound}"), arm.get("times_ours")
        mark = "*" if arm["name"] == entry["ours"] else ""
        lines.append(
            [
                arm["name"] + mark,
                *(seconds(times[p]) for p in ("p20", "p50", "p80")),
                _rate(arm, share),
                ratio(times_ours["p50"]) if times_ours else "",
                size(arm["extra_peak_bytes"]) if "extra_peak_bytes" in arm else "",
                *([_host(arm)] if hosts else []),
                *([_predicted(arm)] if predicted else []),
                str(arm["launches"]) if arm.get("launches") is not None else "",
                f"{max((e['vs_float64'] for e in arm['errors']), default=0.0):.1e}" if arm.get("errors") else "",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    shown = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        shown.append("    " + "  ".join(cells).rstrip())
    if predicted:
        asked = predicted[0]["predicted"]
        shown.append(
            f"    predicted of {predicted[0]['name']}: {asked['launches']} operators, {size(asked['bytes'])}, "
            f"{asked['flops'] / 1e9:.3g} GFLOP, on {asked['machine']}"
        )
    return "\n".join(shown)


def _rate(arm: dict[str, Any], share: dict[str, float] | None) -> str:
    if "images_per_s" in arm:
        return f"{arm['images_per_s']:.0f}"
    return f"{100 * share['p50']:.0f} %" if share and arm["kind"] != "ceiling" else ""


def _predicted(arm: dict[str, Any]) -> str:
    """What it should take, and how many times that it took."""
    if "predicted" not in arm:
        return ""
    expected = arm["predicted"]["seconds"]
    return f"{seconds(expected)} ({ratio(arm['seconds']['p50'] / expected)}x)"


def _host(arm: dict[str, Any]) -> str:
    """What the host takes for a call; "+" where some of it is in the arm's time too, as it was not queued in time."""
    if "host_us" not in arm:
        return ""
    return seconds(arm["host_us"] / 1e6) + ("" if arm["queued"] else " +")
