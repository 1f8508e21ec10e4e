"""PQ on held-out samples during training, as a run's `validation.metric` names it.

    --set validation.cache=DIR
    --set validation.metric=panoptic_cache.evaluate.held_out:panoptic_quality

Training finds it by that name, so that it does not depend on this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

from panoptic_cache.evaluate.metric.pq import PQStat, match_image, summarize
from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.photo import decode_photo
from panoptic_cache.train.checkpoint import TrainState
from panoptic_cache.train.model import PanopticModel

BATCH = 8
"""Samples that the network takes at once."""


def panoptic_quality(
    model: PanopticModel, state: TrainState, samples: Iterable[Sample]
) -> dict[str, float]:
    """PQ of samples at the size they were cached at; see `panoptic_cache.train.validation.Metric`.

    On a cache of native size this is the official metric. On a resized cache it is only close to
    it: good for comparing checkpoints, while `panoptic evaluate` gives the number to report.

    Returns `pq`, `pq_things` and `pq_stuff` as fractions, those that are defined. Raises InputError
    where a prediction is not finite, or a photo is damaged.
    """
    predictor, total, rest = Predictor.of_model(model, state), PQStat(), iter(samples)
    while batch := list(islice(rest, BATCH)):
        photos = [decode_photo(sample.photo, f"{sample.key}.jpg") for sample in batch]
        for sample, result in zip(batch, predictor(photos), strict=True):
            # The cache holds positions in the segment table, the metric compares ids.
            ids = np.array([0, *(s.id for s in sample.segments)], np.int32)[sample.segment_map]
            truth = [SegmentInfo(s.id, s.category_id, s.iscrowd) for s in sample.segments]
            classes = {s.id: predictor.categories[s.label].id for s in result.segments}
            total += match_image(sample.image_id, ids, truth, result.ids, classes)
    found = summarize(total, predictor.categories)
    groups = {"pq": found.all, "pq_things": found.things, "pq_stuff": found.stuff}
    return {name: group.pq for name, group in groups.items() if group is not None}
