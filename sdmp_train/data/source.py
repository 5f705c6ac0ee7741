"""Where images come from, as a loader sees it: a folder today, shards or archives the same way."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Source(Protocol):
    """N images in a fixed order, with what was learnt of them before any is decoded."""

    @property
    def heights(self) -> NDArray[np.int32]:
        """(N,) pixels, as stored (orientation tags ignored)."""

    @property
    def widths(self) -> NDArray[np.int32]:
        """(N,) pixels."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) number of the class in `classes`, -1 where there are none."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Sorted names, or none."""

    @property
    def pillow(self) -> NDArray[np.bool_]:
        """(N,) True where DALI's decoder is not known to agree with Pillow (`decoders.needs_pillow`)."""

    @property
    def fingerprint(self) -> str:
        """Changes when the images do."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """The image file of a row, undecoded.

        Raises:
            OSError, ValueError: it cannot be read.
        """

    def name(self, row: int) -> str:
        """What messages call it."""

    def file(self, row: int) -> str | None:
        """The path of the file that holds what `read` gives and nothing else, for decoders that read on their own;
        None where there is none."""


def at_once(source: Source) -> int:
    """Images that are read at once where one waits for a network: what a source says by an attribute `at_once`; else 1,
    since a disk, and decoding, keep a core busy."""
    return int(getattr(source, "at_once", 1))


def channels_of(source: Source) -> int:
    """Of every image, 1 to 16: what a source says by an attribute `channels`; 3 where it has none."""
    return int(getattr(source, "channels", 3))
