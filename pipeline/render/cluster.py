"""Jobs on a running Dask scheduler: a bounded number at a time, one clear line for a failure."""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from asyncio import CancelledError
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from distributed import Client, Future, KilledWorker, as_completed
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.render.plan import ShardPlan
from panoptic_cache.pipeline.render.processes import raise_died

T = TypeVar("T")

CONNECT_SECONDS, WORKER_SECONDS = 10, 120
"""How long to wait for the scheduler, and for its first worker."""
POLL_SECONDS, LOOK_SECONDS, DESERTED_SECONDS = 0.02, 2, 10
"""How often to look for finished shards and for workers, and how long none may be there."""

log = logging.getLogger(__name__)

# All loggers to which Dask gives a level of their own, and the two that it uses.
_DASK_LOGGERS = ("distributed", "distributed.client", "distributed.gc", "tornado", "asyncio")


def run_on(
    scheduler: str, work: Callable[..., T], shards: Sequence[ShardPlan], *arguments: Any
) -> Generator[T]:
    """Calls `work(shard, *arguments)` for every shard on a scheduler, in any order.

    `work` is at module level, as it is pickled by name; `arguments` are the same for every job, and
    small. InputError where a job raised one or killed its worker repeatedly, or the scheduler went
    away.
    """
    with _quiet(), connect(scheduler) as client:
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
            name = names.pop(future.key)
            result = _result(future, name, scheduler)
            future.release()
            submit()
            yield result


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
def connect(scheduler: str) -> Iterator[Client]:
    """A client of a scheduler; InputError where none answers, or it has no workers."""
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Dask scheduler answers: {error}",
            where=scheduler,
            remedy="start dask scheduler, or use --workers",
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError:
            raise InputError(
                "the Dask scheduler has no workers", where=scheduler, remedy="start dask worker"
            ) from None
        yield client


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Dask's messages about lost workers and closed connections.

    Its own switch reaches only its own handlers, not those that a program has set up.
    """
    loggers = [logging.getLogger(name) for name in _DASK_LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _result(future: Future, name: str, scheduler: str) -> Any:
    try:
        return future.result()
    except (KilledWorker, MemoryError):
        raise_died(name)
    except ImportError as error:
        raise InputError(
            f"the workers lack a package: {error}",
            where=scheduler,
            remedy="install the same version of this program for them",
            code="worker-differs",
        ) from None
    except (FutureCancelledError, CancelledError, CommClosedError):
        raise InputError(
            "the Dask scheduler went away",
            where=scheduler,
            remedy="run the same command to go on",
            code="scheduler-lost",
        ) from None
    except OSError as error:
        raise InputError(str(error), where=f"shard {name}", code="worker-failed") from None
