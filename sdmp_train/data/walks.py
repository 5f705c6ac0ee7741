"""What walks through shards have told, remembered: a shard is read whole once, and not again until it changes.

One file of JSON per shard in the cache folder. Nothing in it is believed that the shard cannot hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from PIL import Image

from ..durable import write_durably
from ..reading import open_regular, read_json
from ..text import printable
from .cache import Cache, Checked, cache_folder
from .images import DECODE_ERRORS, DataError, Unreachable, describe
from .index import Checks, look_at
from .remote import AT_ONCE, StoredFile, is_url, open_remote

_log = logging.getLogger(__name__)

_VERSION = 1
_MOST_BYTES = 2**30


@dataclass
class Walk:
    """What a shard holds, in its order. Names are those within the shard."""

    stamp: int
    """Changes when the shard does."""
    images: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, offset and length in bytes."""
    classes: dict[str, str] = field(default_factory=dict)
    """Key -> class."""
    others: Counter[str] = field(default_factory=Counter)
    """Suffix -> members that are passed over."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """What follows the shard's own name, and why it is no image."""
    checked: dict[str, Checked] = field(default_factory=dict)
    """What images told whose bytes were read on the way."""


Look = Callable[[bytes], Checked | None]
"""What an image's bytes tell; None where they are no image, which is found again where it can be named."""
Walker = Callable[[IO[bytes], str, int, int, Look, bool], Walk]
"""(file, what it is called, bytes, stamp, look, whether every byte is checked) -> what it holds."""


def remembered_walks(place: str, shards: Sequence[StoredFile], how: Checks, walker: Walker) -> list[Walk]:
    """What every shard of a place holds; those that are not remembered are read, several at once.

    One process of a machine at a time: the others find its work.

    Raises:
        DataError: a shard cannot be read, or is none.
    """
    walks = []
    with (
        warnings.catch_warnings(),
        Cache(f"{place} shards", how.cache_dir).alone(),
        ThreadPoolExecutor(min(AT_ONCE, len(shards))) as pool,
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # as `_check_files`
        for walk in pool.map(partial(_remembered, how, walker), shards):
            walks.append(walk)
            if how.progress is not None:
                how.progress(len(walks), len(shards))
    return walks


def look(how: Checks, held: bytes) -> Checked | None:
    """As `Look`."""
    try:
        return look_at(held, how)
    except DECODE_ERRORS:
        return None


def _remembered(how: Checks, walker: Walker, shard: StoredFile) -> Walk:
    place = _place(how, shard)
    if place is not None and how.check != "digest":
        try:
            return _read(place, shard, decoded=how.check == "decode")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError) as error:
            _log.warning("what is remembered of %s is not used: %s", printable(shard.url), printable(error))
    try:
        with open_remote(shard) if is_url(shard.url) else open_regular(shard.url) as file:
            walk = walker(file, shard.url, shard.bytes, shard.stamp, partial(look, how), how.check != "header")
    except DataError:
        raise
    except Unreachable as error:
        raise DataError(f"the shard {printable(shard.url)} {printable(error)}. Go on once the store answers") from error
    except (OSError, ValueError) as error:
        raise DataError(f"the shard {printable(shard.url)} {describe(error)}") from error
    if place is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_durably(place, _text(walk, decoded=how.check != "header"))
        except OSError as error:
            _log.warning("%s cannot be written (%s); the next start reads the shard again", printable(place), error)
    return walk


def _place(how: Checks, shard: StoredFile) -> Path | None:
    """Where a shard's walk is kept; None where there is no cache folder."""
    said = json.dumps([shard.url, shard.bytes, shard.stamp, how.channels])
    try:
        folder = cache_folder(how.cache_dir) / "shards"
    except DataError:
        return None
    return folder / f"v{_VERSION}-{hashlib.sha256(said.encode()).hexdigest()[:24]}.json"


def _text(walk: Walk, decoded: bool) -> str:
    """ASCII: names that are no text survive as escapes."""
    rows: list[list[Any]] = []
    for name, offset, length in walk.images:
        found = walk.checked.get(name)
        rows.append([name, offset, length, *((found.height, found.width, int(found.pillow)) if found else ())])
    plain = {"classes": walk.classes, "others": dict(walk.others), "problems": walk.problems}
    return json.dumps({"decoded": decoded, "images": rows, **plain}) + "\n"


def _read(place: Path, shard: StoredFile, decoded: bool) -> Walk:
    """Raises `FileNotFoundError` where nothing is remembered that says enough, other errors where it makes no sense."""
    held = read_json(place, _MOST_BYTES)
    if decoded and held["decoded"] is not True:
        raise FileNotFoundError("only headers were looked at")
    walk = Walk(shard.stamp, others=Counter(held["others"]))
    walk.classes = {str(key): str(value) for key, value in held["classes"].items()}
    walk.problems = [(str(name), str(reason)) for name, reason in held["problems"]]
    for name, offset, length, *found in held["images"]:
        numbers = [offset, length, *found]
        if not isinstance(name, str) or len(found) not in (0, 3) or {type(number) for number in numbers} != {int}:
            raise ValueError("it names no place in the shard")
        if min(numbers) < 0 or offset + length > shard.bytes or (found and min(found[:2]) < 1):
            raise ValueError("it names places that the shard does not have")
        walk.images.append((name, offset, length))
        if found:
            walk.checked[name] = Checked(found[0], found[1], held["decoded"] is True, bool(found[2]))
    if len({name for name, _, _ in walk.images}) != len(walk.images):
        raise ValueError("it names an image twice")
    return walk
