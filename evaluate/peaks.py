"""Which instances a picture holds: of the peaks of the votes, the few that explain the codes.

Every voting pixel has fallen into a bin: the cell nearest to its code, and its semantic label.
Peaks of the votes are candidates. A greedy choice then takes the candidate that explains the codes
best, again and again, until the next one would only explain noise. All of this is on a few hundred
bins, not on pixels, and on the processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluate.votes import Bins

MAX_CANDIDATES = 512


@dataclass(frozen=True)
class Instances:
    """K instances.

    Attributes:
        prototypes: (K, 4L) codes of norm sqrt(2 L).
        labels: (K,) int64 semantic labels.
        faint: How many of them, the last ones, only faint votes tell of.
    """

    prototypes: Tensor
    labels: Tensor
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


def find_candidates(bins: Bins, cells: int, *, radius: int) -> Tensor:
    """Bins that are peaks of their label's votes, in cell space.

    Cell space, because gamma has period 2: the first and the last cell are neighbours in code
    space, but opposite ends of the picture.

    Args:
        bins: The votes.
        cells: Cells an axis.
        radius: 1 takes the local maxima of 3 x 3 cells, after a binomial smoothing; 0 takes every
            bin, for predictions so clean that even neighbouring cells are two instances.

    Returns:
        (Kc,) indices into the bins, most votes first.
    """
    if radius == 0:
        return torch.arange(len(bins.weight))[:MAX_CANDIDATES]
    labels, layer = torch.unique(bins.label, return_inverse=True)
    votes = torch.zeros(len(labels), cells, cells)
    votes[layer, bins.row, bins.column] = bins.weight
    for axis in (1, 2):
        before, votes, after = _three(votes, axis)
        votes = votes + (before + after) / 2
    highest = votes
    for axis in (1, 2):
        before, highest, after = _three(highest, axis)
        highest = torch.maximum(highest, torch.maximum(before, after))
    score = votes[layer, bins.row, bins.column]
    peaks = (score == highest[layer, bins.row, bins.column]).nonzero()[:, 0]
    order = score[peaks].argsort(descending=True, stable=True)
    return peaks[order][:MAX_CANDIDATES]


def _three(votes: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, cells, cells) votes of the cell before, the cell itself and the cell after."""
    cells = votes.shape[axis]
    padded = F.pad(votes, (1, 1) if axis == 2 else (0, 0, 1, 1))
    before, itself, after = (padded.narrow(axis, start, cells) for start in range(3))
    return before, itself, after


def candidates_of(bins: Bins, peaks: Tensor, *, radius: int) -> Instances:
    """The peaks, with the mean code of the bins of their label within `radius` cells."""
    near = (
        (bins.label[peaks][:, None] == bins.label)
        & ((bins.row[peaks][:, None] - bins.row).abs() <= radius)
        & ((bins.column[peaks][:, None] - bins.column).abs() <= radius)
    )
    return Instances(normalised((near * bins.weight) @ bins.code), bins.label[peaks])


def normalised(code: Tensor) -> Tensor:
    """Scales the u and the v half of (K, 4L) codes to the length of gamma, sqrt(L)."""
    harmonics = code.shape[1] // 4
    halves = code.view(-1, 2, 2 * harmonics)
    return F.normalize(halves, dim=2).flatten(1) * math.sqrt(harmonics)


def bin_costs(bins: Bins, instances: Instances, label_cost: float) -> Tensor:
    """(M, K) squared distances, plus `label_cost` where the labels differ."""
    distance = torch.cdist(bins.code, instances.prototypes).square()
    return distance + label_cost * (bins.label[:, None] != instances.labels)


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
    cost = bin_costs(bins, candidates, rules.label_cost).clamp_max(rules.cap).T.numpy()
    weight, current = bins.weight.numpy(), np.full(len(bins.weight), rules.cap, np.float32)
    if found is not None and len(found.labels):
        known = bin_costs(bins, found, rules.label_cost).amin(1).numpy()
        current = np.minimum(current, known)
    left, chosen = np.arange(len(cost)), []
    while len(left):
        relief = np.maximum(current - cost, 0)  # (candidates left, M)
        total = relief @ weight
        helped = (relief > 0).astype(np.float32) @ weight
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
    cost, nearest = bin_costs(bins, instances, rules.label_cost).min(1)
    weight = bins.weight * (cost < rules.cap)
    total = torch.zeros_like(instances.prototypes)
    total.index_add_(0, nearest, bins.code * weight[:, None])
    moved = torch.bincount(nearest, weight, minlength=len(total)) > 0
    prototypes = torch.where(moved[:, None], normalised(total), instances.prototypes)
    return Instances(prototypes, instances.labels)
