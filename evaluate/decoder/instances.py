"""From votes to instances, on a grid of cells: a histogram, its basins, and which of them are one.

    votes -> histogram -> Gaussian -> watershed -> basins -> merged by evidence -> instances

The votes of an instance do not meet in a point: noise scatters them, and the centroids of a trained
network drift, for each pixel pulls its own a little towards itself. What tells parts of an instance
from two instances, `log_odds`, does not depend on the size of picture or object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from panoptic_cache.evaluate.decoder.field import TYPICAL_POWER, Votes

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Slices = tuple[slice, slice]

CLEAN_GAP, CLEAN_SCATTER, LEAST_WIDTH = 0.05, 0.1, 0.4
"""Cells. Votes that differ less between neighbours, and scatter less within a cell, are exact, and
then each cell is a basin; else the Gaussian has this width at least."""
DRIFT, TOUCH, SLOPE, NECK, CLASS, BIAS = 2.6, 2.2, -1.5, 1.1, 2.9, -4.75
"""Of the evidence in `log_odds`: fitted to pairs of basins of networks and of corrupted codes."""


@dataclass(frozen=True)
class Voters:
    """The pixels of an image that belong to instances."""

    pixels: Integers  # (V,) flat indices
    place: Floats  # (2, V) column and row of their votes, in cells
    at: Floats  # (2, V) column and row where they lie themselves, in cells
    length: Floats  # (V,) of their codes, over the typical one of the image
    chance: Floats  # (V,) see `field.Classes`


@dataclass(frozen=True)
class Basins:
    """Basins 1 to n of the votes; 0 is no basin."""

    cells: Integers  # (cells, cells) the basin of each cell
    owner: Integers  # (V,) the basin of each voter
    exact: bool = False  # Whether votes are exact; then each basin is an instance


def tally(index: Integers, weights: Floats | None, count: int) -> Floats:
    """(count,) sums of the weights of each index."""
    return np.asarray(np.bincount(index, weights, count), np.float64)


def find_voters(votes: Votes, trust: float) -> Voters:
    """The pixels whose codes are long enough to name an instance.

    How long that is depends on the image: codes of an immature network are short everywhere. Half
    of the typical length is between instance and void; the semantic head moves the bar, by `trust`.
    """
    length = votes.length.astype(np.float64)
    inside = length[votes.chance >= 0.5] if (votes.chance >= 0.5).any() else length
    weight = inside**TYPICAL_POWER
    typical = min(1.0, float((weight * inside).sum() / max(weight.sum(), 1e-12)))
    bar = typical * (0.5 + trust * (1 - 2 * votes.chance))
    pixels = np.flatnonzero(length > np.maximum(bar, 1e-6))
    (height, width), (y, x) = votes.shape, np.divmod(pixels, votes.shape[1])
    at = np.stack([(x + 0.5) * (votes.cells / width), (y + 0.5) * (votes.cells / height)]) - 0.5
    relative = np.minimum(length[pixels] / max(typical, 1e-6), 1)
    place = votes.place[:, pixels].astype(np.float64)
    return Voters(pixels, place, at, relative, votes.chance[pixels].astype(np.float64))


def find_basins(voters: Voters, votes: Votes, blur: float) -> Basins:
    """The basins of the histogram of votes, after a Gaussian `blur` times as wide as they scatter.

    That is how far those of neighbours are apart, or of smoothed pixels that share no window.
    """
    if len(voters.pixels) == 0:
        return Basins(np.zeros((votes.cells, votes.cells), np.int64), voters.pixels)
    column, row = np.rint(voters.place).astype(np.int64).clip(0, votes.cells - 1)
    cell, count = row * votes.cells + column, votes.cells**2
    weight = tally(cell, voters.length, count)
    middle = np.stack([tally(cell, voters.length * axis, count) for axis in voters.place])
    off = np.square(voters.place - (middle / np.maximum(weight, 1e-12))[:, cell]).sum(0)
    scatter = math.sqrt(np.average(off, weights=voters.length))
    kind = np.where(votes.chance >= 0.5, votes.thing, -1).reshape(votes.shape)
    apart = 2 * votes.radius + 1
    steps = [distance[kind[a] == kind[b]] for a, b, distance in _steps(voters, votes, apart)]
    differing = np.concatenate(steps)  # nan where one of both does not vote
    gap = float(np.nanmedian(differing)) if np.isfinite(differing).any() else 0.0
    histogram = weight.reshape(votes.cells, votes.cells)
    if gap <= CLEAN_GAP and scatter <= CLEAN_SCATTER:
        cells = np.where(histogram > 0, (histogram > 0).cumsum().reshape(histogram.shape), 0)
        return Basins(cells, cells.ravel()[cell], exact=True)
    width = max(blur * gap, LEAST_WIDTH)
    height = ndimage.gaussian_filter(histogram, width, mode="constant", truncate=3)
    height = np.where(height > 1e-4 * height.max(), height, 0)  # not for votes of no weight
    peaks = (height == ndimage.maximum_filter(height, 3)) & (height > 0)
    markers, _ = ndimage.label(peaks, np.ones((3, 3)))
    cells = watershed(-height, markers, mask=height > 0, connectivity=2).astype(np.int64)
    return Basins(cells, cells.ravel()[cell])


def _steps(voters: Voters, votes: Votes, apart: int) -> list[tuple[Slices, Slices, Floats]]:
    """Distances between votes of pixels so far apart in a row and in a column, and of which."""
    places = np.full((2, *votes.shape), np.nan)
    places.reshape(2, -1)[:, voters.pixels] = voters.place
    every, late, early = slice(None), slice(apart, None), slice(None, -apart)
    pairs = [((every, late), (every, early)), ((late, every), (early, every))]
    return [(a, b, np.hypot(*(places[:, *a] - places[:, *b]))) for a, b in pairs]


def merge(basins: Basins, voters: Voters, votes: Votes, bias: float) -> Integers:
    """Makes one of two basins that are the likeliest partners of each other, until none are left.

    Returns (V,) the instance of each voter, any numbers, 0 for none.
    """
    if basins.exact or len(voters.pixels) == 0:
        return basins.owner
    count, pixel = int(basins.cells.max()) + 1, votes.cells / math.sqrt(math.prod(votes.shape))
    names, kind = np.unique(votes.thing[voters.pixels], return_inverse=True)
    keys = basins.owner * len(names) + kind
    chances = tally(keys, voters.chance, count * len(names)).reshape(count, -1)
    # Pixels; weight, and weighted sums of the places of votes and of pixels.
    columns = np.ones_like(voters.length), *voters.place, *voters.at
    moments = [tally(basins.owner, voters.length * one, count) for one in columns]
    sums = np.column_stack([tally(basins.owner, None, count), *moments, chances])
    pairs, root = find_pairs(basins, voters, votes), np.arange(count)
    while len(pairs.one):
        odds = bias + log_odds(pairs, sums, pixel)
        best = np.full(count, -np.inf)
        np.maximum.at(best, pairs.one, odds)
        np.maximum.at(best, pairs.other, odds)
        mutual = (odds > 0) & (odds == best[pairs.one]) & (odds == best[pairs.other])
        if not mutual.any():
            break
        into = np.arange(count)
        into[pairs.other[mutual]] = pairs.one[mutual]  # the smaller number: there are no circles
        while (into[into] != into).any():
            into = into[into]
        root = into[root]
        sums = np.stack([tally(into, column, count) for column in sums.T], axis=1)
        pairs = Pairs.of(into[pairs.one], into[pairs.other], pairs.facts)
    return root[basins.owner]


@dataclass(frozen=True)
class Pairs:
    """M pairs of basins that are neighbours among the votes, or in the picture."""

    one: Integers  # (M,) the smaller number
    other: Integers  # (M,) the larger one
    # (2, M) sum of the steps, in cells, that votes take across their border, and how many these are
    facts: Floats

    @classmethod
    def of(cls, one: Integers, other: Integers, facts: Floats) -> Pairs:
        """Makes one row of those that are of the same two basins; of one alone, none."""
        low, high = np.minimum(one, other), np.maximum(one, other)
        apart = low != high
        size = int(high.max(initial=0)) + 1
        keys, row = np.unique((low * size + high)[apart], return_inverse=True)
        sums = np.stack([tally(row, fact[apart], len(keys)) for fact in facts])
        return cls(keys // size, keys % size, sums)


def find_pairs(basins: Basins, voters: Voters, votes: Votes) -> Pairs:
    """All pairs of basins of which cells or voters are neighbours."""
    owner = np.zeros(votes.shape, np.int64)
    owner.ravel()[voters.pixels] = basins.owner
    rows = []
    for a, b, step in _steps(voters, votes, 1):
        border = (owner[a] != owner[b]) & (owner[a] > 0) & (owner[b] > 0)
        rows.append((owner[a][border], owner[b][border], [step[border], np.ones(border.sum())]))
    cells = np.pad(basins.cells, 1)
    inner = cells[1:-1, 1:-1]
    for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):
        beside = cells[1 + dy : 1 + dy + votes.cells, 1 + dx : 1 + dx + votes.cells]
        border = (inner > 0) & (beside > 0) & (inner != beside)
        rows.append((inner[border], beside[border], list(np.zeros((2, border.sum())))))
    return Pairs.of(*(np.concatenate(part, axis=-1) for part in zip(*rows, strict=True)))


def log_odds(pairs: Pairs, sums: Floats, pixel: float) -> Floats:
    """(M,) log odds that both basins of a pair are parts of one instance.

    Drift: the votes of two instances are as far apart as their pixels are, for a centroid is the
    mean of its pixels; parts of one vote for nearly the same place from different ones. Slope:
    within an instance, a step of a pixel moves the vote by less than that pixel (`pixel` cells
    wide); between two it leaps. Neck: a cut through an instance is long for the size of its parts,
    two instances touch along a short line. Class: of one instance all pixels have the same.
    """
    both = sums[np.stack([pairs.one, pairs.other])]  # (2, M, 6 + classes)
    middle = both[..., 2:6] / np.maximum(both[..., 1:2], 1e-12)
    apart = (middle[0] - middle[1]).T  # (4, M)
    unlike = np.hypot(*(apart[:2] - apart[2:])) / np.maximum(np.hypot(*apart[:2]), 1e-3)
    steps, touches = pairs.facts
    slope = np.log((steps / np.maximum(touches, 1) / pixel).clip(0.1, 10))
    neck = np.log(np.maximum(touches, 1) / np.sqrt(np.maximum(both[..., 0].min(0), 1)))
    border = np.where(touches > 0, TOUCH + SLOPE * slope + NECK * neck, 0)
    shares = both[..., 6:] / np.maximum(both[..., 6:].sum(2, keepdims=True), 1e-12)
    alike = shares.prod(0).sum(1)
    odds: Floats = BIAS + DRIFT * np.log1p(np.minimum(unlike, 20)) + border + CLASS * alike
    return odds
