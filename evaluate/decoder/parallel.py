"""Threads of the decoder: each takes an image, and those without one help others with theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")
First = TypeVar("First")
Second = TypeVar("Second")

THREADS = 8
"""Images that a processor decodes at once, at most: each takes up to 0.8 KB of memory a pixel."""


@dataclass(frozen=True)
class _Threads:
    pool: ThreadPoolExecutor
    count: int

    def ask(self, help_out: Callable[[], None], helpers: int) -> list[Future[None]]:
        """Asks idle threads; none come once the interpreter is about to end."""
        asked: list[Future[None]] = []
        with suppress(RuntimeError):
            while len(asked) < helpers:
                asked.append(self.pool.submit(help_out))
        return asked


_threads: ContextVar[_Threads | None] = ContextVar("threads", default=None)
"""Those that may help with the image of this one."""


def each_image(work: Callable[[Task], Result], images: Sequence[Task]) -> list[Result]:
    """The results for all images, by as many threads as PyTorch has, but not more than `THREADS`.

    Each of them has PyTorch's operations for itself: most are on pieces that fit a core's cache,
    too small to be shared.
    """
    threads = torch.get_num_threads()
    count = min(threads, THREADS)
    if count < 2:
        return [work(image) for image in images]
    pool = ThreadPoolExecutor(count, "decode", torch.set_num_threads, (1,))

    def run(image: Task) -> Result:
        _threads.set(_Threads(pool, count))  # lives no longer than this thread of the pool
        return work(image)

    try:
        with pool:
            try:
                results = pool.map(run, images)
            except RuntimeError:  # the interpreter is about to end, and starts no thread
                results = map(work, images)
            return list(results)
    finally:
        torch.set_num_threads(threads)  # what threads to come start with


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
    helpers = threads.ask(go_on, min(threads.count, len(todo)) - 1) if threads else []
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
