"""Files behind an fsspec URL: tried again where a server fails in passing."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file or folder behind a URL; whatever fails is an OSError that names it."""

    url: str

    def _find(self) -> tuple[Any, str]:
        """The file system, and what it calls the place."""
        options: dict[str, Any] = {}
        try:
            if is_http(self.url):
                import aiohttp  # noqa: PLC0415 - optional

                wait = aiohttp.ClientTimeout(total=None, connect=TIMEOUT, sock_read=TIMEOUT)
                # A signature in the query holds for the very bytes of it.
                options = {"client_kwargs": {"timeout": wait}, "encoded": "?" in self.url}
            filesystem, path = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            raise InputError(f"a package is missing: {error}", where=self.url) from None
        except ValueError as error:
            raise InputError(f"no such kind of URL: {error}", where=self.url) from None
        return filesystem, path.rstrip("/")

    def make_folder(self) -> None:
        """Makes the folder, where the place has such things."""
        filesystem, path = self._find()
        _tried(self.url, lambda: filesystem.makedirs(path, exist_ok=True))

    def write(self, data: bytes) -> None:
        """Puts the file in one call."""
        filesystem, path = self._find()

        def put() -> int:
            filesystem.pipe_file(path, data)
            filesystem.invalidate_cache()
            return int(filesystem.size(path))

        if _tried(self.url, put) != len(data):
            raise InputError("stored with another size", self.url, code="write")

    def read(self, size: int | None = None) -> bytes:
        """The bytes; over HTTP again where less than `size` came, as an answer may be cut short."""
        filesystem, path = self._find()

        def get() -> bytes:
            data = bytes(filesystem.cat_file(path))
            if size is not None and len(data) < size and is_http(self.url):
                raise ConnectionError(f"{len(data)} bytes came instead of {size}")
            return data

        return _tried(self.url, get)

    def size(self) -> int | None:
        """In bytes; None where there is no such file."""
        filesystem, path = self._find()
        try:
            size: int | None = _tried(self.url, lambda: filesystem.size(path))
            return len(self.read()) if size is None else size
        except FileNotFoundError:
            return None

    def list(self) -> dict[str, int | None]:
        """Names and sizes of the files in the folder, as far as the place tells them."""
        filesystem, path = self._find()

        def listing() -> list[dict[str, Any]]:
            filesystem.invalidate_cache()
            there = "?" not in path and filesystem.exists(path)
            return list(filesystem.ls(path, detail=True)) if there else []

        rows = [row for row in _tried(self.url, listing) if row["type"] == "file"]
        return {row["name"].rsplit("/", 1)[-1]: row["size"] for row in rows}

    def remove(self) -> None:
        """Removes the file if it is there."""
        filesystem, path = self._find()
        _tried(self.url, lambda: filesystem.exists(path) and filesystem.rm_file(path))


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
