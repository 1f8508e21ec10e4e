"""From the instance of each voter to segments: scores, classes, stuff, native size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.field import Votes
from panoptic_cache.evaluate.decoder.instances import Floats, Integers, Voters, tally

Values = NDArray[np.int32]

STRIP = 1 << 19
"""Native pixels worked on at once: an upper bound on temporary memory."""
OFF_CENTRE = 0.2
"""Exponent of what an instance loses in score if its votes miss its middle by its own spread."""


@dataclass(frozen=True)
class DecodedSegment:
    """One row of a panoptic map."""

    id: int  # positive, unique in its map
    label: int  # contiguous category label
    isthing: bool  # whether it is an instance
    score: float  # how likely an instance is right, in [0, 1], see `draw`; 1 for stuff
    area: int  # native pixels


@dataclass(frozen=True)
class PanopticMap:
    """Segments that do not overlap."""

    ids: NDArray[np.int32]  # (H, W) segment ids, 0 = void
    segments: tuple[DecodedSegment, ...]  # one for each id in `ids`, in ascending order


@dataclass(frozen=True)
class Painting:
    """What each pixel shows, before ids are given."""

    values: Values  # (h, w) 0 = void, v = row v - 1 of the tables below
    labels: Integers  # (R,) category of each row: all C categories as stuff, then instances
    scores: Floats  # (R,) see `DecodedSegment`
    categories: int  # C


def draw(
    owner: Integers, voters: Voters, votes: Votes, categories: int, least_score: float
) -> Painting:
    """Scores instances, drops those that are likely wrong, and puts stuff where none is.

    The score is the mean length of the codes, times the mean chance of a thing, less what the votes
    miss the middle of the pixels by: a centroid is the mean of its pixels. The class is the one
    with most chances. Pixels of a thing class that no instance takes are void.
    """
    numbers, owner = np.unique(np.append(0, owner), return_inverse=True)
    owner, count = owner[1:], len(numbers)  # from here on 0 to K
    area = np.maximum(np.bincount(owner, minlength=count), 1)

    def mean(values: Floats) -> Floats:
        return tally(owner, values, count) / area

    length = mean(voters.length)
    off, spread = np.zeros(count), np.zeros(count)
    for place, at in zip(voters.place, voters.at, strict=True):
        middle = mean(at)
        off += np.square(mean(voters.length * place) / np.maximum(length, 1e-12) - middle)
        spread += mean(np.square(at - middle[owner]))
    kinds = owner * categories + votes.thing[voters.pixels]
    chances = tally(kinds, voters.chance, count * categories).reshape(count, categories)
    missed = np.sqrt(off) / np.maximum(np.sqrt(spread), 0.5)  # half a cell at least
    scores = length * mean(voters.chance) * np.exp(-OFF_CENTRE * missed)
    kept = (scores >= least_score) & (scores > 0) & (np.arange(count) > 0)
    values = np.where(votes.chance < 0.5, votes.stuff + 1, 0)
    values[voters.pixels] = np.where(kept[owner], owner + categories, values[voters.pixels])
    return Painting(
        values.reshape(votes.shape).astype(np.int32),
        np.concatenate([np.arange(categories), chances.argmax(1)[1:]]),
        np.concatenate([np.ones(categories), scores[1:].clip(max=1)]),
        categories,
    )


def resize_values(values: Values, size: tuple[int, int]) -> Values:
    """Resizes (h, w) values to (H, W) by bilinear vote; by nearest pixel where it shrinks.

    A pixel takes the value with the largest bilinear weight among its four neighbours, which is
    the bilinear resize of each segment's mask.
    """
    axes = []
    for source, target in zip(values.shape, size, strict=True):
        place = (np.arange(target) + 0.5) * (source / target) - 0.5
        low = np.floor(place).astype(np.int64)
        near = np.floor(place + 0.5).astype(np.int64).clip(0, source - 1)
        axes.append((low, (place - low).astype(np.float32), near))
    (top, down, row), (left, right, column) = axes
    result: Values = values.take(column, 1).take(row, 0)  # rows last: that copies whole rows
    if size[0] <= values.shape[0] or size[1] <= values.shape[1]:
        return result
    wide = np.pad(values, 1, mode="edge")  # so that top and left may be -1
    across, along = wide[:, 1:] != wide[:, :-1], wide[1:] != wide[:-1]
    # The nearest pixel wins unless it differs from its neighbours both across and down.
    mixed = ((across[1:] | across[:-1]) & (along[:, 1:] | along[:, :-1])).take(left + 1, 1)
    for start in range(0, size[0], step := max(1, STRIP // size[1])):
        y, x = mixed.take(top[start : start + step] + 1, 0).nonzero()
        y += start
        fy, fx = down[y], right[x]
        corners = np.stack(
            [wide[top[y] + 1 + dy, left[x] + 1 + dx] for dy in (0, 1) for dx in (0, 1)]
        )
        weights = np.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx])
        shares = [(weights * (corners == corner)).sum(0) for corner in corners]
        result[y, x] = np.take_along_axis(corners, np.argmax(shares, 0)[None], 0)[0]
    return result


def number(painting: Painting, native: Values, *, min_stuff_area: int) -> PanopticMap:
    """Gives ids 1, 2, ... to what is left at native size; writes into its (H, W) values."""
    rows = len(painting.labels) + 1
    strips = np.array_split(native.ravel(), max(1, native.size // STRIP))
    area = np.sum([np.bincount(strip, minlength=rows) for strip in strips], axis=0)
    stuff = np.arange(rows) <= painting.categories
    kept = (area > 0) & ~(stuff & (area < min_stuff_area))
    kept[0] = False
    ids = np.where(kept, kept.cumsum(), 0).astype(np.int32)
    for strip in strips:
        ids.take(strip, out=strip, mode="clip")  # in place, which `raise` would copy for
    rows_kept = np.flatnonzero(kept)
    columns = ids, np.append(0, painting.labels), ~stuff, np.append(0, painting.scores), area
    table = zip(*(column[rows_kept].tolist() for column in columns), strict=True)
    return PanopticMap(ids=native, segments=tuple(DecodedSegment(*row) for row in table))
