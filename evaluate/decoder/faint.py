"""Instances that the first choice misses: faint ones, and neighbours merged into one.

A blur shortens the codes of small and thin objects, so that none of their pixels says with a full
amplitude that there is one. But such a pixel lies close to the centroid that its code names, which
a mixture or noise hardly ever does: a pixel at home may vote with a lower amplitude.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder.cells import NearestCells, nearest_cells
from panoptic_cache.evaluate.decoder.peaks import (
    Instances,
    Rules,
    bin_costs,
    candidates_of,
    choose,
    find_candidates,
)
from panoptic_cache.evaluate.decoder.votes import Bins

SCATTER = 4.0
"""Times the median squared distance of votes that a split must take off on average."""


def at_home(
    pixels: Tensor, nearest: NearestCells, size: tuple[int, int], cells: int, reach: float
) -> Tensor:
    """Whether pixels lie close to the centroids that their codes name.

    Args:
        pixels: (P,) int64 flat indices in the image.
        nearest: The cells nearest to their codes.
        size: (h, w) of the image.
        cells: Cells an axis.
        reach: Pixels that the centre of the cell may be away on either axis; at least half a cell.

    Returns:
        (P,) bool.
    """
    height, width = size
    near = torch.ones_like(pixels, dtype=torch.bool)
    for cell, place, side in (
        (nearest.column, pixels % width, width),
        (nearest.row, pixels // width, height),
    ):
        off = (place + 0.5) * (cells / side) - (cell + 0.5)
        near &= off.abs() <= max(reach * cells / side, 0.5)
    return near


def add_faint(bins: Bins, found: Instances, rules: Rules, *, cells: int) -> Instances:
    """Adds the instances that votes at home name and those found do not explain.

    Args:
        bins: Votes of pixels at home, of any amplitude above noise.
        found: The instances so far; they stay as they are.
        rules: What the new ones must explain.
        cells: Cells an axis.
    """
    if len(bins.weight) == 0:
        return found
    # At full length, as if the blur had shortened nothing, distances mean what they mean elsewhere.
    code = torch.from_numpy(bins.code).T.contiguous()
    amplitude = nearest_cells(code, cells).amplitude.mean(0).clamp_(0.1, 1).numpy()
    bins = replace(bins, code=bins.code / amplitude[:, None])
    candidates = candidates_of(bins, find_candidates(bins, cells, radius=1), radius=1)
    more = choose(bins, candidates, rules, found)
    return replace(_joined(found, more), faint=len(more.labels))


def split(bins: Bins, found: Instances, rules: Rules, *, cells: int, gap: float) -> Instances:
    """Adds instances of cells next to those found, where many votes are much better explained.

    Only what takes off several times the votes' median distance counts: where an instance's own
    codes scatter over cells, their neighbours are no instances.

    Args:
        bins: The votes.
        found: The instances so far, none of them next to another.
        rules: What the new ones must explain, but for `gap`.
        cells: Cells an axis.
        gap: Least mean distance that a new one must take off.
    """
    if len(found.labels) == 0:
        return found
    cost = np.minimum(bin_costs(bins, found, rules.label_cost).min(1), rules.cap)
    order = cost.argsort()
    share = bins.weight[order].cumsum()
    median = float(cost[order][np.searchsorted(share, share[-1] / 2)])
    rules = replace(rules, gap=max(gap, SCATTER * median))
    candidates = candidates_of(bins, find_candidates(bins, cells, radius=0), radius=0)
    return _joined(found, choose(bins, candidates, rules, found))


def _joined(first: Instances, second: Instances) -> Instances:
    return Instances(
        np.concatenate([first.prototypes, second.prototypes]),
        np.concatenate([first.labels, second.labels]),
    )
