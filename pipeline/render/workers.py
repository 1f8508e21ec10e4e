"""Jobs in other processes, by Dask: our own, joined by pipes without a port, or a scheduler's."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
import uuid
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, resource_tracker
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from dask.callbacks import Callback
from dask.multiprocessing import get

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import end_with_parent, held_back
from panoptic_cache.pipeline.render.plan import ShardPlan

if TYPE_CHECKING:
    from distributed import Client, Future, as_completed

T = TypeVar("T")

START_SECONDS = 120
"""How long the first process may take to start."""
DEATHS = 4
"""Jobs that have ended so many processes are at fault themselves; a Dask cluster counts so, too."""
CONNECT_SECONDS, WORKER_SECONDS = 10, 120
"""How long to wait for the scheduler, and for its first worker."""
POLL_SECONDS, LOOK_SECONDS, DESERTED_SECONDS = 0.02, 2, 10
"""How often to look for finished shards and for workers, and how long none may be there."""

log = logging.getLogger(__name__)

# All loggers to which Dask gives a level of their own, and the two that it uses.
_DASK_LOGGERS = ("distributed", "distributed.client", "distributed.gc", "tornado", "asyncio")


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
            except (BrokenProcessPool, MemoryError) as error:
                deaths += 1
                if deaths == DEATHS or isinstance(error, MemoryError):
                    _raise_died(" or ".join(sorted(running)))
            except InputError as error:
                raise getattr(error, "exception", error) from None  # Dask wraps it
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}:
                    raise
                _raise_not_started(error)  # the second one


class _Pool(ProcessPoolExecutor):
    """Processes that no signal from the terminal reaches, without a standard error."""

    def submit(self, *arguments: Any, **named: Any) -> Any:
        with held_back():  # it may start a process: what goes wrong in that, the driver says
            before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, 2)
                return super().submit(*arguments, **named)
            finally:
                os.dup2(before, 2)
                os.close(before)
                os.close(nowhere)


@contextmanager
def _pool(size: int) -> Iterator[_Pool]:
    """Processes, the first of which runs; all are ended at once at the end."""
    others = {*active_children()}
    pool: _Pool | None = None
    try:
        try:
            # Otherwise the first process to be spawned starts it, and so lets signals through.
            resource_tracker.ensure_running()
            pool = _Pool(size, get_context("spawn"), end_with_parent)
            pool.submit(os.getpid).result(START_SECONDS)
        except (OSError, BrokenProcessPool, TimeoutError) as error:
            _raise_not_started(error)
        yield pool
    finally:
        for process in {*active_children()} - others:
            process.kill()  # the next run renders what was under way
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _raise_not_started(error: Exception) -> NoReturn:
    what = getattr(error, "strerror", "") or str(error) or f"not after {START_SECONDS} s"
    remedy = "lift the limits on memory, processes and open files, or use --workers 0"
    raise InputError(f"no worker process can start: {what}", "", remedy, "worker-start") from None


def _raise_died(name: str) -> NoReturn:
    what = f"its worker died {DEATHS} times, most likely out of memory"
    remedy = "go on with fewer --workers, or in another folder with --samples-per-shard 64"
    raise InputError(what, f"shard {name}", remedy, "worker-killed")


def run_on(
    scheduler: str,
    work: Callable[..., T],
    shards: Sequence[ShardPlan],
    *arguments: Any,
    note: Callable[[T], object],
) -> None:
    """Calls `note(work(shard, *arguments))` for every shard on a scheduler, in any order.

    `work` is at module level, as it is pickled by name; `arguments` are the same for every job, and
    small. InputError where a job raised one or killed its worker repeatedly, or the scheduler went
    away.
    """
    from distributed import as_completed  # noqa: PLC0415 - our own processes do without

    with _quiet(), _connected(scheduler) as client:
        # New names for each run: a scheduler remembers the failed jobs of the last one.
        run = uuid.uuid4().hex[:8]
        waiting = iter(shards)
        names: dict[str, str] = {}
        futures = as_completed()

        def submit() -> None:
            # One job a thread. More would wait on the workers, take memory, and share the
            # blame when a worker dies, to save milliseconds in a job of seconds. The
            # threads are counted again each time, because workers come and go.
            free = max(1, _threads(client) or 0) - len(names)
            for shard in itertools.islice(waiting, max(0, free)):
                key = f"{shard.name}-{run}"
                names[key] = shard.name
                futures.add(client.submit(work, shard, *arguments, key=key, pure=False))

        submit()
        for future in _completed(futures, client):
            result = _result(future, names.pop(future.key), scheduler)
            future.release()
            submit()
            note(result)


def _completed(futures: as_completed, client: Client) -> Iterator[Future]:
    """The futures as they finish; logs a line while no worker is left to run them."""
    looked = seen = time.monotonic()
    told = False
    while not futures.is_empty():
        if futures.has_ready():
            yield next(futures)
            continue
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - looked < LOOK_SECONDS:
            continue
        looked = now
        if _threads(client) != 0:
            seen, told = now, False
        elif now - seen > DESERTED_SECONDS and not told:
            log.warning("all Dask workers are gone: waiting for new ones (start dask worker)")
            told = True


def _threads(client: Client) -> int | None:
    """Threads of all workers; None if the scheduler is gone, which its futures will report."""
    try:
        return sum(client.nthreads().values()) if client.status == "running" else None
    except (OSError, TimeoutError):
        return None


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    """A client of a scheduler; InputError where none answers, or it has no workers."""
    from distributed import Client  # noqa: PLC0415

    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"no Dask scheduler answers: {error}"
        raise InputError(what, scheduler, "start dask scheduler, or use --workers") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError:
            what = "the Dask scheduler has no workers"
            raise InputError(what, scheduler, "start dask worker") from None
        yield client


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Dask's messages about lost workers and closed connections.

    Its own switch reaches only its own handlers, not those that a program has set up.
    """
    before = {name: logging.getLogger(name).level for name in _DASK_LOGGERS}
    for name in before:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _result(future: Future, name: str, scheduler: str) -> Any:
    from distributed import KilledWorker  # noqa: PLC0415
    from distributed.client import FutureCancelledError  # noqa: PLC0415
    from distributed.comm import CommClosedError  # noqa: PLC0415

    try:
        return future.result()
    except (KilledWorker, MemoryError):
        _raise_died(name)
    except ImportError as error:
        what, code = f"the workers lack a package: {error}", "worker-differs"
        remedy = "install the same version of this program for them"
        raise InputError(what, scheduler, remedy, code) from None
    except (FutureCancelledError, CancelledError, CommClosedError):
        what, remedy = "the Dask scheduler went away", "run the same command to go on"
        raise InputError(what, scheduler, remedy, "scheduler-lost") from None
    except OSError as error:
        raise InputError(str(error), f"shard {name}", code="worker-failed") from None
