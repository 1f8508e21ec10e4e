"""One cached sample -> one augmented item at the network's size, with targets that stay exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panoptic_cache.pipeline.cache.sample import Sample, encode_distance
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
"""Void mask of pixels outside the picture; the cache itself holds 0, 1 and 2."""

Scalar = TypeVar("Scalar", bound=np.generic)
Place = tuple[int, int]
"""(epoch, position in the cache): all that augmentation depends on besides the seed."""


@dataclass(frozen=True, slots=True)
class Item:
    """One augmented sample, see `Batch` for the fields (without the leading axis)."""

    key: str
    photo: NDArray[np.uint8]
    index: SegmentMap
    eds: NDArray[np.uint8]
    void: NDArray[np.uint8]
    eds_scale: float
    colour: NDArray[np.float32]
    centroid: NDArray[np.float32]
    instance: NDArray[np.bool_]
    label: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is drawn for one sample.

    Attributes:
        flip: Mirror left and right.
        scale: Isotropic factor on top of the fit.
        place: (x, y) in [0, 1]: where the crop or the padding goes.
        colour: Factors of brightness, contrast and saturation.
    """

    flip: bool = False
    scale: float = 1.0
    place: tuple[float, float] = (0.5, 0.5)
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)


def draw_augmentation(config: DataConfig, seed: int, place: Place) -> Augmentation:
    """The augmentation of a sample in an epoch: a pure function of (seed, epoch, position)."""
    if not config.augment:
        return Augmentation()
    random = np.random.default_rng([seed, *place])
    low, high = np.log(config.scale)
    flip = bool(random.random() < 0.5) and config.flip
    scale = float(np.exp(random.uniform(low, high)))
    x, y = random.random(2).tolist()
    jitter = random.uniform(1 - config.colour, 1 + config.colour, 3).tolist()
    return Augmentation(flip, scale, (x, y), (jitter[0], jitter[1], jitter[2]))


def make_item(sample: Sample, config: DataConfig, augmentation: Augmentation) -> Item:
    """Fits a cached sample to the network's input, with targets that stay exact.

    Centroids are computed anew from what is visible. Cached distances survive isotropic scaling,
    flips and crops; a fit that changes the aspect ratio computes them anew, and so does one that
    shrinks to less than half: the cache holds distances up to 127.5 of its own pixels.

    Raises:
        InputError: The photo is damaged.
    """
    side = config.size
    height, width = sample.segment_map.shape
    new_height, new_width = fitted_size(height, width, side, config.fit, augmentation.scale)
    index = resize_segment_map(sample.segment_map, (new_height, new_width))
    photo = decode_photo(sample.photo, f"{sample.key}.jpg", (new_height, new_width))
    if 2 * new_height < height or (config.fit == "squash" and height != width):
        eds, eds_scale = encode_distance(edge_distance(boundary(index))), 1.0
    else:
        eds, eds_scale = resize_nearest(sample.eds, index.shape), new_height / height
    void = resize_nearest(sample.void, index.shape)

    window = place_window(new_height, new_width, side, augmentation.place)
    index, eds = window.cut(index, 0), window.cut(eds, 255)
    void, photo = window.cut(void, PADDING), window.cut(photo, 0)
    if augmentation.flip:
        index, eds, void, photo = (x[:, ::-1] for x in (index, eds, void, photo))
    index = np.ascontiguousarray(index)

    found = geometry(index, len(sample.segments))
    things = np.array([s.isthing and not s.iscrowd for s in sample.segments], np.bool_)
    return Item(
        key=sample.key,
        photo=np.ascontiguousarray(photo.transpose(2, 0, 1)),
        index=index,
        eds=np.ascontiguousarray(eds),
        void=np.ascontiguousarray(void),
        eds_scale=eds_scale,
        colour=np.array(augmentation.colour, np.float32),
        centroid=np.concatenate([np.zeros((1, 2)), np.nan_to_num(found.centroid)]).astype(
            np.float32
        ),
        instance=np.concatenate([[False], things & (found.area > 0)]),
        label=np.array([-1, *(segment.label for segment in sample.segments)], np.int64),
    )


def resize_nearest(values: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Nearest-neighbour resize to (height, width), the same sampling as the segment map's."""
    return resize_segment_map(values, (size[0], size[1])).astype(np.uint8, copy=False)


@dataclass(frozen=True, slots=True)
class Window:
    """A square of `side` laid over a picture; parts may lie outside."""

    top: int
    left: int
    side: int

    def cut(self, values: NDArray[Scalar], fill: int) -> NDArray[Scalar]:
        """The window's content (side, side, ...), `fill` outside the picture."""
        height, width = values.shape[:2]
        if (self.top, self.left, height, width) == (0, 0, self.side, self.side):
            return values
        result = np.full((self.side, self.side, *values.shape[2:]), fill, values.dtype)
        top, left = max(self.top, 0), max(self.left, 0)
        part = values[top : self.top + self.side, left : self.left + self.side]
        down, right = top - self.top, left - self.left
        result[down : down + part.shape[0], right : right + part.shape[1]] = part
        return result


def place_window(height: int, width: int, side: int, place: tuple[float, float]) -> Window:
    """Where the crop begins: a part `place` of the room that is left, negative for padding."""
    return Window(round((height - side) * place[1]), round((width - side) * place[0]), side)


def jitter_colour(photo: Tensor, factors: Tensor, void: Tensor | None = None) -> Tensor:
    """Brightness, contrast and saturation, on the device.

    Contrast is about the mean of the picture. Padding has no part in it, else a picture that fills
    less of the input would fade to black, and stays black, as at prediction.

    Args:
        photo: (B, 3, S, S) uint8 RGB, 0 in the padding.
        factors: (B, 3) float32, 1 = unchanged.
        void: (B, S, S) uint8 that says where padding is; None where there is none.

    Returns:
        (B, 3, S, S) float32 in [0, 1].
    """
    brightness, contrast, saturation = factors.T[..., None, None, None]  # (B, 1, 1, 1) each
    inside = torch.ones_like(photo[:, 0]).bool() if void is None else void != PADDING
    pixels = inside.sum((1, 2)).clamp(min=1).view(-1, 1, 1, 1)
    # A sum of whole numbers is the same in any order: on any device, however it is split.
    mean = photo.sum((1, 2, 3), keepdim=True) / (3 * pixels) * (brightness / 255)
    scaled = photo.float() * (brightness * contrast / 255)
    grey = scaled.mean(1, keepdim=True)
    jittered = torch.lerp(grey, scaled, saturation) + mean * (1 - contrast)
    result: Tensor = jittered.clamp(0, 1) * inside[:, None]
    return result
