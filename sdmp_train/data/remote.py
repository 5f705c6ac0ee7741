"""Files behind a URL (`s3://`, `gs://`, `hf://`, `https://`, `memory://`), by fsspec: listed, and read by ranges.

A connection that is lost costs a line and another attempt; a store that does not answer for half a minute is an error
that no file is blamed for (`Unreachable`).
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from ..advice import install
from ..text import one_line, printable
from .images import DataError, Unreachable

_log = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between the attempts at one read."""
REST = 60.0
"""Seconds for which a store that has not answered is not asked again: a batch does not wait for each of its images."""
AT_ONCE = 16
"""Requests of one process that are under way at once: each waits for the network, not for a core."""
_CHUNK = 4 * 2**20
"""Bytes per request while a whole file is read from its beginning to its end."""

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(://|::)")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_NETWORK = ("aiohttp.", "requests.", "urllib3.", "http.", "httpx.", "httpx2.", "httpcore.")
"""Modules whose exceptions mean the network, where they are no `OSError`."""
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "mtime", "LastModified", "last_modified", "created")
"""What stores say of a file that changes when it does; the first that is there."""

T = TypeVar("T")

_down: dict[str, float] = {}
_said: dict[str, float] = {}


class StoredFile(NamedTuple):
    """A file of a store, or a local one."""

    url: str
    """Or a path."""
    name: str
    """Below the root of the listing."""
    bytes: int
    stamp: int
    """Changes when the file does, as far as the store tells."""


def is_url(text: str) -> bool:
    """Whether a text names a place in a store; `file://` does not (see `without_scheme`)."""
    return _URL.match(text) is not None and not text.startswith("file://")


def without_scheme(text: str) -> str:
    """The path that a `file://` URL names; any other text as it is."""
    return text.removeprefix("file://") if text.startswith("file://") else text


def list_remote(url: str, wanted: Callable[[str], bool]) -> tuple[str, list[StoredFile]]:
    """The files that a URL names, by name, and the URL of the folder that their names are relative to.

    It names one file that is `wanted` (asked of its name); those that braces `{000..127}` count up; those that a `*` in
    its last part stands for; or else the wanted files right in a folder.

    Raises:
        DataError: the store cannot be used, or there is no such file.
    """
    try:
        if _BRACES.search(url):
            with ThreadPoolExecutor(AT_ONCE) as pool:
                found = dict(pool.map(_asked, _counted_up(url)))
        elif "*" in url.rpartition("/")[2]:
            found = insist(lambda: _globbed(url), url)
        elif wanted(_path_of(url)):
            found = dict([_asked(url)])
        else:
            found = insist(lambda: _listed(url), url)
            found = {place: info for place, info in found.items() if wanted(_path_of(place))}
        with ThreadPoolExecutor(AT_ONCE) as pool:  # a web server's listing tells no sizes
            found |= dict(pool.map(_asked, [place for place, info in found.items() if info.get("size") is None]))
    except (OSError, ValueError) as error:
        reason = f"cannot be listed: {'is not there' if isinstance(error, FileNotFoundError) else one_line(error)}"
        raise DataError(f"{printable(url)} {error if isinstance(error, Unreachable) else reason}") from error
    root = _root_of(list(found))
    sizes = {place: _size(place, info) for place, info in found.items()}
    files = [StoredFile(place, place[len(root) + 1 :], sizes[place], _stamp(info)) for place, info in found.items()]
    return root, sorted(files, key=lambda file: file.name)


def read_range(url: str, offset: int, length: int) -> bytes:
    """Some bytes of a file.

    Raises:
        Unreachable: the store does not answer.
        OSError, ValueError: the file is not there, may not be read, or has become too short.
    """

    def attempt() -> bytes:
        store, path = _store(url)
        data: bytes = store.cat_file(path, start=offset, end=offset + length)
        if len(data) > length:
            raise ValueError("its store gives whole files where a part is asked for")
        if len(data) < length:
            there = _size(url, store.info(path))
            if there < offset + length:
                raise ValueError(f"is cut: it ends {offset + length - there} bytes too early")
            raise ConnectionError(f"{len(data)} of {length} bytes have come")
        return data

    return insist(attempt, url)


def open_remote(file: StoredFile) -> io.BufferedReader:
    """A file to be read from its beginning to its end, in requests of some megabytes."""
    return io.BufferedReader(_Ranges(file), _CHUNK)


class _Ranges(io.RawIOBase):
    """The bytes of a remote file, each read by `read_range`, so that a lost connection costs one request."""

    def __init__(self, file: StoredFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.bytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._file.bytes - self._at))
        if length:
            buffer[:length] = read_range(self._file.url, self._at, length)
        self._at += length
        return length


def insist(action: Callable[[], T], url: str) -> T:
    """What `action` returns, tried again where the connection is lost: `PAUSES`, with one line a minute.

    Raises:
        Unreachable: every attempt has failed, or all have shortly before.
        OSError, ValueError: another attempt would fail as well.
    """
    host = _host_of(url)
    if time.monotonic() < _down.get(host, 0.0):
        raise Unreachable(f"cannot be reached: {printable(host)} has not answered for {sum(PAUSES):.0f} s")
    for pause in (*PAUSES, None):
        try:
            return action()
        except Exception as error:
            if not is_lost_connection(error):
                raise _plain(error) from error
            reason = one_line(error.__cause__ if isinstance(error, FileNotFoundError) else error)
            if pause is None:
                _down[host] = time.monotonic() + REST
                raise Unreachable(f"cannot be reached: {reason} ({len(PAUSES) + 1} attempts)") from error
            _say(host, reason, pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def is_lost_connection(error: BaseException) -> bool:
    """Whether the same request may succeed later: what it says, or what it was raised from.

    A web server that refuses the connection comes as `FileNotFoundError`.
    """
    final = isinstance(error, _FOR_GOOD)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and not isinstance(cause, _FOR_GOOD):
            return True
        if not final and any(f"{kind.__module__}.".startswith(_NETWORK) for kind in type(cause).__mro__):
            return True
        cause = cause.__cause__
    return False


def _say(host: str, reason: str, pause: float) -> None:
    if time.monotonic() >= _said.get(host, 0.0):
        _said[host] = time.monotonic() + REST
        _log.warning("%s does not answer (%s); trying again in %.0f s", printable(host), reason, pause)


def _plain(error: Exception) -> OSError | ValueError:
    """As an error that those who read files expect: a missing package or password is theirs to explain."""
    if isinstance(error, (OSError, ValueError)):
        return error
    return ValueError(one_line(f"{type(error).__name__}: {error}" if str(error) else error))


def _store(url: str) -> tuple[Any, str]:
    """The file system that serves a URL, and the path in it. fsspec keeps them by their options, anew in a fork."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ValueError(f"fsspec is not installed, which reads URLs: {install('remote')}") from error
    store, path = url_to_fs(url)
    return store, path


def _asked(url: str) -> tuple[str, Mapping[str, Any]]:
    def attempt() -> Mapping[str, Any]:
        store, path = _store(url)
        info: Mapping[str, Any] = store.info(path)
        return info

    return url, insist(attempt, url)


def _listed(url: str) -> dict[str, Mapping[str, Any]]:
    store, path = _store(url)
    return _places(url.rstrip("/"), store.ls(path, detail=True))


def _globbed(url: str) -> dict[str, Mapping[str, Any]]:
    store, path = _store(url)
    found = _places(url.rpartition("/")[0], store.glob(path, detail=True).values())
    if not found:
        raise FileNotFoundError(url)
    return found


def _places(folder: str, infos: Any) -> dict[str, Mapping[str, Any]]:
    files = [info for info in infos if info.get("type") == "file"]
    return {f"{folder}/{info['name'].rstrip('/').rpartition('/')[2]}": info for info in files}


def _counted_up(url: str) -> Iterator[str]:
    """`a{08..10}` -> a08, a09, a10; several braces, each with each."""
    braces = _BRACES.search(url)
    if braces is None:
        yield url
        return
    first, last = braces[1], braces[2]
    for number in range(int(first), int(last) + 1):
        yield from _counted_up(f"{url[: braces.start()]}{number:0{len(first)}}{url[braces.end() :]}")


def _root_of(urls: list[str]) -> str:
    """The URL of the folder that holds all of them, at some depth."""
    parts = [url.split("/")[:-1] for url in urls] or [[""]]
    shared = 0
    while shared < min(map(len, parts)) and len({tuple(each[: shared + 1]) for each in parts}) == 1:
        shared += 1
    return "/".join(parts[0][:shared])


def _path_of(url: str) -> str:
    """Without the query of an address of the web."""
    return url.partition("?")[0]


def _host_of(url: str) -> str:
    return "/".join(url.split("/")[:3])


def _size(url: str, info: Mapping[str, Any]) -> int:
    size = info.get("size")
    if not isinstance(size, int):
        raise DataError(f"the store of {printable(url)} does not say how long the file is")
    return size


def _stamp(info: Mapping[str, Any]) -> int:
    said = next((str(info[name]) for name in _STAMPS if info.get(name)), "")
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=7).digest(), "little")
