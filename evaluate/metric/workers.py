"""Pairs of PNGs, read and scored by several processes: results in order, memory bounded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.pairs import ImagePair
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import keep_heap, map_in_order
from panoptic_cache.pipeline.png import read_ids

Ids = NDArray[np.int32]
Result = TypeVar("Result")
Work = Callable[[ImagePair, Ids, Ids], Result]
CHUNK = 16
"""Images a task at most: about 100 ms of work, and 1 ms to send it."""
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
    size = max(1, min(CHUNK, len(pairs) // (4 * workers)))
    chunks = (pairs[start : start + size] for start in range(0, len(pairs), size))
    with closing(map_in_order(partial(_work_on, work), chunks, workers)) as results:
        for some in results:
            yield from some


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
