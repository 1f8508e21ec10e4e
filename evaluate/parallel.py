"""Threads of the decoder: each takes an image, and those without one help others with theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import cv2
import torch

Task = TypeVar("Task")
Result = TypeVar("Result")
First = TypeVar("First")
Second = TypeVar("Second")

THREADS = 8
"""Images that a processor decodes at once, at most: each takes up to 0.45 KB of memory a pixel."""


@dataclass(frozen=True)
class _Threads:
    pool: ThreadPoolExecutor
    count: int


_threads: ContextVar[_Threads | None] = ContextVar("threads", default=None)
"""Those that may help with the image of this one."""


def each_image(work: Callable[[Task], Result], images: Sequence[Task]) -> list[Result]:
    """The results for all images, by as many threads as PyTorch has.

    Meanwhile PyTorch and OpenCV have one each: most operations are on pieces that fit a core's
    cache, too small to be shared.
    """
    with _one_thread_for_libraries() as threads:
        count = min(threads, THREADS)
        if count < 2:
            return [work(image) for image in images]
        with ThreadPoolExecutor(count, "decode") as pool:

            def run(image: Task) -> Result:
                _threads.set(_Threads(pool, count))  # lives no longer than this thread of the pool
                return work(image)

            return list(pool.map(run, images))


@dataclass
class _Calls:
    """Those of `each_image` under way: several threads may make them at once.

    Attributes:
        lock: For the others.
        count: How many.
        before: Threads of PyTorch and of OpenCV before the first of them.
    """

    lock: Lock = field(default_factory=Lock)
    count: int = 0
    before: tuple[int, int] = (1, 1)


_calls = _Calls()


@contextmanager
def _one_thread_for_libraries() -> Iterator[int]:
    """Gives the threads that PyTorch had, and gives them back."""
    with _calls.lock:
        if _calls.count == 0:
            _calls.before = torch.get_num_threads(), cv2.getNumThreads()
        _calls.count += 1
        before = _calls.before
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield before[0]
    finally:
        torch.set_num_threads(before[0])  # each thread has a number of its own
        with _calls.lock:
            _calls.count -= 1
            if _calls.count == 0:
                cv2.setNumThreads(before[1])


def in_parallel(begin: Callable[[], Callable[[Task], None]], parts: Iterable[Task]) -> None:
    """Works on all parts, which must not depend on each other, with whatever threads are idle.

    Args:
        begin: Called once by each thread; what it returns is called with one part after the other.
            Room that it makes stays in the cache of that thread: any that is freed and made again
            may by then be in that of another, which costs a third of the time.
        parts: Of the work.
    """
    todo = list(parts)
    left, threads, inference = iter(todo), _threads.get(), torch.is_inference_mode_enabled()

    def go_on() -> None:
        with torch.inference_mode(inference):  # each thread has a mode of its own
            work = begin()
            for part in left:
                work(part)

    # The other images are before these in the pool's queue: nobody who has one is kept from it.
    asked = min(threads.count, len(todo)) - 1 if threads else 0
    helpers = [threads.pool.submit(go_on) for _ in range(asked)] if threads else []
    try:
        go_on()
    finally:
        came = [helper for helper in helpers if not helper.cancel()]
        wait(came)
    for helper in came:
        helper.result()


def both(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """What two tasks that do not depend on each other result in; an idle thread takes one."""
    results: dict[str, Any] = {}

    def do(task: tuple[str, Callable[[], Any]]) -> None:
        name, run = task
        results[name] = run()

    in_parallel(lambda: do, [("first", first), ("second", second)])
    return results["first"], results["second"]
