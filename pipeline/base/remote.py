"""Files behind an fsspec URL: tried again where a server fails in passing."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import is_http

T = TypeVar("T")

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try."""
TIMEOUT = 60.0
"""Seconds without a byte after which an HTTP request has failed."""
BUSY = {408, 425, 429, 500, 502, 503, 504}
"""Answers of HTTP that may be others a moment later."""


class RemoteFile:
    """A file or folder behind a URL; whatever fails is an OSError that names it."""

    def __init__(self, url: str) -> None:
        self.url = url
        options: dict[str, Any] = {}
        try:
            if is_http(url):
                import aiohttp  # noqa: PLC0415 - optional

                wait = aiohttp.ClientTimeout(total=None, connect=TIMEOUT, sock_read=TIMEOUT)
                # A signature in the query holds for the very bytes of it.
                options = {"client_kwargs": {"timeout": wait}, "encoded": "?" in url}
            self._filesystem, path = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise InputError(f"a package is missing: {error}", where=url) from None
        except ValueError as error:
            raise InputError(f"no such kind of URL: {error}", where=url) from None
        self._path = path.rstrip("/")

    def make_folder(self) -> None:
        """Makes the folder, where the place has such things."""
        _tried(self.url, lambda: self._filesystem.makedirs(self._path, exist_ok=True))

    def write(self, data: bytes) -> None:
        """Puts the file in one call."""

        def put() -> int:
            self._filesystem.pipe_file(self._path, data)
            self._filesystem.invalidate_cache()
            return int(self._filesystem.size(self._path))

        if _tried(self.url, put) != len(data):
            raise InputError("stored with another size", self.url, code="write")

    def read(self, size: int | None = None) -> bytes:
        """The bytes; over HTTP again where less than `size` came, as an answer may be cut short."""

        def get() -> bytes:
            data = bytes(self._filesystem.cat_file(self._path))
            if size is not None and len(data) < size and is_http(self.url):
                raise ConnectionError(f"{len(data)} bytes came instead of {size}")
            return data

        return _tried(self.url, get)

    def size(self) -> int | None:
        """In bytes; None where there is no such file."""
        try:
            size: int | None = _tried(self.url, lambda: self._filesystem.size(self._path))
            return len(self.read()) if size is None else size
        except FileNotFoundError:
            return None

    def list(self) -> dict[str, int | None]:
        """Names and sizes of the files in the folder, as far as the place tells them."""

        def listing() -> list[dict[str, Any]]:
            self._filesystem.invalidate_cache()
            there = "?" not in self._path and self._filesystem.exists(self._path)
            return list(self._filesystem.ls(self._path, detail=True)) if there else []

        rows = [row for row in _tried(self.url, listing) if row["type"] == "file"]
        return {row["name"].rsplit("/", 1)[-1]: row["size"] for row in rows}

    def remove(self) -> None:
        """Removes the file if it is there."""
        _tried(
            self.url,
            lambda: self._filesystem.exists(self._path) and self._filesystem.rm_file(self._path),
        )


def remote_sizes(urls: Mapping[str, str]) -> dict[str, int | None]:
    """Sizes in bytes by name, of URLs by name, asked for at once; None where there is no file."""
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda url: RemoteFile(url).size(), urls.values())
        return dict(zip(urls, found, strict=True))


def _tried(where: str, action: Callable[[], T]) -> T:
    """What an action of a library behind fsspec returns, tried again where it fails in passing.

    Whatever it raises becomes an OSError that names the place: the HTTP library, for example, has
    its own errors for a refused or truncated answer.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except InputError:
            raise
        except Exception as error:
            # fsspec says "not found" for whatever a question for a size met over HTTP.
            cause = error.__cause__ or error
            status = getattr(cause, "status", None)
            passes = status in BUSY or (
                isinstance(cause, ConnectionError | TimeoutError)
                or (status is None and type(cause).__module__.startswith("aiohttp"))
            )
            if pause is None or not passes:
                if isinstance(error, FileNotFoundError) and not passes:
                    raise
                what = getattr(cause, "strerror", None) or f"{type(cause).__name__} {cause}"
                raise OSError(errno.EIO, what.rstrip(), where) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
