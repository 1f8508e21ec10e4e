"""What stands beside PQ: additive statistics of images, taken from the pixels that segments share.

    overlap of one image -> Measures, one an image -> their sum -> the keys of `Measures.to_json`

The overlap is that of `overlap.count_pairs`: one pass over the pixels serves PQ and everything
here. Sums are taken in the order of the images: any number of processes gives the same floats.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from panoptic_cache.evaluate.metric.overlap import VOID, segment_areas
from panoptic_cache.evaluate.metric.pq import CategoryStat, PQStat, match_overlap
from panoptic_cache.pipeline.coco import Category, ImageId, SegmentInfo

Overlap = Mapping[tuple[int, int], int]
SIZE_EDGES = (0, 8, 16, 32, 64, 128, 256, 512)
"""Lower ends of the size bins: side of the square of an instance's area, pixels."""
WORST = 20
"""Images that the list of the worst names."""
ANY_THING = 1
"""The one category that all things become in the class-agnostic PQ."""


@dataclass(frozen=True, slots=True)
class Measures:
    """Sums over images; `+` adds, in the order of the images.

    Attributes:
        size_counts: True thing instances (no crowd) in each bin of `SIZE_EDGES`.
        size_ious: Sum of their best IoU with a predicted thing segment of any category.
        agnostic: Counts of PQ with all things as one category.
        pixels: Pixels of (true category, predicted category or None where void); unlabelled
            pixels are left out, crowd has its category.
        confusion: True segments (no crowd) of (true category, category of the prediction that
            covers them with IoU > 0.5, or None).
    """

    size_counts: tuple[int, ...] = (0,) * len(SIZE_EDGES)
    size_ious: tuple[float, ...] = (0.0,) * len(SIZE_EDGES)
    agnostic: CategoryStat = field(default_factory=CategoryStat)
    pixels: Mapping[tuple[int, int | None], int] = field(default_factory=dict)
    confusion: Mapping[tuple[int, int | None], int] = field(default_factory=dict)

    def __add__(self, other: Measures) -> Measures:
        return Measures(
            tuple(a + b for a, b in zip(self.size_counts, other.size_counts, strict=True)),
            tuple(a + b for a, b in zip(self.size_ious, other.size_ious, strict=True)),
            self.agnostic + other.agnostic,
            _added(self.pixels, other.pixels),
            _added(self.confusion, other.confusion),
        )

    def to_json(self) -> dict[str, Any]:
        """Extra keys of `score --json` and `evaluate --json`; fractions, undefined is null.

        - `sizes`: for each bin `from` and `to` (null = no end), side of the square of the true
          area in pixels, `n` instances, `iou` their mean best IoU (the paper's Figures 5 and 6).
        - `things_agnostic`: `pq`, `sq`, `rq`, `tp`, `fp`, `fn` with all things as one category.
        - `semantic`: `miou`, mean over the `n` categories that have true pixels.
        - `confusion`: by true category id, the number of its segments found (IoU > 0.5) under
          each predicted category id, and under `none` those that were not found.
        """
        tops = (*SIZE_EDGES[1:], None)
        one, (miou, n) = self.agnostic, self.miou()
        found: dict[str, dict[str, int]] = {}
        for (true, predicted), count in sorted(self.confusion.items(), key=_by_ids):
            name = "none" if predicted is None else str(predicted)
            found.setdefault(str(true), {})[name] = count
        return {
            "sizes": [
                {"from": low, "to": top, "n": count, "iou": iou}
                for low, top, count, iou in zip(
                    SIZE_EDGES, tops, self.size_counts, self.size_means(), strict=True
                )
            ],
            "things_agnostic": None
            if one.empty
            else {
                "pq": one.pq,
                "sq": one.sq,
                "rq": one.rq,
                "tp": one.tp,
                "fp": one.fp,
                "fn": one.fn,
            },
            "semantic": {"miou": miou, "n": n},
            "confusion": found,
        }

    def size_means(self) -> tuple[float | None, ...]:
        """Mean best IoU of each size bin; None where it is empty."""
        return tuple(
            total / count if count else None
            for total, count in zip(self.size_ious, self.size_counts, strict=True)
        )

    def miou(self) -> tuple[float | None, int]:
        """Mean semantic IoU over the categories with true pixels, and how many those are.

        Predicted void is wrong everywhere; predictions on unlabelled pixels do not count.
        """
        true: dict[int, int] = {}
        predicted: dict[int, int] = {}
        for (gt, pred), pixels in self.pixels.items():
            true[gt] = true.get(gt, 0) + pixels
            if pred is not None:
                predicted[pred] = predicted.get(pred, 0) + pixels
        if not true:
            return None, 0
        ious = []
        for category in sorted(true):
            both = self.pixels.get((category, category), 0)
            ious.append(both / (true[category] + predicted.get(category, 0) - both))
        return sum(ious) / len(ious), len(ious)


def measure_image(
    image_id: ImageId,
    overlap: Overlap,
    gt_segments: Sequence[SegmentInfo],
    pred_segments: Mapping[int, int],
    things: frozenset[int],
) -> Measures:
    """The measures of one image.

    Args:
        image_id: For messages.
        overlap: Pixels of each (true id, predicted id), see `overlap.count_pairs`.
        gt_segments: As annotated; areas are counted here.
        pred_segments: Category id by segment id.
        things: Ids of the thing categories.
    """
    gt_area, pred_area = segment_areas(overlap, side=0), segment_areas(overlap, side=1)
    gt = {segment.id: segment for segment in gt_segments}
    best: dict[int, float] = {}
    found: dict[int, int] = {}
    pixels: dict[tuple[int, int | None], int] = {}
    for (gt_id, pred_id), shared in overlap.items():
        segment, category = gt.get(gt_id), pred_segments.get(pred_id)
        if segment is None:
            continue
        pixel = segment.category_id, category
        pixels[pixel] = pixels.get(pixel, 0) + shared
        if segment.iscrowd or category is None:
            continue
        # As for PQ, predicted pixels on ground-truth void leave the union.
        void = overlap.get((VOID, pred_id), 0)
        iou = shared / (gt_area[gt_id] + pred_area[pred_id] - shared - void)
        if iou > 0.5:
            found[gt_id] = category
        if category in things:
            best[gt_id] = max(best.get(gt_id, 0.0), iou)
    counts, ious = [0] * len(SIZE_EDGES), [0.0] * len(SIZE_EDGES)
    confusion: dict[tuple[int, int | None], int] = {}
    for segment in gt.values():
        if segment.iscrowd or segment.id not in gt_area:
            continue
        became = segment.category_id, found.get(segment.id)
        confusion[became] = confusion.get(became, 0) + 1
        if segment.category_id in things:
            bin_ = bisect.bisect_right(SIZE_EDGES, math.sqrt(gt_area[segment.id])) - 1
            counts[bin_] += 1
            ious[bin_] += best.get(segment.id, 0.0)
    agnostic = _agnostic(image_id, overlap, gt, pred_segments, things)
    return Measures(tuple(counts), tuple(ious), agnostic, pixels, confusion)


def _agnostic(
    image_id: ImageId,
    overlap: Overlap,
    gt: Mapping[int, SegmentInfo],
    pred_segments: Mapping[int, int],
    things: frozenset[int],
) -> CategoryStat:
    """PQ's counts with all things as one category, so that all crowds of things are one crowd.

    Stuff stays in the overlap: a thing predicted on it is wrong there.
    """
    true = [segment for segment in gt.values() if segment.category_id in things]
    crowds = [segment.id for segment in true if segment.iscrowd]
    merged: dict[tuple[int, int], int] = {}
    for (gt_id, pred_id), shared in overlap.items():
        pair = crowds[0] if gt_id in crowds else gt_id, pred_id
        merged[pair] = merged.get(pair, 0) + shared
    return match_overlap(
        image_id,
        merged,
        [
            replace(segment, category_id=ANY_THING, area=None)
            for segment in true
            if segment.id not in crowds[1:]
        ],
        {id_: ANY_THING for id_, category in pred_segments.items() if category in things},
    ).stat[ANY_THING]


def thing_ids(categories: Iterable[Category]) -> frozenset[int]:
    """Ids of the categories that have instances."""
    return frozenset(category.id for category in categories if category.isthing)


def image_pq(stat: PQStat) -> float | None:
    """PQ of one image: the mean over its categories; None where it counts no segment."""
    values = [one.pq for one in stat.categories.values() if not one.empty]
    return sum(values) / len(values) if values else None


def worst_images(scores: Iterable[tuple[ImageId, float | None]]) -> list[dict[str, Any]]:
    """The `WORST` images of lowest PQ, worst first; an earlier one wins a tie."""
    defined = [(pq, image_id) for image_id, pq in scores if pq is not None]
    lowest = sorted(defined, key=lambda row: row[0])[:WORST]
    return [{"image_id": image_id, "pq": pq} for pq, image_id in lowest]


def size_names() -> tuple[str, ...]:
    """The bins in words: `0-8`, ..., `512+`."""
    return (*(f"{low}-{top}" for low, top in pairwise(SIZE_EDGES)), f"{SIZE_EDGES[-1]}+")


def _added(
    one: Mapping[tuple[int, int | None], int], other: Mapping[tuple[int, int | None], int]
) -> dict[tuple[int, int | None], int]:
    total = dict(one)
    for key, count in other.items():
        total[key] = total.get(key, 0) + count
    return total


def _by_ids(item: tuple[tuple[int, int | None], int]) -> tuple[int, int]:
    (true, predicted), _ = item
    return true, -1 if predicted is None else predicted
