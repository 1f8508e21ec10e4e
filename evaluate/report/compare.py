"""Which segments of a prediction are right, as PQ matches them: for pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from panoptic_cache.evaluate.metric.matching import Overlap, match_segments
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.pictures.colours import LabelledMap, instance_numbers


@dataclass(frozen=True, slots=True)
class Comparison:
    """Right and wrong segments of one image, by position from 0."""

    matches: dict[int, int]  # Position of the true segment, by that of the predicted one
    missed: tuple[int, ...]  # True segments without match (FN)
    false: tuple[int, ...]  # Predicted segments without match that count as wrong (FP)


def compare(truth: LabelledMap, prediction: LabelledMap) -> Comparison:
    """Matches the segments of one image, with counted areas."""
    true = [
        SegmentInfo(row, label, row - 1 in truth.crowd)
        for row, label in enumerate(truth.labels, start=1)
    ]
    found = dict(enumerate(prediction.labels, start=1))
    overlap = Overlap.of(truth.segment_map, prediction.segment_map)
    matching = match_segments("", overlap, true, found)
    return Comparison(
        {found_id - 1: true_id - 1 for true_id, found_id in matching.ious},
        tuple(row - 1 for row in matching.missed),
        tuple(row - 1 for row in matching.false),
    )


def matched_numbers(
    truth: LabelledMap, prediction: LabelledMap, comparison: Comparison
) -> tuple[int, ...]:
    """Instance numbers of predicted segments that give a match its true segment's colour."""
    known = instance_numbers(truth.labels)
    next_free = Counter(truth.labels)
    numbers: list[int] = []
    for row, label in enumerate(prediction.labels):
        if row in comparison.matches:
            numbers.append(known[comparison.matches[row]])
        else:
            numbers.append(next_free[label])
            next_free[label] += 1
    return tuple(numbers)
