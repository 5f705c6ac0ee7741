"""The settings of `eval knn`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from ...flags import arg
from ...settings import between, require
from .subject import Precision, SubjectConfig


@dataclass(frozen=True)
class KnnConfig(SubjectConfig):
    """Weighted nearest neighbours on frozen features: bank from --data, queries from --test-data."""

    k: tuple[int, ...] | None = None
    """Numbers of neighbours; default: 10, 20, 100 and 200, as far as the bank has so many."""
    temperature: float = 0.07
    """Votes weigh exp(similarity / temperature)."""
    batch_size: Annotated[int, arg(aliases=("-b",))] = 256
    """Images per forward pass."""
    knn_max_images: int | None = None
    """Images used (four fifths bank, one fifth queries), evenly spread; default: what the run used, else all."""
    precision: Precision | None = None
    """Autocast of the backbone; default: the run's, else bf16 on a GPU, fp32 elsewhere."""
    raw_pixels: bool = True
    """Also measure the pixels themselves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k is None or (len(self.k) > 0 and min(self.k) >= 1), "k", self.k, "whole numbers from 1")
        between("temperature", self.temperature, 0, 1e6, above=True)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        most = self.knn_max_images
        require(most is None or most >= 5, "knn_max_images", most, "at least 5: every fifth image is a query")

    @staticmethod
    def function() -> Callable[[KnnConfig], Any]:
        """What measures by them; imported here, since it needs torch."""
        from ..knn import evaluate_knn

        return evaluate_knn
