"""Jobs in processes of our own, each joined to this one by a pipe: no port, which others reach."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, TypeVar

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import held_back
from panoptic_cache.pipeline.render.plan import ShardPlan

T = TypeVar("T")

START_SECONDS = 120
"""How long a process may take to start."""
DEATHS = 4
"""A job that has ended so many processes is at fault itself; Dask counts so, too."""


def run_here(
    work: Callable[..., T], shards: Sequence[ShardPlan], *arguments: Any, workers: int
) -> Generator[T]:
    """Calls `work(shard, *arguments)` for every shard, in any order; see `run_on`.

    A process that dies is replaced, and its job is done again. InputError where a job raised one
    or ended `DEATHS` processes, or none can start.
    """
    # Otherwise the first process to be spawned starts it, and in doing so lets signals through.
    resource_tracker.ensure_running()
    waiting = deque(shards)
    processes: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, ShardPlan] = {}
    deaths: Counter[str] = Counter()  # by name of the shard, or "" before there was one
    try:
        for _ in range(min(workers, len(shards))):
            _start(work, processes)
        while waiting or busy:
            ready = wait(list(processes), None if busy else START_SECONDS)
            if not ready:
                _cannot_start(f"not ready after {START_SECONDS} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                shard = busy.pop(pipe, None)
                name = shard.name if shard else ""
                try:
                    result = pipe.recv()
                    deaths[""] = 0
                    if waiting and not isinstance(result, Exception):
                        pipe.send((waiting[0], *arguments))
                        busy[pipe] = waiting.popleft()
                except (EOFError, OSError):
                    process = processes.pop(pipe)
                    process.join()
                    deaths[name] += 1
                    if deaths[name] == DEATHS:
                        raise_died(name) if name else _cannot_start(f"exit code {process.exitcode}")
                    waiting.extendleft([shard] if shard else [])
                    _start(work, processes)
                    continue
                if isinstance(result, MemoryError):
                    raise_died(name)
                if isinstance(result, Exception):
                    raise result
                if shard is not None:
                    yield result
    finally:
        for process in processes.values():
            process.kill()  # at once: the next run renders what was under way
            process.join()


def _start(work: Callable[..., object], processes: dict[Connection, BaseProcess]) -> None:
    try:
        ours, theirs = Pipe()
        with held_back(), _no_errors(), theirs:
            process = get_context("spawn").Process(target=_serve, args=(work, theirs), daemon=True)
            process.start()
    except OSError as error:
        _cannot_start(error.strerror or str(error))
    processes[ours] = process


def _serve(work: Callable[..., object], pipe: Connection) -> None:
    """Says that it is there, then does jobs until its driver is gone."""
    result: object = None
    while True:
        try:
            pipe.send(result)
            arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = work(*arguments)
        except Exception as error:  # noqa: BLE001 (the driver raises it)
            result = error


@contextmanager
def _no_errors() -> Iterator[None]:
    """Processes started meanwhile have no standard error: what goes wrong, the driver says."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def raise_died(name: str) -> NoReturn:
    """Raises the InputError of a shard whose worker died `DEATHS` times."""
    raise InputError(
        f"its worker died {DEATHS} times, most likely out of memory",
        where=f"shard {name}",
        remedy="go on with fewer --workers, or in another folder with --samples-per-shard 64",
        code="worker-killed",
    )


def _cannot_start(what: str) -> NoReturn:
    raise InputError(
        f"no worker process can start: {what}",
        remedy="lift the limits on memory, processes and open files, or use --workers 0",
        code="worker-start",
    )
