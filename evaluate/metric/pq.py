"""Panoptic quality, equal to the official evaluator: two JSONs + PNGs -> `PQResult`.

    ImagePair (evaluate/metric/pairs.py) -> ImageStat, one an image -> PQStat, their sum -> PQResult

A segment is matched where its intersection over union with a segment of the same category exceeds
0.5; PQ of a category is sum IoU / (TP + FP/2 + FN/2) (Kirillov et al., Panoptic Segmentation,
CVPR 2019, equation 1). Void, crowd and ground-truth areas follow cocodataset/panopticapi.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.overlap import (
    VOID,
    check_listed,
    check_sizes,
    count_pairs,
    segment_areas,
)
from panoptic_cache.evaluate.metric.pairs import ImagePair, listing, read_pairs
from panoptic_cache.evaluate.metric.pool import Ids, map_pairs
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category, ImageId, SegmentInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CategoryStat:
    """Counts of one category; they add up over images.

    Attributes:
        tp: Matched pairs.
        fp: Predicted segments without match.
        fn: Ground-truth segments without match.
        iou: Sum of the IoU of the matched pairs.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou: float = 0.0

    def __add__(self, other: CategoryStat) -> CategoryStat:
        return CategoryStat(
            self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.iou + other.iou
        )

    @property
    def empty(self) -> bool:
        """No segment of the category counted anywhere: it enters no mean."""
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

    Floats make the order of a sum matter in the last digit: add in the order of the images.
    """

    categories: Mapping[int, CategoryStat] = field(default_factory=dict)

    def __add__(self, other: PQStat) -> PQStat:
        total = dict(self.categories)
        for category_id, stat in other.categories.items():
            total[category_id] = total.get(category_id, CategoryStat()) + stat
        return PQStat(total)

    def __getitem__(self, category_id: int) -> CategoryStat:
        return self.categories.get(category_id, CategoryStat())


@dataclass(frozen=True, slots=True)
class ImageStat:
    """What one image adds.

    Attributes:
        image_id: As annotated.
        stat: Its counts.
        wrong_areas: Ids of ground-truth segments (no crowd) whose JSON area, which PQ trusts,
            differs from the PNG.
    """

    image_id: ImageId
    stat: PQStat
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
    """The metric of a split.

    Attributes:
        all: Over all categories; None (undefined) where no category has a segment.
        things: The same, over things.
        stuff: The same, over stuff.
        per_class: Counts of every category of the ground truth, by ascending id.
    """

    all: GroupPQ | None
    things: GroupPQ | None
    stuff: GroupPQ | None
    per_class: Mapping[int, CategoryStat]

    def to_json(self) -> dict[str, Any]:
        """The object that `panoptic score --json` prints: fractions, undefined groups null."""
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
    """Matches one image as the official evaluator does.

    Predicted areas are counted; ground-truth areas are trusted. Predicted pixels on ground-truth
    void leave the union. An unmatched prediction is no false positive if more than half of it
    lies on void and on the last listed crowd segment of its own category.

    Args:
        image_id: For messages and the result.
        gt_ids: (H, W) integer, 0 = void.
        gt_segments: Distinct ids above 0, as listed: the order decides which crowd segment
            protects. An area of None is counted from the map.
        pred_ids: (H, W) integer, 0 = void.
        pred_segments: Category id by segment id.

    Raises:
        InputError: Sizes differ, the map and the list of the prediction disagree, or an area of
            the ground truth is smaller than what it shares with a prediction.
    """
    check_sizes(image_id, gt_ids, pred_ids)
    overlap = count_pairs(gt_ids, pred_ids)
    check_listed(image_id, overlap, pred_segments)
    return match_overlap(image_id, overlap, gt_segments, pred_segments)


def match_overlap(
    image_id: ImageId,
    overlap: Mapping[tuple[int, int], int],
    gt_segments: Sequence[SegmentInfo],
    pred_segments: Mapping[int, int],
) -> ImageStat:
    """`match_image` from the pixels that segments share; see there.

    Args:
        image_id: For messages and the result.
        overlap: See `count_pairs`.
        gt_segments: As listed; those left out count as neither void nor segment.
        pred_segments: Category id by segment id; those left out do not count.

    Raises:
        InputError: An area is smaller than what it shares with a prediction.
    """
    gt = {segment.id: segment for segment in gt_segments}
    gt_area, pred_area = segment_areas(overlap, side=0), segment_areas(overlap, side=1)
    stats: dict[int, CategoryStat] = {}

    def count(category_id: int, one: CategoryStat) -> None:
        stats[category_id] = stats.get(category_id, CategoryStat()) + one

    matched_gt: set[int] = set()
    matched_pred: set[int] = set()
    for (gt_id, pred_id), intersection in overlap.items():
        segment, category_id = gt.get(gt_id), pred_segments.get(pred_id)
        if segment is None or segment.iscrowd or segment.category_id != category_id:
            continue
        area = gt_area[gt_id] if segment.area is None else segment.area
        union = pred_area[pred_id] + area - intersection - overlap.get((VOID, pred_id), 0)
        if union <= 0:
            raise InputError(
                f"ground-truth segment {gt_id} has area {area} in the JSON, but shares "
                f"{intersection} pixels with predicted segment {pred_id}",
                where=f"image {image_id}",
                remedy="set the areas of the ground truth to the pixel counts of its PNG",
                code="area-wrong",
            )
        if (iou := intersection / union) > 0.5:
            count(category_id, CategoryStat(tp=1, iou=iou))
            matched_gt.add(gt_id)
            matched_pred.add(pred_id)

    crowd: dict[int, int] = {}
    for segment in gt.values():
        if segment.iscrowd:
            crowd[segment.category_id] = segment.id
        elif segment.id not in matched_gt:
            count(segment.category_id, CategoryStat(fn=1))

    for pred_id, category_id in pred_segments.items():
        if pred_id in matched_pred:
            continue
        ignored = overlap.get((VOID, pred_id), 0)
        if category_id in crowd:
            ignored += overlap.get((crowd[category_id], pred_id), 0)
        if not ignored / pred_area[pred_id] > 0.5:
            count(category_id, CategoryStat(fp=1))

    wrong = tuple(
        segment.id
        for segment in gt.values()
        if not segment.iscrowd and segment.area not in (None, gt_area.get(segment.id, 0))
    )
    return ImageStat(image_id, PQStat(stats), wrong)


def summarize(total: PQStat, categories: Sequence[Category]) -> PQResult:
    """Means over categories. A group without any segment is None, and a warning says so.

    Args:
        total: The sum over all images.
        categories: Of the ground truth.

    Raises:
        ValueError: `total` counts a category that is not among them.
    """
    if unknown := total.categories.keys() - {category.id for category in categories}:
        raise ValueError(f"statistics of unknown categories {listing(unknown)}")

    def group(name: str, members: Iterable[Category]) -> GroupPQ | None:
        stats = [total[category.id] for category in members if not total[category.id].empty]
        if not stats:
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


def score(
    gt_json: Path,
    pred_json: Path,
    gt_dir: Path | None = None,
    pred_dir: Path | None = None,
    *,
    workers: int = 1,
) -> PQResult:
    """Scores a folder of predictions; the result is the same for any number of workers.

    Args:
        gt_json: COCO panoptic annotations of the ground truth; its images are scored.
        pred_json: Predictions in COCO panoptic format; `categories` may be absent.
        gt_dir: Folder of the ground truth's PNGs; the JSON's path without `.json` if None.
        pred_dir: The same for the predictions.
        workers: Processes; 1 works in this one.

    Raises:
        InputError: Whatever is wrong with the files, naming image and segments.
    """
    categories, pairs = read_pairs(gt_json, pred_json, gt_dir, pred_dir)
    return score_pairs(categories, pairs, workers=workers)


def score_pairs(
    categories: Sequence[Category],
    pairs: Sequence[ImagePair],
    *,
    workers: int = 1,
    advance: Callable[[], None] | None = None,
) -> PQResult:
    """Scores pairs of images, see `score`; calls `advance` after each one."""
    images = []
    for image in evaluate_images(pairs, workers=workers):
        images.append(image)
        if advance is not None:
            advance()
    return total_pq(images, categories)


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


def evaluate_images(pairs: Sequence[ImagePair], *, workers: int = 1) -> Iterator[ImageStat]:
    """Reads and matches the images; see `map_pairs`."""
    return map_pairs(pairs, _match, workers=workers)


def _match(pair: ImagePair, gt_ids: Ids, pred_ids: Ids) -> ImageStat:
    return match_image(pair.image_id, gt_ids, pair.gt_segments, pred_ids, pair.pred_segments)
