"""Pairs of PNGs, read and scored by several processes: results in order, memory bounded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.pairs import ImagePair
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import held_back, keep_heap
from panoptic_cache.pipeline.png import read_ids

if TYPE_CHECKING:
    from concurrent.futures import Future
    from multiprocessing.context import BaseContext

Ids = NDArray[np.int32]
Result = TypeVar("Result")
Work = Callable[[ImagePair, Ids, Ids], Result]
CHUNK = 16
"""Images a task at most: about 100 ms of work, and 1 ms to send it."""
WINDOW = 8
"""Tasks a worker that may be waiting, under way or finished but not yet asked for."""
MOST = 32
"""Processes at most, unless told otherwise: with more, reading the JSONs is most of the work."""
WORTH = 8
"""Images a process, below which another process costs more time than it saves."""


def useful_workers(images: int) -> int:
    """How many processes shorten the work on so many images, on this machine."""
    # The processors that this process may use, where the system says so.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, MOST, images // WORTH))


def map_pairs(
    pairs: Sequence[ImagePair], work: Work[Result], *, workers: int = 1
) -> Iterator[Result]:
    """Reads both maps of each pair and works on them; yields in the order of the pairs.

    `work` makes a result of a pair, its true and its predicted ids; it must pickle. Raises the
    InputError of the first image, in order, with an unreadable PNG or a bad prediction.
    """
    if workers > 1 and len(pairs) > 1:
        yield from _share(work, pairs, min(workers, len(pairs)))
        return
    keep_heap()  # 5.5 instead of 7.5 ms an image, at 640 x 480
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the images are too small to share
    try:
        yield from (_read_and(work, pair) for pair in pairs)
    finally:
        cv2.setNumThreads(before)


def _share(work: Work[Result], pairs: Sequence[ImagePair], workers: int) -> Iterator[Result]:
    # Imported here: one process, which is enough for a few images, does without, 25 ms sooner.
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415
    from concurrent.futures.process import BrokenProcessPool  # noqa: PLC0415

    size = max(1, min(CHUNK, len(pairs) // (4 * workers)))
    with ProcessPoolExecutor(workers, _context(), _start_worker) as pool:
        # A bounded window: results of a slow consumer do not pile up, and an error stops soon.
        window: deque[Future[list[Result]]] = deque()
        try:
            for start in range(0, len(pairs), size):
                with held_back():  # Ctrl-C is for this process alone
                    window.append(pool.submit(_work_on, work, pairs[start : start + size]))
                if len(window) > WINDOW * workers:
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


def _work_on(work: Work[Result], pairs: Sequence[ImagePair]) -> list[Result]:
    return [_read_and(work, pair) for pair in pairs]


def _read_and(work: Work[Result], pair: ImagePair) -> Result:
    try:
        try:
            gt_ids = read_ids(pair.gt_png, bgr=pair.gt_bgr)
            pred_ids = read_ids(pair.pred_png, bgr=pair.pred_bgr)
        except InputError as error:
            error.where = f"image {pair.image_id}: {error.where}"
            error.remedy = error.remedy or "write or fetch the file again"
            raise
        return work(pair, gt_ids, pred_ids)
    except (MemoryError, cv2.error) as error:
        if isinstance(error, cv2.error) and error.code != cv2.Error.StsNoMem:
            raise
        raise InputError(
            "out of memory",
            where=f"image {pair.image_id}",
            remedy="use fewer --workers, or a machine with more memory",
            code="out-of-memory",
        ) from None
