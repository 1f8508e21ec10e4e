"""The mathematics of the training targets: pure functions on index maps.

An index map is (H, W) uint8 (uint16 above 255 segments): 0 = unlabelled, i = row i - 1 of the
segment table. Distances are Euclidean, in pixels of the map they are computed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

IndexMap = NDArray[np.unsignedinteger[Any]]

LABELLED, UNLABELLED, CROWD = 0, 1, 2
"""Values of the void mask."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Size and place of n segments.

    Attributes:
        area: (n,) int64, pixels.
        bbox: (n, 4) int64, x, y, width, height.
        centroid: (n, 2) float64, (u, v) in [-1, 1], the mean of the pixel centres.
    """

    area: NDArray[np.int64]
    bbox: NDArray[np.int64]
    centroid: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Targets:
    """What is computed from one index map of n segments.

    Attributes:
        index: (H, W) uint8 or uint16, 0 = unlabelled, i = segment row i - 1.
        distance: (H, W) float32, pixels to the nearest boundary pixel; inf without any boundary.
        void: (H, W) uint8: 0 labelled, 1 unlabelled, 2 crowd.
        geometry: Area, box and centroid of each segment.
    """

    index: IndexMap
    distance: NDArray[np.float32]
    void: NDArray[np.uint8]
    geometry: Geometry


def compute_targets(index: IndexMap, iscrowd: Sequence[bool]) -> Targets:
    """All targets of one image.

    Args:
        index: (H, W) index map; every segment has at least one pixel.
        iscrowd: A flag for each of the n segments.
    """
    return Targets(
        index=index,
        distance=edge_distance(boundary(index)),
        void=void_mask(index, iscrowd),
        geometry=geometry(index, len(iscrowd)),
    )


def index_dtype(count: int) -> type[np.unsignedinteger[Any]]:
    """The type of an index map of `count` segments: uint8 up to 255 of them, else uint16."""
    return np.uint8 if count < 256 else np.uint16


def index_map(ids: NDArray[np.int32], segment_ids: Sequence[int]) -> IndexMap:
    """Index map of an id map.

    Works on runs of equal ids, of which a picture has a few thousand, not on its pixels.

    Args:
        ids: (H, W) int32 segment ids.
        segment_ids: The ids of rows 0, 1, ...; distinct and not 0.

    Returns:
        (H, W) index map; ids that are not listed become 0, unlabelled.
    """
    dtype = index_dtype(len(segment_ids))
    if not segment_ids:
        return np.zeros(ids.shape, dtype)
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    known = np.asarray(segment_ids, np.int64)
    order = np.argsort(known)
    values = flat[starts]
    rank = np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)
    row = order[rank]
    index = np.where(known[row] == values, row + 1, 0).astype(dtype)
    return index.repeat(np.diff(starts, append=flat.size)).reshape(ids.shape)


def boundary(index: IndexMap) -> NDArray[np.bool_]:
    """Pixels with a 4-neighbour of another segment, on both sides of an edge.

    Unlabelled and crowd count as segments; the image border is no boundary.

    Args:
        index: (H, W) index map.

    Returns:
        (H, W) bool.
    """
    result = np.zeros(index.shape, np.bool_)
    across = index[:, 1:] != index[:, :-1]
    down = index[1:] != index[:-1]
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


def geometry(index: IndexMap, count: int) -> Geometry:
    """Area, box and centroid of each segment's visible part, exact sums of integers.

    A horizontal run of pixels adds its length to the area and its end points to the sums, so the
    work goes with the number of runs.

    Args:
        index: (H, W) index map.
        count: Rows n of the segment table.

    Returns:
        Area (n,), box (n, 4) and centroid (n, 2) from pixel centres (x + 0.5) / W and
        (y + 0.5) / H; a segment without pixels has area 0, box 0 and centroid nan.
    """
    height, width = index.shape
    flat = index.ravel()
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


def void_mask(index: IndexMap, iscrowd: Sequence[bool]) -> NDArray[np.uint8]:
    """(H, W) uint8: 0 labelled, 1 unlabelled, 2 crowd."""
    values = np.array([UNLABELLED, *(CROWD if crowd else LABELLED for crowd in iscrowd)], np.uint8)
    if index.dtype != np.uint8:
        return values[index]
    table = np.zeros(256, np.uint8)
    table[: len(values)] = values
    mask: NDArray[np.uint8] = cv2.LUT(index, table)  # a sixth of the time of fancy indexing
    return mask


def resize_index(index: IndexMap, size: tuple[int, int]) -> IndexMap:
    """Nearest-neighbour resize of an index map to (height, width)."""
    height, width = size
    if index.shape == (height, width):
        return index
    resized: IndexMap = cv2.resize(index, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized


def drop_empty_rows(index: IndexMap, count: int) -> tuple[IndexMap, NDArray[np.int64]]:
    """Renumbers an index map so that every row has a pixel.

    Args:
        index: (H, W) index map of `count` segments, some of which may have no pixel.
        count: Rows of the segment table.

    Returns:
        The map over the kept rows, and the kept rows (k,) int64 in their old order.
    """
    used = np.zeros(count + 1, np.bool_)
    flat = index.ravel()
    used[flat[:1]] = True
    used[flat[1:][flat[1:] != flat[:-1]]] = True  # the first pixel of each run is enough
    kept = np.flatnonzero(used[1:]).astype(np.int64)
    if len(kept) == count:
        return index, kept
    lookup = np.zeros(count + 1, np.int64)
    lookup[kept + 1] = np.arange(1, len(kept) + 1)
    return lookup[index].astype(index_dtype(len(kept))), kept
