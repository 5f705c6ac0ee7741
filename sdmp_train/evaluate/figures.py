"""The figures of a report, by matplotlib: curves of what was logged, and the mixing coefficients that were drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdmp_kernels import MixPlan, Rule

from ..distributed import World
from ..methods.method import At
from ..models import PLAIN_VITS, SHORT_NAMES, is_resnet
from ..settings import ModelConfig
from ..training import assemble
from .record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("knn", "losses", "method", "speed", "optimiser", "lam")
"""Of the figures."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito: told apart by people who see colours otherwise too."""
MOST_POINTS = 2000
COLUMNS, PANEL_INCHES = 3, (3.6, 2.5)
LAM_STEPS, LAM_BINS = 200, 20
NOT_CURVES = ("step", "epoch", "time")
SHARE = "data_wait_fraction"
SPEED = {
    "images_per_second": "images per second",
    "step_seconds": "seconds per step",
    SHARE: "share of the time spent waiting for data",
    "memory_gib": "memory, GiB",
    "lost_images": "images that could not be decoded",
}
OPTIMISER = {"lr": "learning rate", "grad_norm": "norm of the gradient"}
KNN = ("knn", "knn_raw_pixels")
FAR = 3
"""Times what nine tenths of the points keep below: a point of a run's speed beyond that is cut off."""


def figures(records: Sequence[RunRecord]) -> Iterator[tuple[str, str, Figure]]:
    """(name, caption, figure) of all that was logged by one of the runs at least."""
    keys = list(dict.fromkeys(key for record in records for key in record.keys))
    losses = [key for key in keys if key == "loss" or key.startswith("loss_")]
    known = {*NOT_CURVES, *losses, *SPEED, *OPTIMISER, *KNN}
    groups: dict[str, tuple[str, Mapping[str, str]]] = {
        "losses": ("The loss and each of its terms", {key: words(key) for key in losses}),
        "method": ("Other numbers that the method logs", {key: words(key) for key in keys if key not in known}),
        "speed": ("How fast the run went, how much of the time it waited for data, and the memory it held", SPEED),
        "optimiser": ("Learning rate and gradient", OPTIMISER),
    }
    if "knn" in keys:
        yield "knn", knn_caption(records), knn_figure(records)
    for name, (caption, panels) in groups.items():
        panels = {key: title for key, title in panels.items() if key in keys}
        if panels:
            yield name, caption + thinned(records, panels), curves(records, panels)
    drawn = {record.name: lams for record in records if (lams := drawn_lams(record))}
    if drawn:
        caption = (
            "lam, the share of a mixed image that is its own, by rule: drawn again from seed and step for up to "
            f"{LAM_STEPS} steps that each run made (the draws depend on nothing else), not read from a log"
        )
        yield "lam", caption, lam_figure(drawn)


def words(key: str) -> str:
    """A logged number's name for people."""
    return key.replace("loss_", "loss: ", 1) if key.startswith("loss_") else key.replace("_", " ")


def colour(number: int) -> str:
    """Of the run or rule of that number."""
    return COLOURS[number % len(COLOURS)]


def new_figure(panels: int, *, shared_legend: bool) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, up to three in a row."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, panels)
    rows = -(-panels // columns)
    width, height = PANEL_INCHES
    figure = Figure(
        figsize=(width * max(columns, 2 if panels == 1 else 1), height * rows + 0.35 * shared_legend),
        layout="constrained",
    )
    axes = list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flat)
    for panel in axes[panels:]:
        panel.remove()
    for panel in axes[:panels]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=8)
    return figure, axes[:panels]


def curves(records: Sequence[RunRecord], panels: Mapping[str, str]) -> Figure:
    """A panel for each number, a line in it for each run."""
    figure, axes = new_figure(len(panels), shared_legend=len(records) > 1)
    for panel, (key, title) in zip(axes, panels.items(), strict=True):
        for number, record in enumerate(records):
            epochs, values = thin(record.series(key))
            values = [100 * value for value in values] if key in KNN else values
            # The mark keeps a run of a single line, or one that a gap surrounds, visible.
            look = measured(values) if key in KNN else {"linewidth": 1.1, "marker": ".", "markersize": 2.5}
            panel.plot(epochs, values, color=colour(number), **look)
        top = end_of_axis([record.series(key)[1] for record in records]) if key in SPEED and key != SHARE else None
        if top is not None:
            panel.set_ylim(top=top)
            above = sum(value > top for record in records for value in record.series(key)[1])
            title += f" ({above} above)"
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("epoch", fontsize=8)
        if key == SHARE:
            panel.set_ylim(-0.02, 1.02)
    name_runs(figure, records)
    return figure


def measured(values: Sequence[float]) -> dict[str, Any]:
    """How measurements now and then are drawn: each a mark. Two are not joined: nobody knows what lies between."""
    return {"marker": "o", "markersize": 4, "linewidth": 0.8, "linestyle": "-" if len(values) > 2 else "none"}


def end_of_axis(series: Sequence[Sequence[float]]) -> float | None:
    """Where an axis ends so that the few points at which a run did something else do not press the others flat."""
    values = sorted(value for one in series for value in one if math.isfinite(value))
    usual = values[9 * (len(values) - 1) // 10] if len(values) > 3 else 0.0
    return 1.2 * usual if usual > 0 and values[-1] > FAR * usual else None


def name_runs(figure: Figure, records: Sequence[RunRecord]) -> None:
    """One legend for all panels, where there are several runs."""
    if len(records) > 1:
        name_colours(figure, [(record.name, colour(number)) for number, record in enumerate(records)])


def name_colours(figure: Figure, named: Iterable[tuple[str, str]]) -> None:
    """A legend above all panels, where it covers nothing that is drawn."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=shade, label=name) for name, shade in named]
    figure.legend(handles=lines, loc="outside upper left", ncols=3, fontsize=8, frameon=False)


def thin(series: Series) -> Series:
    """Every n-th point, so that at most `MOST_POINTS` are left, and the last."""
    epochs, values = series
    every = -(-len(values) // MOST_POINTS)
    if every <= 1:
        return series
    kept = sorted({*range(0, len(values), every), len(values) - 1})
    return [epochs[i] for i in kept], [values[i] for i in kept]


def thinned(records: Sequence[RunRecord], panels: Mapping[str, str]) -> str:
    """A remark where not every point is drawn."""
    most = max(len(record.series(key)[1]) for record in records for key in panels)
    return f" (every {-(-most // MOST_POINTS)}th of the logged lines)" if most > MOST_POINTS else ""


def knn_caption(records: Sequence[RunRecord]) -> str:
    """What was measured, on how many images."""
    on = {record.said["knn"] for record in records if "knn" in record.said}
    return (
        "kNN accuracy of the backbone, measured by the run itself"
        + (f" ({'; '.join(sorted(on))})" if on else "")
        + ". Dashed: nearest neighbours of the raw pixels"
    )


def knn_figure(records: Sequence[RunRecord]) -> Figure:
    """kNN over time, in percent."""
    figure, (panel,) = new_figure(1, shared_legend=len(records) > 1)
    for number, record in enumerate(records):
        epochs, values = record.series("knn")
        panel.plot(epochs, [100 * v for v in values], color=colour(number), **measured(values))
        if (raw := record.last("knn_raw_pixels")) is not None:
            panel.axhline(100 * raw, color=colour(number), linestyle="--", linewidth=0.8)
    panel.set_xlabel("epoch", fontsize=8)
    panel.set_ylabel("kNN accuracy, %", fontsize=8)
    name_runs(figure, records)
    return figure


def drawn_lams(record: RunRecord) -> dict[str, np.ndarray]:
    """The run's mixing coefficients by rule, of up to `LAM_STEPS` of its steps, drawn again as the run drew them.

    lam depends on seed and step alone, on no device and no number of processes. Empty where nothing was mixed.
    """
    steps = record.step
    if steps == 0 or not math.isfinite(record.steps_per_epoch):
        return {}
    per_epoch = max(1, round(record.steps_per_epoch))
    config = replace(record.config, model=lighter(record.config.model))
    method = assemble(config, World(torch.device("cpu")), steps_per_epoch=per_epoch, classes=2).method
    total = record.config.optim.epochs * per_epoch
    found: dict[str, list[np.ndarray]] = {}
    for step in np.unique(np.linspace(0, steps - 1, LAM_STEPS).astype(int)):
        for plan in mix_plans(method.plan(At(int(step), total, per_epoch))):
            for rule in (r for r in plan.rules if r != Rule.KEEP):
                found.setdefault(rule.name.lower(), []).append(plan.lam[plan.rule == rule].numpy())
    lams = {rule: np.concatenate(parts) for rule, parts in found.items()}
    return {rule: values for rule, values in sorted(lams.items()) if len(values)}


def lighter(model: ModelConfig) -> ModelConfig:
    """A smaller backbone of the same family, where it can be had: what is mixed with what does not depend on it."""
    if SHORT_NAMES.get(model.arch, model.arch).startswith(PLAIN_VITS):
        return replace(model, depth=1)
    return replace(model, width=2) if is_resnet(model.arch) else model


def mix_plans(plan: Any) -> Iterator[MixPlan]:
    """The mixing plans within whatever a method's `plan` returns."""
    if isinstance(plan, MixPlan):
        yield plan
    elif isinstance(plan, Mapping) or is_dataclass(plan):
        for part in (plan if isinstance(plan, Mapping) else vars(plan)).values():
            yield from mix_plans(part)
    elif isinstance(plan, (tuple, list)):
        for part in plan:
            yield from mix_plans(part)


def lam_figure(drawn: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """A histogram for each run, its rules stacked; a rule has one colour in all of them."""
    figure, axes = new_figure(len(drawn), shared_legend=True)
    edges = np.linspace(0, 1, LAM_BINS + 1)
    colours = {rule: colour(number) for number, rule in enumerate(sorted({r for lams in drawn.values() for r in lams}))}
    for panel, (name, lams) in zip(axes, drawn.items(), strict=True):
        counts = [np.histogram(values, edges)[0] for values in lams.values()]
        below = np.zeros(LAM_BINS)
        total = sum(int(count.sum()) for count in counts)
        for rule, count in zip(lams, counts, strict=True):
            share = 100 * count / total
            panel.bar(edges[:-1], share, 1 / LAM_BINS, below, align="edge", color=colours[rule])
            below += share
        panel.set_title(name if len(drawn) > 1 else f"{total:,} mixed images", fontsize=9, loc="left")
        panel.set_xlabel("lam", fontsize=8)
        panel.set_ylabel("% of the mixed images", fontsize=8)
    name_colours(figure, colours.items())
    return figure
