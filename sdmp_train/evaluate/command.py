"""Which protocols `eval` knows. A protocol is one line in `PROTOCOLS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..advice import elsewhere
from .settings.embed import EmbedConfig
from .settings.finetune import FinetuneConfig
from .settings.knn import KnnConfig
from .settings.linear import LinearConfig
from .settings.pictures import PicturesConfig
from .settings.robustness import RobustnessConfig
from .settings.subject import SubjectConfig

if TYPE_CHECKING:
    from ..data import Index
    from ..settings import DataConfig

PROTOCOLS: dict[str, type[SubjectConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "finetune": FinetuneConfig,
    "robustness": RobustnessConfig,
    "pictures": PicturesConfig,
    "embed": EmbedConfig,
}
"""Settings of each, by the name that `eval` knows it by; they know their function."""


def describe_protocols(program: str) -> str:
    """What `eval --help` prints: a line for each."""
    lines = [f"  {name:12} {(settings.__doc__ or '').splitlines()[0]}" for name, settings in PROTOCOLS.items()]
    return "\n".join(
        [
            f"usage: {program} eval PROTOCOL WHAT [OPTIONS]",
            "",
            "WHAT (or --run, --weights): a run folder, the folder of an export, or timm:NAME for weights of timm's.",
            "--data: a folder of class folders; default: the run's own images. (robustness: --imagenet-a, -r, -c)",
            "",
            *lines,
            "",
            f"{program} eval PROTOCOL --help lists a protocol's flags; docs/evaluation.md says what each measures.",
            *elsewhere(),
        ]
    )


def labelled_images(data: DataConfig, test_data: str | None = None) -> tuple[Index, Index]:
    """Bank and queries as `eval` takes them: `subject.labelled_images`, which other programs know by this place."""
    from .subject import labelled_images as found

    return found(data, test_data)
