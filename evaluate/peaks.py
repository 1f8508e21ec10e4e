"""Which instances a picture holds: votes on the grid of centroids, then the fewest that explain them.

Every voting pixel falls into a bin: the cell nearest to its code, and its semantic label. Peaks of
the votes are candidates. A greedy choice then takes the candidate that explains the codes best,
again and again, until the next one would only explain noise. All of this is on a few hundred bins,
not on pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from train.encoding import cell_centres, gamma

MAX_BINS = 2048
"""Bins beyond these hold next to no votes; they bound the work on an untrained network."""
MAX_CANDIDATES = 512
CHUNK = 8192
"""Pixels worked on at once: their scores stay in the processor's cache."""


@dataclass(frozen=True)
class Instances:
    """K instances: prototype codes (K, 4L) of norm sqrt(2 L), and semantic labels (K,) int64."""

    prototypes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class NearestCells:
    """The nearest cell of each of P codes.

    Attributes:
        column: (P,) int64.
        row: (P,) int64.
        amplitude: (2, P) projections on the cell's gamma(u) and gamma(v), over |gamma|^2: 1 for a
            clean code, 0 for void.
    """

    column: Tensor
    row: Tensor
    amplitude: Tensor


def packed_argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the first dimension and its index, several times faster than `torch.max`.

    A plain maximum is vectorised, one with indices is not: so the index rides in the lowest bits
    of the number. The maximum is off by at most a relative 2^-23 times the power of two that holds
    the n indices (2^-15 for 133 classes), and candidates closer than that count as equal.

    Args:
        scores: (n, P) float32.

    Returns:
        (P,) float32 maxima, not finite where a score is not finite, and (P,) int64 indices.
    """
    count, size = scores.shape
    mask = (1 << (count - 1).bit_length()) - 1
    tags = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=scores.device)[:, None]
    best = torch.empty(size, dtype=torch.float32, device=scores.device)
    step = CHUNK if scores.device.type == "cpu" else size
    buffer = torch.empty((count, min(step, size)), dtype=torch.int32, device=scores.device)
    for start in range(0, size, step):
        chunk = scores[:, start : start + step].view(torch.int32)
        tagged = buffer[:, : chunk.shape[1]]
        torch.bitwise_and(chunk, ~mask, out=tagged)
        tagged |= tags
        torch.amax(tagged.view(torch.float32), 0, out=best[start : start + step])
    index = (count - 1) - (best.view(torch.int32) & mask).long()
    return best, index


def nearest_cells(code: Tensor, cells: int) -> NearestCells:
    """Nearest of cells x cells grid points by two searches over `cells` (section 5.1).

    |x - gamma(u)|^2 = |x|^2 + L - 2 x . gamma(u), so the nearest cell is the largest product.

    Args:
        code: (4L, P) float32.
        cells: Cells an axis.
    """
    harmonics = code.shape[0] // 4
    grid = gamma(cell_centres(cells, device=code.device), harmonics)  # (cells, 2L)
    size = code.shape[1]
    best = code.new_empty(2, size)
    place = torch.empty((2, size), dtype=torch.int64, device=code.device)
    for axis, part in enumerate(code.unflatten(0, (2, 2 * harmonics))):
        for start in range(0, size, CHUNK):
            stop = start + CHUNK
            best[axis, start:stop], place[axis, start:stop] = packed_argmax(
                grid @ part[:, start:stop]
            )
    return NearestCells(column=place[0], row=place[1], amplitude=best / harmonics)


def noise_variance(code: Tensor, nearest: NearestCells) -> Tensor:
    """(P,) variance a channel of what a code holds beside its cell's, whatever its amplitude."""
    harmonics = code.shape[0] // 4
    explained = harmonics * nearest.amplitude.square().sum(0)
    return (code.square().sum(0) - explained).clamp_min(0) / (code.shape[0] - 2)


def neighbour_distance(harmonics: int, cells: int) -> float:
    """Squared distance of the codes of neighbouring cells (0.51 for L = 4, 80 cells)."""
    near = gamma(torch.tensor([0.0, 2.0 / cells]), harmonics)
    return float((near[1] - near[0]).square().sum())


@dataclass(frozen=True)
class Bins:
    """M non-empty bins of votes.

    Attributes:
        weight: (M,) float32, votes in pixels.
        code: (M, 4L) mean code.
        label: (M,) int64 semantic label.
        row: (M,) int64 cell.
        column: (M,) int64 cell.
    """

    weight: Tensor
    code: Tensor
    label: Tensor
    row: Tensor
    column: Tensor


def bin_votes(code: Tensor, labels: Tensor, nearest: NearestCells, cells: int) -> Bins:
    """Sums the votes of P pixels by cell and label; (4L, P) codes, (P,) labels."""
    key = (labels * cells + nearest.row) * cells + nearest.column
    keys, inverse, counts = key.unique(return_inverse=True, return_counts=True)
    total = code.new_zeros(len(keys), code.shape[0]).index_add_(0, inverse, code.T)
    weight = counts.to(code.dtype)
    order = weight.argsort(descending=True, stable=True)[:MAX_BINS]
    keys = keys[order]
    return Bins(
        weight=weight[order].cpu(),
        code=(total[order] / weight[order, None]).cpu(),
        label=(keys // cells**2).cpu(),
        row=(keys // cells % cells).cpu(),
        column=(keys % cells).cpu(),
    )


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
    labels, layer = bins.label.unique(return_inverse=True)
    votes = torch.zeros(len(labels), cells, cells)
    votes[layer, bins.row, bins.column] = bins.weight
    kernel = torch.tensor([0.5, 1.0, 0.5])
    votes = F.conv2d(votes[:, None], (kernel[:, None] * kernel)[None, None], padding=1)
    peak = (votes == F.max_pool2d(votes, 3, 1, 1))[:, 0]
    score = votes[:, 0][layer, bins.row, bins.column]
    peaks = peak[layer, bins.row, bins.column].nonzero()[:, 0]
    order: Tensor = score[peaks].argsort(descending=True, stable=True)
    return peaks[order][:MAX_CANDIDATES]


def prototypes_of(bins: Bins, candidates: Tensor, *, radius: int) -> Tensor:
    """(Kc, 4L) mean code of the bins around each candidate that share its label."""
    near = (
        (bins.label[candidates][:, None] == bins.label)
        & ((bins.row[candidates][:, None] - bins.row).abs() <= radius)
        & ((bins.column[candidates][:, None] - bins.column).abs() <= radius)
    )
    return normalised((near * bins.weight) @ bins.code)


def normalised(code: Tensor) -> Tensor:
    """Scales the u and the v half of (K, 4L) codes to the length of gamma, sqrt(L)."""
    harmonics = code.shape[1] // 4
    halves = code.unflatten(1, (2, 2 * harmonics))
    return (F.normalize(halves, dim=2) * harmonics**0.5).flatten(1)


def bin_costs(bins: Bins, instances: Instances, label_cost: float) -> Tensor:
    """(M, K) squared distances, plus `label_cost` where the labels differ."""
    distance = torch.cdist(bins.code, instances.prototypes).square()
    return distance + label_cost * (bins.label[:, None] != instances.labels)


def choose(
    bins: Bins, candidates: Instances, *, cap: float, label_cost: float, gap: float, saved: float
) -> Instances:
    """Greedy choice of the instances that explain the votes, as in facility location.

    A bin costs its distance to the nearest chosen instance, at most `cap`. A candidate is worth
    what it would take off. It must take off `gap` on average from the bins it improves, else it
    only splits the scatter of another one, and `saved` altogether.

    Args:
        bins: The votes.
        candidates: Their peaks.
        cap: Squared distance from which a bin is not explained at all.
        label_cost: Squared distance that a differing label counts for.
        gap: Least mean squared distance taken off.
        saved: Least squared distance taken off, summed over votes.
    """
    cost = bin_costs(bins, candidates, label_cost).clamp_max(cap)
    current = torch.full_like(bins.weight, cap)
    chosen: list[int] = []
    while len(chosen) < len(candidates.labels):
        relief = (current[:, None] - cost).clamp_min(0)
        total = bins.weight @ relief
        helped = bins.weight @ (relief > 0).to(cost.dtype)
        fair = (total >= gap * helped) & (total >= saved) & (helped > 0)
        if not bool(fair.any()):
            break
        best = int((total * fair).argmax())
        chosen.append(best)
        current = torch.minimum(current, cost[:, best])
    return Instances(candidates.prototypes[chosen], candidates.labels[chosen])


def refine(bins: Bins, instances: Instances, *, cap: float, label_cost: float) -> Instances:
    """Moves each prototype to the mean of the bins nearest to it: finer than the grid."""
    if len(instances.labels) == 0:
        return instances
    cost, nearest = bin_costs(bins, instances, label_cost).min(1)
    weight = bins.weight * (cost < cap)
    total = torch.zeros_like(instances.prototypes).index_add_(
        0, nearest, bins.code * weight[:, None]
    )
    moved = torch.bincount(nearest, weight, minlength=len(total)) > 0
    prototypes = torch.where(moved[:, None], normalised(total), instances.prototypes)
    return Instances(prototypes, instances.labels)
