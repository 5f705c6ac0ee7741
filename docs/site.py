"""What the site has beside the pages of this folder: the README as its first page, CONTRIBUTING, and the API pages.

A hook of mkdocs (mkdocs.yml); nothing is written into the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
API = {
    "sdmp_kernels": "sdmp_kernels",
    "timm": "sdmp_kernels.timm",
    "v2": "sdmp_kernels.v2",
    "views": "sdmp_kernels.views",
}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages that are made."""
    made = {"index.md": inside(ROOT / "README.md"), "contributing.md": inside(ROOT / "CONTRIBUTING.md")}
    made |= {f"api/{page}.md": reference(module) for page, module in API.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ lead to the page that the site has instead."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)+(README|CONTRIBUTING)\.md", lambda link: f"]({up}{_NAMES[link[1]]}", markdown)


_NAMES = {"README": "index.md", "CONTRIBUTING": "contributing.md"}


def inside(path: Path) -> str:
    """A page of the root as one of docs/: its links begin there."""
    text = path.read_text(encoding="utf-8").replace("](docs/", "](")
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](README.md", "](index.md")


def reference(module: str) -> str:
    """Every public name of a module, in the order of its `__all__`."""
    return (
        f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    )
