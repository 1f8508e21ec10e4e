"""Processes: ended by Ctrl-C or `kill` in one line, quick with large blocks of memory, shared work.

What only some commands need is imported where it is used: they start sooner by it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from panoptic_cache.pipeline.base.errors import InputError

if TYPE_CHECKING:
    from concurrent.futures import Future
    from multiprocessing.context import BaseContext

T = TypeVar("T")
Result = TypeVar("Result")

WINDOW = 8
"""Tasks a worker that may be waiting, under way or finished but not yet asked for."""
ARENA_MAX, MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -4, -3, -1
"""Of mallopt(3)."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Somebody asked the program to stop.

    No subclass of KeyboardInterrupt, which libraries catch and report in their own ways.

    Attributes:
        signal: Which signal.
        advice: What the user may want to know, added on the way up.
    """

    def __init__(self, number: int, advice: str = "") -> None:
        self.signal = signal.Signals(number)
        self.advice = advice
        super().__init__(number, advice)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}{self.advice and ': '}{self.advice}"

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM: what a shell reports of a process that they end."""
        return 128 + self.signal.value


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Calls a handler at each of `SIGNALS`; for the main thread."""
    before = {each: signal.signal(each, handler) for each in SIGNALS}
    try:
        yield
    finally:
        for each, one in before.items():
            signal.signal(each, one)


def leave(number: int, _: FrameType | None) -> None:
    """Ends the process at once: a handler for the time before there is something to close."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # it may be closed
            os.write(2, f"{Interrupted(number)}\n".encode())
    os._exit(Interrupted(number).exit_code)


@contextmanager
def started() -> Iterator[None]:
    """What a program begins with, before it imports anything that takes long."""
    # Threads of torch that wait for each other let others compute meanwhile. 24 steps of the demo
    # with two threads on two cores beside eight busy processes: 29 s, not 200; alone 7 % slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with handled(leave):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises `Interrupted` in the main thread at the first signal, and ignores further ones.

    What follows the first is only the closing of files and workers; impatience would spoil it.
    """
    with handled(_stop):
        yield


def _stop(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # A module that is being imported may catch whatever is raised in it, and be left half
            # made: the signal comes again later.
            later = threading.Timer(0.1, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        frame = frame.f_back
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


@contextmanager
def held_back() -> Iterator[None]:
    """Holds the signals back; threads and processes that start meanwhile never get them.

    Ctrl-C on a terminal goes to every process in the foreground. Workers leave it to the driver.
    Windows cannot hold signals back.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def keep_heap(*, large: bool = False) -> None:
    """Makes glibc keep the memory of images that were freed, instead of returning it to the kernel.

    Otherwise each large block is mapped anew, page fault by page fault. CPU time per image, on 50
    photos of COCO val2017: scoring 5.6 -> 3.7 ms (1,350 page faults less); rendering in a Dask
    worker, which starts with MALLOC_TRIM_THRESHOLD_=65536, 13.6 -> 8.3 ms. Blocks up to 32 MiB
    come from one heap, which keeps up to 256 MiB; `large` ones too, up to 1 GiB: seven steps of
    training a small encoder on 16 tiles of 96 px take 3.9 instead of 5.6 s of CPU time. Does
    nothing where there is no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(ARENA_MAX, 1)
    mallopt(MMAP_THRESHOLD, 32 << 20)
    mallopt(TRIM_THRESHOLD, 256 << 20)
    if large:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, 1 << 30)


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
            remedy = "use fewer workers if memory ran out; a script needs a __main__ guard"
            raise InputError("a worker process died", "", remedy, "worker-died") from error
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
    import cv2  # noqa: PLC0415

    end_with_parent()
    cv2.setNumThreads(1)
    keep_heap()


def end_with_parent() -> None:
    """Ends this process when its parent is gone: workers of one that was killed would wait on."""
    from multiprocessing import parent_process  # noqa: PLC0415

    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
