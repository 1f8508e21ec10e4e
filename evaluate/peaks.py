"""Which instances a picture holds: votes on the grid of centroids, then the few that explain them.

Every voting pixel falls into a bin: the cell nearest to its code, and its semantic label. Peaks of
the votes are candidates. A greedy choice then takes the candidate that explains the codes best,
again and again, until the next one would only explain noise. All of this is on a few hundred bins,
not on pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
DEVICE_CHUNK = 1 << 18
"""The same elsewhere, where only memory counts."""


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


def chunks(size: int, device: torch.device) -> Iterator[slice]:
    """Slices of `CHUNK` pixels on a processor, of `DEVICE_CHUNK` elsewhere."""
    step = CHUNK if device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, size, step):
        yield slice(start, start + step)


def packed_argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the first dimension and its index, several times faster than `torch.max`.

    A plain maximum is vectorised, one with indices is not: so the index rides in the lowest bits
    of the number. For n candidates these are ceil(log2 n) of 23 bits of precision (relative 2^-15
    is left for 133 classes), and scores closer than that count as equal.

    Args:
        scores: (n, P) float32.

    Returns:
        (P,) float32 maxima, not finite where a score is not finite, and (P,) int64 indices.
    """
    count, size = scores.shape
    mask = (1 << (count - 1).bit_length()) - 1
    # Counting down, equal positive scores go to the first candidate.
    tags = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=scores.device)[:, None]
    best = torch.empty(size, dtype=torch.float32, device=scores.device)
    for part in chunks(size, scores.device):
        tagged = scores[:, part].view(torch.int32).bitwise_and(~mask).bitwise_or_(tags)
        torch.amax(tagged.view(torch.float32), 0, out=best[part])
    return best, (count - 1) - (best.view(torch.int32) & mask).long()


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
    for axis, half in enumerate(code.view(2, 2 * harmonics, size)):
        for part in chunks(size, code.device):
            best[axis, part], place[axis, part] = packed_argmax(grid @ half[:, part])
    return NearestCells(column=place[0], row=place[1], amplitude=best / harmonics)


def off_grid(code: Tensor, nearest: NearestCells) -> Tensor:
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


def bin_votes(code: Tensor, labels: Tensor, rows: Tensor, columns: Tensor, cells: int) -> Bins:
    """Sums the votes of P pixels by cell and label.

    Args:
        code: (4L, P).
        labels: (P,) int64.
        rows: (P,) int64 cells.
        columns: (P,) int64 cells.
        cells: Cells an axis.

    Returns:
        The bins, most votes first, on the processor: from here on the work is small.
    """
    keys, inverse, counts = torch.unique(
        (labels * cells + rows) * cells + columns, return_inverse=True, return_counts=True
    )
    total = code.new_zeros(len(keys), code.shape[0]).index_add_(0, inverse, code.T)
    order = counts.argsort(descending=True, stable=True)[:MAX_BINS]
    mean = (total[order] / counts[order, None]).cpu()
    keys, counts = torch.stack([keys[order], counts[order]]).cpu()
    return Bins(
        weight=counts.to(code.dtype),
        code=mean,
        label=keys // cells**2,
        row=keys // cells % cells,
        column=keys % cells,
    )


def measure_drift(code: Tensor, labels: Tensor, rows: Tensor, columns: Tensor, cells: int) -> float:
    """Variance of the centroids within a bin, over the squared distance of neighbouring cells.

    Codes of an instance may change slowly across it without leaving the curve that gamma draws,
    so that no distance to the grid shows it. Their scatter along the curve does: 0 where the code
    of an instance is constant, 1/6 where it sweeps over whole cells of both axes.

    Args:
        code: (4L, P); a sample of the votes will do.
        labels: (P,) int64.
        rows: (P,) int64 cells.
        columns: (P,) int64 cells.
        cells: Cells an axis.
    """
    if len(labels) == 0:
        return 0.0
    harmonics = code.shape[0] // 4
    step = 1e-3
    centres = cell_centres(cells, device=code.device)
    ahead = gamma(centres + step, harmonics) - gamma(centres - step, harmonics)
    tangent = F.normalize(ahead, dim=1).T  # (2L, cells), orthogonal to gamma: mixing with void
    u, v = code.view(2, 2 * harmonics, -1)  # only shortens what is measured
    along = torch.stack([(u * tangent[:, columns]).sum(0), (v * tangent[:, rows]).sum(0)])
    _, bin_of, counts = torch.unique(
        (labels * cells + rows) * cells + columns, return_inverse=True, return_counts=True
    )
    mean = along.new_zeros(2, len(counts)).index_add_(1, bin_of, along) / counts
    scatter = (along - mean[:, bin_of]).square().sum(0).mean()
    return float(scatter) / neighbour_distance(harmonics, cells)


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


def choose(bins: Bins, candidates: Instances, rules: Rules) -> Instances:
    """Greedy choice of the instances that explain the votes, as in facility location.

    A vote costs its distance to the nearest chosen instance, at most `cap`. A candidate is worth
    what it takes off, and is taken only if that is more than the scatter of those chosen.

    Args:
        bins: The votes.
        candidates: Their peaks.
        rules: What counts as more.
    """
    cost = bin_costs(bins, candidates, rules.label_cost).clamp_max(rules.cap)
    current = torch.full_like(bins.weight, rules.cap)
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
