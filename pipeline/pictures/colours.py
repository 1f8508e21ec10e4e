"""Small pure functions that turn maps into pictures; a picture is (H, W, 3) uint8 RGB.

A colour depends only on category and instance number, so a category looks the same in every picture
of every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.targets import SegmentMap, boundary, resize_segment_map

Picture = NDArray[np.uint8]

JPEG_QUALITY = 88
_GOLDEN_ANGLE = 137.50776


@dataclass(frozen=True, slots=True)
class LabelledMap:
    """What a picture needs of the segments of one image, true or predicted."""

    segment_map: SegmentMap  # (H, W) segment map, 0 = unlabelled or void, i = segment i - 1 below
    labels: tuple[int, ...]  # Contiguous category of each segment
    isthing: tuple[bool, ...]  # Whether its category has instances; false for a crowd
    crowd: frozenset[int] = frozenset()  # Positions of the crowds among the segments

    def resized(self, size: tuple[int, int]) -> LabelledMap:
        """The same segments at (height, width), nearest neighbour."""
        return replace(self, segment_map=resize_segment_map(self.segment_map, size))


def instance_numbers(labels: Sequence[int]) -> tuple[int, ...]:
    """The number of each segment among those of its category: 0, 1, ... in the order listed."""
    seen: Counter[int] = Counter()
    numbers: list[int] = []
    for label in labels:
        numbers.append(seen[label])
        seen[label] += 1
    return tuple(numbers)


def segment_colours(
    labels: Sequence[int], isthing: Sequence[bool], numbers: Sequence[int] | None = None
) -> Picture:
    """(n + 1, 3) uint8 colours of n segments, to be indexed with a segment map; row 0 is black.

    The label decides the hue; labels in a row are the golden angle apart in CIE L*a*b*. The number
    (see `instance_numbers`, the default) varies it for things. Stuff is paler, so things stand out.
    """
    label = np.asarray(labels, np.float64)
    thing = np.asarray(isthing, np.bool_)
    number = np.asarray(instance_numbers(labels) if numbers is None else numbers, np.int64)
    number = np.where(thing, number, 0)
    # 0, 1, -1, 2, -2, ...: steps around the category's own colour that repeat late.
    swing = (number + 1) // 2 * np.where(number % 2, 1, -1)
    hue = np.deg2rad(label * _GOLDEN_ANGLE + 20 + (swing * 14 + 28) % 56 - 28)
    chroma = np.where(thing, 68, 26)
    lightness = np.where(thing, 64, 68) + (label // 5 % 3 - 1) * 7 + (swing * 14 + 20) % 40 - 20
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    colours = np.zeros((len(label) + 1, 3), np.uint8)
    if len(label):
        rgb = cv2.cvtColor(lab[None].astype(np.float32), cv2.COLOR_Lab2RGB)[0]
        colours[1:] = np.rint(rgb.clip(0, 1) * 255)
    return colours


def overlay(
    photo: Picture, segment_map: SegmentMap, colours: Picture, alpha: float = 0.6
) -> Picture:
    """A photo with its segments in colour, `alpha` opaque, and their outlines in white.

    `colours` (n + 1, 3) uint8 are indexed by the segment map (H, W).
    """
    blended = photo * (1 - alpha) + colours[segment_map] * alpha
    edges = boundary(segment_map)
    blended[edges] = blended[edges] * 0.25 + 255 * 0.75
    return _rounded(blended)


def centroid_colours(uv: NDArray[np.floating[Any]]) -> Picture:
    """(2, H, W) centroids in [-1, 1] as colours: u is red, v is green; nan becomes black.

    As in Figures 1 and 8 of the paper; blue is constant.
    """
    isvoid = np.isnan(uv).any(0)
    red, green = (np.nan_to_num(uv).clip(-1, 1) + 1) * 127.5
    picture = np.stack([red, green, np.full_like(red, 140)], axis=-1)
    picture[isvoid] = 0
    return _rounded(picture)


def mark_points(picture: Picture, uv: Sequence[tuple[float, float]]) -> Picture:
    """A picture with a white dot on each centroid (u, v), in [-1, 1]."""
    height, width = picture.shape[:2]
    marked = picture.copy()
    for u, v in uv:
        centre = (int((u + 1) / 2 * width), int((v + 1) / 2 * height))
        cv2.circle(marked, centre, 4, (0, 0, 0), cv2.FILLED, cv2.LINE_AA)
        cv2.circle(marked, centre, 2, (255, 255, 255), cv2.FILLED, cv2.LINE_AA)
    return marked


def semantic_colours(labels: NDArray[np.integer[Any]], isthing: Sequence[bool]) -> Picture:
    """(H, W) labels in the colours of the C categories; negative labels become black."""
    table = segment_colours(range(len(isthing)), isthing)
    picture: Picture = table[np.maximum(labels, -1) + 1]
    return picture


def heat(weights: NDArray[np.floating[Any]]) -> Picture:
    """(H, W) weights in [0, 1] on a perceptually uniform scale from black to pale yellow."""
    levels = np.rint(weights.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1])


def stained(
    photo: Picture, marks: Sequence[tuple[NDArray[np.bool_], tuple[int, int, int]]]
) -> Picture:
    """A pale gray photo with some pixels in colour: (H, W) masks and their colours."""
    gray = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY).astype(np.float64)[..., None]
    picture = np.repeat(gray * 0.35 + 255 * 0.65, 3, axis=-1)
    for mask, colour in marks:
        picture[mask] = gray[mask] * 0.25 + np.array(colour) * 0.75
    return _rounded(picture)


def _rounded(picture: NDArray[np.floating[Any]]) -> Picture:
    return np.asarray(np.rint(picture), np.uint8)


def resized(picture: Picture, size: tuple[int, int], *, smooth: bool = True) -> Picture:
    """A picture at (height, width); maps of flat colours want `smooth=False`."""
    if picture.shape[:2] == size:
        return picture
    shrinks = size[0] < picture.shape[0]
    method = (cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC) if smooth else cv2.INTER_NEAREST_EXACT
    return np.asarray(cv2.resize(picture, size[::-1], interpolation=method), np.uint8)


def encode_picture(picture: Picture, suffix: str = ".png") -> bytes:
    """PNG or JPEG bytes of a picture; InputError for another suffix than .png, .jpg or .jpeg."""
    if suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise InputError("pictures are written as PNG or JPEG", suffix, "name it .png or .jpg")
    settings = [] if suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    _, data = cv2.imencode(suffix, picture[..., ::-1], settings)
    return bytes(data)


def save_picture(path: Path, picture: Picture) -> None:
    """Writes a PNG or JPEG, by suffix, whole or not at all; makes the folder."""
    data = encode_picture(picture, path.suffix)
    folder = Storage(str(path.parent))
    folder.create()
    folder.write(path.name, data)
