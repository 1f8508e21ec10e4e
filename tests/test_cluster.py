"""Rendering through a running Dask scheduler, and into places that are no local folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import psutil  # type: ignore[import-untyped]
import pytest
from distributed import Client
from handmade import hashes

import panoptic_cache.pipeline.render.driver
import panoptic_cache.pipeline.render.workers
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, read_dataset
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig

T = TypeVar("T")

CONFIG = RenderConfig(samples_per_shard=4)
ROOT = Path(__file__).parents[1]


def wait_for(look: Callable[[], T | None], what: str, seconds: float = 60) -> T:
    """The first thing seen that is true."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.01)
    return seen


class Cluster:
    """`dask scheduler` and two `dask worker` on the loopback, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.processes = [
            self._start(
                *("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"),
                *("--scheduler-file", str(self.file)),
            )
        ]
        self.address = self._wait_for_address()

    def _wait_for_address(self) -> str:
        def address() -> str | None:
            try:
                return str(json.loads(self.file.read_text())["address"])
            except (FileNotFoundError, ValueError):  # not there yet, or not written to its end
                return None

        return wait_for(address, "a scheduler")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        # In another folder than the driver's, as on another machine.
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )

    def add_workers(self, count: int = 2) -> None:
        """Starts workers; they report when they are ready."""
        for _ in range(count):
            self.processes.append(
                self._start("worker", self.address, "--nthreads", "1", "--no-dashboard")
            )

    def freeze_workers(self) -> None:
        """Stops the workers where they are, once the scheduler knows them."""
        with Client(self.address) as client:
            client.wait_for_workers(len(self.processes) - 1, timeout=30)
        for process in self.processes[1:]:
            for below in psutil.Process(process.pid).children(recursive=True):
                below.suspend()

    def wait_for_task(self) -> None:
        """Returns when a worker has been given a task."""
        with Client(self.address, set_as_default=False) as client:
            wait_for(lambda: any(client.processing().values()), "a task")

    def kill(self) -> None:
        """Ends all that was started, and what that started."""
        self.kill_workers()
        if self.processes:
            self._end(self.processes.pop())

    def kill_workers(self) -> None:
        """Ends the workers."""
        while len(self.processes) > 1:
            self._end(self.processes.pop())

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        with suppress(psutil.NoSuchProcess):
            for below in psutil.Process(process.pid).children(recursive=True):
                below.kill()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that several tests share."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.add_workers()
        yield cluster
    finally:
        cluster.kill()


def run(dataset: CocoPanoptic, url: str, **settings: Any) -> None:
    render(dataset, "train", Storage(url), CONFIG, **{"workers": 0, **settings})


@pytest.mark.slow
def test_a_scheduler_with_two_workers_changes_no_byte(
    cluster: Cluster, tiny_root: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    command = [
        *(sys.executable, str(ROOT / "cli.py"), "preprocess", "--json"),
        *("--coco", os.path.relpath(tiny_root, tmp_path), "--split", "train", "--out", "cache"),
        *("--samples-per-shard", "4", "--scheduler", cluster.address),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["written"] == 12
    assert hashes(out) == hashes(tiny_cache)
    before = hashes(out)
    (out / "train-00001.json").unlink()
    (out / "train-00002.tar").unlink()
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert hashes(out) == before


@pytest.mark.slow
def test_four_workers_change_no_byte(
    tiny_dataset: CocoPanoptic, tiny_cache: Path, tmp_path: Path
) -> None:
    run(tiny_dataset, str(tmp_path / "cache"), workers=4)
    assert hashes(tmp_path / "cache") == hashes(tiny_cache)


def test_workers_with_other_libraries_are_refused(
    cluster: Cluster, tiny_dataset: CocoPanoptic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panoptic_cache.pipeline.render.driver, "tools", lambda: "OpenCV 3")
    with pytest.raises(InputError, match="the driver OpenCV 3") as caught:
        run(tiny_dataset, str(tmp_path), scheduler=cluster.address)
    assert caught.value.code == "worker-differs"


@pytest.mark.parametrize("which", ["photo", "png"])
def test_a_worker_that_does_not_see_the_data_spoils_no_cache(
    root: Path, tiny_cache: Path, tmp_path: Path, which: str
) -> None:
    layout = CocoLayout.of(root, "train")
    dataset = read_dataset(layout)
    path = layout.images if which == "photo" else layout.panoptic_dir
    path.rename(tmp_path / "unmounted")
    with pytest.raises(InputError, match="not there for this worker") as caught:
        run(dataset, str(tmp_path / "cache"))
    assert caught.value.code == "input-gone"
    (tmp_path / "unmounted").rename(path)
    run(dataset, str(tmp_path / "cache"))
    assert hashes(tmp_path / "cache") == hashes(tiny_cache)


def test_workers_that_write_elsewhere_are_found_out(
    cluster: Cluster, tiny_dataset: CocoPanoptic
) -> None:
    with pytest.raises(InputError, match="a worker wrote it, and it is not here") as caught:
        run(tiny_dataset, f"memory://{uuid.uuid4().hex}", scheduler=cluster.address)
    assert caught.value.code == "not-shared"


@pytest.mark.slow
def test_workers_that_go_are_waited_for(
    tiny_dataset: CocoPanoptic,
    tiny_cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As at the walltime of a cluster's jobs."""
    monkeypatch.setattr(panoptic_cache.pipeline.render.workers, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(panoptic_cache.pipeline.render.workers, "DESERTED_SECONDS", 0.5)
    cluster, out = Cluster(tmp_path), tmp_path / "cache"

    def replace_workers() -> None:
        cluster.wait_for_task()
        cluster.kill_workers()
        wait_for(lambda: any("workers are gone" in line for line in caplog.messages), "the line")
        cluster.add_workers(1)

    try:
        cluster.add_workers(1)
        cluster.freeze_workers()  # else it is done before it goes
        change = threading.Thread(target=replace_workers, daemon=True)
        change.start()
        with caplog.at_level(logging.WARNING, "panoptic_cache"):
            run(tiny_dataset, str(out), scheduler=cluster.address)
        change.join()
        assert sum("workers are gone" in line for line in caplog.messages) == 1
    finally:
        cluster.kill()
    assert hashes(out) == hashes(tiny_cache)


def test_no_scheduler_is_said(
    tiny_dataset: CocoPanoptic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panoptic_cache.pipeline.render.workers, "CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match="no Dask scheduler answers"):
        run(tiny_dataset, str(tmp_path), scheduler="tcp://127.0.0.1:9")


@pytest.mark.slow
def test_a_scheduler_that_goes_away_ends_in_one_line(
    tiny_root: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    lost = Cluster(tmp_path)
    try:
        lost.add_workers(1)
        lost.freeze_workers()
        out = tmp_path / "cache"
        command = [
            *(sys.executable, str(ROOT / "cli.py"), "preprocess", "--coco", str(tiny_root)),
            *("--split", "train", "--out", str(out), "--samples-per-shard", "4"),
            *("--scheduler", lost.address),
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
            lost.wait_for_task()
            lost.kill()
            _, errors = driver.communicate(timeout=60)
        assert driver.returncode == 1, errors
        assert errors.count("\n") == 1, errors
        assert "the Dask scheduler went away" in errors
    finally:
        lost.kill()
    run(read_dataset(CocoLayout.of(tiny_root, "train")), str(out))
    assert hashes(out) == hashes(tiny_cache)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_any_filesystem_holds_the_same_bytes(
    tiny_dataset: CocoPanoptic, tiny_cache: Path, tmp_path: Path, workers: int
) -> None:
    # fsspec's own filesystem of the local disk, reached as any remote one is.
    url = f"local://{tmp_path}/cache"
    assert Storage(url).local is None
    run(tiny_dataset, url, workers=workers)
    assert hashes(tmp_path / "cache") == hashes(tiny_cache)


def test_an_interrupted_run_in_memory_goes_on(
    tiny_dataset: CocoPanoptic, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = uuid.uuid4().hex
    storage, write = Storage(f"memory://{name}/cache"), Storage.write

    def half(self: Storage, name: str, data: bytes) -> None:
        # What a filesystem that is no object store leaves when its writer is killed.
        write(self, name, data[: len(data) // 2])
        raise KeyboardInterrupt

    for cut in ("train-00000.tar", "train-00001.json", "quarantine.jsonl", "index.json"):

        def cutting(self: Storage, name: str, data: bytes, cut: str = cut) -> None:
            (half if name == cut else write)(self, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "write", cutting)
            with pytest.raises(KeyboardInterrupt):
                run(tiny_dataset, storage.url)
    run(tiny_dataset, storage.url)
    found = {name: storage.read(name) for name in storage.sizes()}
    assert found == {path.name: path.read_bytes() for path in tiny_cache.iterdir()}
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def test_a_remote_disk_that_is_full_ends_in_one_line(
    tiny_dataset: CocoPanoptic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", full)
    with pytest.raises(InputError, match="cannot write: No space left"):
        run(tiny_dataset, f"memory://{uuid.uuid4().hex}")
