"""PQ broken down: by size, without classes, without instances, and what is taken for what.

    overlap of one image -> Breakdown, one an image -> their sum -> the keys of `Breakdown.to_json`

Sums are taken in the order of the images, so any number of processes gives the same floats.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from panoptic_cache.evaluate.metric.matching import LEAST_IOU, Overlap, match_segments
from panoptic_cache.evaluate.metric.pq import CategoryStat, count_matches
from panoptic_cache.pipeline.annotations import ImageId, SegmentInfo
from panoptic_cache.pipeline.coco import Category

SIZE_EDGES = (0, 8, 16, 32, 64, 128, 256, 512)
"""Lower ends of the size bins: side of the square of an instance's area, pixels."""
WORST = 20
"""Images that the list of the worst names."""
ANY_THING = 1
"""The one category that all things become in the class-agnostic PQ."""
CategoryPair = tuple[int, int | None]
"""True category, and predicted category or None for void."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Sums over images; `+` adds, in the order of the images."""

    # True thing instances (no crowd) in each bin of `SIZE_EDGES`.
    size_counts: tuple[int, ...] = (0,) * len(SIZE_EDGES)
    # Sum of their best IoU with a predicted thing segment of any category.
    size_ious: tuple[float, ...] = (0.0,) * len(SIZE_EDGES)
    # Counts of PQ with all things as one category.
    agnostic: CategoryStat = field(default_factory=CategoryStat)
    # Pixels; unlabelled ones are left out, crowd has its category.
    pixels: Mapping[CategoryPair, int] = field(default_factory=dict)
    # True segments (no crowd), with the category of what covers them with IoU > 0.5.
    confusion: Mapping[CategoryPair, int] = field(default_factory=dict)

    def __add__(self, other: Breakdown) -> Breakdown:
        return Breakdown(
            tuple(a + b for a, b in zip(self.size_counts, other.size_counts, strict=True)),
            tuple(a + b for a, b in zip(self.size_ious, other.size_ious, strict=True)),
            self.agnostic + other.agnostic,
            Counter(self.pixels) + Counter(other.pixels),
            Counter(self.confusion) + Counter(other.confusion),
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
        bins = zip(SIZE_EDGES, tops, self.size_counts, self.size_ious, strict=True)
        one, (miou, n) = self.agnostic, self.miou()
        agnostic = {name: getattr(one, name) for name in ("pq", "sq", "rq", "tp", "fp", "fn")}
        rows = [(true, -1 if p is None else p, k) for (true, p), k in self.confusion.items()]
        found: dict[str, dict[str, int]] = {}
        for true, predicted, count in sorted(rows):
            name = "none" if predicted == -1 else str(predicted)
            found.setdefault(str(true), {})[name] = count
        return {
            "sizes": [
                {"from": low, "to": top, "n": count, "iou": total / count if count else None}
                for low, top, count, total in bins
            ],
            "things_agnostic": None if one.empty else agnostic,
            "semantic": {"miou": miou, "n": n},
            "confusion": found,
        }

    def miou(self) -> tuple[float | None, int]:
        """Mean semantic IoU over the categories with true pixels, and how many those are.

        Predicted void is wrong everywhere; predictions on unlabelled pixels do not count.
        """
        true: Counter[int] = Counter()
        predicted: Counter[int | None] = Counter()
        for (gt, pred), pixels in self.pixels.items():
            true[gt] += pixels
            predicted[pred] += pixels
        if not true:
            return None, 0
        ious = []
        for category in sorted(true):
            both = self.pixels.get((category, category), 0)
            ious.append(both / (true[category] + predicted[category] - both))
        return sum(ious) / len(ious), len(ious)


def break_down(
    image_id: ImageId,
    overlap: Overlap,
    gt_segments: Sequence[SegmentInfo],
    pred_segments: Mapping[int, int],
    things: frozenset[int],
) -> Breakdown:
    """The breakdown of one image, with counted areas; arguments as of `score.score_image`."""
    gt = {segment.id: segment for segment in gt_segments}
    best: dict[int, float] = {}  # by true id, of predicted things
    found: dict[int, int] = {}  # category by true id, of any match
    pixels: Counter[CategoryPair] = Counter()
    for (gt_id, pred_id), shared in overlap.shared.items():
        segment, category = gt.get(gt_id), pred_segments.get(pred_id)
        if segment is None:
            continue
        pixels[segment.category_id, category] += shared
        if segment.iscrowd or category is None:
            continue
        iou = shared / overlap.union(gt_id, pred_id)
        if iou > LEAST_IOU:
            found[gt_id] = category
        if category in things:
            best[gt_id] = max(best.get(gt_id, 0.0), iou)
    counts, ious = [0] * len(SIZE_EDGES), [0.0] * len(SIZE_EDGES)
    confusion: Counter[CategoryPair] = Counter()
    for segment in gt.values():
        if segment.iscrowd or segment.id not in overlap.true_area:
            continue
        confusion[segment.category_id, found.get(segment.id)] += 1
        if segment.category_id in things:
            side = math.sqrt(overlap.true_area[segment.id])
            bin_ = bisect.bisect_right(SIZE_EDGES, side) - 1
            counts[bin_] += 1
            ious[bin_] += best.get(segment.id, 0.0)
    # All things as one category. Stuff stays in the overlap: a thing predicted on it is wrong.
    true = [
        SegmentInfo(segment.id, ANY_THING, segment.iscrowd)
        for segment in gt.values()
        if segment.category_id in things
    ]
    predicted = {id_: ANY_THING for id_, category in pred_segments.items() if category in things}
    matching = match_segments(image_id, overlap, true, predicted, every_crowd=True)
    agnostic = count_matches(matching, true, predicted)[ANY_THING]
    return Breakdown(tuple(counts), tuple(ious), agnostic, pixels, confusion)


def thing_ids(categories: Iterable[Category]) -> frozenset[int]:
    """Ids of the categories that have instances."""
    return frozenset(category.id for category in categories if category.isthing)


def worst_images(scores: Iterable[tuple[ImageId, float | None]]) -> list[dict[str, Any]]:
    """The `WORST` images of lowest PQ, worst first; an earlier one wins a tie."""
    defined = [(pq, image_id) for image_id, pq in scores if pq is not None]
    lowest = sorted(defined, key=lambda row: row[0])[:WORST]
    return [{"image_id": image_id, "pq": pq} for pq, image_id in lowest]
