"""From a network's output to a panoptic map.

    codes -> noise -> votes of the pixels -> instances -> every pixel to an instance or none
    logits -> stuff where no instance is, and the class of each instance by majority vote

Codes are noisy to a degree that no fixed threshold suits: so the noise is measured first, as what
codes hold beside the nearest grid point, and smoothing and suppression follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder.assign import assign
from panoptic_cache.evaluate.decoder.confidence import confidences
from panoptic_cache.evaluate.decoder.instances import DecodeConfig, find_instances, measure_noise
from panoptic_cache.evaluate.decoder.parallel import both, each_image
from panoptic_cache.evaluate.decoder.pixels import NotFiniteError, Pixels
from panoptic_cache.evaluate.decoder.rescue import rescue
from panoptic_cache.evaluate.decoder.segments import (
    DecodedSegment,
    PanopticMap,
    number,
    paint,
    resize_values,
)
from panoptic_cache.evaluate.decoder.smoothing import Smoother
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.heap import keep_heap
from panoptic_cache.train.encoding import Encoding

__all__ = ["DecodeConfig", "DecodedSegment", "PanopticMap", "decode"]

TOGETHER = 1 << 22
"""Pixels that a GPU decodes at once: 23 images of 420 x 420."""


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

    A GPU works on many images at once, a processor on one with each thread; see `parallel.py`.

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
    settings = config or DecodeConfig()

    device = instance[0].device.type if len(sizes) else "cpu"

    def run(images: list[int]) -> list[PanopticMap]:
        known = torch.amp.is_autocast_available(device)
        off = torch.autocast(device, enabled=False) if known else nullcontext()
        with torch.inference_mode(), off:  # whatever the caller has on
            return decode_group(images)

    def decode_group(images: list[int]) -> list[PanopticMap]:
        try:
            pixels = Pixels.of(
                [instance[image] for image in images],
                [semantic[image] for image in images],
                encoding=encoding,
                isthing=isthing,
            )
        except NotFiniteError as error:
            place = f"image {images[error.image] + 1} of {len(sizes)}"
            raise InputError(
                "the network's output holds NaN or infinite values",
                where=place if len(sizes) > 1 else "",
                remedy="check the checkpoint, or run the network in float32",
                code="prediction-not-finite",
            ) from None
        return decode_pixels(pixels, [sizes[image] for image in images], settings)

    shapes = [(code.shape[-2], code.shape[-1]) for code in instance]
    groups = list(together(shapes, on_gpu=device != "cpu"))
    if device == "cpu":
        keep_heap()
        found = each_image(run, groups)
    else:
        found = [run(images) for images in groups]
    maps = {
        image: one
        for images, some in zip(groups, found, strict=True)
        for image, one in zip(images, some, strict=True)
    }
    return [maps[image] for image in range(len(sizes))]


def together(sizes: Sequence[tuple[int, int]], *, on_gpu: bool) -> Iterator[list[int]]:
    """Which images to decode at once: of one size, and not too many."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for (height, width), alike in groupby(order, key=sizes.__getitem__):
        images = list(alike)
        step = max(1, TOGETHER // (height * width)) if on_gpu else 1
        for start in range(0, len(images), step):
            yield images[start : start + step]


def decode_pixels(
    pixels: Pixels, sizes: Sequence[tuple[int, int]], config: DecodeConfig
) -> list[PanopticMap]:
    """Decodes images of one size; see `decode`.

    Pixels are worked on for all images at once; what waits for the device does so a few times a
    batch, not an image. From the instance of each pixel on, the work is the processor's.
    """
    noise = measure_noise(pixels, config)
    kinds: dict[tuple[bool, bool], list[int]] = {}  # clean, or smoothed once or twice
    for image, each in enumerate(noise):
        kind = config.is_clean(each), config.smoothing_radius(each) > 1
        kinds.setdefault(kind, []).append(image)
    maps: dict[int, PanopticMap] = {}
    for images in kinds.values():
        decoded = decode_alike(
            pixels.take(images),
            [noise[image] for image in images],
            [sizes[image] for image in images],
            config,
        )
        maps.update(zip(images, decoded, strict=True))
    return [maps[image] for image in range(len(sizes))]


def decode_alike(
    pixels: Pixels,
    noise: Sequence[float],
    sizes: Sequence[tuple[int, int]],
    config: DecodeConfig,
) -> list[PanopticMap]:
    """The same of images that are smoothed at the same places."""
    smoother = None if config.is_clean(noise[0]) else Smoother.of(pixels)
    found = find_instances(pixels, smoother, noise, config)
    member = assign(pixels, smoother, found, noise, config)
    members, labels = (map_.view(pixels.shape).cpu().numpy() for map_ in (member, pixels.labels))
    rescue(pixels, found, members=members, labels=labels, noise=noise, config=config)
    paintings = [
        paint(owner, label, pixels.things, min_instance_area=config.min_instance_area)
        for owner, label in zip(members, labels, strict=True)
    ]
    scores, natives = both(
        lambda: confidences(pixels, paintings),
        lambda: [
            resize_values(one.values, size) for one, size in zip(paintings, sizes, strict=True)
        ],
    )
    return [
        number(*parts, min_stuff_area=config.min_stuff_area)
        for parts in zip(paintings, natives, scores, strict=True)
    ]
