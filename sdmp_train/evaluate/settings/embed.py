"""The settings of `eval embed`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ...flags import arg
from ...settings import require
from .subject import Precision, SubjectConfig

EmbeddedName = Literal["output", "last4", "mean", "output+mean", "patches"]


@dataclass(frozen=True)
class EmbedConfig(SubjectConfig):
    """Write the features of images to --output: a file for each kind, and one that names the images."""

    features: tuple[EmbeddedName, ...] = ("output",)
    """output: class token, or a ResNet's pooled map; mean: mean patch token; patches: all of them; last4: the class
    tokens of four blocks; output+mean: both."""
    split: Literal["train", "test", "all"] = "all"
    """Images of --data as a whole, or one side of it as `eval knn` divides it (which takes class folders)."""
    format: Literal["npy", "safetensors"] = "npy"
    """npy is written as it comes; safetensors is held in memory first."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the features."""
    batch_size: Annotated[int, arg(aliases=("-b",))] = 256
    """Images per forward pass."""
    precision: Precision = "auto"
    """Autocast of the backbone; auto is bf16 on a GPU, fp32 elsewhere."""
    overwrite: bool = False
    """Write over features that lie in --output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        many = len(self.features)
        require(many > 0 and len(set(self.features)) == many, "features", self.features, "some, each once")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")

    @staticmethod
    def function() -> Callable[[EmbedConfig], Any]:
        """What measures by them; imported here, since it needs torch."""
        from ..embed import write_embeddings

        return write_embeddings
