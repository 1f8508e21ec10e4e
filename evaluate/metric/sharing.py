"""Tasks shared by several processes, this one among them; results in order, memory bounded."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Thread
from typing import TypeVar

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.stopping import held_back

Task = TypeVar("Task")
Result = TypeVar("Result")
WINDOW = 8
"""Tasks a worker that may be finished or under way, but are not yet asked for."""


def share(
    work: Callable[[Task], Sequence[Result]],
    tasks: Sequence[Task],
    workers: int,
    *,
    start: Callable[[], None],
) -> Iterator[Result]:
    """Yields what the tasks result in, one after the other, in their order.

    This process is one of the workers: it is at work long before another has started.

    Args:
        work: From a task to its results; it must pickle, and so must both.
        tasks: In order.
        workers: Processes, 2 or more.
        start: Called first in every other process.

    Raises:
        InputError: The first, in order, that a task raised; or a process died.
    """
    with ProcessPoolExecutor(workers - 1, _context(), _start, (start,)) as pool:
        # A bounded window: results of a slow consumer do not pile up, an error stops soon.
        window: deque[Future[Sequence[Result]]] = deque()
        try:
            for task in tasks:
                if len(window) > WINDOW * workers:
                    yield from window.popleft().result()
                if sum(not future.done() for future in window) < 2 * (workers - 1):
                    with held_back():  # Ctrl-C is for this process alone
                        window.append(pool.submit(work, task))
                else:
                    window.append(_finished(work, task))
                while window and window[0].done():
                    yield from window.popleft().result()
            while window:
                yield from window.popleft().result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process died",
                remedy="use fewer workers if memory ran out; a script needs a __main__ guard",
                code="worker-died",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    """How processes start: by fork where that is safe, as a spawned one imports all anew.

    A forked process inherits locks as they are, and no thread that would release them. So it is
    safe where this thread is the only one, those of libraries included.
    """
    threads = Path("/proc/self/task")  # Linux alone tells, and forks well
    alone = threads.is_dir() and len(list(threads.iterdir())) == 1
    return multiprocessing.get_context("fork" if alone else "spawn")


def _finished(work: Callable[[Task], Result], task: Task) -> Future[Result]:
    """Works here; an error waits for its turn, as that of another process does."""
    future: Future[Result] = Future()
    try:
        future.set_result(work(task))
    except InputError as error:
        future.set_exception(error)
    return future


def _start(start: Callable[[], None]) -> None:
    Thread(target=_follow, daemon=True).start()
    start()


def _follow() -> None:
    """Ends this process with the one that started it: killed, that one cannot say so itself."""
    if parent := multiprocessing.parent_process():
        connection.wait([parent.sentinel])
    os._exit(1)
