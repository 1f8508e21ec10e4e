"""Pairs of PNGs read and worked on by several processes, in order and with bounded memory."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluate.pairs import ImagePair
from pipeline.errors import InputError
from pipeline.ids import read_ids
from pipeline.interrupt import held_back

Ids = NDArray[np.int32]
Result = TypeVar("Result")
Work = Callable[[ImagePair, Ids, Ids], Result]
CHUNK = 16  # Images a task: some 100 ms of work, against about 1 ms to send it.
WINDOW = 8
"""Tasks a worker that may be finished or under way, but are not yet asked for."""


def map_pairs(
    pairs: Sequence[ImagePair], work: Work[Result], *, workers: int = 1
) -> Iterator[Result]:
    """Reads both maps of each pair; yields in their order, whatever the number of workers.

    This process is one of the workers: it is at work long before another has started.

    Args:
        pairs: From `read_pairs`.
        work: From a pair, its true and its predicted ids to a result; it must pickle.
        workers: Processes; those beside this one are started by spawn.

    Raises:
        InputError: The first image, in order, with an unreadable PNG or a bad prediction.
    """
    chunk = max(1, min(CHUNK, -(-len(pairs) // max(1, workers))))
    chunks = [pairs[start : start + chunk] for start in range(0, len(pairs), chunk)]
    workers = min(workers, len(chunks))
    _keep_heap()
    with _one_thread():
        if workers <= 1:
            yield from (_on_images(work, pair) for pair in pairs)
        else:
            yield from _shared(chunks, work, workers)


def _shared(
    chunks: Sequence[Sequence[ImagePair]], work: Work[Result], workers: int
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers - 1, context, _start_worker) as pool:
        # A bounded window: results of a slow consumer do not pile up, an error stops soon.
        window: deque[Future[list[Result]]] = deque()
        try:
            for task in chunks:
                if len(window) > WINDOW * workers:
                    yield from window.popleft().result()
                if sum(not future.done() for future in window) < 2 * (workers - 1):
                    with held_back():  # Ctrl-C is for this process alone
                        window.append(pool.submit(_on_chunk, work, task))
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


def _finished(work: Work[Result], pairs: Sequence[ImagePair]) -> Future[list[Result]]:
    """Works here; an error waits for its turn, as that of another process does."""
    future: Future[list[Result]] = Future()
    try:
        future.set_result(_on_chunk(work, pairs))
    except InputError as error:
        future.set_exception(error)
    return future


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps OpenCV to this thread: to hand work out costs more than what there is to do."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _start_worker() -> None:
    cv2.setNumThreads(1)
    _keep_heap()


def _keep_heap() -> None:
    """Makes glibc reuse picture-sized blocks, which cuts an image from 7.5 to 5 ms.

    It maps every block above a threshold anew, page fault by page fault, and raises the threshold
    to the largest block ever freed (mallopt(3), M_MMAP_THRESHOLD; 32 MiB at most). An untouched
    block of that size costs nothing; with another allocator nothing happens.
    """
    np.empty(31 << 20, np.uint8)


def _on_chunk(work: Work[Result], pairs: Sequence[ImagePair]) -> list[Result]:
    return [_on_images(work, pair) for pair in pairs]


def _on_images(work: Work[Result], pair: ImagePair) -> Result:
    try:
        gt_ids, pred_ids = read_ids(pair.gt_png), read_ids(pair.pred_png)
    except InputError as error:
        raise InputError(
            error.what,
            where=f"image {pair.image_id}: {error.where}",
            remedy=error.remedy or "write or fetch the file again",
            code=error.code,
        ) from None
    return work(pair, gt_ids, pred_ids)
