"""The panoptic maps of overlapping tiles -> that of their image.

Maps are merged, not heads: a code names a place in its own tile, and the decoder's 80 cells are
made for the objects of one. Each pixel takes what the tile says in which it lies deepest. Two
instances of neighbouring tiles are one where they agree about the pixels that both tiles see. What
a seam leaves of an instance that agrees with no other is dropped if it is the smaller part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.decode import DecodedSegment, PanopticMap
from panoptic_cache.pipeline.tiles import Span, Window

AGREEMENT = 0.5
"""IoU of two instances, in the pixels that two tiles share, above which they are one. From 1/2 on,
an instance agrees with at most one of another tile."""
REST = 0.5
"""Part of what a tile sees of an instance, below which the rest of it is dropped."""

Rows = NDArray[np.int64]
"""(H, W) what each pixel shows: a row of the table of all tiles' segments, 0 for void."""


def stitch(
    size: tuple[int, int],
    parts: Iterable[tuple[Window, PanopticMap]],
    *,
    min_stuff_area: int = 0,
) -> PanopticMap:
    """Merges the maps of an image's tiles.

    `size` is (H, W) of the image. `parts` are its tiles, as `windows` orders them, and the map of
    each at the tile's own size. Stuff segments below `min_stuff_area` pixels are dropped. The score
    of an instance is the mean over its pixels.
    """
    # Row 0 is void, and a stuff class has the same row in all tiles.
    table = [DecodedSegment(0, -1, isthing=False, score=1.0, area=0)]
    joined = [0]  # A row that each row is one with, itself at first
    stuff: dict[int, int] = {}
    recent: list[tuple[Window, Rows]] = []
    values = np.zeros(size, np.int64)
    for window, found in parts:
        lookup = np.zeros(1 + max((segment.id for segment in found.segments), default=0), np.int64)
        for segment in found.segments:
            new = len(table)
            lookup[segment.id] = new if segment.isthing else stuff.setdefault(segment.label, new)
            if lookup[segment.id] == new:
                table.append(segment)
                joined.append(new)
        own = lookup[found.ids]
        recent = [part for part in recent if part[0].rows[1] > window.rows[0]]
        for other, theirs in recent:
            if min(other.columns[1], window.columns[1]) <= max(other.columns[0], window.columns[0]):
                continue
            for one, another in agreeing(shared(window, own, other), shared(other, theirs, window)):
                if table[one].isthing and table[one].label == table[another].label:
                    joined[root(joined, one)] = root(joined, another)
        recent.append((window, own))
        values[window.core] = own[cut(window, window.core_rows, window.core_columns)]

    # From rows to segments: stuff by label, then instances in the order of their tiles.
    count = len(table)
    area = np.bincount(values.ravel(), minlength=count)
    roots = np.array([root(joined, row) for row in range(count)])
    total = np.bincount(roots, area, count)
    seen = np.zeros(count)  # The most that a tile sees of it
    np.maximum.at(seen, roots, [segment.area for segment in table])
    score = np.bincount(roots, area * [segment.score for segment in table], count)
    things = np.array([segment.isthing for segment in table])
    large = np.where(things, total >= REST * seen, total >= min_stuff_area) & (total > 0)
    large[0] = False
    kept = [*sorted(np.flatnonzero(large & ~things), key=lambda row: table[row].label)]
    kept += [*np.flatnonzero(large & things)]
    ids = np.zeros(count, np.int32)
    ids[kept] = np.arange(1, len(kept) + 1)
    return PanopticMap(
        ids[roots[values]],
        tuple(
            DecodedSegment(
                id=number,
                label=table[row].label,
                isthing=table[row].isthing,
                score=float(score[row] / total[row]),
                area=int(total[row]),
            )
            for number, row in enumerate(kept, start=1)
        ),
    )


def paste(
    size: tuple[int, int], parts: Iterable[tuple[Window, NDArray[np.float32]]]
) -> NDArray[np.float32]:
    """What the heads say of tiles, as one picture of the image of `size` (H, W).

    Each tile has (3, h, w) at any size: u and v in the tile, and the label. Returns (3, H, W) u and
    v in the image, and the label, by the nearest pixel.
    """
    result = np.zeros((3, *size), np.float32)
    for window, values in parts:
        rows, columns = (
            ((np.arange(pixels) + 0.5) * (side / pixels)).astype(int)
            for pixels, side in zip(window.shape, values.shape[1:], strict=True)
        )
        own = values[:, rows][:, :, columns]  # at the tile's own size
        for axis, (first, end), side in ((0, window.columns, size[1]), (1, window.rows, size[0])):
            own[axis] = ((own[axis] + 1) * (end - first) + 2 * first) / side - 1
        result[:, *window.core] = own[:, *cut(window, window.core_rows, window.core_columns)]
    return result


def cut(window: Window, rows: Span, columns: Span) -> tuple[slice, slice]:
    """Where rows and columns of the image lie in an array of the tile."""
    top, left = window.rows[0], window.columns[0]
    return slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)


def shared(window: Window, values: Rows, other: Window) -> Rows:
    """The part of a tile's values that another tile sees too, as (P,)."""
    both = [
        (max(ours[0], theirs[0]), max(min(ours[1], theirs[1]), ours[0], theirs[0]))
        for ours, theirs in ((window.rows, other.rows), (window.columns, other.columns))
    ]
    return values[cut(window, *both)].ravel()


def agreeing(one: Rows, other: Rows) -> Iterator[tuple[int, int]]:
    """Rows of two tiles whose IoU in the (P,) pixels that both see is above `AGREEMENT`."""
    (a, of_a), (b, of_b) = (np.unique(rows, return_inverse=True) for rows in (one, other))
    overlap = np.bincount(of_a * len(b) + of_b, minlength=len(a) * len(b)).reshape(len(a), len(b))
    union = overlap.sum(1)[:, None] + overlap.sum(0) - overlap
    for i, j in zip(*np.nonzero(overlap > AGREEMENT * union), strict=True):
        yield int(a[i]), int(b[j])


def root(joined: list[int], row: int) -> int:
    """The row that stands for all rows that this one is joined with."""
    while joined[row] != row:
        row = joined[row]
    return row
