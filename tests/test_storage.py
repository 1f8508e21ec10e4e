"""Storage: files whole or not at all, one run at a time, and folders that are none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_write, no_links


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    Storage(str(path)).create()
    return path


@pytest.fixture(params=["path", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    name = uuid.uuid4().hex
    url = {
        "path": str(tmp_path / name),
        "file": f"file://{tmp_path / name}",
        "memory": f"memory://{name}/deep/",
    }[request.param]
    storage = Storage(url)
    storage.create()
    yield storage
    if request.param == "memory":
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def test_sizes_that_a_listing_does_not_tell_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As over HTTP."""
    filesystem, storage = fsspec.filesystem("memory"), Storage(f"memory://{uuid.uuid4().hex}")
    storage.create()
    storage.write("a.tar", b"four")
    listing = filesystem.ls

    def without(*arguments: Any, **settings: Any) -> Any:
        return [{**row, "size": None} for row in listing(*arguments, **settings)]

    monkeypatch.setattr(filesystem, "ls", without)
    monkeypatch.setattr(filesystem, "size", lambda path: len(filesystem.cat_file(path)))
    assert storage.sizes() == {"a.tar": 4}


@pytest.mark.parametrize("call", ["read", "write", "create", "sizes", "remove"])
def test_what_a_library_raises_is_an_error_with_a_place(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """As HTTP's does for a server that refuses, or cuts an answer short."""

    class RefusedError(Exception):
        pass

    def refuse(*_: Any, **__: Any) -> None:
        raise RefusedError("403, message='Forbidden'")

    filesystem, storage = fsspec.filesystem("memory"), Storage(f"memory://{uuid.uuid4().hex}")
    for name in ("cat_file", "pipe_file", "makedirs", "exists"):
        monkeypatch.setattr(filesystem, name, refuse)
    arguments = {"read": ("a",), "write": ("a", b""), "remove": ("a",)}.get(call, ())
    with pytest.raises((OSError, InputError), match="Forbidden") as caught:
        getattr(storage, call)(*arguments)
    assert storage.url in str(caught.value)


def test_a_disk_without_locks_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", unable)
    with (
        pytest.raises(InputError, match=r"does not lock.*-o flock"),
        Storage(str(folder)).locked(),
    ):
        pass


def test_a_name_that_is_too_long_is_one_line(folder: Path) -> None:
    Storage(str(folder)).write("x" * 250, b"")  # as long as the disk takes, whatever it is first
    with pytest.raises(InputError, match="File name too long"):
        Storage(str(folder)).write("x" * 300, b"")


def test_every_kind_of_place_behaves_the_same(storage: Storage) -> None:
    assert storage.sizes() == {}
    storage.create()  # again
    storage.write("a.tar", b"one")
    storage.write("b.json", b"")
    storage.write("a.tar", b"three")
    assert storage.sizes() == {"a.tar": 5, "b.json": 0}
    assert storage.read("a.tar") == b"three"
    with fsspec.open(storage.path("a.tar"), "rb") as file:
        assert file.read() == b"three"
    Storage(storage.path("below")).create()
    Storage(storage.path("below")).write("c.tar", b"")
    assert set(storage.sizes()) == {"a.tar", "b.json"}
    with storage.locked():
        storage.remove("a.tar")
    storage.remove("a.tar")  # again
    assert set(storage.sizes()) == {"b.json"}
    with pytest.raises(FileNotFoundError):
        storage.read("a.tar")


@pytest.mark.parametrize("url", ["/nowhere/at/all", "memory://nowhere/at/all"])
def test_a_place_that_is_not_there_is_empty(url: str) -> None:
    assert Storage(url).sizes() == {}


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(InputError, match="carrier-pigeon"):
        Storage("carrier-pigeon://coop/cache").sizes()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        Storage(str(tmp_path / "cache")).create()
    with pytest.raises(InputError, match="cannot write"), Storage(str(tmp_path / "no")).locked():
        pass


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    storage = Storage(str(folder))
    storage.write("a.tar", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(InputError, match="No space left") as caught:
            storage.write("a.tar", b"new")
    assert caught.value.code == "write"
    assert storage.read("a.tar") == b"old"
    assert [path.name for path in folder.iterdir()] == ["a.tar"]


def test_folders_that_cannot_be_synced_are_ignored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of CIFS, FUSE and VirtualBox; a file that cannot is no less an error."""
    real, refused = os.fsync, [errno.EINVAL]

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") or refused[0] == errno.EIO:  # noqa: PTH112
            raise OSError(refused[0], os.strerror(refused[0]))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for number in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
        refused[0] = number
        Storage(str(folder)).write("a.tar", str(number).encode())
        assert Storage(str(folder)).read("a.tar") == str(number).encode()
    refused[0] = errno.EIO
    with pytest.raises(InputError, match="Input/output error"):
        Storage(str(folder)).write("a.tar", b"")


def test_links_in_place_of_our_files_are_not_followed(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_text("years of work")
    for name in ("a.tar", "metrics.jsonl", ".lock"):
        (folder / name).symlink_to(mine)
    Storage(str(folder)).write("a.tar", b"new")
    assert not (folder / "a.tar").is_symlink()
    with (
        pytest.raises(OSError, match="symbolic") as caught,
        open(folder / "metrics.jsonl", "a", opener=no_links),
    ):
        pass
    said = str(cannot_write(caught.value, folder / "metrics.jsonl"))
    assert said == f"{folder}/metrics.jsonl: cannot write: it is a link (remove it)"
    with pytest.raises(InputError, match="it is a link"), Storage(str(folder)).locked():
        pass
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(InputError, match="it is a link"), Storage(str(folder)).locked():
        pass
    assert not (tmp_path / "new").exists()
    assert mine.read_text() == "years of work"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_regular_files_are_read(folder: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(folder / "index.json")
    else:
        (folder / "index.json").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a regular file"):
        Storage(str(folder)).read("index.json")


def test_bytes_that_come_back_changed_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"rotten")
    with pytest.raises(InputError, match="other bytes than written"):
        Storage(str(folder)).write("a.tar", b"fresh")
    assert list(folder.iterdir()) == []


def test_what_a_killed_run_left_is_not_seen_and_is_swept(folder: Path) -> None:
    storage = Storage(str(folder))
    (folder / ".tmp-a.tar-0badcafe").write_bytes(b"half")
    (folder / ".lock").touch()
    (folder / "checkpoints/.tmp-step_0000002").mkdir(parents=True)  # not its business
    (folder / "panoptic").mkdir()
    (folder / "panoptic/.tmp-0badcafe").write_bytes(b"half")
    assert storage.sizes() == {}
    with storage.locked():
        assert {path.name for path in folder.iterdir()} == {".lock", "checkpoints", "panoptic"}
    assert [path.name for path in folder.rglob(".*")] == [".tmp-step_0000002"]


def test_a_second_run_is_refused_while_the_first_holds_the_folder(folder: Path) -> None:
    storage = Storage(str(folder))
    with storage.locked():
        with pytest.raises(InputError, match="another run is writing here"), storage.locked():
            pass
        with pytest.raises(InputError), storage.locked():  # the refusal did not free it
            pass
    with storage.locked():
        pass


def test_the_lock_ends_with_its_process(folder: Path) -> None:
    script = (
        "import sys, time; from panoptic_cache.pipeline.base.files import Storage\n"
        "with Storage(sys.argv[1]).locked(): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError), Storage(str(folder)).locked():
            pass
        holder.kill()
    with Storage(str(folder)).locked():
        pass


def test_never_two_hold_the_lock(folder: Path) -> None:
    inside, held, clashes = [0], [0], [0]

    def contend() -> None:
        for _ in range(60):
            try:
                with Storage(str(folder)).locked():
                    inside[0] += 1
                    clashes[0] += inside[0] > 1
                    held[0] += 1
                    os.sched_yield()
                    inside[0] -= 1
            except InputError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held[0] > 0
    assert clashes[0] == 0
