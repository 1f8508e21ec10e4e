"""Decoders on the same heads: what each scores, how long it takes, and how sure a difference is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.decode import DecodeConfig, PanopticMap, decode
from panoptic_cache.evaluate.metric.score import (
    ImageScore,
    Scores,
    score_image,
    thing_ids,
    total_scores,
)
from panoptic_cache.evaluate.study.corruption import (
    Corruption,
    Quality,
    corrupted_heads,
    measure_quality,
)
from panoptic_cache.evaluate.study.heads import ImageHeads
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.coco import Category, CocoPanoptic
from panoptic_cache.train.encoding import Encoding, PositionalCode

RESAMPLES = 2000
"""Draws of images for an interval."""

Decoder = Callable[[ImageHeads], PanopticMap]


@dataclass
class Trial:
    """What one decoder made of a set of images."""

    images: list[ImageScore] = field(default_factory=list)  # Their scores, in order
    seconds: float = 0.0  # Of decoding


@dataclass
class Comparison:
    """What several decoders made of the same images."""

    categories: tuple[Category, ...]  # By label
    trials: dict[str, Trial]  # By the decoder's name
    # What the codes of each image look like, of those with clear ones.
    qualities: list[Quality] = field(default_factory=list)
    encode: float = 0.0  # Seconds of reading or making the heads
    score: float = 0.0  # Seconds of scoring all decoders

    def outcome(self, name: str) -> Scores:
        """The scores of a decoder, with the seconds of `encode`, `decode` and `score`."""
        trial = self.trials[name]
        score = self.score / len(self.trials)
        seconds = {"encode": self.encode, "decode": trial.seconds, "score": score}
        count = len(trial.images)
        mean = {step: round(value / count, 6) for step, value in seconds.items()}
        return total_scores(trial.images, self.categories, mean)

    def quality(self) -> Quality | None:
        """Medians over the images; None where no image has clear codes."""
        if not self.qualities:
            return None
        noises, drifts = zip(*((one.noise, one.drift) for one in self.qualities), strict=True)
        return Quality(median(noises), median(drifts))

    def interval(self, name: str, other: str) -> tuple[float, float]:
        """95 % interval of the difference of PQ, a fraction: a bootstrap over the same images."""
        count = len(self.trials[name].images)
        draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
        weights = np.stack([np.bincount(draw, minlength=count) for draw in draws]).astype(float)
        both = (self.trials[which].images for which in (name, other))
        first, second = (_mean_pq(weights, images, self.categories) for images in both)
        low, high = np.quantile(first - second, (0.025, 0.975))
        return float(low), float(high)


def _mean_pq(
    weights: NDArray[np.float64], images: Sequence[ImageScore], categories: Sequence[Category]
) -> NDArray[np.float64]:
    """(R,) All PQ where image i counts weights[r, i] times; 0 where no category has a segment."""
    stats = [[image.stat[category.id] for category in categories] for image in images]
    iou = np.array([[stat.iou for stat in row] for row in stats])  # (images, categories)
    whole = np.array([[stat.tp + 0.5 * stat.fp + 0.5 * stat.fn for stat in row] for row in stats])
    total = weights @ whole  # (R, categories)
    pq = np.divide(weights @ iou, total, out=np.zeros_like(total), where=total > 0)
    means: NDArray[np.float64] = pq.sum(1) / np.maximum((total > 0).sum(1), 1)
    return means


def compare_decoders(
    images: Iterator[ImageHeads],
    count: int,
    decoders: Mapping[str, Decoder],
    *,
    categories: tuple[Category, ...],
    title: str,
) -> Comparison:
    """Decodes and scores `count` images of positional codes by several decoders."""
    found = Comparison(categories, {name: Trial() for name in decoders})
    things = thing_ids(categories)
    with progress(title, count, "images") as advance:
        start = time.perf_counter()
        for image in images:
            found.encode += time.perf_counter() - start
            truth = image.name, image.ids, image.segments
            for name, decoder in decoders.items():
                start = time.perf_counter()
                map_ = decoder(image)
                decoded = time.perf_counter()
                kinds = {s.id: categories[s.label].id for s in map_.segments}
                scores = {s.id: s.score for s in map_.segments}
                scored = score_image(*truth, map_.ids, kinds, scores=scores, things=things)
                found.trials[name].images.append(scored)
                found.trials[name].seconds += decoded - start
                found.score += time.perf_counter() - decoded
            if quality := measure_quality(image, categories):
                found.qualities.append(quality)
            advance(1)
            start = time.perf_counter()
    return found


def our_decoder(categories: Sequence[Category], config: DecodeConfig | None = None) -> Decoder:
    """The decoder of `evaluate/decoder/decode.py`, of positional codes."""
    isthing = torch.tensor([category.isthing for category in categories])
    return lambda image: decode(
        [image.instance],
        [image.semantic],
        encoding=PositionalCode(),  # of any number of harmonics
        isthing=isthing,
        sizes=[image.size],
        config=config,
    )[0]


def ceiling(
    dataset: CocoPanoptic,
    corruption: Corruption,
    *,
    encoding: Encoding | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Scores, Quality | None]:
    """Scores the ground truth of a split after encoding, corruption and decoding.

    What is missing to 100 is the code's, the resize's and the decoder's, not the network's.
    `encoding` is the paper's by default. Raises InputError where the split is empty, or one of its
    images cannot be used.
    """
    code = encoding or PositionalCode()
    found = compare_decoders(
        (image.positional(code) for image in corrupted_heads(dataset, corruption, code)),
        len(dataset.records),
        {"ours": our_decoder(dataset.categories, config)},
        categories=dataset.categories,
        title="ceiling",
    )
    return found.outcome("ours"), found.quality()
