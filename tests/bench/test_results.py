"""The results file: its schema, and that it is whole after every row."""

import copy
import json

import pytest
from bench_documents import arm, document, row

from bench import environment, table
from bench.results import FOLDER, Results, load, newest, rounded, validate


def changed(path, value):
    """The document with one value replaced, or removed where `value` is ...; `path` names it."""
    made = copy.deepcopy(document())
    place = made
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return made


def test_a_good_document_is_valid():
    assert validate(document()) == []


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (["schema"], 99, "schema: 99"),
        (["rows"], ..., "document.rows: missing"),
        (["surprise"], 1, "document.surprise: unknown field"),
        (["runs", "mix", "threads"], "two", "runs.mix.threads: str"),
        (["rows", 0, "threads"], True, "rows[0].threads: bool"),
        (["rows", 0, "floor_bytes"], 1.5, "rows[0].floor_bytes: float"),
        (["rows", 0, "ours"], "sdmp rust", "is no arm"),
        (["rows", 0, "arms", 1, "name"], "copy", "two arms share a name"),
        (["rows", 0, "arms", 1, "kind"], "hers", "is unknown"),
        (["rows", 0, "arms", 1, "seconds"], ..., "none where it is ok"),
        (["rows", 0, "arms", 5, "reason"], "", "gives no reason"),
        (["checks"], {"large": {"status": "fine", "detail": "", "seconds": 1}}, "expected one of"),
    ],
)
def test_departures_from_the_schema_are_named(path, value, place):
    assert place in "; ".join(validate(changed(path, value)))


def test_a_time_on_a_wrong_answer_is_refused():
    bad = document(rows=[row(arms=[{**arm("sdmp cpp", "ours", 1.0), "status": "wrong", "reason": "off"}])])
    assert "has a time where it is 'wrong'" in validate(bad)[0]


def test_a_row_keeps_the_run_that_measured_it(tmp_path, monkeypatch):
    """A later run of the same question measures other settings, or some of them anew."""
    results, entry = Results(tmp_path / "results.json"), {k: v for k, v in row().items() if k != "question"}
    for number, settings in enumerate((("a", "b"), ("b", "c"))):
        monkeypatch.setattr(environment, "command", lambda number=number: f"run {number}")
        monkeypatch.setattr(environment, "commit", lambda number=number: (f"{number}" * 40, False))
        results.begin("mix", threads=2, allocator="default")
        for setting in settings:
            results.add("mix", {**entry, "setting": setting})
    written = load(tmp_path / "results.json")
    told = {row["setting"]: (row["command"], row["commit"][0]) for row in written["rows"]}
    assert told == {"a": ("run 0", "0"), "b": ("run 1", "1"), "c": ("run 1", "1")}
    assert "(`run 0`, `run 1`)" in table.render([written])


def test_rows_are_written_as_they_come_and_replace_their_like(tmp_path):
    path = tmp_path / "deep" / "results.json"
    results = Results(path)
    results.begin("mix", threads=2, allocator="default")
    entry = {key: value for key, value in row().items() if key != "question"}
    results.add("mix", entry)
    assert len(load(path)["rows"]) == 1
    again = Results(path)
    again.add("mix", {**entry, "threads": 1})
    again.add("mix", {**entry, "setting": "another"})
    rows = load(path)["rows"]
    assert [(r["setting"], r["threads"]) for r in rows] == [(row()["setting"], 1), ("another", 2)]
    again.add("mix", {**entry, "threads": 4})  # and keep their place
    rows = load(path)["rows"]
    assert [(r["setting"], r["threads"]) for r in rows] == [(row()["setting"], 4), ("another", 2)]
    assert list(path.parent.iterdir()) == [path]


def test_numbers_that_json_cannot_hold_become_null():
    assert rounded({"a": [float("inf"), float("nan"), 1.23456789e-5, 3, True]}) == {
        "a": [None, None, 1.23457e-5, 3, True]
    }


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document(rows=3)))
    with pytest.raises(ValueError, match=r"x\.json is not a results file"):
        load(path)


def test_the_newest_of_every_machine(tmp_path):
    for name, changes in {
        "a1": {"machine": "a", "date": "2026-01-01"},
        "a2": {"machine": "a", "date": "2026-03-01"},
        "b1": {"machine": "b", "date": "2026-02-01"},
        "dry": {"machine": "c", "dry_run": True},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document(**changes)))
    assert [(d["machine"], d["date"]) for d in newest(tmp_path)] == [("a", "2026-03-01"), ("b", "2026-02-01")]


def test_a_file_of_the_first_schema_is_still_read(tmp_path):
    """There the fewest bytes of a row were called `bytes_moved`."""
    old = document(schema=1)
    old["rows"][0]["bytes_moved"] = old["rows"][0].pop("floor_bytes")
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = load(tmp_path / "old.json")
    assert read["rows"][0]["floor_bytes"] == 1000
    assert "bytes_moved" not in read["rows"][0]
    Results(tmp_path / "old.json").write()
    assert validate(json.loads((tmp_path / "old.json").read_text())) == []


def test_committed_results_are_read():
    for path in FOLDER.glob("*.json"):
        assert load(path)["rows"], path.name
