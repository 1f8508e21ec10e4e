"""One cached sample -> one augmented item at the network's input size, with exact targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panoptic_cache.pipeline.cache.sample import EDS_FAR, Sample, encode_distance
from panoptic_cache.pipeline.photo import decode_photo, fitted_size
from panoptic_cache.pipeline.targets import (
    SegmentMap,
    boundary,
    edge_distance,
    geometry,
    resize_segment_map,
)
from panoptic_cache.train.config import DataConfig

PADDING = 3
"""Value of the void mask outside the image; the cache itself holds 0, 1 and 2."""

Scalar = TypeVar("Scalar", bound=np.generic)
Place = tuple[int, int]
"""(epoch, position in the cache): augmentation depends on these and the seed alone."""


@dataclass(frozen=True, slots=True)
class Item:
    """One augmented sample, see `Batch` for the fields (without the leading axis)."""

    key: str
    photo: NDArray[np.uint8]
    segment_map: SegmentMap
    eds: NDArray[np.uint8]
    void: NDArray[np.uint8]
    eds_scale: float
    colour: NDArray[np.float32]
    centroid: NDArray[np.float32]
    instance: NDArray[np.bool_]
    label: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The random choices for one sample."""

    flip: bool = False  # Mirror left and right
    scale: float = 1.0  # Isotropic factor on top of the fit
    # (x, y) in [0, 1]: where the crop lies, or how the padding is shared out.
    place: tuple[float, float] = (0.5, 0.5)
    # Factors of brightness, contrast and saturation.
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)


def draw_augmentation(config: DataConfig, seed: int, place: Place) -> Augmentation:
    """The augmentation of a sample in an epoch: a pure function of (seed, epoch, position)."""
    if not config.augment:
        return Augmentation()
    random = np.random.default_rng([seed, *place])
    low, high = np.log(config.scale)
    # Everything is drawn, used or not, so that one switch does not change the other draws.
    flip = bool(random.random() < 0.5) and config.flip
    scale = float(np.exp(random.uniform(low, high)))
    x, y = random.random(2).tolist()
    jitter = random.uniform(1 - config.colour, 1 + config.colour, 3).tolist()
    return Augmentation(flip, scale, (x, y), (jitter[0], jitter[1], jitter[2]))


def make_item(sample: Sample, config: DataConfig, augmentation: Augmentation) -> Item:
    """Fits a cached sample to the network's input, with targets that stay exact.

    Raises InputError where the photo is damaged.
    """
    side = config.size
    height, width = sample.segment_map.shape
    size = fitted_size(height, width, side, config.fit, augmentation.scale, tile=config.tile)

    # Scale: the photo smoothly, maps by the nearest pixel, all of them to this size.
    photo = decode_photo(sample.photo, f"{sample.key}.jpg", size)
    segment_map = resize_segment_map(sample.segment_map, size)
    void = resize_segment_map(sample.void, size)
    if 2 * size[0] < height or (config.fit == "squash" and not config.tile and height != width):
        # Distances survive an isotropic scale only, and cached ones end at 127.5 cached pixels,
        # which at less than half the size would cut weights short that still count.
        eds, eds_scale = encode_distance(edge_distance(boundary(segment_map))), 1.0
    else:
        eds, eds_scale = resize_segment_map(sample.eds, size), size[0] / height

    # Crop or pad to (side, side), then mirror. Distances stay those of the whole image: a boundary
    # that is cut away still counts.
    place = augmentation.place
    photo = cut_square(photo, side, place, 0)
    segment_map = cut_square(segment_map, side, place, 0)
    eds = cut_square(eds, side, place, EDS_FAR)
    void = cut_square(void, side, place, PADDING)
    if augmentation.flip:
        photo, segment_map, eds, void = (x[:, ::-1] for x in (photo, segment_map, eds, void))
    segment_map = np.ascontiguousarray(segment_map)

    # The table, row 0 for unlabelled pixels. A crop moves a centroid: that of the visible part.
    visible = geometry(segment_map, len(sample.segments))
    things = np.array([s.isthing and not s.iscrowd for s in sample.segments], np.bool_)
    centroid = np.concatenate([np.zeros((1, 2)), np.nan_to_num(visible.centroid)])
    return Item(
        key=sample.key,
        photo=np.ascontiguousarray(photo.transpose(2, 0, 1)),  # (side, side, 3) -> (3, side, side)
        segment_map=segment_map,
        eds=np.ascontiguousarray(eds),
        void=np.ascontiguousarray(void),
        eds_scale=eds_scale,
        colour=np.array(augmentation.colour, np.float32),
        centroid=centroid.astype(np.float32),
        instance=np.concatenate([[False], things & (visible.area > 0)]),
        label=np.array([-1, *(segment.label for segment in sample.segments)], np.int64),
    )


def cut_square(
    values: NDArray[Scalar], side: int, place: tuple[float, float], fill: int
) -> NDArray[Scalar]:
    """Crops or pads each axis of (H, W, ...) values, so that they become (side, side, ...).

    `place`, (x, y) in [0, 1], is which part of the pixels to cut off or to pad lies to the left,
    and which part above.
    """
    height, width = values.shape[:2]
    top, left = round((height - side) * place[1]), round((width - side) * place[0])  # < 0: padding
    part = values[max(top, 0) : top + side, max(left, 0) : left + side]
    if part.shape[:2] == (side, side):
        return part
    result = np.full((side, side, *values.shape[2:]), fill, values.dtype)
    y, x = max(-top, 0), max(-left, 0)
    result[y : y + part.shape[0], x : x + part.shape[1]] = part
    return result


def jitter_colour(photo: Tensor, factors: Tensor, void: Tensor) -> Tensor:
    """Brightness, contrast and saturation by (B, 3) factors, on the device: (B, 3, S, S) in [0, 1].

    Of (B, 3, S, S) uint8 RGB with its (B, S, S) void mask. Contrast is taken about the mean of the
    image without its padding: else an image that fills less of the input would fade to black.
    Padding stays black, as it is at prediction.
    """
    brightness, contrast, saturation = factors.T[..., None, None, None]  # (B, 1, 1, 1) each
    inside = void != PADDING
    pixels = inside.sum((1, 2)).clamp(min=1).view(-1, 1, 1, 1)
    # The sum is of integers, so it is exact: the same on any device and in any order.
    mean = photo.sum((1, 2, 3), keepdim=True) / (3 * pixels) * (brightness / 255)
    scaled = photo.float() * (brightness * contrast / 255)
    grey = scaled.mean(1, keepdim=True)  # (B, 1, S, S)
    jittered = torch.lerp(grey, scaled, saturation) + mean * (1 - contrast)
    result: Tensor = jittered.clamp(0, 1) * inside[:, None]
    return result
