"""Pairs of PNGs read and worked on by several processes, in order and with bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.pairs import ImagePair
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.heap import keep_heap
from panoptic_cache.pipeline.png import read_ids

Ids = NDArray[np.int32]
Result = TypeVar("Result")
Work = Callable[[ImagePair, Ids, Ids], Result]
CHUNK = 16  # Images a task: some 100 ms of work, against about 1 ms to send it.
MOST = 32
"""Processes at most, unless told otherwise: reading the JSONs is then most of the work."""
WORTH = 8
"""Images a process, below which another one costs more than it does: some 20 ms."""


def useful_workers(images: int) -> int:
    """How many processes shorten the work on so many images, on this machine."""
    # Those this process may use, where the system tells them from those there are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, MOST, images // WORTH))


def map_pairs(
    pairs: Sequence[ImagePair], work: Work[Result], *, workers: int = 1
) -> Iterator[Result]:
    """Reads both maps of each pair; yields in their order, whatever the number of workers.

    This process is one of the workers: it is at work long before another has started.

    Args:
        pairs: From `read_pairs`.
        work: From a pair, its true and its predicted ids to a result; it must pickle.
        workers: Processes.

    Raises:
        InputError: The first image, in order, with an unreadable PNG or a bad prediction.
    """
    workers = min(workers, len(pairs))
    keep_heap()
    with _one_thread():
        if workers <= 1:
            yield from (_on_images(work, pair) for pair in pairs)
        else:
            # Imported here: it takes as long as several images.
            from panoptic_cache.evaluate.metric.sharing import share  # noqa: PLC0415

            chunks = list(_chunks(pairs, workers))
            yield from share(partial(_on_chunk, work), chunks, workers, start=_start_worker)


def _chunks(pairs: Sequence[ImagePair], workers: int) -> Iterator[Sequence[ImagePair]]:
    """Cuts into tasks, ever smaller towards the end: then nobody waits long for another."""
    start = 0
    while start < len(pairs):
        size = max(1, min(CHUNK, (len(pairs) - start) // (4 * workers)))
        yield pairs[start : start + size]
        start += size


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
    keep_heap()


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
