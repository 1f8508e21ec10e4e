"""Which segments of an image match: the rule of PQ, on the pixels that segments share.

    true and predicted segment maps -> Overlap -> Matching

The overlap is counted in one pass over the pixels. PQ, its breakdown, mask AP and the pictures of
errors all start from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.pairs import listing
from panoptic_cache.pipeline.annotations import ImageId, SegmentInfo
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.png import is_swapped

VOID = 0
LEAST_IOU = 0.5
"""A match has a higher IoU, so that a segment has at most one."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """The pixels that the segments of two maps share; 0 is void."""

    # Pixels of each (true id, predicted id) that occurs, in ascending order.
    shared: Mapping[tuple[int, int], int]
    true_area: Mapping[int, int]  # Pixels of each true id
    area: Mapping[int, int]  # Pixels of each predicted id

    @classmethod
    def of(cls, gt_ids: NDArray[np.integer[Any]], pred_ids: NDArray[np.integer[Any]]) -> Overlap:
        """Counts the overlap of two (H, W) maps of ids in 0..2^31-1.

        Maps are constant along most of a row, so runs of pixels are sorted instead of pixels: an
        image of COCO has 300,000 pixels, but only 4,000 to 25,000 runs.
        """
        gt, pred = gt_ids.ravel(), pred_ids.ravel()
        if gt.size == 0:
            return cls({}, {}, {})
        changes = np.flatnonzero((gt[1:] != gt[:-1]) | (pred[1:] != pred[:-1])) + 1
        starts = np.concatenate(([0], changes))  # (runs,)
        lengths = np.diff(starts, append=gt.size)
        keys = gt[starts].astype(np.int64) << 32 | pred[starts].astype(np.int64)
        pairs, inverse = np.unique(keys, return_inverse=True)
        # Exact: float64 weights hold whole numbers up to 2^53.
        counts = np.bincount(inverse, weights=lengths).astype(np.int64)
        ids = zip((pairs >> 32).tolist(), (pairs & 0xFFFFFFFF).tolist(), strict=True)
        shared = dict(zip(ids, counts.tolist(), strict=True))
        areas: tuple[dict[int, int], dict[int, int]] = {}, {}
        for pair, pixels in shared.items():
            for side, id_ in zip(areas, pair, strict=True):
                side[id_] = side.get(id_, 0) + pixels
        return cls(shared, *areas)

    def union(self, gt_id: int, pred_id: int, true_area: int | None = None) -> int:
        """Pixels of either of two segments that share some; those on true void do not count.

        `true_area` is that of the true segment, counted where None.
        """
        area = self.true_area[gt_id] if true_area is None else true_area
        void = self.shared.get((VOID, pred_id), 0)
        return area + self.area[pred_id] - self.shared[gt_id, pred_id] - void


@dataclass(frozen=True, slots=True)
class Matching:
    """Which segments are right and wrong; all by id."""

    # IoU of each matched (true id, predicted id), in ascending order.
    ious: Mapping[tuple[int, int], float]
    missed: tuple[int, ...]  # True segments without match (FN)
    false: tuple[int, ...]  # Predicted segments without match that count as wrong (FP)


def match_segments(
    image_id: ImageId,
    overlap: Overlap,
    gt_segments: Sequence[SegmentInfo],
    pred_segments: Mapping[int, int],
    *,
    every_crowd: bool = False,
) -> Matching:
    """Matches segments as cocodataset/panopticapi does.

    Two segments match where they have the same category and an IoU above 0.5. An unmatched
    prediction is not wrong where more than half of it lies on void and on a crowd of its category:
    the one listed last, or all of them with `every_crowd`. True segments that are not listed count
    as neither void nor segment. Raises InputError where the area of a true segment is smaller than
    what it shares with a prediction.
    """
    gt = {segment.id: segment for segment in gt_segments}
    ious: dict[tuple[int, int], float] = {}
    for (gt_id, pred_id), pixels in overlap.shared.items():
        segment = gt.get(gt_id)
        if segment is None or segment.iscrowd or segment.category_id != pred_segments.get(pred_id):
            continue
        union = overlap.union(gt_id, pred_id, segment.area)
        if union <= 0:
            raise InputError(
                f"ground-truth segment {gt_id} has area {segment.area} in the JSON, but shares "
                f"{pixels} pixels with predicted segment {pred_id}",
                where=f"image {image_id}",
                remedy="set the areas of the ground truth to the pixel counts of its PNG",
                code="area-wrong",
            )
        if (iou := pixels / union) > LEAST_IOU:
            ious[gt_id, pred_id] = iou
    crowds: dict[int, tuple[int, ...]] = {}
    for segment in gt.values():
        if segment.iscrowd:
            others = crowds.get(segment.category_id, ()) if every_crowd else ()
            crowds[segment.category_id] = (*others, segment.id)
    matched_gt, matched_pred = {pair[0] for pair in ious}, {pair[1] for pair in ious}

    def excused(pred_id: int, category_id: int) -> bool:
        ignored = (VOID, *crowds.get(category_id, ()))
        pixels = sum(overlap.shared.get((gt_id, pred_id), 0) for gt_id in ignored)
        return 2 * pixels > overlap.area.get(pred_id, 0)

    return Matching(
        ious,
        tuple(id_ for id_, one in gt.items() if not one.iscrowd and id_ not in matched_gt),
        tuple(
            id_
            for id_, category_id in pred_segments.items()
            if id_ not in matched_pred and not excused(id_, category_id)
        ),
    )


def checked_overlap(
    image_id: ImageId,
    gt_ids: NDArray[np.integer[Any]],
    pred_ids: NDArray[np.integer[Any]],
    pred_segments: Mapping[int, int],
) -> Overlap:
    """The overlap of a prediction that is fit to be scored; void needs no entry in its list.

    Raises InputError where the maps differ in size, or the predicted map and its list disagree.
    """
    where = f"image {image_id}"
    if gt_ids.shape != pred_ids.shape:
        raise InputError(
            f"prediction is {pred_ids.shape} pixels (H, W), ground truth {gt_ids.shape}",
            where=where,
            remedy="resize the predicted id map with nearest neighbour",
            code="size-mismatch",
        )
    overlap = Overlap.of(gt_ids, pred_ids)
    painted = overlap.area.keys()
    if unlisted := painted - pred_segments.keys() - {VOID}:
        remedy = "list them in segments_info, or paint them 0 (void)"
        if is_swapped(overlap.area, pred_segments.keys()):
            remedy = "they match with red and blue swapped: score with --pred-bgr, or without it"
        raise InputError(
            f"segment ids {listing(unlisted)} are in the predicted PNG but not in its JSON",
            where=where,
            remedy=remedy,
            code="id-missing-in-json",
        )
    if unpainted := pred_segments.keys() - painted:
        raise InputError(
            f"segment ids {listing(unpainted)} are in the predicted JSON but not in its PNG",
            where=where,
            remedy="drop segments without pixels from segments_info",
            code="id-missing-in-png",
        )
    return overlap
