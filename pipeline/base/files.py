"""Files of a cache, in a local folder or behind an fsspec URL; each is whole or not there."""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from panoptic_cache.pipeline.base.errors import InputError

if TYPE_CHECKING:
    from panoptic_cache.pipeline.base.remote import RemoteFile

PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO")
    if hasattr(errno, name)
}
"""Errors of a share that may be gone a moment later."""
SHARE_PAUSES = (0.5, 1.0, 3.0)
"""Seconds before each further try of what is on a share."""

_TEMPORARY = ".tmp-"
_LOCK = ".lock"
_NO_LINKS, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder that holds a cache.

    On a local disk a file is written under a temporary name, synced and renamed, so a kill at any
    moment leaves the old file or the new one. Elsewhere an object is put in one call, which object
    stores make atomic; there is no lock there, and nothing to sweep. On other remote filesystems a
    kill can leave half a file under its final name. Rendering can still continue: half a tar has
    no sidecar, and half a sidecar is not accepted as one.
    """

    url: str  # A local path or an fsspec URL such as `s3://bucket/coco`

    @property
    def local(self) -> Path | None:
        """The folder, where it is a local one."""
        if "://" not in self.url:
            return Path(self.url)
        scheme, _, path = self.url.partition("://")
        return Path(path) if scheme == "file" else None

    def absolute(self) -> Storage:
        """The same place as an absolute path, for processes with another working directory."""
        return self if "://" in self.url else replace(self, url=str(Path(self.url).absolute()))

    def path(self, name: str) -> str:
        """The full path or URL of a file; a query, such as a signature, stays at the end."""
        folder, mark, query = self.url.partition("?") if is_http(self.url) else (self.url, "", "")
        return f"{folder.rstrip('/')}/{name}{mark}{query}"

    def _remote(self, name: str = "") -> RemoteFile:
        """The folder, or a file in it."""
        from panoptic_cache.pipeline.base.remote import RemoteFile  # noqa: PLC0415 - takes 60 ms

        return RemoteFile(self.path(name) if name else self.url)

    def create(self) -> None:
        """Makes the folder; InputError where that is not possible."""
        with _writing(self.url, "cannot make the folder"):
            if self.local is not None:
                self.local.mkdir(parents=True, exist_ok=True)
            else:
                self._remote().make_folder()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole; see `write_file`."""
        if self.local is not None:
            write_file(self.local / name, data)
            return
        with _writing(self.path(name)):
            self._remote(name).write(data)

    def read(self, name: str, size: int | None = None) -> bytes:
        """The bytes of a file; FileNotFoundError where there is none, OSError where it fails.

        Reads again over HTTP where less than `size` bytes came.
        """
        if self.local is None:
            return self._remote(name).read(size)
        return read_file(self.local / name)

    def sizes(self, names: Iterable[str] = ()) -> dict[str, int]:
        """The size of every file here, by name, without temporary files.

        HTTP has no listing of folders, though many servers show one as a page. Those of `names`
        that it does not show are asked for one by one.
        """
        folder, found = self.local, dict[str, int | None]()
        if folder is None:
            from panoptic_cache.pipeline.base.remote import remote_sizes  # noqa: PLC0415

            found = self._remote().list()
            asked = {*found, *(names if is_http(self.url) else ())}
            found |= remote_sizes({name: self.path(name) for name in asked if not found.get(name)})
        elif folder.is_dir():
            with os.scandir(folder) as entries:
                found = {
                    entry.name: entry.stat().st_size
                    for entry in entries
                    # Another process renames its temporary files at any moment.
                    if _is_kept(entry.name) and entry.is_file()
                }
        return {name: size for name, size in found.items() if size is not None and _is_kept(name)}

    def remove(self, name: str) -> None:
        """Removes a file if it is there; InputError where that is not possible."""
        with _writing(self.path(name)):
            if self.local is None:
                self._remote(name).remove()
            else:
                (self.local / name).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder for one run, and removes half-written files before and after it.

        Those before come from a killed run, those after from a killed worker. The kernel frees
        the lock when its process ends, however it ends. Raises InputError where another run holds
        the folder, or it cannot be locked.
        """
        folder = self.local
        if folder is None:
            yield
            return
        # Imported here: only what writes a folder needs it, and it takes 15 ms.
        from filelock import FileLock, Timeout  # noqa: PLC0415

        path = folder / _LOCK
        # A lock file that stands for the lock would stay after a kill.
        lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
        with _writing(folder):
            folder.stat()  # FileLock would make a folder that is not there
            try:
                lock.acquire()
            except Timeout:
                what, remedy = (
                    "another run is writing here",
                    "wait for it, or choose another folder",
                )
                raise InputError(what, folder, remedy, "locked") from None
            except OSError as error:
                if error.errno not in {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL}:
                    raise
                what = f"this file system does not lock: {error.strerror}"
                remedy = "mount it with locks (Lustre: -o flock), or write to another disk"
                raise InputError(what, folder, remedy, "no-lock") from None
        try:
            sweep(folder)
            yield
        finally:
            sweep(folder)
            path.unlink(missing_ok=True)
            lock.release()


@contextmanager
def _writing(where: Path | str, what: str = "cannot write") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(error, where, what) from None


def is_http(url: str) -> bool:
    """Whether a place is one of HTTP, which lists no folders and takes queries."""
    return url.startswith(("http://", "https://"))


def _is_kept(name: str) -> bool:
    return not name.startswith(_TEMPORARY) and name != _LOCK


def sweep(folder: Path) -> None:
    """Removes the half-written files of killed processes."""
    for left_over in folder.rglob(f"{_TEMPORARY}*"):
        if not left_over.is_dir():  # as half a checkpoint is
            left_over.unlink(missing_ok=True)


def cannot_read(error: OSError, where: Path | str) -> InputError:
    """The error for a file that exists but cannot be read."""
    return InputError(f"cannot read: {error.strerror or error}", where=where, code="unreadable")


def cannot_write(error: OSError, where: Path | str, what: str = "cannot write") -> InputError:
    """The error for a file that cannot be written."""
    if error.errno == errno.ELOOP:
        return InputError(f"{what}: it is a link", where, "remove it", "write")
    remedy = "make room or rights, then run the same command to go on"
    return InputError(f"{what}: {error.strerror or error}", where, remedy, "write")


def open_file(path: Path) -> BinaryIO:
    """Opens a local file; OSError where it is none that ends, such as a pipe or a device."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_file(path: Path, most: int = 1 << 34) -> bytes:
    """The bytes of a local file; passing errors of a share are retried.

    OSError where it cannot be read, has more bytes than `most`, or is no file; see `open_file`.
    """
    for pause in (*SHARE_PAUSES, None):
        try:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size > most:
                    what = f"has {size:,} bytes, {most:,} are the most"
                    raise OSError(errno.EFBIG, what, str(path))
                return file.read()
        except OSError as error:
            if pause is None or error.errno not in PASSING:
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def stamp(*files: Path) -> list[int]:
    """Size and time of each file: what differs once one of them has changed."""
    found = []
    for file in files:
        try:
            state = file.stat()
            found += [state.st_size, state.st_mtime_ns]
        except OSError:
            found += [-1, -1]
    return found


def no_links(path: str, flags: int) -> int:
    """An `opener` for files that are not replaced but written to: OSError where one is a link.

    Else somebody who may write in the folder could have another file of the user overwritten.
    """
    return os.open(path, flags | _NO_LINKS, 0o666)


def write_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a local file whole, or leaves what was there; InputError where that is not possible.

    Where it is `durable`, it survives a power cut, and is read back before it gets its name.
    """
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")  # no longer than other names
    try:
        with _writing(path):
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if durable and temporary.read_bytes() != data:
                raise InputError("the disk returns other bytes than written", where=path)
            temporary.replace(path)
            if durable:
                sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that a rename in it survives a power cut, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # as on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Shares (CIFS, FUSE, VirtualBox) refuse for folders what they do for files.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS}:
            raise
    finally:
        os.close(descriptor)
