"""The tables of the README, docs/results and docs/gpu-run.md, from the newest results of every machine.

`python -m bench table --write` puts them there: a small one for readers in a hurry, and all that was measured.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench import goals, plots, predict, report
from bench.environment import ROOT
from bench.results import FOLDER, newest

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = ROOT / "README.md"
FULL = ROOT / "docs" / "results" / "README.md"
GPU_RUN = ROOT / "docs" / "gpu-run.md"
SHOWN = ("mixup", "cutmix", "resizemix", "uint8")
"""Words of the settings of mixing in the small table, of each the first that was measured; then the first of any op."""


def run(args: argparse.Namespace) -> int:
    """Print the table, or put it between the README's markers; returns the exit code."""
    documents = newest()
    if args.plots:
        for document in documents:
            print("\n".join(f"drew {path.name}" for path in plots.draw(document, FOLDER)))
    if not args.write:
        print(render(documents))
        return 0
    pages = write_pages(documents)
    for page, written in pages.items():
        print(f"{page}: table written" if written else f"{page} has no lines {BEGIN} and {END}; add them")
    return 0 if all(pages.values()) else 2


def between_markers(page: str, text: str) -> str:
    """`page` with what lies between the markers replaced by `text`."""
    head, rest = page.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    return f"{head}{BEGIN}\n{text.strip()}\n{END}{tail}"


def small(documents: list[dict[str, Any]]) -> str:
    """What stands in the README: a few rows of the machine that says most, one with a GPU where there is any."""
    gpus = [d for d in documents if d["environment"]["gpu"]]
    if not documents:
        return "Nothing has been measured yet: `python -m bench mix` and `python -m bench losses` do."
    document = (gpus or documents)[-1]
    rows = [_small_row(row) for row in _shown(document["rows"])]
    bold = " Bold: faster than ours." if any("**" in row for row in rows) else ""
    lines = [
        "| what | ours | of the ceiling | best eager | torch.compile | best library |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"{_where(document)}, {document['date']} ({_commands(document)}); every answer checked against float64.{bold}",
    ]
    if not gpus:
        lines.append("**No GPU figure exists yet**: no run on a GPU has been recorded; `make gpu` makes one.")
    return "\n".join(lines)


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for word in SHOWN:
        row = next((r for r in rows if word in r["setting"] and r not in found and r["ours"] is not None), None)
        found += [row] if row is not None else []
    for row in rows:
        if row["ours"] is not None and row["op"] not in {shown["op"] for shown in found}:
            found.append(row)
    return found


def _small_row(row: dict[str, Any]) -> str:
    own = next(arm for arm in row["arms"] if arm["name"] == row["ours"])
    cells = []
    for kind in ("eager", "compile", "peer"):
        arms = [arm for arm in row["arms"] if arm["kind"] == kind and "times_ours" in arm]
        best = min(arms, key=lambda arm: arm["times_ours"]["p50"], default=None)
        cells.append("" if best is None else _best(best))
    time = report.seconds(own["seconds"]["p50"])
    return f"| {row['setting']} | {time} | {_of_ceiling(own)} | {' | '.join(cells)} |"


def _best(arm: dict[str, Any]) -> str:
    """A ratio, and where the column's title does not say it, whose."""
    ratio = report.ratio(arm["times_ours"]["p50"])
    text = f"**{ratio}**" if arm["times_ours"]["p50"] < 1 else ratio
    return text if arm["kind"] == "compile" else f"{text} ({arm['name'].removeprefix('eager ')})"


def _of_ceiling(own: dict[str, Any]) -> str:
    """Which share of a copy of its bytes, or of a matrix product of its arithmetic, it reaches."""
    share = next((own[f] for f in ("share_of_copy", "share_of_matmul") if f in own), None)
    if share is None:
        return ""
    return f"{100 * share['p50']:.0f} % of a {'copy' if 'share_of_copy' in own else 'matmul'}"


def render(documents: list[dict[str, Any]]) -> str:
    """All that was measured: what exists, a table per machine, and the goals beside what was measured."""
    gpus = [d for d in documents if d["environment"]["gpu"]]
    cpus = [d for d in documents if not d["environment"]["gpu"]]
    parts = [existing(gpus, cpus)]
    parts += [machine(document) for document in (*gpus, *cpus)]
    parts.append(goal_table(gpus[-1] if gpus else None, "cuda", "Goals on a GPU"))
    parts.append(goal_table(cpus[-1] if cpus else None, "cpu", "Goals on a CPU"))
    return "\n\n".join(parts)


def existing(gpus: list[dict[str, Any]], cpus: list[dict[str, Any]]) -> str:
    """Which figures there are and which there are not, plainly."""
    lines = [f"Measured on {_where(d)}, {d['date']} ({_commands(d)})." for d in (*gpus, *cpus)]
    if not gpus:
        lines.append(
            "**No GPU figure exists yet**: no run on a GPU has been recorded. `make gpu` makes one in ten minutes."
        )
    if not cpus:
        lines.append("**No CPU figure exists yet**: `python -m bench mix` and `python -m bench losses` make them.")
    lines.append(
        "Every ratio is a median of ratios taken round by round in one run, after each answer was checked against "
        'float64; above 1 the other takes longer ("both in place": the quotient of two such medians). Rows that we '
        "lose are in the table too, in bold. How it is measured: "
        "[docs/benchmarks.md](../benchmarks.md)."
    )
    return "\n".join(lines)


def _commands(document: dict[str, Any]) -> str:
    """What measured the rows, each once; rows of before know their question's last run alone."""
    runs = document["runs"]
    measured = [row.get("command") or runs[row["question"]]["command"] for row in document["rows"]]
    measured = measured or [run["command"] for run in runs.values()]
    return ", ".join(f"`{command}`" for command in dict.fromkeys(measured))


def _where(document: dict[str, Any]) -> str:
    facts = document["environment"]
    if facts["gpu"]:
        return facts["gpu"]["name"]
    threads = {run["threads"] for run in document["runs"].values()}
    return f"{facts['cpu']} with {', '.join(map(str, sorted(threads)))} threads"


def machine(document: dict[str, Any]) -> str:
    """The table of one machine."""
    lines = [f"#### {_where(document)}", "", "| what | ours | of the ceiling | how many times longer the others take |"]
    lines += ["|---|---|---|---|", *(_row(row) for row in document["rows"])]
    absent = sorted({a["name"] for row in document["rows"] for a in row["arms"] if a["status"] == "absent"})
    if absent:
        lines += ["", f"Absent from this run: {', '.join(absent)}."]
    broken = [
        f"{a['name']} in {row['setting']} ({a['status']}: {a['reason']})"
        for row in document["rows"]
        for a in row["arms"]
        if a["status"] in ("wrong", "failed")
    ]
    if broken:
        lines += ["", f"Without a time: {'; '.join(broken)}."]
    missed = [setting for run in document["runs"].values() for setting in run["skipped"]]
    if missed:
        lines += ["", f"Not reached in the time given, or broken off: {'; '.join(missed)}."]
    checks = document["checks"]
    if checks:
        passed = sum(check["status"] == "passed" for check in checks.values())
        lines += ["", f"Checks on this machine: {passed} of {len(checks)} passed."]
        lines += [f"- {name}: {c['status']} ({c['detail']})" for name, c in checks.items() if c["status"] != "passed"]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    own = next((a for a in row["arms"] if a["name"] == row["ours"]), None)
    if own is None:
        reasons = [f"{a['name']}: {a['reason']}" for a in row["arms"] if a["kind"] == "ours" and a["status"] != "ok"]
        return f"| {row['setting']} | none ran ({'; '.join(reasons)}) | | |"
    of = f"{own['images_per_s']:.0f} images/s" if "images_per_s" in own else _of_ceiling(own)
    others = [a for a in row["arms"] if a["kind"] != "ceiling" and a is not own and "times_ours" in a]
    cells = [_ratio(a) for a in sorted(others, key=lambda a: a["times_ours"]["p50"])]
    return f"| {row['setting']} | {report.seconds(own['seconds']['p50'])} ({own['name']}) | {of} | {', '.join(cells)} |"


def _ratio(arm: dict[str, Any]) -> str:
    text = f"{arm['name']} {report.ratio(arm['times_ours']['p50'])}"
    return f"**{text}**" if arm["times_ours"]["p50"] < 1 and arm["kind"] != "ours" else text


def goal_table(document: dict[str, Any] | None, device: str, title: str) -> str:
    """Every goal beside what was measured, or why there is nothing; without any run the goals alone."""
    found = goals.outcomes(document, device)
    measured_ones = [outcome for outcome in found if outcome.value is not None]
    held = sum(bool(outcome.held) for outcome in measured_ones)
    count = f"{held} of {len(measured_ones)} measured claims hold" if measured_ones else "none measured yet"
    heads = ["goal", "", "asked", *(["measured"] if document else [])]
    lines = [f"<details><summary>{title}: {count}</summary>", "", _cells(heads), "|---" * len(heads) + "|"]
    for outcome in found:
        claim = outcome.claim
        asked = f"{'<=' if claim.at_most else '>='} {claim.bound:g}{claim.unit}"
        if outcome.value is None:
            measured = f"not measured: {outcome.why}"
        else:
            measured = f"{report.ratio(outcome.value)}{claim.unit}" + ("" if outcome.held else " (**missed**)")
        asked += f" ({claim.limit})" if claim.limit else ""
        lines.append(_cells([claim.goal, claim.words, asked, *([measured] if document else [])]))
    if device == "cuda":
        for goal, words in goals.NOT_BUILT.items():
            lines.append(_cells([goal, words, "not built yet", *([""] if document else [])]))
    return "\n".join([*lines, "", "</details>"])


def _cells(row: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in row)


def write_pages(documents: list[dict[str, Any]] | None = None) -> dict[str, bool]:
    """Refresh the pages where their markers are; by page whether they were there."""
    documents = newest() if documents is None else documents
    found = {}
    gpus = [d for d in documents if d["environment"]["gpu"]]
    pages = {
        README: small(documents),
        FULL: render(documents),
        GPU_RUN: predict.table(gpus[-1] if gpus else None),
    }
    for page, text in pages.items():
        old = page.read_text(encoding="utf-8") if page.exists() else ""
        name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
        found[name] = {BEGIN, END} <= set(old.split("\n"))
        if found[name]:
            page.write_text(between_markers(old, text), encoding="utf-8")
    return found
