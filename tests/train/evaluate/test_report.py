"""The page of a real run: whole, self-contained, opened by a browser where there is one, and silent on the unmeasured."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from written_runs import small_run, write_run

from sdmp_train.advice import elsewhere
from sdmp_train.cli import main
from sdmp_train.config import Config, ConfigError
from sdmp_train.evaluate.report import NOT_MEASURED, ReportConfig, headline, plainly, write_report
from sdmp_train.presets import get_preset

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds; raises where its tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        if tag == "img":
            self.images.append(found)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data


def is_picture(source: str) -> bool:
    """Whether a data address holds a whole picture."""
    kind, _, data = source.removeprefix("data:image/").partition(";base64,")
    content = base64.b64decode(data, validate=True)
    if kind == "svg+xml":
        return ElementTree.fromstring(content).tag.endswith("}svg")
    Image.open(io.BytesIO(content)).load()
    return kind == "png"


def browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def pictures_seen_by(program: str, page: Path, folder: Path) -> list[int]:
    """The widths of the pictures as a browser shows them, 0 for one that it cannot."""
    script = (
        "<script>onload = () => document.body.append('WIDTHS' + "
        "JSON.stringify([...document.images].map(i => i.naturalWidth)) + 'END')</script>"
    )
    copy = folder / "watched.html"
    copy.write_text(page.read_text().replace("</body>", script + "</body>"))
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    shown = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"WIDTHS(\[[\d,]*\])END", shown.stdout)
    assert found, shown.stderr
    return json.loads(found.group(1))


def test_a_real_run_in_a_browser(tiny: Config, tmp_path: Path, capsys):
    run = small_run(tmp_path / "run", tiny)
    assert main(["report", str(run)]) == 0
    page = run / "report.html"
    assert str(page) in capsys.readouterr().out
    parsed = Page(page.read_text())
    assert len(parsed.images) == 7  # kNN, losses, lam_mean, speed, optimiser, lam, mix.png
    assert all(is_picture(image["src"] or "") and image["alt"] for image in parsed.images)
    assert all(link.startswith("data:image/") for link in parsed.links)
    figures = {path.name for path in (run / "report-figures").iterdir()}
    assert figures == {f"{name}.png" for name in ("knn", "losses", "method", "speed", "optimiser", "lam")}
    for name in figures:
        assert Image.open(run / "report-figures" / name).size[0] > 500
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]["knn"]
    assert f"{100 * last:.1f} %" in parsed.words
    assert main(["pretrain", "--overwrite", "--output", str(run), "--data", "nowhere"]) == 2  # and not a stranger in it
    assert "something else" not in capsys.readouterr().err
    program = browser()
    if program is None:
        pytest.skip("no browser here; the page was parsed instead")
    widths = pictures_seen_by(program, page, tmp_path)
    assert len(widths) == 7 and min(widths) > 100


def test_what_was_not_measured_is_said_and_nothing_else(tiny: Config, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")  # so that a shell takes `python` for none
    rows = [{"step": 4, "epoch": 1.0, "loss": 2.5}]
    bare = write_run(tmp_path / "bare", tiny, rows=rows, log="")
    (bare / "report-figures").mkdir()
    for name in ("knn.png", "mine.png"):
        (bare / "report-figures" / name).write_bytes(b"old")
    place = write_report(ReportConfig((str(bare),)))
    assert {path.name for path in (bare / "report-figures").iterdir()} == {"losses.png", "lam.png", "mine.png"}
    parsed = Page(place.read_text())
    assert NOT_MEASURED in parsed.words
    assert not re.search(r"\d %", parsed.words)  # no accuracy, no share of the time
    said = capsys.readouterr().out
    for text in ("kNN over time", "evaluations: none", "picture of the mixing", "eval pictures --run"):
        assert text in parsed.words and text in said
    assert said.endswith(f"shell    {elsewhere()[0]}\n"), "which Python the command means"


def test_names_and_logs_cannot_write_into_the_page(tiny: Config, tmp_path: Path):
    run = write_run(tmp_path / "<script>alert(1)<", tiny)
    text = write_report(ReportConfig((str(run),), output=str(tmp_path / "page.html"))).read_text()
    assert "<script" not in text and "<b>" not in text and "&lt;b&gt;bold" in text
    Page(text)


def test_the_papers_row_and_what_differs_from_it(tmp_path: Path):
    preset = get_preset("table5/cifar10-r50-sdmp")
    config = replace(preset, optim=replace(preset.optim, base_lr=0.6))
    run = write_run(tmp_path / "run", config)
    words = Page(write_report(ReportConfig((str(run),))).read_text()).words
    assert "89.5 % top-1 on CIFAR-10" in words and "paper, Table 5" in words
    assert "optim.base_lr: 0.3 -> 0.6" in words and "4 of 800 steps are on record" in words
    assert "none was measured of this run" in words
    with (run / "evaluations.jsonl").open("w") as file:
        file.write(json.dumps({"protocol": "linear", "top1": 0.8765, "sweep": {"lr": [1, 3]}}) + "\n")
    words = Page(write_report(ReportConfig((str(run),))).read_text()).words
    other = run / "evaluations" / "finetune-10"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.yaml").write_text("evaluation: finetune\nsettings: {}\n")
    (other / "evaluations.jsonl").write_text(json.dumps({"protocol": "finetune", "top1": 0.4321}) + "\n")
    assert "top1 43.21 %" in Page(write_report(ReportConfig((str(run),))).read_text()).words
    with pytest.raises(ConfigError, match="evaluation's training, not of a run: `report` shows its numbers on"):
        write_report(ReportConfig((str(other),)))
    assert "top1 87.65 %" in words and "sweep.lr 1, 3" in words and "none was measured of this run" not in words


def test_runs_side_by_side(tiny: Config, tmp_path: Path):
    one = write_run(tmp_path / "one", tiny)
    two = write_run(tmp_path / "two", replace(tiny, run=replace(tiny.run, seed=5)))
    place = write_report(ReportConfig((str(one), str(two))))
    assert place == tmp_path / "report.html"
    text = place.read_text()
    assert re.search(r"<th>run.seed</th><td>0</td><td>5</td>", text)
    assert text.index("run.seed") < text.index("<details>")  # what differs stands above what is folded away
    with pytest.raises(ConfigError, match="each run once"):
        ReportConfig((str(one), str(one)))
    with pytest.raises(ConfigError, match=r"\.html"):
        write_report(ReportConfig((str(one),), output=str(tmp_path / "page.txt")))
    (tmp_path / "other").mkdir()
    twin = write_run(tmp_path / "other" / "one", tiny)
    with pytest.raises(ConfigError, match="same folder name"):
        write_report(ReportConfig((str(one), str(twin))))


def test_entries_as_written():
    found = {"protocol": "knn", "accuracy": {"20": 0.51234}, "queries": 10, "split": "val"}
    assert list(plainly(found)) == ["accuracy.20 0.5123", "queries 10", "split val"]
    sweep = {"sweep": [{"lr": 0.3, "top1": 0.5}, {"lr": 1.0, "top1": 0.25}]}
    assert list(plainly(sweep)) == ["sweep.0.lr 0.3", "sweep.0.top1 0.5", "sweep.1.lr 1", "sweep.1.top1 0.25"]
    assert headline({"protocol": "knn", "accuracy": {"20": 0.51234}, "time": "now"}) == ["accuracy 51.23 % (k = 20)"]
    measured = {
        "backbone": {"10": 0.3, "20": 0.25},
        "raw pixels": {"10": 0.2},
        "bank_images": 5,
        "settings": {"k": [10]},
    }
    shown = ["backbone 30.00 % (k = 10), 25.00 % (k = 20)", "raw pixels 20.00 % (k = 10)", "bank_images 5"]
    assert headline({"protocol": "knn", **measured}) == shown
    assert headline({"protocol": "robustness", "imagenet_r": 0.2}) == ["imagenet_r 20.00 %"]
    for classes, shown in (({"classes": 5}, 0), ({}, 0), ({"classes": 6}, 1)):
        lines = headline({"top1": 0.5, "top5": 1.0, **classes})
        assert lines[0] == "top1 50.00 %" and lines.count("top5 100.00 %") == shown
    assert "top5 90.00 %" in headline({"top1": 0.5, "top5": 0.9})
    assert headline({"top1": 0.8765, "lr": 0.3, "settings": {"lr": [1]}, "time": "now"}) == ["top1 87.65 %", "lr 0.3"]
