"""Which instances a picture holds: of the peaks of the votes, the few that explain the codes.

Every voting pixel has fallen into a bin: the cell nearest to its code, and its semantic label.
Peaks of the votes are candidates. A greedy choice then takes the candidate that explains the codes
best, again and again, until the next one would only explain noise. All of this is on a few hundred
bins, not on pixels, and on the processor: NumPy is quicker at that than PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from panoptic_cache.evaluate.decoder.votes import Bins, Floats, Integers

MAX_CANDIDATES = 512
TINY = 1e-12
"""Length below which a code has no direction."""
ROUNDING = 1e-4
"""Squared distance that single precision leaves open: no more than that is not nearer."""


@dataclass(frozen=True)
class Instances:
    """K instances.

    Attributes:
        prototypes: (K, 4L) float32 codes of norm sqrt(2 L).
        labels: (K,) int64 semantic labels.
        faint: How many of them, the last ones, only faint votes tell of.
    """

    prototypes: Floats
    labels: Integers
    faint: int = 0


@dataclass(frozen=True)
class Rules:
    """When a candidate is an instance; squared distances in code space.

    Attributes:
        cap: From here on a vote is not explained at all.
        label_cost: What a differing label counts for.
        gap: Least mean distance that an instance must take off from the votes it improves.
        saved: Least sum of them.
    """

    cap: float
    label_cost: float
    gap: float
    saved: float


def find_candidates(bins: Bins, cells: int, *, radius: int) -> Integers:
    """Bins that are peaks of their label's votes, in cell space.

    Cell space, because gamma has period 2: the first and the last cell are neighbours in code
    space, but opposite ends of the picture.

    Args:
        bins: The votes.
        cells: Cells an axis.
        radius: 1 takes the local maxima of 3 x 3 cells, after a binomial smoothing; 0 takes every
            bin, for predictions so clean that even neighbouring cells are two instances.

    Returns:
        (Kc,) int64 indices into the bins, most votes first.
    """
    if radius == 0:
        return np.arange(len(bins.weight))[:MAX_CANDIDATES]
    labels, layer = np.unique(bins.label, return_inverse=True)
    votes: Floats = np.zeros((len(labels), cells, cells), np.float32)
    votes[layer, bins.row, bins.column] = bins.weight
    for axis in (1, 2):
        before, after = _beside(votes, axis)
        votes = votes + (before + after) * np.float32(0.5)
    highest = votes
    for axis in (1, 2):
        highest = np.maximum(highest, np.maximum(*_beside(highest, axis)))
    score = votes[layer, bins.row, bins.column]
    peaks = np.flatnonzero(score == highest[layer, bins.row, bins.column])
    return peaks[np.argsort(-score[peaks], kind="stable")][:MAX_CANDIDATES]


def _beside(votes: Floats, axis: int) -> tuple[Floats, Floats]:
    """(labels, cells, cells) votes of the cell before and of the cell after."""
    before, after = np.zeros_like(votes), np.zeros_like(votes)
    cells, earlier, later = (np.moveaxis(map_, axis, 0) for map_ in (votes, before, after))
    earlier[1:], later[:-1] = cells[:-1], cells[1:]
    return before, after


def candidates_of(bins: Bins, peaks: Integers, *, radius: int) -> Instances:
    """The peaks, with the mean code of the bins of their label within `radius` cells."""
    near = (
        (bins.label[peaks][:, None] == bins.label)
        & (np.abs(bins.row[peaks][:, None] - bins.row) <= radius)
        & (np.abs(bins.column[peaks][:, None] - bins.column) <= radius)
    )
    return Instances(normalised((near * bins.weight) @ bins.code), bins.label[peaks])


def normalised(code: Floats) -> Floats:
    """Scales the u and the v half of (K, 4L) codes to the length of gamma, sqrt(L)."""
    harmonics = code.shape[1] // 4
    halves = code.reshape(-1, 2, 2 * harmonics)
    length = np.sqrt(np.square(halves).sum(2, keepdims=True))
    scaled: Floats = halves * (math.sqrt(harmonics) / np.maximum(length, TINY))
    return scaled.reshape(code.shape)


def bin_costs(bins: Bins, instances: Instances, label_cost: float) -> Floats:
    """(M, K) squared distances, plus `label_cost` where the labels differ."""
    codes, prototypes = bins.code, instances.prototypes
    squares = np.square(codes).sum(1)[:, None] + np.square(prototypes).sum(1)
    distance = np.maximum(squares - 2 * codes @ prototypes.T, 0)
    differs = bins.label[:, None] != instances.labels
    costs: Floats = distance + np.float32(label_cost) * differs
    return costs


def choose(
    bins: Bins, candidates: Instances, rules: Rules, found: Instances | None = None
) -> Instances:
    """Greedy choice of the instances that explain the votes, as in facility location.

    A vote costs its distance to the nearest chosen instance, at most `cap`. A candidate is worth
    what it takes off, and is taken only if that is more than the scatter of those chosen.

    Args:
        bins: The votes.
        candidates: Their peaks.
        rules: What counts as more.
        found: Instances chosen before, which are not returned.
    """
    cost = np.minimum(bin_costs(bins, candidates, rules.label_cost), rules.cap).T
    weight, current = bins.weight, np.full(len(bins.weight), rules.cap, np.float32)
    if found is not None and len(found.labels):
        current = np.minimum(current, bin_costs(bins, found, rules.label_cost).min(1))
    left, chosen = np.arange(len(cost)), []
    while len(left):
        relief = np.maximum(current - cost, 0)  # (candidates left, M)
        total = relief @ weight
        helped = (relief > ROUNDING).astype(np.float32) @ weight
        worth = np.where((total >= rules.gap * helped) & (helped > 0), total, 0)
        best = int(worth.argmax())
        if worth[best] <= 0 or worth[best] < rules.saved:
            break
        chosen.append(int(left[best]))
        current = np.minimum(current, cost[best])
        # What a candidate takes off only falls: one that takes off too little is out for good.
        total[best] = 0
        able = np.flatnonzero(total >= rules.saved)
        left, cost = left[able], cost[able]
    return Instances(candidates.prototypes[chosen], candidates.labels[chosen])


def refine(bins: Bins, instances: Instances, rules: Rules) -> Instances:
    """Moves each prototype to the mean of the bins nearest to it: finer than the grid."""
    if len(instances.labels) == 0:
        return instances
    cost = bin_costs(bins, instances, rules.label_cost)
    nearest = cost.argmin(1)
    weight = bins.weight * (cost.min(1) < rules.cap)
    own = (nearest == np.arange(len(instances.labels))[:, None]) * weight  # (K, M)
    moved = own.any(1, keepdims=True)
    prototypes = np.where(moved, normalised(own @ bins.code), instances.prototypes)
    return Instances(prototypes, instances.labels)
