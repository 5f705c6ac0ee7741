"""Two pictures of a results file: how close each op comes to its ceiling, and how it compares with each peer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

OURS, MATMUL, EAGER, COMPILE, PEER = "#1f5fbf", "#7a4fb5", "#9a9a9a", "#d98a1f", "#3f9a5a"
COLOURS = {"ours": OURS, "eager": EAGER, "compile": COMPILE, "peer": PEER}
WORDS = {"eager": "plain PyTorch", "compile": "torch.compile", "peer": "other libraries"}


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write `<machine>-<date>-ceiling.png` and `-peers.png`; returns those there was anything to show in."""
    import matplotlib

    matplotlib.use("Agg")
    stem = f"{document['machine']}-{document['date']}"
    pictures = {f"{stem}-ceiling.png": ceiling_figure(document), f"{stem}-peers.png": peers_figure(document)}
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, dpi=110)
            written.append(folder / name)
    return written


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["ours"] and row["op"] not in ("step", "loader")]


def _figure(height: float, title: str, document: dict[str, Any]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    where = document["environment"]["gpu"]["name"] if document["environment"]["gpu"] else document["environment"]["cpu"]
    cores = "" if document["environment"]["gpu"] else f", {document['environment']['cores']} cores"
    torch_version = document["environment"]["packages"]["torch"]
    words = f"{title}\n{where}{cores}, torch {torch_version}, {document['date']}"
    figure.suptitle(words, x=0.01, ha="left", fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _two_lines(name: str) -> str:
    """A long name broken at the comma nearest to its middle."""
    commas = [place for place, letter in enumerate(name) if letter == ","]
    if len(name) < 44 or not commas:
        return name
    middle = min(commas, key=lambda place: abs(place - len(name) / 2))
    return f"{name[: middle + 1]}\n{name[middle + 2 :]}"


# Behind numbers that may lie on a line of the picture.
CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def ceiling_figure(document: dict[str, Any]) -> Any | None:
    """Bars: the share of a copy's bandwidth, or of a matrix product's rate, that ours reaches, by setting."""
    bars = []
    for row in _rows(document):
        own = next(a for a in row["arms"] if a["name"] == row["ours"])
        for field, words in (("share_of_copy", "of a copy"), ("share_of_matmul", "of a matrix product")):
            if field in own:
                bars.append((row["setting"], own[field], words))
    if not bars:
        return None
    figure, axes = _figure(1.5 + 0.44 * len(bars), "How close to a copy of the bytes, or a matrix product", document)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    for place, (_, share, words) in enumerate(bars):
        axes.barh(place, share["p50"], color=OURS if words == "of a copy" else MATMUL, height=0.62)
        axes.plot([share["p20"], share["p80"]], [place, place], color="black", linewidth=1)
        end = max(share["p80"], share["p50"]) + 0.02
        axes.text(end, place, f"{100 * share['p50']:.0f} % {words}", va="center", fontsize=9, bbox=CLEAR)
    axes.set_yticks(range(len(bars)), [_two_lines(name) for name, _, _ in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, max(1.4, 0.4 + max(share["p80"] for _, share, _ in bars)))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "the ceiling"])
    return figure


def peers_figure(document: dict[str, Any]) -> Any | None:
    """Dots: how many times longer each other arm takes than ours, by setting, on a logarithmic axis."""
    rows = [(row, _others(row)) for row in _rows(document)]
    rows = [(row, others) for row, others in rows if others]
    if not rows:
        return None
    lines = sum(len(others) + 1 for _, others in rows)
    title = "How many times longer the others take (left of 1: they are faster)"
    figure, axes = _figure(1.7 + 0.24 * lines, title, document)
    axes.axvline(1, color=OURS, linewidth=1.2)
    place, names, seen = 0, [], set()
    for row, others in rows:
        words = f"{row['setting']}  (ours: {row['ours']})"
        axes.text(
            0.0, place, words, transform=axes.get_yaxis_transform(), va="center", fontsize=9, weight="bold", bbox=CLEAR
        )
        names.append("")
        for arm in others:
            place += 1
            _dot(axes, place, arm, labelled=arm["kind"] not in seen)
            seen.add(arm["kind"])
            names.append(arm["name"])
        place += 1
    axes.set_yticks(range(lines), names, fontsize=8)
    axes.set_ylim(lines - 0.4, -0.6)
    ratios = [a["times_ours"][p] for _, others in rows for a in others for p in ("p20", "p80")]
    low, high = min([0.5, *ratios]) / 1.2, max([2, *ratios]) * 1.6
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    powers = [10**e * m for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
    shown = [p for p in powers if low <= p <= high]
    axes.set_xticks(shown, [f"{p:g}x" for p in shown])
    axes.minorticks_off()
    figure.legend(loc="outside lower right", fontsize=9, ncols=3, frameon=False)
    return figure


def _dot(axes: Any, place: int, arm: dict[str, Any], *, labelled: bool) -> None:
    ratio, colour = arm["times_ours"], COLOURS[arm["kind"]]
    axes.plot([ratio["p20"], ratio["p80"]], [place, place], color=colour, linewidth=2, alpha=0.5)
    label = WORDS[arm["kind"]] if labelled else None
    axes.plot(ratio["p50"], place, "o", color=colour, markersize=6, label=label)
    text = f"{ratio['p50']:.2f}x" if ratio["p50"] < 10 else f"{ratio['p50']:.0f}x"
    axes.text(max(ratio["p80"], ratio["p50"]) * 1.08, place, text, va="center", fontsize=8, bbox=CLEAR)


def _others(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = [
        arm
        for arm in row["arms"]
        if arm["status"] == "ok" and arm["kind"] in WORDS and "times_ours" in arm and not arm["graph"]
    ]
    return sorted(found, key=lambda arm: arm["times_ours"]["p50"])
