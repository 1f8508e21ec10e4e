"""Mask AP of the predicted instances: COCO's matching without masks, pycocotools' curves.

    overlap of one image -> ImageInstances, one an image -> `mask_ap`

COCO's matching needs of an image only the areas, the scores and the IoUs. Segments of a panoptic
map do not overlap, so the pixels that they share tell all of it, and an instance has hardly ever
more than one partner: a fraction of what `COCOeval.evaluate` costs in time and memory, which asks
about every pair of image and category.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.matching import Overlap
from panoptic_cache.pipeline.coco import Category, SegmentInfo

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The first six numbers of pycocotools' summary, in its order."""
THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
AREAS = ((0, 10**10), (0, 32**2), (32**2, 96**2), (96**2, 10**10))
"""All, small, medium and large: pixels, both ends included, as in pycocotools."""
MOST = 100
"""Instances of a category that count in an image, those of the highest scores."""

Truth = tuple[int, int, bool]
"""Id, area, whether it is a crowd."""
Outcome = tuple[int, int]
"""Two sets of thresholds as bits, lowest first: matched at, and ignored at."""
Found = tuple[int, float, tuple[Outcome, ...]]
"""Category, score, and outcome for each of `AREAS`."""


@dataclass(frozen=True, slots=True)
class ImageInstances:
    """The instances of one image after matching, for each of `AREAS`.

    Attributes:
        true: By category, how many true ones count.
        found: The predicted ones, those of a category by descending score.
        scored: Whether every predicted one has a score.
    """

    true: Mapping[int, tuple[int, ...]]
    found: tuple[Found, ...]
    scored: bool


def match_instances(
    overlap: Overlap,
    gt_segments: Sequence[SegmentInfo],
    pred_segments: Mapping[int, int],
    scores: Mapping[int, float],
    things: frozenset[int],
) -> ImageInstances:
    """Matches the instances of one image as `COCOeval.evaluateImg` does.

    Args:
        overlap: Of the two maps.
        gt_segments: As annotated; areas are counted.
        pred_segments: Category id by segment id.
        scores: Confidence by segment id.
        things: Ids of the thing categories.
    """
    gt_area, pred_area = overlap.true_area, overlap.area
    truths: dict[int, list[Truth]] = {}
    for segment in gt_segments:
        if segment.category_id in things and segment.id in gt_area:
            row = segment.id, gt_area[segment.id], segment.iscrowd
            truths.setdefault(segment.category_id, []).append(row)
    founds: dict[int, list[int]] = {}
    for id_, category in pred_segments.items():
        if category in things:
            founds.setdefault(category, []).append(id_)
    ious = _ious(overlap, truths, pred_segments, pred_area)
    found = []
    for category, ids in founds.items():
        ordered = sorted(ids, key=lambda id_: -scores.get(id_, 0.0))[:MOST]
        members = truths.get(category, [])
        columns = [_outcomes(ordered, pred_area, members, ious, area) for area in AREAS]
        rows = zip(ordered, zip(*columns, strict=True), strict=True)
        found += [(category, scores.get(id_, 0.0), outcomes) for id_, outcomes in rows]
    return ImageInstances(
        {
            category: tuple(sum(not _ignored(row, area) for row in rows) for area in AREAS)
            for category, rows in truths.items()
        },
        tuple(found),
        all(id_ in scores for ids in founds.values() for id_ in ids),
    )


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
    # Imported here: predictions without scores, which are many, do without.
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415

    evaluator = COCOeval(iouType="segm")
    # All images as one: only `evaluateImg` and the cut at `MOST` look at images, and are done.
    evaluator.params.imgIds, evaluator.params.catIds = [0], catalogue
    evaluator.params.maxDets = [max(1, sum(len(image.found) for image in images))]
    evaluator._paramsEval = evaluator.params
    found: dict[int, list[Found]] = {category: [] for category in catalogue}
    for row in (row for image in images for row in image.found):
        found[row[0]].append(row)
    evaluator.evalImgs = [
        entry
        for category in catalogue
        for entry in _evaluated(found[category], [image.true.get(category) for image in images])
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 0]  # (thresholds, recalls, categories, areas)
    halves, quarters = THRESHOLDS.index(0.5), THRESHOLDS.index(0.75)
    parts = (
        *(precision[..., 0], precision[halves, ..., 0], precision[quarters, ..., 0]),
        *(precision[..., area] for area in (1, 2, 3)),
    )
    # pycocotools says -1 where there is nothing to average.
    defined = [part[part > -1] for part in parts]
    return {
        name: float(part.mean()) if part.size else None
        for name, part in zip(NAMES, defined, strict=True)
    }


def _ious(
    overlap: Overlap,
    truths: Mapping[int, Iterable[Truth]],
    pred_segments: Mapping[int, int],
    pred_area: Mapping[int, int],
) -> dict[tuple[int, int], float]:
    """IoU of (true id, predicted id) of one category, of those that the lowest threshold takes."""
    known = {row[0]: (category, row) for category, rows in truths.items() for row in rows}
    ious = {}
    for (gt_id, pred_id), both in overlap.shared.items():
        category, (_, area, crowd) = known.get(gt_id, (None, (0, 0, False)))
        if category is None or pred_segments.get(pred_id) != category:
            continue
        iou = both / (pred_area[pred_id] + (0 if crowd else area - both))
        if iou >= THRESHOLDS[0]:
            ious[gt_id, pred_id] = iou
    return ious


def _outcomes(
    found: Sequence[int],
    pred_area: Mapping[int, int],
    truths: Sequence[Truth],
    ious: Mapping[tuple[int, int], float],
    area: tuple[int, int],
) -> list[Outcome]:
    """Greedy matching at each threshold: by descending score, to the best that is free.

    Args:
        found: Ids of one category by descending score.
        pred_area: Pixels by id.
        truths: Of the category.
        ious: See `_ious`.
        area: One of `AREAS`; a truth outside of it may be matched, but then counts for nothing.
    """
    order = sorted(truths, key=lambda row: _ignored(row, area))
    taken: set[tuple[int, int]] = set()
    outcomes = []
    for pred_id in found:
        partners = [
            (gt_id, ious[gt_id, pred_id], crowd, _ignored((gt_id, size, crowd), area))
            for gt_id, size, crowd in order
            if (gt_id, pred_id) in ious
        ]
        hits = ignored = 0
        for bit, threshold in enumerate(THRESHOLDS):
            best, best_iou, best_ignored = None, threshold, True
            for gt_id, iou, crowd, ignores in partners:
                if (bit, gt_id) in taken and not crowd:
                    continue
                if best is not None and not best_ignored and ignores:
                    break  # one that counts goes first, at any IoU
                if iou >= best_iou:
                    best, best_iou, best_ignored = gt_id, iou, ignores
            if best is not None:
                taken.add((bit, best))
                hits |= 1 << bit
                ignored |= best_ignored << bit
        if not area[0] <= pred_area[pred_id] <= area[1]:
            ignored |= ~hits & (1 << len(THRESHOLDS)) - 1
        outcomes.append((hits, ignored))
    return outcomes


def _ignored(truth: Truth, area: tuple[int, int]) -> bool:
    _, size, crowd = truth
    return crowd or not area[0] <= size <= area[1]


def _evaluated(
    found: Sequence[Found], true: Sequence[tuple[int, ...] | None]
) -> list[dict[str, Any]]:
    """What `COCOeval.accumulate` needs of one category, for each of `AREAS`."""
    outcomes = np.array([row[2] for row in found], np.int64).reshape(len(found), len(AREAS), 2)
    counts = np.sum([row for row in true if row] or [(0,) * len(AREAS)], axis=0)
    return [
        {
            "dtScores": [row[1] for row in found],
            "dtMatches": _bits(outcomes[:, number, 0]),
            "dtIgnore": _bits(outcomes[:, number, 1]),
            "gtIgnore": np.zeros(count),
        }
        for number, count in enumerate(counts.tolist())
    ]


def _bits(sets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) sets of thresholds -> (thresholds, N)."""
    return (sets >> np.arange(len(THRESHOLDS))[:, None] & 1).astype(bool)
