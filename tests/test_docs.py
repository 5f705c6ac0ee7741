"""README and docs: their code runs, their links lead somewhere, and their commands have the flags they are given."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
# What a page may use without saying so.
NEEDED = {"torchvision.md": ["torchvision"]}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language ("" for those that name none)."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for kind, text in fences if kind == language]


def code(page: Path) -> str:
    return "\n".join(blocks(page, "python"))


@pytest.mark.parametrize("page", [p for p in PAGES if code(p)], ids=name)
def test_the_code_of_a_page_runs(page: Path):
    said = re.search(r"<!-- needs: (.*?) -->", page.read_text(encoding="utf-8"))
    for package in [*(said[1].split(", ") if said else []), *NEEDED.get(page.name, [])]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    for block in blocks(page, "python"):  # each by itself, as it is pasted
        exec(compile(block, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", [p for p in RECIPES if p.name != "README.md"], ids=name)
def test_a_recipe_begins_with_the_lines_to_change(page: Path):
    text = page.read_text(encoding="utf-8")
    assert blocks(page, "diff") and code(page)
    assert text.index("```") in (text.find("```diff"), text.find("```\npython -m sdmp_kernels.timm"))
    assert f"({page.name})" in (page.parent / "README.md").read_text(encoding="utf-8"), "listed"


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            assert re.fullmatch(r"https://[\w.-]+(/[\w./%#?=&~+-]*)?", target), target
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `python -m ...` and `make ...` in blocks without a language and in code spans."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(page, "") for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
        for line in [*lines, *spans]:
            start = re.search(r"(?:^|\s|/)(?:python3? -m|torchrun .*?-m) (sdmp_\w+|bench)\b|^make \w", line.strip())
            if start:
                found.append((name(page), re.split(r"\s{2,}#?|\s#", line.strip())[0].rstrip(".,;")))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_exists_with_its_flags(page: str, command: str):
    words = shlex.split(command, posix=False)
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word and word != "-j"} <= targets
        return
    module, *rest = words[words.index("-m") + 1 :]
    path = ROOT / module.replace(".", "/")
    assert (path / "__main__.py").exists() or path.with_suffix(".py").exists()
    if module in ("sdmp_train", "bench"):
        named = [word for word in rest if not word.startswith("-")]
        said = usage(module, tuple(named[: 2 if named[:1] == ["eval"] else 1]))
        for flag in (word.split("=")[0] for word in rest if word.startswith("--")):
            assert re.search(rf"{re.escape(flag)}\b", said), f"{flag} is not in the help of {module}"


HELP: dict[tuple[str, tuple[str, ...]], str] = {}


def usage(module: str, subcommand: tuple[str, ...]) -> str:
    """What `--help` prints, in this process."""
    key = (module, subcommand)
    if key not in HELP:
        if module == "sdmp_train":
            pytest.importorskip("tyro", reason="tyro is not installed")
        entry, printed = (
            importlib.import_module({"bench": "bench.__main__", "sdmp_train": "sdmp_train.cli"}[module]),
            io.StringIO(),
        )
        arguments = [*subcommand, "--help"]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
            entry.main(arguments)
        HELP[key] = printed.getvalue()
    return HELP[key]


def test_the_site_builds_without_a_warning(tmp_path: Path):
    """As `make docs` does, where mkdocs is installed beside the rest."""
    pytest.importorskip(
        "mkdocstrings", reason="mkdocstrings is not installed (make docs has it in its own environment)"
    )
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "draw_plan" in (tmp_path / "api" / "sdmp_kernels" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_list_or_table_has_a_blank_line_before_it(page: Path):
    """Otherwise the site (unlike GitHub) shows it as running text."""
    text = re.sub(r"^```.*?^```$", "```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for mark in (r"(?:[-*]|\d+\.) ", r"\|"):
        item = re.compile(rf"\s*{mark}")
        for before, line in itertools.pairwise(text.splitlines()):
            inside = before.startswith(("#", "<!--")) or not before.strip() or item.match(before)
            if re.match(mark, line) and not inside:
                assert re.match(r"\s", before), f"{page.name}: a blank line is missing before {line!r}"


def test_the_readmes_code_fits_the_sites_column():
    """What is wider is cut at its edge."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = [
        line
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert code and not [line for line in code if len(line) > 88]


def test_every_page_is_in_the_sites_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert re.search(rf"\b{re.escape(page.relative_to(ROOT / 'docs').as_posix())}$", text, re.MULTILINE), page
