"""Classes of images that lie in one flat folder, from the file that lists them.

Read are, in the folder, beside it, or for ImageNet where its archives put them:

- `val_annotations.txt` (Tiny-ImageNet; any `*_annotations.txt`): file name, tab, class
- `LOC_val_solution.csv` (ImageNet from Kaggle): file name without suffix, comma, class and boxes
- `val.txt` (the split's own name; Caffe's lists): file name, blank, class or its number among the sorted classes
- `*synset_labels.txt` (ImageNet): a class per line, in the order of the numbers that end the file names
- `ILSVRC2012_validation_ground_truth.txt` with `map_clsloc.txt` beside it (ImageNet's development kit): a number per
  line in that order, and what the numbers mean
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..reading import open_regular
from .images import DataError

_MOST_BYTES = 64 * 2**20
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
KNOWN = f"val_annotations.txt, LOC_val_solution.csv, val.txt, *synset_labels.txt, {_GROUND_TRUTH} with map_clsloc.txt"

Lookup = Callable[[str], str | None]


def read_annotations(folder: Path, classes: Sequence[str]) -> tuple[Path, Lookup] | None:
    """The file that lists the classes of a folder's images, and a function from file name to class.

    `classes` are the sorted classes of the training images. None where there is no such file.

    Raises:
        DataError: there is one, but it cannot be read or makes no sense.
    """
    for path, read in _candidates(folder):
        try:
            lines = _lines(path)
            return path, read(path, lines, classes)
        except (OSError, ValueError, LookupError) as error:
            raise DataError(f"the annotations {str(path)!r} cannot be read: {error}") from error
    return None


def _candidates(folder: Path) -> Iterator[tuple[Path, Callable[[Path, list[str], Sequence[str]], Lookup]]]:
    kit = Path("ILSVRC2012_devkit_t12") / "data"
    near = (folder, folder.parent)
    patterns = (
        (near, "*_annotations.txt", _by_tab),
        ((*near, *folder.parents[1:4]), "LOC_val_solution.csv", _by_comma),
        (near, f"{folder.name}.txt", _by_blank),
        (near, "*synset_labels.txt", _by_number),
        ((*near, *(place / kit for place in near), *(place / "data" for place in near)), _GROUND_TRUTH, _ground_truth),
    )
    for places, pattern, read in patterns:
        for place in places:
            for path in sorted(place.glob(pattern)):
                if place == folder or _may_list(path, folder):
                    yield path, read


def _may_list(path: Path, folder: Path) -> bool:
    """Whether a list outside a folder may be that folder's: `train_annotations.txt` is none of val/."""
    word, name = path.name.partition("_")[0].casefold(), folder.name.casefold()
    return word not in _SPLITS or name.startswith(word) or word.startswith(name)


def _lines(path: Path) -> list[str]:
    with open_regular(path) as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is longer than {_MOST_BYTES:,} bytes")
    text = os.fsdecode(data.removeprefix(codecs.BOM_UTF8))
    return [line for line in text.splitlines() if line.strip()]


def _by_tab(path: Path, lines: list[str], classes: Sequence[str]) -> Lookup:
    pairs = [line.split("\t") for line in lines]
    return {parts[0].rsplit("/", 1)[-1]: parts[1].strip() for parts in pairs}.get


def _by_comma(path: Path, lines: list[str], classes: Sequence[str]) -> Lookup:
    pairs = [line.split(",", 1) for line in lines if not line.startswith("ImageId,")]
    found = {stem.strip(): boxes.split()[0] for stem, boxes in pairs}
    return lambda name: found.get(os.path.splitext(name)[0])


def _by_blank(path: Path, lines: list[str], classes: Sequence[str]) -> Lookup:
    pairs = [line.rsplit(None, 1) for line in lines]
    known = set(classes)
    found = {
        name.rsplit("/", 1)[-1]: value if value in known or not value.isdecimal() else classes[int(value)]
        for name, value in pairs
    }
    return found.get


def _by_number(path: Path, lines: list[str], classes: Sequence[str]) -> Lookup:
    labels = [line.strip() for line in lines]

    def look_up(name: str) -> str | None:
        number = re.search(r"(\d+)$", os.path.splitext(name)[0])
        return labels[int(number[1]) - 1] if number and 1 <= int(number[1]) <= len(labels) else None

    return look_up


def _ground_truth(path: Path, lines: list[str], classes: Sequence[str]) -> Lookup:
    names = {}
    for line in _lines(path.with_name("map_clsloc.txt")):
        name, number = line.split()[:2]
        names[int(number)] = name
    return _by_number(path, [names[int(line)] for line in lines], classes)
