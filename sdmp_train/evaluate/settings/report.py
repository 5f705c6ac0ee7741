"""The settings of `report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...flags import Positional, arg
from ...settings import require


@dataclass(frozen=True)
class ReportConfig:
    """A page about runs: settings, curves, kNN, pictures, evaluations beside the paper's numbers."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders; several stand side by side."""
    output: str | None = None
    """HTML file; default report.html in the run's folder, of several beside the first one's. PNG files go beside it."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "runs", self.runs, "at least one run folder")
        require(len(set(self.runs)) == len(self.runs), "runs", self.runs, "each run once")
