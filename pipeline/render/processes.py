"""Jobs in processes of our own, by Dask's scheduler for one machine: joined by pipes, no port."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process, resource_tracker
from multiprocessing.connection import wait
from typing import Any, NoReturn, TypeVar

from dask.callbacks import Callback
from dask.multiprocessing import get

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import held_back
from panoptic_cache.pipeline.render.plan import ShardPlan

T = TypeVar("T")

START_SECONDS = 120
"""How long the first process may take to start."""
DEATHS = 4
"""Jobs that have ended so many processes are at fault themselves; a Dask cluster counts so, too."""


def run_here(
    work: Callable[..., T],
    shards: Sequence[ShardPlan],
    *arguments: Any,
    workers: int,
    note: Callable[[T], object],
) -> None:
    """Calls `note(work(shard, *arguments))` for every shard, in any order.

    Where a process dies, what is left goes to new ones. InputError where a job raised one, where
    `DEATHS` times in a row no shard was finished before a process died, or where none can start.
    """
    waiting = {shard.name: partial(work, shard, *arguments) for shard in shards}
    running: set[str] = set()
    deaths = 0

    def start(name: str, *_: object) -> None:
        running.add(name)

    def finish(name: str, result: T, *_: object) -> None:
        nonlocal deaths
        deaths = 0
        del waiting[name]
        running.discard(name)
        note(result)

    while waiting:
        jobs = {name: (job,) for name, job in waiting.items()}
        running.clear()
        with _pool(min(workers, len(jobs))) as pool, Callback(pretask=start, posttask=finish):
            try:
                get(jobs, [*jobs], pool=pool, chunksize=1, optimize_graph=False)
            except BrokenProcessPool:
                deaths += 1
                if deaths == DEATHS:
                    raise_died(" or ".join(sorted(running)))
            except MemoryError:
                raise_died(" or ".join(sorted(running)))
            except InputError as error:
                raise getattr(error, "exception", error) from None  # Dask wraps it
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}:
                    raise
                _raise_not_started(error)  # the second one


class _Pool(ProcessPoolExecutor):
    """Processes that no signal from the terminal reaches, without a standard error."""

    def __init__(self, size: int) -> None:
        super().__init__(size, mp_context=get_context("spawn"), initializer=_end_with_parent)

    def submit(self, *arguments: Any, **named: Any) -> Any:
        with held_back(), _no_errors():  # it may start a process
            return super().submit(*arguments, **named)


@contextmanager
def _pool(size: int) -> Iterator[_Pool]:
    """Processes, the first of which runs; all are ended at once at the end."""
    others = {*active_children()}
    pool: _Pool | None = None
    try:
        try:
            # Otherwise the first process to be spawned starts it, and so lets signals through.
            resource_tracker.ensure_running()
            pool = _Pool(size)
            pool.submit(os.getpid).result(START_SECONDS)
        except (OSError, BrokenProcessPool, TimeoutError) as error:
            _raise_not_started(error)
        yield pool
    finally:
        for process in {*active_children()} - others:
            process.kill()  # the next run renders what was under way
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: a pool's processes would wait for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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


def _raise_not_started(error: Exception) -> NoReturn:
    what = getattr(error, "strerror", "") or str(error) or f"not after {START_SECONDS} s"
    raise InputError(
        f"no worker process can start: {what}",
        remedy="lift the limits on memory, processes and open files, or use --workers 0",
        code="worker-start",
    ) from None


def raise_died(name: str) -> NoReturn:
    """Raises the InputError of shards whose worker died `DEATHS` times."""
    raise InputError(
        f"its worker died {DEATHS} times, most likely out of memory",
        where=f"shard {name}",
        remedy="go on with fewer --workers, or in another folder with --samples-per-shard 64",
        code="worker-killed",
    )
