"""From the instance of each pixel to segments: classes, stuff, small areas, native size.

All of it is on maps of integers, and on the processor: NumPy is several times faster at that than
PyTorch, and the result is wanted there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.int32]

STRIP = 1 << 19
"""Native pixels worked on at once: an upper bound on temporary memory."""


@dataclass(frozen=True)
class DecodedSegment:
    """One row of a panoptic map.

    Attributes:
        id: Positive, unique in its map.
        label: Contiguous category label.
        isthing: Whether it is an instance.
        score: How sure the network is of an instance, in [0, 1], see `confidence.py`; 1 for stuff.
        area: Native pixels.
    """

    id: int
    label: int
    isthing: bool
    score: float
    area: int


@dataclass(frozen=True)
class PanopticMap:
    """Segments that do not overlap.

    Attributes:
        ids: (H, W) int32 segment ids, 0 = void.
        segments: One row for each id in `ids`, in ascending order.
    """

    ids: NDArray[np.int32]
    segments: tuple[DecodedSegment, ...]


@dataclass(frozen=True)
class Painting:
    """What each pixel shows, before ids are given.

    Attributes:
        values: (h, w) int32: 0 = void, v = row v - 1 of the tables below.
        labels: (R,) contiguous category of each row: all C categories as stuff, then instances.
        categories: C.
    """

    values: Values
    labels: NDArray[np.int64]
    categories: int


def paint(
    member: Values, labels: Values, things: NDArray[np.bool_], *, min_instance_area: int
) -> Painting:
    """Classes of instances by majority vote, stuff where none is.

    Pixels of a thing class that no instance claims are void.

    Args:
        member: (h, w) int32, 0 = no instance, k = instance k - 1.
        labels: (h, w) int32, semantic labels.
        things: (C,) whether a category is a thing.
        min_instance_area: Pixels below which an instance is dropped.
    """
    categories = len(things)
    count = int(member.max()) + 1
    both = member * np.int32(categories) + labels
    ballots = np.bincount(both.ravel(), minlength=count * categories).reshape(count, categories)
    votes = ballots * things
    winning, area = votes.max(1), ballots.sum(1)
    valid = (area >= min_instance_area) & (winning > 0)
    valid[0] = False
    shown = np.where(valid, np.arange(count) + categories, 0)
    stuff = np.where(things, 0, np.arange(categories) + 1)
    table = np.where(shown[:, None] > 0, shown[:, None], stuff).astype(np.int32)
    values = table.ravel().take(both)
    return Painting(
        values=values,
        labels=np.concatenate([np.arange(categories), votes.argmax(1)[1:]]),
        categories=categories,
    )


@dataclass(frozen=True)
class Axis:
    """Where the target pixels of one axis lie between source pixels.

    Attributes:
        near: (n,) the nearest source pixel of each.
        far: (n,) its neighbour on the other side; itself at the borders.
        weight: (n,) float32 bilinear weight of the far one, at most 1/2.
        pair: (n,) the pair they form: p is pixels p - 1 and p.
    """

    near: NDArray[np.intp]
    far: NDArray[np.intp]
    weight: NDArray[np.float32]
    pair: NDArray[np.intp]


def locate(source: int, target: int) -> Axis:
    """Places `target` pixels over `source` pixels of the same extent."""
    place = (np.arange(target) + 0.5) * (source / target)
    near = place.astype(np.intp).clip(max=source - 1)
    offset = place - 0.5 - near
    far = (near + np.sign(offset).astype(np.intp)).clip(0, source - 1)
    return Axis(near, far, np.abs(offset).astype(np.float32), np.maximum(near, far))


def resize_values(values: Values, size: tuple[int, int]) -> Values:
    """Resizes a map of values to (H, W) by bilinear vote; by nearest pixel where it shrinks.

    A pixel takes the value with the largest bilinear weight among its four neighbours, which is
    the bilinear resize of each segment's mask.

    Args:
        values: (h, w) int32.
        size: (H, W).
    """
    rows, columns = locate(values.shape[0], size[0]), locate(values.shape[1], size[1])
    # Rows last: that copies whole rows, the quicker half.
    result = values.take(columns.near, 1).take(rows.near, 0)
    if size[0] <= values.shape[0] or size[1] <= values.shape[1]:
        return result
    doubtful = _corners(values).take(columns.pair, 1)
    for start in range(0, size[0], step := max(1, STRIP // size[1])):
        strip = result[start : start + step]
        mixed = np.flatnonzero(doubtful.take(rows.pair[start : start + step], 0))
        y, x = np.divmod(mixed, size[1])
        strip.ravel()[mixed] = _vote(values, rows, columns, y + start, x)
    return result


def _corners(values: Values) -> NDArray[np.bool_]:
    """(h + 1, w + 1) bool, blocks of 2 x 2 pixels where the nearest is not always the winner.

    It always is where it equals a neighbour along a row or a column, for their weights sum to one
    half or more. So only blocks matter that have a border across and one down.
    """
    padded = np.pad(values, 1, mode="edge")
    across = padded[:, 1:] != padded[:, :-1]
    down = padded[1:] != padded[:-1]
    corners: NDArray[np.bool_] = (across[1:] | across[:-1]) & (down[:, 1:] | down[:, :-1])
    return corners


def _vote(
    values: Values, rows: Axis, columns: Axis, y: NDArray[np.intp], x: NDArray[np.intp]
) -> Values:
    """The bilinear vote at N target pixels."""
    flat, width = values.ravel(), values.shape[1]
    row, below = (rows.near * width).take(y), (rows.far * width).take(y)
    column, beside = columns.near.take(x), columns.far.take(x)
    near, side = flat.take(row + column), flat.take(row + beside)
    under, across = flat.take(below + column), flat.take(below + beside)
    fx, fy = columns.weight[x], rows.weight[y]
    pair, diagonal = side == under, fx * fy
    for_near = (1 - fx) * (1 - fy) + diagonal * (across == near)
    for_side = fx * (1 - fy) + diagonal * (across == side) + pair * (1 - fx) * fy
    for_under = (1 - fx) * fy + diagonal * (across == under) + pair * fx * (1 - fy)
    lost = (near != side) & (near != under) & (np.maximum(for_side, for_under) > for_near)
    winner: Values = np.where(lost, np.where(for_side >= for_under, side, under), near)
    return winner


def number(
    painting: Painting, native: Values, scores: NDArray[np.float64], *, min_stuff_area: int
) -> PanopticMap:
    """Gives ids 1, 2, ... to what is left at native size.

    Args:
        painting: See `paint`.
        native: (H, W) its values, resized; are written into.
        scores: (R,) of its rows, see `DecodedSegment`.
        min_stuff_area: Native pixels below which a stuff segment becomes void.
    """
    rows = len(painting.labels) + 1
    strips = np.array_split(native.ravel(), max(1, native.size // STRIP))
    area = np.sum([np.bincount(strip, minlength=rows) for strip in strips], axis=0)
    stuff = np.arange(rows) <= painting.categories
    kept = (area > 0) & ~(stuff & (area < min_stuff_area))
    kept[0] = False
    ids = np.where(kept, kept.cumsum(), 0).astype(np.int32)
    for strip in strips:
        ids.take(strip, out=strip, mode="clip")  # in place, which `raise` would copy for
    found = np.flatnonzero(kept)
    table = zip(
        ids[found].tolist(),
        painting.labels[found - 1].tolist(),
        (~stuff[found]).tolist(),
        scores[found - 1].tolist(),
        area[found].tolist(),
        strict=True,
    )
    return PanopticMap(ids=native, segments=tuple(DecodedSegment(*row) for row in table))
