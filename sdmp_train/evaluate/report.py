"""A page about one run, or several side by side: one HTML file that needs nothing else, and its figures as PNG.

It holds what the runs have logged and measured, and names what they have not.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..advice import COMMAND, command, elsewhere
from ..config import flatten
from ..durable import replacing, write_durably
from ..presets import presets
from ..settings import ConfigError, require
from ..text import printable, printable_lines
from .accuracy import TOP
from .figures import NAMES, figures
from .record import PICTURES, RunRecord, departures, paper_row, read_record
from .settings.report import ReportConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "report.html"
PNG_DPI = 130
NOT_MEASURED = "not measured"
ACCURACY = re.compile(r"top\d|accura|knn|imagenet")
MIXING = (
    "What the run's mixing rules do to its own images, two of them for every rule: view a and view b (image, where the "
    "method has one view), partner, and mixed, with lam, the share of the mixed image that is its own"
)
REMARKS = ("time", "versions", "weights", "weights_sha256", "settings")
"""Of an evaluation: what it was made with."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1120px; margin: 0 auto;
  padding: 1.5em; }
h1 { font-size: 1.5em; margin: 0 0 .2em; } h2 { font-size: 1.15em; margin: 2em 0 .5em; border-bottom: 1px solid #ccc; }
h3 { font-size: 1em; margin: 1.2em 0 .3em; }
table { border-collapse: collapse; font-size: .92em; } th, td { text-align: left; vertical-align: top;
  padding: .25em .9em .25em 0; border-bottom: 1px solid #e4e4e4; overflow-wrap: anywhere; }
th { font-weight: 600; } figure { margin: 1em 0; } figcaption { color: #555; font-size: .88em; }
img { max-width: 100%; height: auto; } .none { color: #8a5a00; } .small { color: #555; font-size: .88em; }
.wide { overflow-x: auto; } code { font-size: .92em; }
"""


def write_report(config: ReportConfig) -> Path:
    """Write the page and its figures, and say where they are.

    Returns:
        The page's path. The figures are in `<its name without .html>-figures/` beside it.

    Raises:
        ConfigError: a folder holds no run, or the page cannot be written.
    """
    records = [read_record(Path(run)) for run in config.runs]
    if len({record.name for record in records}) < len(records):
        raise ConfigError("two of the runs have the same folder name, so that the page could not tell them apart")
    first = Path(config.runs[0])
    place = Path(config.output) if config.output else (first if len(records) == 1 else first.resolve().parent) / NAME
    require(place.suffix == ".html", "output", str(place), "the name of an .html file")
    drawn = list(figures(records))
    try:
        folder = place.with_name(f"{place.stem}-figures")
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(NAMES) - {name for name, _, _ in drawn}:  # of a former page
            (folder / f"{name}.png").unlink(missing_ok=True)
        for name, _, figure in drawn:
            with replacing(folder / f"{name}.png") as draft:
                figure.savefig(draft, format="png", dpi=PNG_DPI)
        write_durably(place, page(records, drawn))
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {printable(place)}: {error}") from error
    print(printable_lines(f"report   {place} (figures as PNG in {folder})"))
    absent = missing(records, {name for name, _, _ in drawn})
    for line in absent:
        print(printable_lines(f"missing  {line}"))
    for line in elsewhere() if any(COMMAND in line for line in absent) else ():
        print(f"shell    {line}")
    return place


def page(records: Sequence[RunRecord], drawn: Sequence[tuple[str, str, Figure]]) -> str:
    """The whole page."""
    names = ", ".join(record.name for record in records)
    curves = {name: (caption, figure) for name, caption, figure in drawn}
    absent = missing(records, set(curves))
    parts = [
        f"<h1>{escape(names)}</h1>",
        f'<p class="small">Made {datetime.now():%Y-%m-%d %H:%M} from what the '
        f"{'run has' if len(records) == 1 else 'runs have'} written. Nothing on this page was computed otherwise, but "
        "for the histogram of lam where it is shown.</p>",
        section("In short", summary(records)),
        section("Beside the paper", *(beside_the_paper(record) for record in records)),
        section("Evaluations", *(evaluations(record) for record in records)),
        section("Curves", *(svg(name, *shown) for name, shown in curves.items())),
        section("Pictures", *(pictures(record, named=len(records) > 1) for record in records)),
        section("Settings", settings(records)),
        section("Not on this page", bullets(absent)) if absent else "",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(names)}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading with its parts, none where they are all empty."""
    body = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of texts; the first cell of a row is its heading."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = [
        f"<tr><th>{escape(row[0])}</th>" + "".join(f"<td>{cell(text)}</td>" for text in row[1:]) + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><tr>{top}</tr>\n' + "\n".join(lines) + "</table></div>"


def cell(text: str) -> str:
    """A cell's text; what was not measured looks so."""
    return f'<span class="none">{escape(text)}</span>' if text == NOT_MEASURED else escape(text)


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def percent(value: float | None) -> str:
    """A share as text."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """A number as text."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.4g}"


def first_knn(record: RunRecord) -> float | None:
    """kNN of the backbone before the first step."""
    return next((row["knn"] for row in record.rows if row["step"] == 0 and "knn" in row), None)


def last_knn(record: RunRecord) -> float | None:
    """The newest kNN of a backbone that was trained at all."""
    return next((row["knn"] for row in reversed(record.rows) if row["step"] > 0 and "knn" in row), None)


def against_the_start(record: RunRecord) -> str:
    """How many points of kNN accuracy a run has won, or lost, of what the trained weights had it began from."""
    first, last = first_knn(record), last_knn(record)
    if first is None or last is None or not math.isfinite(last - first):
        return NOT_MEASURED
    points = 100 * (last - first)
    return f"{abs(points):.1f} points {'below' if points < 0 else 'above'}" if round(points, 1) else "as at the start"


def began_from(record: RunRecord) -> str:
    """The trained weights that a run continued from."""
    if record.config.model.init_from is None:
        return "random weights"
    return record.said.get("init", printable(record.config.model.init_from))


def steps_made(record: RunRecord) -> str:
    """How far it came."""
    if record.step == 0:
        return "none on record"
    epochs = record.step / record.steps_per_epoch
    of = f" ({epochs:.1f} of {record.config.optim.epochs} epochs)" if math.isfinite(epochs) else ""
    return f"{record.step:,}{of}"


def summary(records: Sequence[RunRecord]) -> str:
    """The few lines to read first, a column for each run."""
    said = {
        "images": "data",
        "model": "model",
        "loss": "loss",
        "device": "device",
        "loader": "loader",
        "batch": "batch",
    }
    continued = any(record.config.model.init_from for record in records)
    lines: dict[str, Callable[[RunRecord], str]] = {
        "preset": lambda r: r.config.run.preset,
        "method": lambda r: r.config.method_name,
        **{
            title: lambda r, word=word: r.said.get(word, "not in its log")  # type: ignore[misc]
            for title, word in said.items()
        },
        "steps": steps_made,
        "last loss": lambda r: number(r.last("loss")),
        "images per second, mean": lambda r: number(r.mean("images_per_second")),
        "waiting for data, mean": lambda r: percent(r.mean("data_wait_fraction")),
        "kNN, raw pixels": lambda r: percent(r.last("knn_raw_pixels")),
        "kNN, at the start" if continued else "kNN, untrained": lambda r: percent(first_knn(r)),
        "kNN, trained (newest)": lambda r: percent(last_knn(r)),
        **({"kNN, against the start": against_the_start, "began from": began_from} if continued else {}),
        "kNN measured on": lambda r: r.said.get("knn", NOT_MEASURED),
        "seed": lambda r: str(r.config.run.seed),
    }
    return table(["", *(r.name for r in records)], [(title, *map(tell, records)) for title, tell in lines.items()])


def beside_the_paper(record: RunRecord) -> str:
    """The paper's number for the preset, and all that keeps this run's from being the same kind of number."""
    row = paper_row(record.config)
    head = f"<h3>{escape(record.name)}</h3>"
    if row is None:
        known = presets().get(record.config.run.preset)
        source = f" ({known.source})" if known else ""
        return head + f"<p>The preset {escape(record.config.run.preset + source)} is no row of the paper.</p>"
    notes = [*departures(record)]
    images = record.said.get("data")
    notes.append(
        f"the paper trained on {row.result.rpartition(', ')[2] if 'CIFAR' not in row.result else 'CIFAR'}; this run on "
        + (images or "images that its log does not name")
    )
    if not any(found.get("protocol") == "linear" for found in record.evaluations):
        notes.append(
            "the paper's number is the top-1 accuracy of a linear classifier on frozen features; none was measured of "
            "this run, and kNN accuracy is another measure"
        )
    if "recipe after" in row.result:
        notes.append("the paper does not state its recipe for these images; the preset takes it from elsewhere")
    lines = [("paper", f"{row.result} [{row.source}]"), *measured_lines(record)]
    return head + table(["", ""], lines) + "<p>What differs from the paper's row:</p>" + bullets(notes)


def measured_lines(record: RunRecord) -> list[tuple[str, str]]:
    """What this run has measured that could stand beside a number of the paper."""
    lines = [(f"this run, {title(found)}", "; ".join(headline(found))) for found in record.evaluations]
    return [*lines, ("this run, kNN (newest)", percent(last_knn(record)))]


def title(found: dict[str, Any]) -> str:
    """What an evaluation is called."""
    return str(found.get("protocol", "evaluation"))


def evaluations(record: RunRecord) -> str:
    """Every evaluation on record: its numbers, and all that was written of it folded away."""
    if not record.evaluations:
        return ""
    rows = [(str(n), title(found), "; ".join(headline(found))) for n, found in enumerate(record.evaluations, 1)]
    whole = "".join(
        f"<details><summary>{n} {escape(title(found))}, all of it</summary>{bullets(plainly(found))}</details>"
        for n, found in enumerate(record.evaluations, 1)
    )
    return f"<h3>{escape(record.name)}</h3>" + table(["", "protocol", "result"], rows) + whole


def headline(found: dict[str, Any]) -> list[str]:
    """The accuracies of an evaluation and the other numbers at its top, in the order in which they were written.

    Top-5 of five classes or fewer is always 1 and left out; so it is where their number was not yet recorded.
    """
    numbers = {key: value for key, value in found.items() if type(value) in (int, float)}
    if numbers.get("top5") == 1 and numbers.get("classes", 0) <= max(TOP):
        del numbers["top5"]
    lines = [*by_neighbours(found), *plainly(numbers, accuracies=True)]
    return lines or list(plainly({key: value for key, value in found.items() if key not in REMARKS}, accuracies=True))


def by_neighbours(found: dict[str, Any]) -> Iterable[str]:
    """Accuracies that an evaluation has for several k, by what was measured."""
    for what, by_k in found.items():
        if isinstance(by_k, dict) and by_k and all(k.isdecimal() and type(v) is float for k, v in by_k.items()):
            yield f"{what} " + ", ".join(f"{100 * v:.2f} % (k = {k})" for k, v in by_k.items())


def plainly(found: Any, prefix: str = "", *, accuracies: bool = False) -> Iterable[str]:
    """The entries of a JSON object as `name value`, nested names joined by dots; `accuracies`: those in percent."""
    if isinstance(found, dict):
        for key, value in found.items():
            if prefix or key != "protocol":
                yield from plainly(value, f"{prefix}.{key}" if prefix else str(key), accuracies=accuracies)
    elif isinstance(found, list) and any(isinstance(part, dict) for part in found):
        for place, part in enumerate(found):
            yield from plainly(part, f"{prefix}.{place}", accuracies=accuracies)
    elif isinstance(found, list):
        yield f"{prefix} {', '.join(map(str, found))}"
    elif accuracies and isinstance(found, float) and ACCURACY.search(prefix) and 0 <= found <= 1:
        yield f"{prefix} {100 * found:.2f} %"
    else:
        yield f"{prefix} {found:.4g}" if isinstance(found, float) else f"{prefix} {found}"


def svg(name: str, caption: str, figure: Figure) -> str:
    """A figure as an image within the page."""
    from matplotlib import rc_context

    text = io.BytesIO()
    # Letters as text: small, and any browser has a sans-serif face.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return image(text.getvalue(), "svg+xml", caption)


def image(data: bytes, kind: str, caption: str) -> str:
    """A picture within the page, with its caption below."""
    encoded = base64.b64encode(data).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/{kind};base64,{encoded}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def pictures(record: RunRecord, *, named: bool) -> str:
    """The mixing, and what `eval pictures` has made."""
    found = {record.folder / PICTURES / name: caption for name, caption in record.pictures.items()}
    if (record.folder / "mix.png").is_file():
        mixing = MIXING
        found = {record.folder / "mix.png": mixing, **found}
    body = "\n".join(image(path.read_bytes(), "png", caption) for path, caption in found.items())
    return (f"<h3>{escape(record.name)}</h3>" if named and body else "") + body


def settings(records: Sequence[RunRecord]) -> str:
    """The settings that differ between the runs, then all of them, folded away."""
    columns = [{name: str(value) for name, value in flatten(record.config)} for record in records]
    rows = [(name, *(c.get(name, "-") for c in columns)) for name in dict.fromkeys(n for c in columns for n in c)]
    heads = ["", *(record.name for record in records)]
    unequal = [row for row in rows if len(set(row[1:])) > 1]
    folded = f"<details><summary>All settings</summary>{table(heads, rows)}</details>"
    return (table(heads, unequal) if unequal else "") + folded


def missing(records: Sequence[RunRecord], drawn: set[str]) -> list[str]:
    """What a page about a run could show and this one, with those figures, cannot: why, or how to get it."""
    lines = []
    for record in records:
        mixes = getattr(record.config.method, "mixing", "") != "none"
        made = command("sdmp_train", "eval", "pictures", "--run", os.path.abspath(record.folder))
        wants = {
            "curves: no step was logged": record.step > 0,
            "kNN over time: not measured by the run": "knn" in record.keys,
            "lam: no step that mixes is on record": not mixes or "lam" in drawn,
            "the picture of the mixing: the run has none": not mixes or (record.folder / "mix.png").is_file(),
            "evaluations: none on record": bool(record.evaluations),
            f"nearest neighbours, attention, patch features, embedding: not made; {made}": bool(record.pictures),
        }
        lines += [f"{record.name}: {text}" for text, there in wants.items() if not there]
        if not mixes:
            lines.append(f"{record.name}: mixing and lam: this run mixes nothing")
    return lines
