"""Which instances a picture holds: of the peaks of the votes, the few that explain the codes.

Every voting pixel has fallen into a bin: the cell nearest to its code, and its semantic label.
Peaks of the votes are candidates. A greedy choice then takes the candidate that explains the codes
best, again and again, until the next one would only explain noise. All of this is on a few hundred
bins, not on pixels, and on the processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    votes = torch.zeros(len(labels), 1, cells, cells)
    votes[layer, 0, bins.row, bins.column] = bins.weight
    kernel = torch.tensor([0.5, 1.0, 0.5])
    votes = F.conv2d(votes, (kernel[:, None] * kernel)[None, None], padding=1)
    highest = F.max_pool2d(votes, 3, 1, 1)[layer, 0, bins.row, bins.column]
    score = votes[layer, 0, bins.row, bins.column]
    peaks = (score == highest).nonzero()[:, 0]
    order = score[peaks].argsort(descending=True, stable=True)
    return peaks[order][:MAX_CANDIDATES]


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
    cost = bin_costs(bins, candidates, rules.label_cost).clamp_max(rules.cap)
    current = torch.full_like(bins.weight, rules.cap)
    if found is not None and len(found.labels):
        current = torch.minimum(current, bin_costs(bins, found, rules.label_cost).amin(1))
    chosen: list[int] = []
    while len(chosen) < len(candidates.labels):
        relief = (current[:, None] - cost).clamp_min(0)
        total = bins.weight @ relief
        helped = bins.weight @ (relief > 0).to(cost.dtype)
        fair = (total >= rules.gap * helped) & (total >= rules.saved) & (helped > 0)
        if not bool(fair.any()):
            break
        best = int((total * fair).argmax())
        chosen.append(best)
        current = torch.minimum(current, cost[:, best])
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
