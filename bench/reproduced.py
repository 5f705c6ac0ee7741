"""What `python -m bench reproduce` has measured: the file it stands in, its table and its picture.

A row of the table is an experiment's setting (images, passes); its numbers are means over seeds with standard errors.
"""

from __future__ import annotations

import fcntl
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import environment

SCHEMA = 1
FOLDER = Path(__file__).parent / "results" / "reproduce"
DOCS = environment.ROOT / "docs"
PAGE, README = DOCS / "reproduction.md", environment.ROOT / "README.md"
WRITTEN = ("bench/results", "docs", "README.md")
"""Where results go: changes there are not changes of what was measured."""
MEASURES = {"knn": "kNN", "linear": "linear"}
BASELINE = "MoCo v3"
COLOURS = {"MoCo v3": "#000000", "i-mix": "#e69f00", "SDMP": "#0072b2"}
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Half the width of Student's 95 % interval in standard errors, by degrees of freedom."""
ENOUGH = 3
"""Seeds from which a difference can be decided."""
APART = 1.07
"""By which factor of passes the arms stand beside each other in the picture, so that none hides another."""
ALL_IMAGES = 50_000
"""CIFAR-10's training split."""


class State:
    """The results file of one experiment, rewritten after every cell, so that a run cut short still counts.

    Several processes may work on one file: each change reads it anew, under a lock.
    """

    def __init__(self, path: Path, experiment: str, machine: dict[str, Any]) -> None:
        self.path, self.machine, self.experiment = path, machine, experiment
        path.parent.mkdir(parents=True, exist_ok=True)
        self.document = self.read()

    def read(self) -> dict[str, Any]:
        """What the file holds now. Raises `SystemExit` where it is of another experiment."""
        if not self.path.exists():
            return {"schema": SCHEMA, "experiment": self.experiment, "cells": [], "spent": {}}
        document = load(self.path)
        if document["experiment"] != self.experiment:
            raise SystemExit(
                f"{self.path} holds {document['experiment']}; expected {self.experiment}: give another --json"
            )
        return document

    @contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """The newest document, to be changed within the block and then written, whole or not at all."""
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.document = self.read()
            yield self.document
            draft = self.path.with_suffix(".tmp")
            draft.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
            draft.replace(self.path)

    def has(self, cell: Any, digest: str) -> bool:
        """Whether this cell was measured with these settings."""
        return any(found["name"] == cell.name and found["digest"] == digest for found in self.document["cells"])

    def spend(self, cell: Any, digest: str, seconds: float) -> None:
        """Count the time of a training, also of one that was stopped."""
        key = f"{cell.name} {digest}"
        with self.changing() as document:
            document["spent"][key] = document["spent"].get(key, 0.0) + seconds

    def add(self, cell: Any, digest: str, measured: dict[str, Any]) -> None:
        """Keep what a cell is worth, in place of what it was worth with other settings."""
        commit, dirty = environment.commit(*WRITTEN)
        card = self.machine["gpu"]["name"] if self.machine["gpu"] else None
        with self.changing() as document:
            entry = {
                "name": cell.name,
                "digest": digest,
                **cell._asdict(),
                **measured,
                "seconds": document["spent"].pop(f"{cell.name} {digest}"),
                "machine": card or f"{self.machine['cpu']}, {self.machine['cores']} cores",
                "commit": commit,
                "dirty": dirty,
                "date": environment.now(),
                "command": environment.command(),
            }
            document["cells"] = [*(found for found in document["cells"] if found["name"] != cell.name), entry]


def load(path: Path) -> dict[str, Any]:
    """A results file. Raises `SystemExit` where there is none, or one of another kind."""
    if not path.exists():
        raise SystemExit(f"there are no results in {path}; run the experiment first")
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA or "cells" not in document:
        raise SystemExit(f"{path} holds no results of `reproduce` of this version")
    return document


def words(measured: dict[str, Any]) -> str:
    """A cell's numbers in one line."""
    if "failed" in measured:
        return f"failed: {measured['failed']}"
    shown = [f"{name} {100 * measured[key]:.2f} %" for key, name in MEASURES.items() if measured[key] is not None]
    return ", ".join(shown) + (f" (no linear: {measured['no_linear']})" if "no_linear" in measured else "")


def hours_for(document: dict[str, Any], cells: Sequence[Any]) -> float | None:
    """How long cells would take at the pace of those that were measured; None where there are none."""
    done = document["cells"]
    seen = sum(cell["images"] * cell["epochs"] for cell in done)
    seconds = sum(cell["seconds"] + cell.get("seconds_to_measure", 0.0) for cell in done)
    return seconds / seen * sum(cell.images * cell.epochs for cell in cells) / 3600 if seen else None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error from the spread over the seeds; NaN of a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def settings_of(document: dict[str, Any]) -> list[tuple[int, int]]:
    """(images, epochs) that were measured, by cost, then by images."""
    found = {(cell["images"], cell["epochs"]) for cell in document["cells"]}
    return sorted(found, key=lambda setting: (round(math.log2(setting[0] * setting[1])), setting[0]))


def values(document: dict[str, Any], arm: str, setting: tuple[int, int], measure: str) -> dict[int, float]:
    """A number of an arm's cells by seed."""
    return {
        cell["seed"]: cell[measure]
        for cell in document["cells"]
        if (cell["arm"], cell["images"], cell["epochs"]) == (arm, *setting) and cell[measure] is not None
    }


def differences(document: dict[str, Any], arm: str, setting: tuple[int, int], measure: str) -> list[float]:
    """By how much an arm is above the baseline at each seed that both have, in points.

    A seed fixes the start, the order of the images and their views for all arms, so that differences are paired.
    """
    ours, base = (values(document, name, setting, measure) for name in (arm, BASELINE))
    return [100 * (ours[seed] - base[seed]) for seed in sorted(ours.keys() & base.keys())]


def gain(document: dict[str, Any], arm: str, setting: tuple[int, int], measure: str) -> tuple[float, float, int] | None:
    """The mean of the differences to the baseline, its error, and of how many seeds; None of none."""
    found = differences(document, arm, setting, measure)
    return (*mean_and_error(found), len(found)) if found else None


def arms_of(document: dict[str, Any]) -> list[str]:
    """The arms that were measured, the baseline first."""
    return [arm for arm in COLOURS if any(cell["arm"] == arm for cell in document["cells"])]


def percent(mean: float, error: float, *, sign: bool = False) -> str:
    """A number with its standard error, where there is one."""
    text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    return text if math.isnan(error) else f"{text} ± {error:.2f}"


def table(document: dict[str, Any]) -> str:
    """A line for each setting and arm: means over seeds, standard errors, the difference to the baseline, minutes."""
    heads = ["images", "passes", "arm", "seeds", *(f"{m}, %" for m in MEASURES.values())]
    heads += [f"{m} above {BASELINE}" for m in MEASURES.values()] + ["minutes a run"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(row)} |" for row in _rows(document)]
    return "\n".join(lines)


def _rows(document: dict[str, Any]) -> Iterator[list[str]]:
    for images, epochs in settings_of(document):
        for arm in arms_of(document):
            cells = [c for c in document["cells"] if (c["arm"], c["images"], c["epochs"]) == (arm, images, epochs)]
            if not cells:
                continue
            failed = [cell for cell in cells if "failed" in cell]
            seeds = str(len(cells)) + (f", {len(failed)} failed" if failed else "")
            row = [f"{images:,}", str(epochs), arm, seeds]
            for measure in MEASURES:
                found = list(values(document, arm, (images, epochs), measure).values())
                row.append(percent(*mean_and_error([100 * v for v in found])) if found else "not measured")
            for measure in MEASURES:
                above = gain(document, arm, (images, epochs), measure) if arm != BASELINE else None
                row.append(percent(*above[:2], sign=True) if above else "")
            yield [*row, f"{statistics.fmean(c['seconds'] for c in cells) / 60:.1f}"]


def finding(document: dict[str, Any]) -> str:
    """What the differences between SDMP and MoCo v3 say: in how many settings it is ahead or behind, and by how much.

    Of one seed nothing is said.
    """
    counts, numbers = [], []
    for measure, name in MEASURES.items():
        told = [(setting, differences(document, "SDMP", setting, measure)) for setting in settings_of(document)]
        told = [(setting, found) for setting, found in told if len(found) > 1]
        if told:
            sides = [verdict(found) for _, found in told]
            counted = ", ".join(f"{side} in {sides.count(side)}" for side in ("ahead", "behind", "undecided"))
            counts.append(f"by {name} {counted}")
            numbers.append(f"{name} {', '.join(_difference(*pair) for pair in told)}")
    if not counts:
        return "No setting has two seeds of both SDMP and MoCo v3 yet, so nothing can be said."
    return (
        f"SDMP beside MoCo v3 at equal student cost: {'; '.join(counts)} of the settings. In points, images x passes "
        f"(± standard error; bold is decided: the 95 % interval of {ENOUGH} or more seeds excludes 0): "
        f"{'; '.join(numbers)}."
    )


def _difference(setting: tuple[int, int], found: Sequence[float]) -> str:
    """A setting's difference, bold where it is decided."""
    number = percent(*mean_and_error(found), sign=True)
    seeds = "" if len(found) >= ENOUGH else f", {len(found)} seeds"
    return f"{number if verdict(found) == 'undecided' else f'**{number}**'} ({setting[0]:,} x {setting[1]}{seeds})"


def verdict(found: Sequence[float]) -> str:
    """Whether the differences of two or more seeds decide: by Student's 95 % interval, 4.3 standard errors of three."""
    mean, error = mean_and_error(found)
    if len(found) < ENOUGH or abs(mean) <= T95.get(len(found) - 1, 2.0) * error:
        return "undecided"
    return "ahead" if mean > 0 else "behind"


def figure(document: dict[str, Any]) -> Any:
    """Accuracy over passes, a column for each number of images, an arm a line; above it kNN, below it linear."""
    from matplotlib.figure import Figure

    images = sorted({cell["images"] for cell in document["cells"]})
    measures = [m for m in MEASURES if any(cell[m] is not None for cell in document["cells"])]
    drawn = Figure(figsize=(3.4 * max(2, len(images)), 2.7 * len(measures) + 0.4), layout="constrained")
    axes = drawn.subplots(len(measures), len(images), squeeze=False, sharey="row")
    for row, measure in zip(axes, measures, strict=True):
        for panel, count in zip(row, images, strict=True):
            for arm in arms_of(document):
                _line(panel, document, arm, count, measure)
            panel.set_xscale("log")
            passes = sorted({cell["epochs"] for cell in document["cells"] if cell["images"] == count})
            panel.set_xticks(passes, [str(p) for p in passes])
            if passes:
                panel.set_xlim(passes[0] / 1.6, passes[-1] * 1.6)
            panel.minorticks_off()
            panel.set_title(f"{count:,} images", fontsize=9, loc="left")
            panel.set_xlabel("passes over the images", fontsize=8)
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
        row[0].set_ylabel(f"{MEASURES[measure]}, %", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=9, frameon=False)
    return drawn


def _line(panel: Any, document: dict[str, Any], arm: str, images: int, measure: str) -> None:
    points, arms = [], arms_of(document)
    beside = APART ** (arms.index(arm) - (len(arms) - 1) / 2)
    for setting in settings_of(document):
        found = values(document, arm, setting, measure)
        if setting[0] == images and found:
            points.append((setting[1] * beside, *mean_and_error([100 * value for value in found.values()])))
    if points:
        passes, means, errors = zip(*sorted(points), strict=True)  # of one seed the error is NaN: no bar
        panel.errorbar(passes, means, errors, color=COLOURS[arm], label=arm, marker="o", markersize=4, capsize=3)
    else:
        panel.plot([], [], color=COLOURS[arm], label=arm, marker="o", markersize=4)


def section(document: dict[str, Any], picture: str) -> str:
    """The experiment's part of docs/reproduction.md: finding, table, picture, how it was made and how to go on."""
    cells = document["cells"]
    hours = sum(cell["seconds"] + cell.get("seconds_to_measure", 0) for cell in cells) / 3600
    commits = sorted(
        {(cell["commit"] or "unknown")[:7] + (" (with changes)" if cell["dirty"] else "") for cell in cells}
    )
    dates = sorted(cell["date"][:10] for cell in cells)
    machines = sorted({cell["machine"] for cell in cells})
    commands = list(dict.fromkeys(cell["command"] for cell in cells))
    return "\n".join(
        [
            finding(document),
            "",
            table(document),
            "",
            f"![accuracy over passes]({picture})",
            "",
            f"{len(cells)} trainings, {hours:.1f} hours on {'; '.join(machines)}, {dates[0]} to {dates[-1]}, "
            f"commit {', '.join(commits)}, by {' and '.join(f'`{command}`' for command in commands)}. Means over seeds "
            "± standard error; differences are means of the differences at equal seeds (same start, same order, same "
            "views).",
        ]
    )


def write(document: dict[str, Any]) -> int:
    """Put an experiment's section between its markers in docs/reproduction.md, and its picture beside it."""
    if not document["cells"]:
        print("nothing was measured yet: docs/reproduction.md stays as it is")
        return 2
    name = document["experiment"]
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = PAGE.read_text(encoding="utf-8")
    if begin not in page or end not in page:
        raise SystemExit(f"{PAGE.name} has no place for {name}: {begin} and {end} are missing")
    picture = f"reproduction-{name}.png"
    figure(document).savefig(PAGE.with_name(picture), dpi=110)
    before, after = page.split(begin)[0], page.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n{section(document, picture)}\n{end}{after}", encoding="utf-8")
    print(f"{PAGE.name} and {picture} are written")
    before, begin, rest = README.read_text(encoding="utf-8").partition(f"<!-- {name}-finding:begin -->")
    _, end, after = rest.partition(f"<!-- {name}-finding:end -->")
    if begin and end:
        README.write_text(f"{before}{begin}\n{finding(document)}\n{end}{after}", encoding="utf-8")
        print(f"{README.name} quotes the finding")
    return 0
