"""How well a perfect, or a perfectly noisy, network would score after decoding.

The ground truth is resized to the network's size, encoded, corrupted, decoded to native size and
scored. What is missing to 100 is the code's, the resize's and the decoder's, not the network's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluate.clock import Clock
from evaluate.decode import DecodeConfig, PanopticMap, decode
from evaluate.measures import thing_ids
from evaluate.pq import PQResult
from evaluate.scoring import ImageScore, Scores, score_image, total_scores
from pipeline.coco import Category, CocoPanoptic, PanopticRecord
from pipeline.errors import InputError
from pipeline.ids import read_ids
from pipeline.progress import progress
from pipeline.targets import geometry, index_map, resize_index
from train.encoding import Encoding, PositionalCode

LOGIT = 10.0
"""Of the true category; the others have 0. Unlabelled pixels have 0 everywhere: no opinion."""

NOISE_GRID = 8
"""Pixels between the values that smooth noise interpolates."""

SEMANTIC_SMOOTH = 0.17
"""Smooth noise of the logits at level 1, over `LOGIT`."""
SEMANTIC_WHITE = 0.04
"""White noise of the logits at level 1, over `LOGIT`."""

TOGETHER = 1 << 21
"""Pixels of the network's output that are decoded at once, at most: 11 images of 420 x 420."""

Decoder = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], PanopticMap]
"""Of (4L, h, w) codes, (C, h, w) logits, (C,) bool things and native (H, W)."""
BatchDecoder = Callable[
    [Sequence[Tensor], Sequence[Tensor], Tensor, Sequence[tuple[int, int]]], list[PanopticMap]
]
"""The same of several images."""


@dataclass(frozen=True, slots=True)
class Corrupted:
    """One image of a split, and what a network of some quality says of it.

    Attributes:
        record: The annotated image.
        ids: (H, W) int32 segment ids.
        code: (channels, size, size) float32.
        logits: (C, size, size) float32.
    """

    record: PanopticRecord
    ids: np.ndarray[Any, np.dtype[np.int32]]
    code: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The outcome.

    Attributes:
        scores: PQ and what stands beside it.
        images: How many were scored.
        seconds_per_image: Mean wall time of `encode` (with reading and corrupting), `decode` and
            `score`.
    """

    scores: Scores
    images: int
    seconds_per_image: dict[str, float]

    @property
    def pq(self) -> PQResult:
        """The metric."""
        return self.scores.pq

    def to_json(self) -> dict[str, Any]:
        """The object that `ceiling --json` prints: that of `score --json`, and two more."""
        return {
            **self.scores.to_json(),
            "images": self.images,
            "seconds_per_image": self.seconds_per_image,
        }


def ceiling(
    dataset: CocoPanoptic,
    *,
    size: int = 420,
    noise: float = 0.0,
    semantic_noise: float = 0.0,
    seed: int = 0,
    config: DecodeConfig | None = None,
) -> Ceiling:
    """Scores the ground truth of a split after encoding, corruption and decoding.

    Args:
        dataset: The annotated split.
        size: Side of the network's square input, pixels.
        noise: Level of corruption of the codes, see `corrupt`.
        semantic_noise: The same of the logits, see `corrupt_logits`.
        seed: Of the corruption; each image draws from its own generator.
        config: Settings of the decoder.

    Raises:
        InputError: The split is empty, or one of its images cannot be used.
    """
    decoders = {"ours": ours(config)}
    return compare_decoders(
        dataset, decoders, size=size, noise=noise, semantic_noise=semantic_noise, seed=seed
    )["ours"]


def ours(config: DecodeConfig | None = None) -> BatchDecoder:
    """The decoder of `evaluate/decode.py`."""

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
    seed: int = 0,
) -> dict[str, Ceiling]:
    """Gives several decoders the same codes; arguments and errors as of `ceiling`.

    Returns:
        What each of the decoders scores.
    """
    isthing = torch.tensor([category.isthing for category in dataset.categories])
    things, count = thing_ids(dataset.categories), len(dataset.records)
    found: dict[str, list[ImageScore]] = {name: [] for name in decoders}
    encoding, clocks = Clock(), {name: Clock() for name in decoders}
    images = corrupted_images(
        dataset, size=size, noise=noise, semantic_noise=semantic_noise, seed=seed
    )
    with progress(f"noise {noise:g}", count, "images") as advance:
        encoding.start()
        while batch := list(islice(images, max(1, TOGETHER // size**2))):
            encoding.lap("encode")
            codes, logits = [image.code for image in batch], [image.logits for image in batch]
            sizes = [(image.ids.shape[0], image.ids.shape[1]) for image in batch]
            for name, decoder in decoders.items():
                clocks[name].start()
                results = decoder(codes, logits, isthing, sizes)
                clocks[name].lap("decode")
                found[name] += [
                    _score(image, result, dataset.categories, things)
                    for image, result in zip(batch, results, strict=True)
                ]
                clocks[name].lap("score")
            advance(len(batch))
            encoding.start()
    return {
        name: Ceiling(
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


def corrupted_images(
    dataset: CocoPanoptic, *, size: int, noise: float, semantic_noise: float = 0.0, seed: int
) -> Iterator[Corrupted]:
    """The images of a split with their corrupted heads; arguments and errors as of `ceiling`."""
    if dataset.rejections or not dataset.records:
        first = dataset.rejections[0] if dataset.rejections else None
        raise InputError(
            f"image {first.image_id} cannot be scored: {first.message}" if first else "no images",
            where=first.file if first else "the split",
            remedy="evaluation never repairs ground truth: mend or remove it",
        )
    for number, record in enumerate(dataset.records):
        ids = read_ids(record.png)
        code, logits = perfect_heads(record, ids, dataset.categories, PositionalCode(), size)
        draw = seed * len(dataset.records) + number
        # Generators of their own, so that the noise of one head does not change the other's.
        generators = [torch.Generator().manual_seed(start) for start in (draw, -1 - draw)]
        yield Corrupted(
            record,
            ids,
            corrupt(code, noise, generators[0]),
            corrupt_logits(logits, semantic_noise, generators[1]),
        )


def perfect_heads(
    record: PanopticRecord,
    ids: np.ndarray[Any, np.dtype[np.int32]],
    categories: tuple[Category, ...],
    encoding: Encoding,
    size: int,
) -> tuple[Tensor, Tensor]:
    """What a network without error says.

    Args:
        record: The annotated image.
        ids: (H, W) int32 segment ids.
        categories: By label.
        encoding: Of the centroids; its targets must be what the network predicts.
        size: Side of the squashed picture, pixels.

    Returns:
        (channels, size, size) codes and (C, size, size) logits, float32.
    """
    by_id = {category.id: category for category in categories}
    rows = [by_id[segment.category_id] for segment in record.segments]
    index = resize_index(index_map(ids, [s.id for s in record.segments]), (size, size))
    found = geometry(index, len(rows))
    present = torch.tensor(
        [False]
        + [
            bool(category.isthing and not segment.iscrowd and area > 0)
            for category, segment, area in zip(rows, record.segments, found.area, strict=True)
        ]
    )
    centroids = torch.zeros(len(rows) + 1, 2)
    centroids[1:] = torch.from_numpy(found.centroid).nan_to_num()
    codes = encoding.encode(centroids, present)  # (n + 1, channels)
    logits = torch.zeros(len(rows) + 1, len(categories))
    for row, category in enumerate(rows, start=1):
        logits[row, category.label] = LOGIT
    pixels = torch.from_numpy(index.astype(np.int64)).flatten()
    return (
        codes.T.index_select(1, pixels).view(-1, size, size),
        logits.T.index_select(1, pixels).view(-1, size, size),
    )


def corrupt(code: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """A prediction as a network of some quality would make it.

    A Gaussian blur of sigma `level` pixels, as of a network unsure of its edges; plus 0.15 `level`
    times smooth noise (normal values every 8 pixels, bicubic between), as of one unsure of its
    centroids; plus 0.1 `level` times white noise.

    Args:
        code: (channels, h, w) float32.
        level: 0 returns the code; 3 is a poor network.
        generator: Of the noise, on the processor.

    Returns:
        (channels, h, w) float32.
    """
    if level == 0:
        return code
    return _disturbed(code, level, generator, smooth=0.15 * level, white=0.1 * level)


def corrupt_logits(logits: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Logits as a network of some quality would give them.

    As `corrupt`: a Gaussian blur of sigma `level` pixels, which rounds corners and loses what is
    thin; plus smooth noise, which moves borders and, where it exceeds the true category's lead,
    flips whole regions; plus white noise. Each category has its own noise, and it grows with the
    root of the level, for categories flip from some amplitude on. On COCO photos at 420 px, levels
    1 to 3 leave a mean IoU of 95, 75 and 54 percent.

    Args:
        logits: (C, h, w) float32, see `perfect_heads`.
        level: 0 returns the logits; 3 is a poor network.
        generator: Of the noise, on the processor.

    Returns:
        (C, h, w) float32.
    """
    if level == 0:
        return logits
    strength = LOGIT * math.sqrt(level)
    smooth, white = SEMANTIC_SMOOTH * strength, SEMANTIC_WHITE * strength
    return _disturbed(logits, level, generator, smooth=smooth, white=white)


def _disturbed(
    maps: Tensor, sigma: float, generator: torch.Generator, *, smooth: float, white: float
) -> Tensor:
    """(channels, h, w) maps, blurred, with noise of two kinds of these standard deviations."""
    channels, height, width = maps.shape
    reach = math.ceil(4 * sigma)
    offsets = torch.arange(-reach, reach + 1.0)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel /= kernel.sum()
    blurred = F.pad(maps[:, None], (reach,) * 4, mode="replicate")
    blurred = F.conv2d(blurred, kernel.view(1, 1, 1, -1))
    blurred = F.conv2d(blurred, kernel.view(1, 1, -1, 1))[:, 0]
    nodes = math.ceil(height / NOISE_GRID), math.ceil(width / NOISE_GRID)
    coarse = F.interpolate(
        torch.randn(1, channels, *nodes, generator=generator),
        size=(height, width),
        mode="bicubic",
        align_corners=False,
    )[0]
    fine = torch.randn(maps.shape, generator=generator)
    return blurred + smooth * coarse + white * fine
