"""Which protocols `eval` knows, and the images that they measure on. A protocol is one line in `PROTOCOLS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..data import Index
from ..settings import DataConfig
from ..splits import measured_images
from .knn import EVERY_IMAGE, KnnConfig, evaluate_knn, knn_images
from .pictures import PicturesConfig, make_pictures

PROTOCOLS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "knn": (KnnConfig, evaluate_knn),
    "pictures": (PicturesConfig, make_pictures),
}
"""Settings and function of each, by the name that `eval` knows it by."""


def labelled_images(data: DataConfig, test_data: str | None) -> tuple[Index, Index]:
    """Bank and queries, all of them, with the same class numbers; `test_data` goes before that of `data`."""
    train, test = measured_images(data if test_data is None else replace(data, test_data=test_data))
    return knn_images(train, test, max_images=EVERY_IMAGE)
