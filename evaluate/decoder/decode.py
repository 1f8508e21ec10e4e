"""From a network's output to a panoptic map: `decode_images` is the whole way.

    logits -> classes of the image -> thing, stuff, chance of each pixel
    codes -> noise -> means within a class -> votes -> basins -> instances -> segments

Votes are counted on a grid of cells (section 5.1), of 80 x 80 whatever the size of the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder import field, instances, segments
from panoptic_cache.evaluate.decoder.segments import DecodedSegment, PanopticMap
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.process import keep_heap
from panoptic_cache.train.encoding import GRID_CELLS, Encoding

__all__ = ["DecodeConfig", "DecodedSegment", "PanopticMap", "decode"]

LEAST_CELLS, MOST_CELLS = 20, 256
"""Fewer cannot tell the waves of a code with four harmonics; more only cost time and memory."""
TOGETHER = 1 << 22
"""Pixels that a GPU decodes at once: 23 images of 420 x 420."""


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of the decoder; one setting serves all networks and sizes that it was tried on."""

    # Cells along each axis of the grid that votes are counted on (section 5.1), 20 to 256. What the
    # decoder measures in cells, such as the width of `blur`, is in these.
    cells: int = GRID_CELLS
    # Log odds, averaged over an image, that a class must win pixels by to be in it.
    least_class: float = 0.0015
    # Pixels of the network's output over which codes are averaged to each side, for a noise of 1 (a
    # variance a channel; of trained networks 0.003, of poor ones 0.1).
    smoothing: float = 58.0
    # How far the semantic head moves the border between instance and void, in lengths of a typical
    # code: to 1/2 - trust where it is sure of a thing, 1/2 + trust of stuff.
    trust: float = 0.2
    # Width of the Gaussian over the votes, in distances between the votes of neighbours.
    blur: float = 1.0
    bias: float = 0.0  # Log odds, added to those that two groups of votes are one instance
    least_score: float = 0.4  # An instance with a lower score is dropped, see `segments.draw`
    min_stuff_area: int = 64  # Native pixels below which a stuff segment is dropped

    def __post_init__(self) -> None:
        if not LEAST_CELLS <= self.cells <= MOST_CELLS:
            remedy = f"give {LEAST_CELLS} to {MOST_CELLS}"
            raise InputError(f"{self.cells} cells", where="cells", remedy=remedy)


def decode(
    instance: Tensor | Sequence[Tensor],
    semantic: Tensor | Sequence[Tensor],
    *,
    encoding: Encoding,
    isthing: Tensor,
    sizes: Sequence[tuple[int, int]],
    config: DecodeConfig | None = None,
) -> list[PanopticMap]:
    """Decodes a batch of predictions, on the device that holds them.

    Args:
        instance: B times (channels, h, w) predicted codes; h and w may differ.
        semantic: B times (C, h, w) logits.
        encoding: The code the network was trained with.
        isthing: (C,) bool.
        sizes: Native (H, W) of each image.
        config: Settings; defaults where None.

    Returns:
        A map for each image, at its native size.

    Raises:
        InputError: A prediction holds NaN or infinite values; says which.
    """
    device = instance[0].device.type if len(sizes) else "cpu"
    if device == "cpu":
        keep_heap()
    known = torch.amp.is_autocast_available(device)
    shapes = [(code.shape[-2], code.shape[-1]) for code in instance]
    found: dict[int, PanopticMap] = {}
    with (
        torch.inference_mode(),  # whatever the caller has on
        torch.autocast(device, enabled=False) if known else nullcontext(),
    ):
        for images in together(shapes, on_gpu=device != "cpu"):
            maps = decode_images(
                stacked([instance[image] for image in images]),
                stacked([semantic[image] for image in images]),
                encoding=encoding,
                isthing=isthing,
                sizes=[sizes[image] for image in images],
                config=config or DecodeConfig(),
            )
            for image, map_ in zip(images, maps, strict=True):
                if map_ is None:
                    raise InputError(
                        "the network's output holds NaN or infinite values",
                        where=f"image {image + 1} of {len(sizes)}" if len(sizes) > 1 else "",
                        remedy="check the checkpoint, or run the network in float32",
                        code="prediction-not-finite",
                    )
                found[image] = map_
    return [found[image] for image in range(len(sizes))]


def decode_images(
    instance: Tensor,
    semantic: Tensor,
    *,
    encoding: Encoding,
    isthing: Tensor,
    sizes: Sequence[tuple[int, int]],
    config: DecodeConfig,
) -> list[PanopticMap | None]:
    """Decodes images of one size, see `decode`; None where a prediction is not finite.

    Heads are (B, channels, h, w) and (B, C, h, w) float32.
    """
    batch, categories, height, width = semantic.shape
    channels_first = instance.transpose(0, 1).flatten(1)  # (channels, B h w)
    code = encoding.to_positional(channels_first).unflatten(1, (batch, height, width))
    code = code.transpose(0, 1)  # (B, 4L, h, w)
    # A sum is not finite where one of its terms is not.
    finite = (semantic.flatten(1).sum(1) + code.flatten(1).sum(1)).isfinite()

    classes = field.read_classes(semantic, isthing.to(semantic.device), config.least_class)
    noise = field.measure_noise(code, classes.chance, config.cells)  # (B,)
    radius = (config.smoothing * noise).round().clamp(max=field.MAX_RADIUS).long()
    kind = torch.where(classes.chance >= 0.5, classes.thing, -1)  # (B, h, w)
    smoothed = field.smooth(code, kind, radius)
    votes = field.cast_votes(smoothed, classes, noise, radius, finite, cells=config.cells)

    maps: list[PanopticMap | None] = []
    for vote, size in zip(votes, sizes, strict=True):
        if vote is None:
            maps.append(None)
            continue
        voters = instances.find_voters(vote, config.trust)
        basins = instances.find_basins(voters, vote, config.blur)
        owner = instances.merge(basins, voters, vote, config.bias)
        painting = segments.draw(owner, voters, vote, categories, config.least_score)
        native = segments.resize_values(painting.values, size)
        maps.append(segments.number(painting, native, min_stuff_area=config.min_stuff_area))
    return maps


def stacked(heads: Sequence[Tensor]) -> Tensor:
    """(B, channels, h, w) float32; one image on the processor is not copied."""
    alone = len(heads) == 1 and heads[0].device.type == "cpu"
    return (heads[0][None] if alone else torch.stack(list(heads))).float()


def together(sizes: Sequence[tuple[int, int]], *, on_gpu: bool) -> Iterator[list[int]]:
    """Which images to decode at once: of one size, and not too many; on a processor one by one."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for (height, width), alike in groupby(order, key=sizes.__getitem__):
        images = list(alike)
        step = max(1, TOGETHER // (height * width)) if on_gpu else 1
        for start in range(0, len(images), step):
            yield images[start : start + step]
