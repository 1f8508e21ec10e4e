"""From a network's output to a panoptic map.

    codes -> noise -> votes of the pixels -> instances -> every pixel to an instance or none
    logits -> stuff where no instance is, and the class of each instance by majority vote

Codes are noisy to a degree that no fixed threshold suits: so the noise is measured first, as what
codes hold beside the nearest grid point, and smoothing and suppression follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evaluate.instances import (
    DecodeConfig,
    Pixels,
    assign,
    find_instances,
    measure_noise,
    rescue,
)
from evaluate.peaks import packed_argmax
from evaluate.segments import DecodedSegment, PanopticMap, number, paint
from evaluate.smoothing import places
from pipeline.errors import InputError
from train.encoding import (
    ClassificationCode,
    DirectCode,
    Encoding,
    PositionalCode,
    cell_centres,
    gamma,
)

__all__ = ["DecodeConfig", "DecodedSegment", "PanopticMap", "decode"]

SAMPLING = 16
"""One pixel in so many is enough to measure the noise."""


def decode(
    instance: Tensor,
    semantic: Tensor,
    *,
    encoding: Encoding,
    isthing: Tensor,
    sizes: Sequence[tuple[int, int]],
    config: DecodeConfig | None = None,
) -> list[PanopticMap]:
    """Decodes a batch of predictions, on the device that holds them.

    Args:
        instance: (B, channels, h, w) predicted codes.
        semantic: (B, C, h, w) logits.
        encoding: The code the network was trained with.
        isthing: (C,) bool.
        sizes: Native (H, W) of each image.
        config: Settings; defaults where None.

    Returns:
        A map for each image, at its native size.

    Raises:
        InputError: The prediction holds NaN or infinite values.
    """
    settings = config or DecodeConfig()
    return [
        decode_image(code, logits, encoding, isthing=isthing, size=size, config=settings)
        for code, logits, size in zip(instance, semantic, sizes, strict=True)
    ]


def decode_image(
    instance: Tensor,
    semantic: Tensor,
    encoding: Encoding,
    *,
    isthing: Tensor,
    size: tuple[int, int],
    config: DecodeConfig,
) -> PanopticMap:
    """Decodes (channels, h, w) codes and (C, h, w) logits of one image; see `decode`."""
    best, labels = packed_argmax(semantic.flatten(1).float())
    codes = to_positional(instance.flatten(1).float(), encoding)
    strength = codes.square().sum(0)
    if not math.isfinite(float(best.abs().max() + strength.max())):
        raise InputError(
            "the network's output holds NaN or infinite values",
            remedy="check the checkpoint, or run the network in float32",
            code="prediction-not-finite",
        )
    thing = isthing.to(labels.device).index_select(0, labels)
    height, width = instance.shape[-2:]
    pixels = Pixels(codes, labels, thing, places(thing), strength, (height, width))
    noise = measure_noise(codes.index_select(1, pixels.inside[::SAMPLING]), config)
    radius = min(round(config.smooth_votes * noise), config.max_smooth)
    found = find_instances(pixels, noise, radius, config)
    member = assign(pixels, found, radius // 2, config)
    member = rescue(pixels, member, noise, config)
    painting = paint(
        member.view(height, width),
        labels.view(height, width),
        isthing,
        min_instance_area=config.min_instance_area,
    )
    return number(painting, size, min_stuff_area=config.min_stuff_area)


def to_positional(code: Tensor, encoding: Encoding) -> Tensor:
    """Codes of any encoding as positional ones, so that one geometry serves all.

    Direct: gamma of the coordinates, times the instance channel. Classification: the expectation
    of gamma under the predicted probabilities, void counting as zero.

    Args:
        code: (channels, P) float32.
        encoding: What they are.

    Returns:
        (4L, P), NaN where a code is NaN.
    """
    harmonics = PositionalCode().harmonics
    match encoding:
        case DirectCode():
            position = gamma(code[:2] * 2 - 1, harmonics)  # (2, P, 2L)
            return (position * code[2].clamp(0, 1)[:, None]).transpose(1, 2).flatten(0, 1)
        case ClassificationCode():
            costs = encoding.axis_costs(code, encoding.cells)
            grid = gamma(cell_centres(encoding.cells, device=code.device), harmonics)
            return torch.cat([(-axis).exp() @ grid for axis in (costs.u, costs.v)], dim=1).T
        case _:
            return code
