"""Panoptic quality, equal to the official evaluator.

    Matching of an image -> ImageStat, one an image -> PQStat, their sum -> PQResult

PQ of a category is sum IoU / (TP + FP/2 + FN/2) (Kirillov et al., Panoptic Segmentation, CVPR 2019,
equation 1). Void, crowd and ground-truth areas follow cocodataset/panopticapi.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.matching import (
    Matching,
    Overlap,
    checked_overlap,
    match_segments,
)
from panoptic_cache.evaluate.metric.pairs import listing
from panoptic_cache.pipeline.annotations import ImageId, SegmentInfo
from panoptic_cache.pipeline.coco import Category

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CategoryStat:
    """Counts of one category; they add up over images."""

    tp: int = 0  # Matched pairs
    fp: int = 0  # Predicted segments without match
    fn: int = 0  # Ground-truth segments without match
    iou: float = 0.0  # Sum of the IoU of the matched pairs

    def __add__(self, other: CategoryStat) -> CategoryStat:
        return CategoryStat(
            self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.iou + other.iou
        )

    @property
    def empty(self) -> bool:
        """No segment of the category was counted, so it enters no mean."""
        return self.tp + self.fp + self.fn == 0

    @property
    def pq(self) -> float:
        """Panoptic quality, a fraction; 0 where empty."""
        return 0.0 if self.empty else self.iou / (self.tp + 0.5 * self.fp + 0.5 * self.fn)

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the matches; 0 without one."""
        return self.iou / self.tp if self.tp else 0.0

    @property
    def rq(self) -> float:
        """Recognition quality: the F1 score of the matching; 0 where empty."""
        return 0.0 if self.empty else self.tp / (self.tp + 0.5 * self.fp + 0.5 * self.fn)


@dataclass(frozen=True, slots=True)
class PQStat:
    """`CategoryStat` by category id, of one image or of many; a category never seen is absent.

    The order of a sum of floats changes its last digit: add in the order of the images.
    """

    categories: Mapping[int, CategoryStat] = field(default_factory=dict)

    def __add__(self, other: PQStat) -> PQStat:
        total = dict(self.categories)
        for category_id, stat in other.categories.items():
            total[category_id] = total.get(category_id, CategoryStat()) + stat
        return PQStat(total)

    def __getitem__(self, category_id: int) -> CategoryStat:
        return self.categories.get(category_id, CategoryStat())

    @property
    def mean_pq(self) -> float | None:
        """Mean PQ of the categories with a segment; None without one."""
        values = [stat.pq for stat in self.categories.values() if not stat.empty]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class ImageStat:
    """What one image adds."""

    image_id: ImageId  # As annotated
    stat: PQStat  # Its counts
    # Ids of ground-truth segments (no crowd) whose area in the JSON, which PQ trusts, differs from
    # the PNG.
    wrong_areas: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupPQ:
    """Unweighted means over the `n` categories of a group that have a segment; fractions."""

    pq: float
    sq: float
    rq: float
    n: int


@dataclass(frozen=True, slots=True)
class PQResult:
    """The metric of a split."""

    all: GroupPQ | None  # Over all categories; None (undefined) where no category has a segment
    things: GroupPQ | None  # The same, over things
    stuff: GroupPQ | None  # The same, over stuff
    # Counts of every category of the ground truth, by ascending id.
    per_class: Mapping[int, CategoryStat]

    def to_json(self) -> dict[str, Any]:
        """The first keys of `panoptic score --json`: fractions, undefined groups null."""
        groups = {"All": self.all, "Things": self.things, "Stuff": self.stuff}
        per_class = {
            str(category_id): asdict(stat) | {"pq": stat.pq, "sq": stat.sq, "rq": stat.rq}
            for category_id, stat in self.per_class.items()
        }
        return {
            **{name: asdict(group) if group else None for name, group in groups.items()},
            "per_class": per_class,
        }


def match_image(
    image_id: ImageId,
    gt_ids: NDArray[np.integer[Any]],
    gt_segments: Sequence[SegmentInfo],
    pred_ids: NDArray[np.integer[Any]],
    pred_segments: Mapping[int, int],
) -> ImageStat:
    """Matches one image, see `matching.match_segments`.

    Predicted areas are counted; ground-truth areas are trusted.

    Args:
        image_id: For messages and the result.
        gt_ids: (H, W) integer, 0 = void.
        gt_segments: Distinct ids above 0, as listed: the order decides which crowd segment
            excuses predictions. An area of None is counted from the map.
        pred_ids: (H, W) integer, 0 = void.
        pred_segments: Category id by segment id.

    Raises:
        InputError: Sizes differ, the map and the list of the prediction disagree, or an area of
            the ground truth is smaller than what it shares with a prediction.
    """
    overlap = checked_overlap(image_id, gt_ids, pred_ids, pred_segments)
    return match_overlap(image_id, overlap, gt_segments, pred_segments)


def match_overlap(
    image_id: ImageId,
    overlap: Overlap,
    gt_segments: Sequence[SegmentInfo],
    pred_segments: Mapping[int, int],
) -> ImageStat:
    """`match_image` from the overlap of the two maps."""
    matching = match_segments(image_id, overlap, gt_segments, pred_segments)
    wrong = tuple(
        segment.id
        for segment in gt_segments
        if not segment.iscrowd and segment.area not in (None, overlap.true_area.get(segment.id, 0))
    )
    return ImageStat(image_id, count_matches(matching, gt_segments, pred_segments), wrong)


def count_matches(
    matching: Matching, gt_segments: Sequence[SegmentInfo], pred_segments: Mapping[int, int]
) -> PQStat:
    """The counts of one image by category."""
    true = {segment.id: segment.category_id for segment in gt_segments}
    counts = [
        *(
            (pred_segments[id_], CategoryStat(tp=1, iou=iou))
            for (_, id_), iou in matching.ious.items()
        ),
        *((true[id_], CategoryStat(fn=1)) for id_ in matching.missed),
        *((pred_segments[id_], CategoryStat(fp=1)) for id_ in matching.false),
    ]
    stats: dict[int, CategoryStat] = {}
    for category_id, one in counts:
        stats[category_id] = stats.get(category_id, CategoryStat()) + one
    return PQStat(stats)


def total_pq(images: Iterable[ImageStat], categories: Sequence[Category]) -> PQResult:
    """The metric of images in their order; warns of ground-truth areas that cannot be true."""
    total, wrong = PQStat(), {}
    for image in images:
        total += image.stat
        if image.wrong_areas:
            wrong[image.image_id] = image.wrong_areas
    if wrong:
        image_id, ids = next(iter(wrong.items()))
        logger.warning(
            "%d ground-truth segments of %d images have another area in the JSON than in the PNG, "
            "such as %s of image %s. As in the official evaluator the JSON counts, and PQ may "
            "exceed 1: set the areas to the pixel counts",
            sum(map(len, wrong.values())), len(wrong), listing(ids), image_id,
        )  # fmt: skip
    return summarize(total, categories)


def summarize(total: PQStat, categories: Sequence[Category]) -> PQResult:
    """Means over categories. A group without any segment is None; if it has categories, warns.

    Raises ValueError where `total`, the sum over all images, counts a category not among them.
    """
    if unknown := total.categories.keys() - {category.id for category in categories}:
        raise ValueError(f"statistics of unknown categories {listing(unknown)}")

    def group(name: str, members: Iterable[Category]) -> GroupPQ | None:
        found = [total[category.id] for category in members]
        stats = [stat for stat in found if not stat.empty]
        if not stats:
            if found:
                logger.warning("%s: PQ is undefined, no category of the group has a segment", name)
            return None
        n, pq, sq, rq = len(stats), 0.0, 0.0, 0.0
        for stat in stats:  # As the official sum; the built-in one rounds by Python version.
            pq, sq, rq = pq + stat.pq, sq + stat.sq, rq + stat.rq
        return GroupPQ(pq / n, sq / n, rq / n, n)

    return PQResult(
        all=group("All", categories),
        things=group("Things", (c for c in categories if c.isthing)),
        stuff=group("Stuff", (c for c in categories if not c.isthing)),
        per_class={category.id: total[category.id] for category in categories},
    )
