"""Loader processes that die, stop, or have no room: one line, and nothing waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import Interrupted
from panoptic_cache.train import loader as loaders
from panoptic_cache.train.caches import open_caches
from panoptic_cache.train.config import DataConfig
from panoptic_cache.train.data import Batch, Share
from panoptic_cache.train.loader import iterate, make_loader, prefetch
from panoptic_cache.train.stopping import StopRequest

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "GRACE", 0.2)
    monkeypatch.setattr(loaders, "PATIENCE", 0.5)


@pytest.fixture
def batches(tiny_cache: Path) -> Iterator[Iterator[Batch]]:
    """Of one loader process, which nothing is asked of yet."""
    config = DataConfig(cache=str(tiny_cache), size=28, batch=2, micro_batch=2, workers=1)
    loader = make_loader(config, open_caches(config), Share(seed=0, steps=range(1000)))
    batches = iterate(loader)
    yield batches
    batches.close()


def worker() -> int:
    (child,) = multiprocessing.active_children()
    return child.pid or 0


def test_a_killed_one_is_noticed_at_the_next_batch_and_never_in_a_step(
    batches: Iterator[Batch],
) -> None:
    next(batches)
    os.kill(worker(), signal.SIGKILL)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # a step
        pass
    with pytest.raises(InputError, match=r"a loader process failed: .* lower data\.workers"):
        for _ in batches:
            pass


@pytest.mark.usefixtures("quick")
def test_a_stopped_one_is_not_waited_for(batches: Iterator[Batch]) -> None:
    next(batches)
    os.kill(worker(), signal.SIGSTOP)
    with pytest.raises(InputError, match=r"no batch for 0 seconds"):
        for _ in batches:
            pass
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("quick")
def test_asked_to_stop_a_run_does_not_wait_for_a_batch(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "PATIENCE", 60.0)
    config = DataConfig(cache=str(tiny_cache), size=28, batch=2, micro_batch=2, workers=1)
    loader = make_loader(config, open_caches(config), Share(seed=0, steps=range(1000)))
    request = StopRequest()
    batches = iterate(loader, request)
    next(batches)
    os.kill(worker(), signal.SIGSTOP)
    request(signal.SIGTERM, None)
    start = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        for _ in batches:
            pass
    assert caught.value.signal == signal.SIGTERM
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "said",
    [
        "unable to write to file </torch_1_2>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)",
    ],
)
def test_a_batch_that_finds_no_room_is_not_lost(
    batches: Iterator[Batch], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def full(_: Batch) -> Batch:
        raise RuntimeError(said)

    monkeypatch.setattr(Batch, "share_memory", full)  # before the process is forked
    with pytest.raises(InputError, match=r"No space left on device.* lower data\.workers"):
        next(batches)


@pytest.mark.parametrize(
    ("room", "workers", "wanted"), [(1000, 4, 4), (64, 1, 4), (64, 4, 3), (64, 8, 1)]
)
def test_as_much_is_made_ahead_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, room: int, workers: int, wanted: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, room << 20))
    config = DataConfig(size=420, micro_batch=4, workers=workers)  # 4 MB a batch
    assert prefetch(config) == wanted


def test_too_little_shared_memory_is_one_line_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 64 << 20))
    with pytest.raises(InputError, match="room for 64 MB, a batch takes 16 MB") as caught:
        prefetch(DataConfig(size=420, micro_batch=16, workers=4))
    fewer = int(caught.value.remedy.rsplit("=", 1)[1])
    assert prefetch(DataConfig(size=420, micro_batch=16, workers=fewer)) >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"room for 16 MB.*data\.workers=0"):
        prefetch(DataConfig(size=420, micro_batch=16, workers=1))


def test_too_few_descriptors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(24, 24)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    with pytest.raises(InputError, match=r"at most 24 files may be open.*data\.workers=0"):
        prefetch(DataConfig(workers=1))
    limits[:] = [(256, 4096)]  # macOS
    assert prefetch(replace(DataConfig(), size=28, workers=8)) == 4
    assert 400 < limits[-1][0] < 4096


def test_processes_are_forked_whatever_the_default_is(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork server, Python 3.14's default, dies of the signals that go to a whole job."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "forkserver")
    config = DataConfig(cache=str(tiny_cache), size=28, batch=2, micro_batch=2, workers=1)
    for reader in ("indexed", "stream"):
        chosen = replace(config, reader=reader)
        loader = make_loader(chosen, open_caches(chosen), Share(seed=0, steps=range(1)))
        assert loader.multiprocessing_context.get_start_method() == "fork"


def test_after_a_stop_no_cause_is_guessed(tiny_cache: Path) -> None:
    config = DataConfig(cache=str(tiny_cache), size=28, batch=2, micro_batch=2, workers=1)
    loader = make_loader(config, open_caches(config), Share(seed=0, steps=range(1000)))
    request = StopRequest()
    batches = iterate(loader, request)
    next(batches)
    request(signal.SIGTERM, None)
    os.kill(worker(), signal.SIGKILL)  # as a scheduler does with the whole job
    with pytest.raises(Interrupted):
        for _ in batches:
            pass
