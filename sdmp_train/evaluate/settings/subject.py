"""What every evaluation is told: a backbone, images, and where to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ...flags import Positional, arg
from ...settings import ConfigError, require

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class SubjectConfig:
    """A backbone, images, and where to measure."""

    what: Annotated[Positional[str | None], arg(metavar="[WHAT]")] = None
    """The same as --run, or --weights where it is no run folder."""
    run: str | None = None
    """Run folder, whose exported backbone is measured; the result is added to its evaluations.jsonl."""
    weights: str | None = None
    """Or the folder of an exported backbone, or timm:NAME for weights that timm knows."""
    data: Annotated[str | None, arg(aliases=("--data-dir",))] = None
    """Folder of class folders; default: the run's."""
    test_data: str | None = None
    """Folder of the images to measure on; default: the run's, the test split of --data, else every fifth of --data."""
    output: str | None = None
    """Folder for the result; default: the run's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""
    workers: Annotated[int | None, arg(aliases=("-j",))] = None
    """Decoding threads; None chooses by the number of cores."""
    bad_images: Literal["stop", "skip"] | None = None
    """What to do where a file is no readable image: stop and name it, or leave it out; default: as the run did."""
    max_bad_frac: float | None = None
    """With --bad-images skip: the share of files that may be left out; default: the run's."""
    max_pixels: int | None = None
    """Files that claim more pixels are bad; default: the run's."""
    loader: Literal["auto", "dali", "torchvision", "resident"] | None = None
    """Who decodes; default: the run's choice."""

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more")
        given = [name for name in ("what", "run", "weights") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                "more than one backbone is given; give --run RUN (a run folder) or --weights DIR (an export), once"
            )

    @staticmethod
    def function() -> Callable[[Any], Any]:
        """What measures by them."""
        raise NotImplementedError
