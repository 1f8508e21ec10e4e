"""The mathematics of the training targets: pure functions on segment maps.

A segment map is (H, W) uint8 (uint16 above 255 segments): 0 = unlabelled, i = row i - 1 of the
segment table. Distances are Euclidean, in pixels of the map they are computed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SegmentMap = NDArray[np.unsignedinteger[Any]]

LABELLED, UNLABELLED, CROWD = 0, 1, 2
"""Values of the void mask."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Size and place of n segments."""

    area: NDArray[np.int64]  # (n,) int64, pixels
    bbox: NDArray[np.int64]  # (n, 4) int64, x, y, width, height
    # (n, 2) float64, (u, v) in [-1, 1], the mean of the pixel centres.
    centroid: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Targets:
    """What is computed from a segment map of n segments."""

    # (H, W) float32, pixels to the nearest boundary pixel; inf without any boundary.
    distance: NDArray[np.float32]
    void: NDArray[np.uint8]  # (H, W) uint8: 0 labelled, 1 unlabelled, 2 crowd
    geometry: Geometry  # Area, box and centroid of each segment


def compute_targets(segment_map: SegmentMap, iscrowd: Sequence[bool]) -> Targets:
    """All targets of one image.

    Args:
        segment_map: (H, W); every segment has at least one pixel.
        iscrowd: A flag for each of the n segments.
    """
    return Targets(
        distance=edge_distance(boundary(segment_map)),
        void=void_mask(segment_map, iscrowd),
        geometry=geometry(segment_map, len(iscrowd)),
    )


def segment_dtype(count: int) -> type[np.unsignedinteger[Any]]:
    """The type of a map of `count` segments: uint8 up to 255 of them, else uint16."""
    return np.uint8 if count < 256 else np.uint16


def make_segment_map(ids: NDArray[np.int32], segment_ids: Sequence[int]) -> SegmentMap:
    """Segment map of an id map.

    Looks up runs of equal ids rather than pixels: an image has a few thousand runs.

    Args:
        ids: (H, W) int32 segment ids.
        segment_ids: The ids of rows 0, 1, ...; distinct and not 0.

    Returns:
        (H, W) segment map; ids that are not listed become 0, unlabelled.
    """
    dtype = segment_dtype(len(segment_ids))
    if not segment_ids:
        return np.zeros(ids.shape, dtype)
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values = flat[starts]  # (R,) the id of each run
    known = np.asarray(segment_ids, np.int64)
    order = np.argsort(known)
    rank = np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)
    row = order[rank]
    found = np.where(known[row] == values, row + 1, 0).astype(dtype)
    return found.repeat(np.diff(starts, append=flat.size)).reshape(ids.shape)


def boundary(segment_map: SegmentMap) -> NDArray[np.bool_]:
    """Pixels with a 4-neighbour of another segment, on both sides of an edge.

    Unlabelled and crowd count as segments; the image border is no boundary.

    Returns:
        (H, W) bool.
    """
    result = np.zeros(segment_map.shape, np.bool_)
    across = segment_map[:, 1:] != segment_map[:, :-1]
    down = segment_map[1:] != segment_map[:-1]
    result[:, 1:] |= across
    result[:, :-1] |= across
    result[1:] |= down
    result[:-1] |= down
    return result


def edge_distance(edges: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Euclidean distance of every pixel to the nearest boundary pixel (section 3.2).

    Args:
        edges: (H, W) bool, see `boundary`.

    Returns:
        (H, W) float32 in pixels: 0 on the boundary, inf where an image has none.
    """
    if not edges.any():
        # Libraries return garbage here: 70.0 from scipy, 1.8e19 from OpenCV.
        return np.full(edges.shape, np.inf, np.float32)
    distance: NDArray[np.float32] = cv2.distanceTransform(
        (~edges).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    return distance


def geometry(segment_map: SegmentMap, count: int) -> Geometry:
    """Area, box and centroid of each segment's visible part, as exact integer sums.

    Works on horizontal runs of equal pixels: the sum of x over a run follows from its two ends.

    Args:
        segment_map: (H, W).
        count: Rows n of the segment table.

    Returns:
        Area (n,), box (n, 4) and centroid (n, 2) from pixel centres (x + 0.5) / W and
        (y + 0.5) / H; a segment without pixels has area 0, box 0 and centroid nan.
    """
    height, width = segment_map.shape
    flat = segment_map.ravel()
    change = flat[1:] != flat[:-1]
    change[width - 1 :: width] = True  # a run ends with its row
    starts = np.concatenate([[0], np.flatnonzero(change) + 1])
    lengths = np.diff(starts, append=flat.size)
    segment = flat[starts]
    y, left = np.divmod(starts, width)
    right = left + lengths

    rows = count + 1
    area = np.bincount(segment, weights=lengths, minlength=rows)[1:]
    twice_x = np.bincount(segment, weights=(left + right - 1) * lengths, minlength=rows)[1:]
    twice_y = np.bincount(segment, weights=2 * y * lengths, minlength=rows)[1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        u = (twice_x / area + 1) / width - 1
        v = (twice_y / area + 1) / height - 1

    low = np.full((2, rows), max(height, width))
    high = np.zeros((2, rows), np.int64)
    for axis, (first, last) in enumerate(((left, right), (y, y + 1))):
        np.minimum.at(low[axis], segment, first)
        np.maximum.at(high[axis], segment, last)
    bbox = np.concatenate([low, high - low])[:, 1:].T
    bbox[area == 0] = 0
    return Geometry(area.astype(np.int64), bbox, np.stack([u, v], axis=-1))


def void_mask(segment_map: SegmentMap, iscrowd: Sequence[bool]) -> NDArray[np.uint8]:
    """(H, W) uint8: 0 labelled, 1 unlabelled, 2 crowd."""
    values = np.array([UNLABELLED, *(CROWD if crowd else LABELLED for crowd in iscrowd)], np.uint8)
    if segment_map.dtype != np.uint8:
        return values[segment_map]
    table = np.zeros(256, np.uint8)
    table[: len(values)] = values
    mask: NDArray[np.uint8] = cv2.LUT(segment_map, table)  # a sixth of the time of fancy indexing
    return mask


def resize_segment_map(segment_map: SegmentMap, size: tuple[int, int]) -> SegmentMap:
    """Nearest-neighbour resize of a segment map to (height, width)."""
    height, width = size
    if segment_map.shape == (height, width):
        return segment_map
    size_xy = (width, height)
    return np.asarray(cv2.resize(segment_map, size_xy, interpolation=cv2.INTER_NEAREST_EXACT))


def drop_empty_rows(segment_map: SegmentMap, count: int) -> tuple[SegmentMap, NDArray[np.int64]]:
    """Renumbers the (H, W) map of a table of `count` rows so that every row has a pixel.

    Returns it over the rows that are kept, and these, (k,) int64 in their old order.
    """
    used = np.zeros(count + 1, np.bool_)
    flat = segment_map.ravel()
    used[flat[:1]] = True
    used[flat[1:][flat[1:] != flat[:-1]]] = True  # the first pixel of each run is enough
    kept = np.flatnonzero(used[1:]).astype(np.int64)
    if len(kept) == count:
        return segment_map, kept
    lookup = np.zeros(count + 1, np.int64)
    lookup[kept + 1] = np.arange(1, len(kept) + 1)
    return lookup[segment_map].astype(segment_dtype(len(kept))), kept
