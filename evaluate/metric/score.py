"""All metrics of predictions in one pass: PQ, its breakdown and mask AP; of files, of a split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.matching import checked_overlap
from panoptic_cache.evaluate.metric.measures import (
    Breakdown,
    ImageInstances,
    break_down,
    mask_ap,
    match_instances,
)
from panoptic_cache.evaluate.metric.pairs import ImagePair
from panoptic_cache.evaluate.metric.pq import PQResult, PQStat, count_segments, summarize
from panoptic_cache.pipeline.annotations import ImageId, SegmentInfo, is_area
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import keep_heap, map_in_order
from panoptic_cache.pipeline.coco import Category, CocoPanoptic
from panoptic_cache.pipeline.png import check_known, read_ids

WORST = 20
"""Images that the list of the worst names."""
CHUNK = 16
"""Images a task at most: about 100 ms of work, and 1 ms to send it."""
MOST = 32
"""Processes at most, unless told otherwise: with more, reading the JSONs is most of the work."""
WORTH = 8
"""Images a process, below which another process costs more time than it saves."""


@dataclass(frozen=True, slots=True)
class ImageScore:
    """What one image adds."""

    image_id: ImageId  # As annotated
    stat: PQStat  # Its counts; `mean_pq` is the PQ of the image
    breakdown: Breakdown  # Its other sums
    instances: ImageInstances  # Its instances, for AP


@dataclass(frozen=True, slots=True)
class Scores:
    """The metrics of a split."""

    pq: PQResult  # Panoptic quality
    breakdown: Breakdown  # The other sums
    mask_ap: dict[str, float | None] | None  # See `measures.mask_ap`
    worst: list[dict[str, Any]]  # See `worst_images`
    images: int  # How many were scored
    # Mean wall time of a process for an image, by step; where that was measured.
    seconds_per_image: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `panoptic score --json` prints.

        The keys of `PQResult.to_json` and of `Breakdown.to_json`, `mask_ap` (`ap`, `ap50`, `ap75`,
        `ap_small`, `ap_medium`, `ap_large`; null where predictions have no scores) and `worst`
        (`image_id` and `pq` of the worst images, worst first). `ceiling` and `evaluate` add
        `images` and `seconds_per_image`.
        """
        found = {**self.pq.to_json(), **self.breakdown.to_json()}
        found |= {"mask_ap": self.mask_ap, "worst": self.worst}
        if self.seconds_per_image:
            found |= {"images": self.images, "seconds_per_image": dict(self.seconds_per_image)}
        return found


def check_scorable(dataset: CocoPanoptic) -> None:
    """Raises InputError where a split has no images, or some that cannot be scored."""
    if dataset.rejections:
        first = dataset.rejections[0]
        raise InputError(
            f"{len(dataset.rejections)} images cannot be scored; the first is {first.image_id}:"
            f" {first.message}",
            where=first.file,
            remedy="evaluation never repairs ground truth: mend or remove them",
        )
    if not dataset.records:
        raise InputError("the split has no images", remedy="choose another split")
    for record in dataset.records:
        for segment in record.segments:
            if segment.area is not None and not is_area(segment.area):
                raise InputError(
                    f"area {str(segment.area)[:40]} is no number of pixels",
                    where=f"image {record.image_id}, segment {segment.id}",
                    remedy="evaluation never repairs ground truth: mend it",
                    code="area-wrong",
                )


def thing_ids(categories: Iterable[Category]) -> frozenset[int]:
    """Ids of the categories that have instances."""
    return frozenset(category.id for category in categories if category.isthing)


def score_image(
    image_id: ImageId,
    gt_ids: NDArray[np.integer[Any]],
    gt_segments: Sequence[SegmentInfo],
    pred_ids: NDArray[np.integer[Any]],
    pred_segments: Mapping[int, int],
    *,
    scores: Mapping[int, float],
    things: frozenset[int],
) -> ImageScore:
    """Scores one image: arguments and errors as of `pq.match_image`, and two more.

    `scores` are confidences by segment id, `things` the ids of the thing categories.
    """
    overlap = checked_overlap(image_id, gt_ids, pred_ids, pred_segments)
    listed = {segment.id for segment in gt_segments}
    check_known(overlap.true_area, listed, f"image {image_id}, ground truth")
    return ImageScore(
        image_id,
        count_segments(image_id, overlap, gt_segments, pred_segments),
        break_down(image_id, overlap, gt_segments, pred_segments, things),
        match_instances(overlap, gt_segments, pred_segments, scores, things),
    )


def total_scores(
    images: Sequence[ImageScore],
    categories: Sequence[Category],
    seconds_per_image: Mapping[str, float] | None = None,
) -> Scores:
    """Sums images in their order."""
    return Scores(
        summarize(sum((image.stat for image in images), start=PQStat()), categories),
        sum((image.breakdown for image in images), start=Breakdown()),
        mask_ap([image.instances for image in images], categories),
        worst_images((image.image_id, image.stat.mean_pq) for image in images),
        len(images),
        seconds_per_image or {},
    )


def worst_images(scores: Iterable[tuple[ImageId, float | None]]) -> list[dict[str, Any]]:
    """The `WORST` images of lowest PQ, worst first; an earlier one wins a tie."""
    defined = [(pq, image_id) for image_id, pq in scores if pq is not None]
    lowest = sorted(defined, key=lambda row: row[0])[:WORST]
    return [{"image_id": image_id, "pq": pq} for pq, image_id in lowest]


def useful_workers(images: int) -> int:
    """How many processes shorten the work on so many images, on this machine."""
    # The processors that this process may use, where the system says so.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, MOST, images // WORTH))


def score_pairs(
    categories: Sequence[Category],
    pairs: Sequence[ImagePair],
    *,
    workers: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores pairs of files; the result is the same for any number of processes.

    `categories` are those of the ground truth. `advance` is called after each image. Raises the
    InputError of the first image, in order, with an unreadable PNG or a bad prediction.
    """
    workers = max(1, min(workers, len(pairs)))
    size = max(1, min(CHUNK, len(pairs) // (4 * workers)))
    chunks = (pairs[start : start + size] for start in range(0, len(pairs), size))
    images: list[ImageScore] = []
    keep_heap()  # 5.5 instead of 7.5 ms an image, at 640 x 480
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the images are too small to share
    try:
        work = partial(_score_chunk, thing_ids(categories))
        with closing(map_in_order(work, chunks, workers)) as results:
            for some in results:
                images += some
                for _ in some:
                    advance()
    finally:
        cv2.setNumThreads(before)
    return total_scores(images, categories)


def _score_chunk(things: frozenset[int], pairs: Sequence[ImagePair]) -> list[ImageScore]:
    return [_score_pair(things, pair) for pair in pairs]


def _score_pair(things: frozenset[int], pair: ImagePair) -> ImageScore:
    try:
        try:
            gt_ids = read_ids(pair.gt_png, bgr=pair.gt_bgr)
            pred_ids = read_ids(pair.pred_png, bgr=pair.pred_bgr)
        except InputError as error:
            error.where = f"image {pair.image_id}: {error.where}"
            error.remedy = error.remedy or "write or fetch the file again"
            raise
        return score_image(
            *(pair.image_id, gt_ids, pair.gt_segments, pred_ids, pair.pred_segments),
            scores=pair.pred_scores,
            things=things,
        )
    except (MemoryError, cv2.error) as error:
        if isinstance(error, cv2.error) and error.code != cv2.Error.StsNoMem:
            raise
        raise InputError(
            "out of memory",
            where=f"image {pair.image_id}",
            remedy="use fewer --workers, or a machine with more memory",
            code="out-of-memory",
        ) from None
