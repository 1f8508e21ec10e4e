"""Which segments of one prediction are right: the matching of PQ, kept for pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from panoptic_cache.evaluate.metric.overlap import count_pairs
from panoptic_cache.pipeline.pictures.colours import LabelledMap, instance_numbers


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which segments of a prediction are right, as PQ counts them; positions start at 0.

    Attributes:
        matches: Position of the true segment, by that of the predicted one.
        missed: True segments without match (FN).
        false: Predicted segments without match that count as wrong (FP).
    """

    matches: dict[int, int]
    missed: tuple[int, ...]
    false: tuple[int, ...]


def compare(truth: LabelledMap, prediction: LabelledMap) -> Comparison:
    """Matches the segments of one image by the rules of `pq.match_image`, with counted areas."""
    overlap = count_pairs(truth.segment_map, prediction.segment_map)
    true_area = np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)
    area = np.bincount(prediction.segment_map.ravel(), minlength=len(prediction.labels) + 1)
    ignored: Counter[int] = Counter()
    last_crowd = {truth.labels[row]: row for row in sorted(truth.crowd)}
    matches: dict[int, int] = {}
    for (i, j), pixels in overlap.items():
        true, found = i - 1, j - 1
        if found < 0:
            continue
        label = prediction.labels[found]
        if true < 0 or last_crowd.get(label) == true:
            ignored[found] += pixels
        elif true not in truth.crowd and truth.labels[true] == label:
            union = true_area[i] + area[j] - pixels - overlap.get((0, j), 0)
            if 2 * pixels > union:
                matches[found] = true
    taken = set(matches.values()) | truth.crowd
    return Comparison(
        matches,
        tuple(row for row in range(len(truth.labels)) if row not in taken),
        tuple(
            row
            for row in range(len(prediction.labels))
            if row not in matches and 2 * ignored[row] <= area[row + 1]
        ),
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
