"""All metrics of predictions in one pass: PQ, its breakdown and mask AP; of files, of a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric.breakdown import Breakdown, break_down, thing_ids, worst_images
from panoptic_cache.evaluate.metric.mask_ap import ImageInstances, mask_ap, match_instances
from panoptic_cache.evaluate.metric.matching import checked_overlap
from panoptic_cache.evaluate.metric.pairs import ImagePair
from panoptic_cache.evaluate.metric.pq import ImageStat, PQResult, match_overlap, total_pq
from panoptic_cache.evaluate.metric.workers import Ids, map_pairs
from panoptic_cache.pipeline.annotations import ImageId, SegmentInfo, is_area
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category, CocoPanoptic
from panoptic_cache.pipeline.png import check_known


@dataclass(frozen=True, slots=True)
class ImageScore:
    """What one image adds."""

    pq: ImageStat  # Its counts
    breakdown: Breakdown  # Its other sums
    instances: ImageInstances  # Its instances, for AP

    @property
    def value(self) -> float | None:
        """PQ of the image, see `PQStat.mean_pq`."""
        return self.pq.stat.mean_pq


@dataclass(frozen=True, slots=True)
class Scores:
    """The metrics of a split."""

    pq: PQResult  # Panoptic quality
    breakdown: Breakdown  # The other sums
    mask_ap: dict[str, float | None] | None  # See `mask_ap.mask_ap`
    worst: list[dict[str, Any]]  # See `breakdown.worst_images`
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
        match_overlap(image_id, overlap, gt_segments, pred_segments),
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
        total_pq((image.pq for image in images), categories),
        sum((image.breakdown for image in images), start=Breakdown()),
        mask_ap([image.instances for image in images], categories),
        worst_images((image.pq.image_id, image.value) for image in images),
        len(images),
        seconds_per_image or {},
    )


def score_pairs(
    categories: Sequence[Category],
    pairs: Sequence[ImagePair],
    *,
    workers: int = 1,
    advance: Callable[[], None] | None = None,
) -> Scores:
    """Scores pairs of files; the result is the same for any number of workers.

    Args:
        categories: Of the ground truth.
        pairs: From `pairs.read_pairs`.
        workers: Processes; 1 works in this one.
        advance: Called after each image.

    Raises:
        InputError: Whatever is wrong with the files, naming image and segments.
    """
    images = []
    for image in map_pairs(pairs, partial(_score_pair, thing_ids(categories)), workers=workers):
        images.append(image)
        if advance is not None:
            advance()
    return total_scores(images, categories)


def _score_pair(things: frozenset[int], pair: ImagePair, gt_ids: Ids, pred_ids: Ids) -> ImageScore:
    return score_image(
        pair.image_id,
        gt_ids,
        pair.gt_segments,
        pred_ids,
        pair.pred_segments,
        scores=pair.pred_scores,
        things=things,
    )
