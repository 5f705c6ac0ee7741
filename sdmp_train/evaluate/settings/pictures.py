"""The settings of `eval pictures`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ...flags import arg
from ...settings import require
from .subject import SubjectConfig


@dataclass(frozen=True)
class PicturesConfig(SubjectConfig):
    """Attention maps, patch features, nearest neighbours and a map of the features, as PNG files."""

    images: tuple[str, ...] = ()
    """Image files to show in place of some of those to measure on."""
    count: int = 6
    """How many images are shown where none are named."""
    max_images: int = 5000
    """Images among which neighbours are sought (four fifths) and that are mapped (one fifth)."""
    embedding: Literal["auto", "tsne", "none"] = "auto"
    """The map of the features, by scikit-learn's t-SNE; auto makes it where that is installed."""
    batch_size: Annotated[int, arg(aliases=("-b",))] = 256
    """Images per forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.count >= 1, "count", self.count, "at least 1")
        require(self.max_images >= 10, "max_images", self.max_images, "at least 10")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")

    @staticmethod
    def function() -> Callable[[PicturesConfig], Any]:
        """What measures by them; imported here, since it needs torch."""
        from ..pictures import make_pictures

        return make_pictures
