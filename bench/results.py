"""The results file: one JSON per machine and date, rewritten after every row, so that a run cut short still counts.

The schema is documented in docs/benchmarks.md; `validate` says where a document departs from it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench import environment

SCHEMA = 2
FOLDER = Path(__file__).parent / "results"
NUMBER, TEXT, MAYBE = (int, float), (str,), type(None)

# Field -> allowed types. A name that ends in "?" may be absent.
DOCUMENT: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "machine": TEXT,
    "date": TEXT,
    "dry_run": (bool,),
    "environment": (dict,),
    "runs": (dict,),
    "rows": (list,),
    "checks": (dict,),
    "ceilings": (dict,),
    "goals?": (list,),
    "trainings?": (dict,),
    "stages?": (dict,),
}
RUN: dict[str, tuple[type, ...]] = {
    "command": TEXT,
    "started": TEXT,
    "finished": (str, MAYBE),
    "commit": (str, MAYBE),
    "dirty": (bool, MAYBE),
    "threads": (int,),
    "allocator": TEXT,
    "processes?": TEXT,
    "skipped": (list,),
    "absent?": (dict,),
    "broken?": (dict,),
    "lacking?": (dict,),
}
ROW: dict[str, tuple[type, ...]] = {
    "question": TEXT,
    "command?": TEXT,
    "commit?": (str, MAYBE),
    "op": TEXT,
    "setting": TEXT,
    "config": (dict,),
    "device": TEXT,
    "threads": (int,),
    "input_copies": (int,),
    "floor_bytes": (int, MAYBE),
    "kernel_bytes?": (int, MAYBE),
    "flops": (int, MAYBE),
    "ours": (str, MAYBE),
    "arms": (list,),
    "seconds_spent": NUMBER,
}
ARM: dict[str, tuple[type, ...]] = {
    "name": TEXT,
    "kind": TEXT,
    "what": TEXT,
    "graph": (bool,),
    "status": TEXT,
    "reason?": TEXT,
    "errors?": (list,),
    "seconds?": (dict,),
    "gb_per_s?": NUMBER,
    "tflops?": NUMBER,
    "share_of_copy?": (dict,),
    "share_of_matmul?": (dict,),
    "times_ours?": (dict,),
    "extra_peak_bytes?": (int, MAYBE),
    "memory_method?": TEXT,
    "launches?": (int, MAYBE),
    "host_syncs?": (int, MAYBE),
    "host_us?": NUMBER,
    "queued?": (bool,),
    "images_per_s?": NUMBER,
    "predicted?": (dict,),
}
TRAINING: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "epochs": (int,),
    "epochs_done": NUMBER,
    "batch_size": (int,),
    "precision": TEXT,
    "loader": TEXT,
    "images_per_s": (*NUMBER, MAYBE),
    "memory_gib": (*NUMBER, MAYBE),
    "data_wait_fraction": (*NUMBER, MAYBE),
    "stall": (dict,),
    "knn": (list,),
    "knn_raw_pixels": (*NUMBER, MAYBE),
    "loss": (list,),
    "commit": (str, MAYBE),
    "dirty": (bool, MAYBE),
    "date": TEXT,
}
STAGE: dict[str, tuple[type, ...]] = {"finished": TEXT, "commit": (str, MAYBE), "seconds": NUMBER}
CHECK: dict[str, tuple[type, ...]] = {"status": TEXT, "detail": TEXT, "seconds": NUMBER, "facts?": (dict,)}
STATUSES = ("ok", "wrong", "failed", "absent")
CHECK_STATUSES = ("passed", "failed", "absent", "out of time")
KINDS = ("ours", "eager", "compile", "peer", "ceiling")


class Results:
    """A results file being written."""

    def __init__(self, path: Path, *, dry_run: bool = False) -> None:
        self.path = path
        if path.exists():
            self.document = load(path)
        else:
            self.document = {
                "schema": SCHEMA,
                "machine": environment.machine_slug(),
                "date": environment.now()[:10],
                "dry_run": dry_run,
                "runs": {},
                "ceilings": {},
                "checks": {},
                "rows": [],
            }
        self.document["environment"] = environment.describe()

    def begin(self, question: str, *, threads: int, allocator: str, processes: str = "one") -> None:
        """Record who measures what, by which command and at which commit, and in how many processes."""
        head, dirty = environment.commit()
        self.document["runs"][question] = {
            "command": environment.command(),
            "started": environment.now(),
            "finished": None,
            "commit": head,
            "dirty": dirty,
            "threads": threads,
            "allocator": allocator,
            "processes": processes,
            "skipped": [],
        }
        self.write()

    def add(self, question: str, row: dict[str, Any]) -> None:
        """Add a row, in place of an older one of the same setting, device and question, and write the file.

        It keeps which command measured it at which commit: a later run of the question may measure other settings.
        """
        run = self.document["runs"][question]
        row = {"question": question, "command": run["command"], "commit": run["commit"], **row}
        identity = ("question", "op", "setting", "device")
        rows = self.document["rows"]
        same = (k for k, old in enumerate(rows) if all(old[key] == row[key] for key in identity))
        place = next(same, len(rows))
        rows[place : place + 1] = [row]
        self.write()

    def skip(self, question: str, setting: str) -> None:
        """Name a setting that there was no time for."""
        self.document["runs"][question]["skipped"].append(setting)
        self.write()

    def gap(self, question: str, kind: str, name: str, reason: str) -> None:
        """Name what a question did not measure, and why: `kind` is "absent", "broken" or "lacking"."""
        self.document["runs"][question].setdefault(kind, {})[name] = reason
        self.write()

    def check(self, name: str, status: str, detail: str, seconds: float, **facts: Any) -> None:
        """Record the outcome of a correctness check."""
        entry = {"status": status, "detail": detail, "seconds": round(seconds, 1)}
        self.document["checks"][name] = entry | ({"facts": facts} if facts else {})
        self.write()

    def stage(self, name: str, commit: str | None, seconds: float) -> None:
        """Mark a stage of `gpu` as finished, by what stood at this commit."""
        entry = {"finished": environment.now(), "commit": commit, "seconds": round(seconds, 1)}
        self.document.setdefault("stages", {})[name] = entry
        self.write()

    def finish(self, question: str) -> None:
        """Mark a question as measured to its end."""
        self.document["runs"][question]["finished"] = environment.now()
        self.write()

    def write(self) -> None:
        """Replace the file as a whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".tmp-{os.getpid()}")
        part.write_text(json.dumps(rounded(self.document), indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)


def default_path() -> Path:
    """Where a full run of today on this machine goes."""
    return FOLDER / f"{environment.machine_slug()}-{environment.now()[:10]}.json"


def rounded(value: Any) -> Any:
    """Floats at six significant digits, and infinities as null: what JSON can hold and a reader can use."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) != float("inf") and value == value else None
    return value


def load(path: Path) -> dict[str, Any]:
    """A results file, also one of an older schema; raises ValueError where it departs from the schema."""
    document = upgraded(json.loads(path.read_text()))
    problems = validate(document)
    if problems:
        raise ValueError(f"{path.name} is not a results file of schema {SCHEMA}: {problems[0]}")
    return document


def upgraded(document: Any) -> Any:
    """A document of schema 1 as one of schema 2: the fewest bytes of a row were called `bytes_moved` there."""
    if not isinstance(document, dict) or document.get("schema") != 1 or not isinstance(document.get("rows"), list):
        return document
    rows = [
        {"floor_bytes" if name == "bytes_moved" else name: value for name, value in row.items()}
        for row in document["rows"]
    ]
    return {**document, "schema": SCHEMA, "rows": rows}


def newest(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The newest document of every machine; dry runs are left out."""
    latest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        document = load(path)
        if document["dry_run"]:
            continue
        known = latest.get(document["machine"])
        if known is None or known["date"] <= document["date"]:
            latest[document["machine"]] = document
    return [latest[machine] for machine in sorted(latest)]


def validate(document: Any) -> list[str]:
    """Every departure from the schema, as "place: what is wrong"; empty for a valid document."""
    problems = _fields(document, DOCUMENT, "document")
    if problems:
        return problems
    if document["schema"] != SCHEMA:
        return [f"schema: {document['schema']}, expected {SCHEMA}"]
    for name, run in document["runs"].items():
        problems += _fields(run, RUN, f"runs.{name}")
    for name, check in document["checks"].items():
        problems += _fields(check, CHECK, f"checks.{name}")
        if check.get("status") not in CHECK_STATUSES:
            problems.append(f"checks.{name}.status: {check.get('status')!r}, expected one of {CHECK_STATUSES}")
    for name, training in document.get("trainings", {}).items():
        problems += _fields(training, TRAINING, f"trainings.{name}")
    for name, stage in document.get("stages", {}).items():
        problems += _fields(stage, STAGE, f"stages.{name}")
    for number, row in enumerate(document["rows"]):
        problems += _row(row, f"rows[{number}]")
    return problems


def _row(row: Any, place: str) -> list[str]:
    problems = _fields(row, ROW, place)
    if problems:
        return problems
    names = [arm.get("name") for arm in row["arms"] if isinstance(arm, dict)]
    if len(set(names)) != len(row["arms"]):
        problems.append(f"{place}.arms: two arms share a name")
    if row["ours"] is not None and row["ours"] not in names:
        problems.append(f"{place}.ours: {row['ours']!r} is no arm")
    for number, arm in enumerate(row["arms"]):
        spot = f"{place}.arms[{number}]"
        wrong = _fields(arm, ARM, spot)
        problems += wrong
        if wrong:
            continue
        if arm["status"] not in STATUSES or arm["kind"] not in KINDS:
            problems.append(f"{spot}: status {arm['status']!r} or kind {arm['kind']!r} is unknown")
        elif (arm["status"] == "ok") != ("seconds" in arm):
            problems.append(f"{spot}: has a time where it is {arm['status']!r}, or none where it is ok")
        elif arm["status"] != "ok" and not arm.get("reason"):
            problems.append(f"{spot}: gives no reason for being {arm['status']!r}")
    return problems


def _fields(value: Any, spec: dict[str, tuple[type, ...]], place: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{place}: expected an object, found {type(value).__name__}"]
    problems = []
    known = {name.removesuffix("?"): (types, name.endswith("?")) for name, types in spec.items()}
    for name, (types, optional) in known.items():
        if name not in value:
            if not optional:
                problems.append(f"{place}.{name}: missing")
        elif not isinstance(value[name], types) or (isinstance(value[name], bool) and bool not in types):
            problems.append(f"{place}.{name}: {type(value[name]).__name__}, expected {types[0].__name__}")
    problems += [f"{place}.{name}: unknown field" for name in value if name not in known]
    return problems
