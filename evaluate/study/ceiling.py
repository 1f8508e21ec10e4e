"""How well a perfect, or a perfectly noisy, network would score after decoding.

The ground truth is resized to the network's size, encoded, corrupted, decoded to native size and
scored. What is missing to 100 is the code's, the resize's and the decoder's, not the network's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder.decode import DecodeConfig, PanopticMap, decode
from panoptic_cache.evaluate.metric.breakdown import thing_ids
from panoptic_cache.evaluate.metric.score import ImageScore, Outcome, score_image, total_scores
from panoptic_cache.evaluate.study.corruption import Corrupted, corrupted_images
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.coco import Category, CocoPanoptic
from panoptic_cache.train.encoding import PositionalCode

BATCH, LARGEST = 8, 1 << 30
"""Images that are decoded at once, and bytes that their heads may have."""

Decoder = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], PanopticMap]
"""Of (4L, h, w) codes, (C, h, w) logits, (C,) bool things and native (H, W)."""
BatchDecoder = Callable[
    [Sequence[Tensor], Sequence[Tensor], Tensor, Sequence[tuple[int, int]]], list[PanopticMap]
]
"""The same of several images."""


class Clock:
    """Adds up wall time by name."""

    def __init__(self, *names: str) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(names, 0.0)
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begins a lap."""
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a lap, and begins the next."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def per_unit(self, units: int) -> dict[str, float]:
        """Seconds by name, divided by a number of units."""
        return {name: round(seconds / units, 6) for name, seconds in self.seconds.items()}


def ceiling(
    dataset: CocoPanoptic,
    *,
    size: int = 420,
    noise: float = 0.0,
    semantic_noise: float = 0.0,
    drift: float = 0.0,
    seed: int = 0,
    config: DecodeConfig | None = None,
) -> Outcome:
    """Scores the ground truth of a split after encoding, corruption and decoding.

    Args:
        dataset: The annotated split.
        size: Side of the network's square input, pixels.
        noise: Level of corruption of the codes, see `corruption.corrupt`.
        semantic_noise: The same of the logits, see `corruption.corrupt_logits`.
        drift: Cells of 80 that centroids slide over an instance, see `corruption.Drift`.
        seed: Of the corruption; each image draws from its own generator.
        config: Settings of the decoder; defaults where None.

    Returns:
        With the seconds of `encode` (reading and corrupting too), `decode` and `score`.

    Raises:
        InputError: The split is empty, or one of its images cannot be used.
    """
    decoders = {"ours": ours(config)}
    return compare_decoders(
        dataset,
        decoders,
        size=size,
        noise=noise,
        semantic_noise=semantic_noise,
        drift=drift,
        seed=seed,
    )["ours"]


def ours(config: DecodeConfig | None = None) -> BatchDecoder:
    """The decoder of `evaluate/decoder/decode.py`."""

    def run(
        codes: Sequence[Tensor],
        logits: Sequence[Tensor],
        isthing: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[PanopticMap]:
        encoding = PositionalCode()
        return decode(codes, logits, encoding=encoding, isthing=isthing, sizes=sizes, config=config)

    return run


def one_by_one(decoder: Decoder) -> BatchDecoder:
    """A decoder of one image, for several."""

    def run(
        codes: Sequence[Tensor],
        logits: Sequence[Tensor],
        isthing: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[PanopticMap]:
        images = zip(codes, logits, sizes, strict=True)
        return [decoder(code, scores, isthing, size) for code, scores, size in images]

    return run


def compare_decoders(
    dataset: CocoPanoptic,
    decoders: Mapping[str, BatchDecoder],
    *,
    size: int,
    noise: float,
    semantic_noise: float = 0.0,
    drift: float = 0.0,
    seed: int = 0,
) -> dict[str, Outcome]:
    """Gives several decoders the same codes; arguments and errors as of `ceiling`.

    Returns:
        What each of the decoders scores.
    """
    isthing = torch.tensor([category.isthing for category in dataset.categories])
    things, count = thing_ids(dataset.categories), len(dataset.records)
    found: dict[str, list[ImageScore]] = {name: [] for name in decoders}
    encoding, clocks = Clock(), {name: Clock() for name in decoders}
    images = corrupted_images(
        dataset, size=size, noise=noise, semantic_noise=semantic_noise, drift=drift, seed=seed
    )
    channels = PositionalCode().channels + len(dataset.categories)
    step = max(1, min(BATCH, LARGEST // (4 * channels * size**2)))

    def decode_some() -> int:
        """Draws, decodes and scores the next few; how many these were."""
        encoding.start()
        batch = list(islice(images, step))
        encoding.lap("encode")
        codes, logits = [image.code for image in batch], [image.logits for image in batch]
        sizes = [(image.ids.shape[0], image.ids.shape[1]) for image in batch]
        for name, decoder in decoders.items() if batch else ():
            clocks[name].start()
            results = decoder(codes, logits, isthing, sizes)
            clocks[name].lap("decode")
            found[name] += [
                _score(image, result, dataset.categories, things)
                for image, result in zip(batch, results, strict=True)
            ]
            clocks[name].lap("score")
        return len(batch)

    with progress(f"noise {noise:g} and {semantic_noise:g}", count, "images") as advance:
        while some := decode_some():
            advance(some)
    return {
        name: Outcome(
            total_scores(images, dataset.categories),
            count,
            {**encoding.per_unit(count), **clocks[name].per_unit(count)},
        )
        for name, images in found.items()
    }


def _score(
    image: Corrupted, result: PanopticMap, categories: Sequence[Category], things: frozenset[int]
) -> ImageScore:
    return score_image(
        image.record.image_id,
        image.ids,
        image.record.segments,
        result.ids,
        {s.id: categories[s.label].id for s in result.segments},
        scores={s.id: s.score for s in result.segments},
        things=things,
    )
