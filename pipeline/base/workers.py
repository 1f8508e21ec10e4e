"""Work shared by several processes: results in order, memory bounded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

import cv2

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import held_back, keep_heap

if TYPE_CHECKING:
    from concurrent.futures import Future
    from multiprocessing.context import BaseContext

T = TypeVar("T")
Result = TypeVar("Result")
WINDOW = 8
"""Tasks a worker that may be waiting, under way or finished but not yet asked for."""


def map_in_order(
    work: Callable[[T], Result], items: Iterable[T], workers: int
) -> Generator[Result]:
    """Yields `work(item)` of each item, in their order, from that many processes; 0 or 1: this one.

    Work and items must pickle. Raises the first error of `work`, and InputError where a process
    died.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    # Imported here: one process does without, 25 ms sooner.
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415
    from concurrent.futures.process import BrokenProcessPool  # noqa: PLC0415

    with ProcessPoolExecutor(workers, _context(), _start_worker) as pool:
        # A bounded window: results of a slow consumer do not pile up, and an error stops soon.
        window: deque[Future[Result]] = deque()
        try:
            for item in items:
                with held_back():  # Ctrl-C is for this process alone
                    window.append(pool.submit(work, item))
                if len(window) > WINDOW * workers:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process died",
                remedy="use fewer workers if memory ran out; a script needs a __main__ guard",
                code="worker-died",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    """Fork where this thread is the only one, else spawn.

    A spawned process imports everything again: 100 images took two processes 0.91 s with spawn and
    0.64 s with fork. But a forked process never sees the locks of other threads released.
    """
    from multiprocessing import get_context  # noqa: PLC0415

    threads = Path("/proc/self/task")  # Linux alone lists them, and forks well
    alone = threads.is_dir() and len(list(threads.iterdir())) == 1
    return get_context("fork" if alone else "spawn")


def _start_worker() -> None:
    Thread(target=_follow, daemon=True).start()
    cv2.setNumThreads(1)
    keep_heap()


def _follow() -> None:
    """Ends a worker with its parent: those of a process that was killed would wait for ever."""
    from multiprocessing import parent_process  # noqa: PLC0415

    if parent := parent_process():
        parent.join()
    os._exit(1)
