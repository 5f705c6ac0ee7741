"""The settings of `eval robustness`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from ...flags import Suppress, arg
from ...settings import ConfigError, require
from .subject import Precision, SubjectConfig


@dataclass(frozen=True)
class RobustnessConfig(SubjectConfig):
    """Top-1 accuracy of a fine-tuned classifier, or one of timm's, on ImageNet-A, -R and -C.

    The images are given by --imagenet-a, --imagenet-r and --imagenet-c, not by --data.
    """

    data: Suppress[Annotated[str | None, arg(aliases=("--data-dir",))]] = None
    """Not on the command line, and refused: the images are those of the sets below."""
    test_data: Suppress[str | None] = None
    """Likewise."""
    imagenet_a: str | None = None
    """Folder of ImageNet-A: one folder per class, named by its WordNet id."""
    imagenet_r: str | None = None
    """Folder of ImageNet-R, likewise."""
    imagenet_c: str | None = None
    """Folder of ImageNet-C: CORRUPTION/SEVERITY/CLASS/*, the corruptions perhaps a folder deeper."""
    batch_size: Annotated[int, arg(aliases=("-b",))] = 256
    """Images per forward pass."""
    precision: Precision = "auto"
    """Autocast of the backbone; auto is bf16 on a GPU, fp32 elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        for name in ("data", "test_data"):
            value = getattr(self, name)
            require(value is None, name, value, "none: name the sets by --imagenet-a, --imagenet-r, --imagenet-c")
        if not (self.imagenet_a or self.imagenet_r or self.imagenet_c):
            raise ConfigError("no images are given; name at least one of --imagenet-a, --imagenet-r, --imagenet-c")

    @staticmethod
    def function() -> Callable[[RobustnessConfig], Any]:
        """What measures by them; imported here, since it needs torch."""
        from ..robustness import evaluate_robustness

        return evaluate_robustness
