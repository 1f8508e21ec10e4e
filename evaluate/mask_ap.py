"""Mask AP of the predicted instances, by pycocotools, without making a single mask again.

COCO's evaluation needs of an image only the areas, the scores and the IoUs. Segments of a panoptic
map do not overlap, so the pixels that they share tell all of it.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from evaluate.overlap import segment_areas
from pipeline.coco import Category, SegmentInfo

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The first six numbers of pycocotools' summary, in its order."""


@dataclass(frozen=True, slots=True)
class ImageInstances:
    """The instances of one image; areas in pixels of the maps.

    Attributes:
        true: (id, category id, area, crowd) of each true one.
        found: (id, category id, area, score) of each predicted one.
        shared: Pixels of (true id, predicted id), of those that share any.
        scored: Whether every predicted one has a score.
    """

    true: tuple[tuple[int, int, int, bool], ...]
    found: tuple[tuple[int, int, int, float], ...]
    shared: Mapping[tuple[int, int], int]
    scored: bool


def instances_of(
    overlap: Mapping[tuple[int, int], int],
    gt_segments: Sequence[SegmentInfo],
    pred_segments: Mapping[int, int],
    scores: Mapping[int, float],
    things: frozenset[int],
) -> ImageInstances:
    """The instances of one image from what its segments share.

    Args:
        overlap: See `overlap.count_pairs`.
        gt_segments: As annotated.
        pred_segments: Category id by segment id.
        scores: Confidence by segment id.
        things: Ids of the thing categories.
    """
    gt_area, pred_area = segment_areas(overlap, side=0), segment_areas(overlap, side=1)
    true = tuple(
        (segment.id, segment.category_id, gt_area[segment.id], segment.iscrowd)
        for segment in gt_segments
        if segment.category_id in things and segment.id in gt_area
    )
    found = tuple(
        (id_, category, pred_area[id_], scores.get(id_, 0.0))
        for id_, category in pred_segments.items()
        if category in things
    )
    gt_ids, pred_ids = {row[0] for row in true}, {row[0] for row in found}
    shared = {
        pair: pixels
        for pair, pixels in overlap.items()
        if pair[0] in gt_ids and pair[1] in pred_ids
    }
    return ImageInstances(true, found, shared, all(row[0] in scores for row in found))


def mask_ap(
    images: Sequence[ImageInstances], categories: Sequence[Category]
) -> dict[str, float | None] | None:
    """COCO's average precision of masks, `NAMES`; fractions, None where undefined.

    IoU to a crowd segment is the share of the prediction that lies on it, and what matches one
    counts as neither right nor wrong.

    Args:
        images: All images of the split.
        categories: Of the ground truth.

    Returns:
        None where a prediction has no score, or no category is a thing.
    """
    catalogue = [category.id for category in categories if category.isthing]
    if not catalogue or not all(image.scored for image in images):
        return None
    evaluator = COCOeval(iouType="segm")
    evaluator.params.imgIds = list(range(len(images)))
    evaluator.params.catIds = catalogue
    truth: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    found: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for number, image in enumerate(images):
        for id_, category, area, crowd in image.true:
            row = {"id": id_, "area": area, "iscrowd": int(crowd), "ignore": int(crowd)}
            truth[number, category].append(row)
        for id_, category, area, score in image.found:
            found[number, category].append({"id": id_, "area": area, "score": score})

    def prepare() -> None:
        evaluator._gts, evaluator._dts = truth, found

    def ious(number: int, category: int) -> NDArray[np.float64] | list[float]:
        return _ious(truth[number, category], found[number, category], images[number].shared)

    evaluator._prepare, evaluator.computeIoU = prepare, ious
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    # pycocotools says -1 where there is nothing to average.
    values = [float(value) for value in evaluator.stats[: len(NAMES)]]
    return {name: None if value < 0 else value for name, value in zip(NAMES, values, strict=True)}


def _ious(
    truth: list[dict[str, Any]],
    found: list[dict[str, Any]],
    shared: Mapping[tuple[int, int], int],
) -> NDArray[np.float64] | list[float]:
    """(predictions by descending score, truths), as `COCOeval.computeIoU` returns them."""
    if not truth or not found:
        return []
    order = np.argsort([-row["score"] for row in found], kind="stable")[:100]
    table = np.zeros((len(order), len(truth)))
    for i, place in enumerate(order):
        row = found[place]
        for j, true in enumerate(truth):
            both = shared.get((true["id"], row["id"]), 0)
            union = row["area"] + (0 if true["iscrowd"] else true["area"] - both)
            table[i, j] = both / union
    return table
