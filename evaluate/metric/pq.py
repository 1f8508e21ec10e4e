"""Panoptic quality, equal to the official evaluator.

    Matching of an image -> PQStat, one an image -> their sum -> PQResult

PQ of a category is sum IoU / (TP + FP/2 + FN/2) (Kirillov et al., Panoptic Segmentation, CVPR 2019,
equation 1). Void, crowd and ground-truth areas follow cocodataset/panopticapi.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.matching import Overlap, checked_overlap, match_segments
from panoptic_cache.evaluate.metric.pairs import listing, png_folder
from panoptic_cache.pipeline.annotations import ImageId, SegmentInfo
from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category

logger = logging.getLogger(__name__)

TOLERANCE = 1e-9
"""Differences below are rounding; sums in another order differ by some 1e-15."""
SOURCE = "git+https://github.com/cocodataset/panopticapi.git"
GROUPS = {"All": None, "Things": True, "Stuff": False}
"""Its own names, and what it calls `isthing`."""
COUNTS = ("tp", "fp", "fn", "iou")


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
    """Counts of one image or of many.

    The order of a sum of floats changes its last digit: add in the order of the images.
    """

    # By category id; a category never seen is absent.
    categories: Mapping[int, CategoryStat] = field(default_factory=dict)
    # By image, ids of true segments (no crowd) whose area in the JSON, which PQ trusts, is another
    # one in the PNG.
    wrong_areas: Mapping[ImageId, tuple[int, ...]] = field(default_factory=dict)

    def __add__(self, other: PQStat) -> PQStat:
        total = dict(self.categories)
        for category_id, stat in other.categories.items():
            total[category_id] = total.get(category_id, CategoryStat()) + stat
        return PQStat(total, {**self.wrong_areas, **other.wrong_areas})

    def __getitem__(self, category_id: int) -> CategoryStat:
        return self.categories.get(category_id, CategoryStat())

    @property
    def mean_pq(self) -> float | None:
        """Mean PQ of the categories with a segment; None without one."""
        values = [stat.pq for stat in self.categories.values() if not stat.empty]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class GroupPQ:
    """Unweighted means over the `n` categories of a group that have a segment; fractions."""

    pq: float
    sq: float
    rq: float
    n: int


@dataclass(frozen=True, slots=True)
class PQResult:
    """The metric of a split; a group is None (undefined) where no category has a segment."""

    all: GroupPQ | None
    things: GroupPQ | None
    stuff: GroupPQ | None
    per_class: Mapping[int, CategoryStat]  # Of every category, by ascending id

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
) -> PQStat:
    """Counts the segments of one image, see `match_segments`.

    Args:
        image_id: For messages and the result.
        gt_ids: (H, W) integer, 0 = void.
        gt_segments: Distinct ids above 0, as listed: the order decides which crowd segment
            excuses predictions. Areas are trusted; one of None is counted from the map.
        pred_ids: (H, W) integer, 0 = void. Areas are counted.
        pred_segments: Category id by segment id.

    Raises:
        InputError: Sizes differ, the map and the list of the prediction disagree, or an area of
            the ground truth is smaller than what it shares with a prediction.
    """
    overlap = checked_overlap(image_id, gt_ids, pred_ids, pred_segments)
    return count_segments(image_id, overlap, gt_segments, pred_segments)


def count_segments(
    image_id: ImageId,
    overlap: Overlap,
    gt_segments: Sequence[SegmentInfo],
    pred_segments: Mapping[int, int],
    *,
    every_crowd: bool = False,
) -> PQStat:
    """The counts of one image; arguments as of `match_segments`."""
    found = match_segments(image_id, overlap, gt_segments, pred_segments, every_crowd=every_crowd)
    true = {segment.id: segment.category_id for segment in gt_segments}
    counts = [
        *(
            (pred_segments[id_], CategoryStat(tp=1, iou=iou))
            for (_, id_), iou in found.ious.items()
        ),
        *((true[id_], CategoryStat(fn=1)) for id_ in found.missed),
        *((pred_segments[id_], CategoryStat(fp=1)) for id_ in found.false),
    ]
    stats: dict[int, CategoryStat] = {}
    for category_id, one in counts:
        stats[category_id] = stats.get(category_id, CategoryStat()) + one
    wrong = tuple(
        segment.id
        for segment in gt_segments
        if not segment.iscrowd and segment.area not in (None, overlap.true_area.get(segment.id, 0))
    )
    return PQStat(stats, {image_id: wrong} if wrong else {})


def summarize(total: PQStat, categories: Sequence[Category]) -> PQResult:
    """Means over categories; warns of a group that is undefined, and of areas that cannot be true.

    Raises ValueError where `total`, the sum over all images, counts a category not among them.
    """
    if unknown := total.categories.keys() - {category.id for category in categories}:
        raise ValueError(f"statistics of unknown categories {listing(unknown)}")
    if wrong := total.wrong_areas:
        image_id, ids = next(iter(wrong.items()))
        logger.warning(
            "%d ground-truth segments of %d images have another area in the JSON than in the PNG, "
            "such as %s of image %s. As in the official evaluator the JSON counts, and PQ may "
            "exceed 1: set the areas to the pixel counts",
            sum(map(len, wrong.values())), len(wrong), listing(ids), image_id,
        )  # fmt: skip

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
        group("All", categories),
        group("Things", (c for c in categories if c.isthing)),
        group("Stuff", (c for c in categories if not c.isthing)),
        {category.id: total[category.id] for category in categories},
    )


# The reference evaluator, cocodataset/panopticapi, beside ours; optional, on no package index. Its
# `pq_compute` forks as many processes as there are processors, prints, and divides by zero where a
# group has no segment. So its parts are called one by one: the matching of each image, in this
# process, and the averages of each group.


def import_official() -> ModuleType:
    """The reference's module; InputError where it is not installed."""
    try:
        return importlib.import_module("panopticapi.evaluation")
    except ImportError as error:
        raise InputError(
            f"the official evaluator cannot be imported: {error}",
            remedy=f"pip install '{SOURCE}', or score without --official",
            code="official-missing",
        ) from None


def run_official(
    reference: Any,
    gt_json: Path,
    pred_json: Path,
    gt_dir: Path | None = None,
    pred_dir: Path | None = None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs the reference on files that ours has accepted, in this process, quietly.

    Arguments as of `pairs.read_pairs`; `advance` is called after each image. Returns the keys of
    `PQResult.to_json`, a group that it divides by zero for as None. Raises InputError where the
    reference fails on an image.
    """
    gt, pred = (decode_json(path.read_bytes(), dict) for path in (gt_json, pred_json))
    categories = {row["id"]: row for row in gt["categories"]}
    folders = str(gt_dir or png_folder(gt_json)), str(pred_dir or png_folder(pred_json))
    predictions = {row["image_id"]: row for row in pred["annotations"]}
    match = inspect.unwrap(reference.pq_compute_single_core)  # wrapped, it prints tracebacks
    total = reference.PQStat()
    for row in gt["annotations"]:
        pair = row, predictions[row["image_id"]]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                total += match(0, [pair], *folders, categories)
        except Exception as error:  # noqa: BLE001 - a KeyError for most of what it refuses
            raise InputError(
                f"the official evaluator fails where ours does not: {type(error).__name__} {error}",
                where=f"{pred_json}: image {row['image_id']}",
                remedy="score without --official",
                code="official-failed",
            ) from None
        advance()
    found: dict[str, Any] = dict.fromkeys(GROUPS)
    counts = {id_: {name: getattr(total[id_], name) for name in COUNTS} for id_ in categories}
    for name, isthing in GROUPS.items():
        with contextlib.suppress(ZeroDivisionError):
            group, members = total.pq_average(categories, isthing=isthing)
            found[name] = _plain(group)
            for id_, means in members.items():
                counts[id_] |= means
    return {**found, "per_class": {str(id_): _plain(values) for id_, values in counts.items()}}


def compare_results(ours: PQResult, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The key `official` of `score --official --json`; `theirs` is what `run_official` returned.

    The reference's groups, the largest absolute `difference` of any number of ours from its, and
    `at` which number, such as `All pq` or `category 17 sq`. An undefined group counts as zeros.
    """
    mine = ours.to_json()
    pairs = {f"{name} ": (mine[name], theirs[name]) for name in GROUPS}
    for id_, values in theirs["per_class"].items():
        pairs[f"category {id_} "] = mine["per_class"][id_], values
    differences = [(0.0, "nowhere")]
    for where, (one, other) in pairs.items():
        a, b = one or {}, other or {}
        differences += [(abs(a.get(key, 0) - b.get(key, 0)), where + key) for key in {**a, **b}]
    difference, at = max(differences, key=lambda row: row[0])
    return {**{name: theirs[name] for name in GROUPS}, "difference": difference, "at": at}


def _plain(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of Python; the reference's are numpy's."""
    return {
        name: value if isinstance(value, int) else float(value) for name, value in values.items()
    }
