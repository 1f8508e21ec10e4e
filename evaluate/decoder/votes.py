"""Votes of pixels, summed by cell and semantic label: from pixels to a few hundred bins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.evaluate.decoder.cells import neighbour_distance
from panoptic_cache.train.encoding import cell_centres, gamma

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

MAX_BINS = 2048
"""Bins beyond these hold next to no votes; they bound the work on an untrained network."""
DRIFT_SAMPLING = 8
"""One vote in so many is enough to measure the drift."""


@dataclass(frozen=True)
class Votes:
    """V pixels that vote, of one image or of several.

    Attributes:
        codes: (4L, V) float32.
        labels: (V,) int64 semantic labels.
        rows: (V,) int64 nearest cells.
        columns: (V,) int64 nearest cells.
        image: (V,) int64, which image each is of.
    """

    codes: Tensor
    labels: Tensor
    rows: Tensor
    columns: Tensor
    image: Tensor


@dataclass(frozen=True)
class Bins:
    """M non-empty bins of the votes of one image, most votes first, on the processor.

    Attributes:
        weight: (M,) float32, votes in pixels.
        code: (M, 4L) float32 mean code.
        label: (M,) int64 semantic label.
        row: (M,) int64 cell.
        column: (M,) int64 cell.
        drift: How far codes move within a bin, see `measure_drift`.
    """

    weight: Floats
    code: Floats
    label: Integers
    row: Integers
    column: Integers
    drift: float


def bin_votes(votes: Votes, images: int, cells: int) -> list[Bins]:
    """Sums votes by image, label and cell.

    Args:
        votes: Of all images.
        images: How many these are.
        cells: Cells an axis.

    Returns:
        The bins of each image: from here on the work is small.
    """
    codes = votes.codes
    keys, bin_of, counts = torch.unique(
        ((votes.labels * images + votes.image) * cells + votes.rows) * cells + votes.columns,
        return_inverse=True,
        return_counts=True,
    )
    total = codes.new_zeros(len(keys), codes.shape[0]).index_add_(0, bin_of, codes.T)
    mean = (total / counts[:, None]).cpu().numpy()
    drift = measure_drift(votes, bin_of, len(keys), images, cells).tolist()
    key, count = torch.stack([keys, counts]).cpu().numpy()
    layer, cell = np.divmod(key, cells**2)
    label, image = np.divmod(layer, images)
    row, column = np.divmod(cell, cells)
    found = []
    for number in range(images):
        own = np.flatnonzero(image == number)
        own = own[np.argsort(-count[own], kind="stable")[:MAX_BINS]]
        found.append(
            Bins(
                weight=count[own].astype(np.float32),
                code=mean[own],
                label=label[own],
                row=row[own],
                column=column[own],
                drift=drift[number],
            )
        )
    return found


def measure_drift(votes: Votes, bin_of: Tensor, bins: int, images: int, cells: int) -> Tensor:
    """Variance of the centroids within a bin, over the squared distance of neighbouring cells.

    Codes of an instance may change slowly across it without leaving the curve that gamma draws,
    so that no distance to the grid shows it. Their scatter along the curve does: 0 where the code
    of an instance is constant, 1/6 where it sweeps over whole cells of both axes.

    Args:
        votes: Of all images; a sample is used.
        bin_of: (V,) int64 bin of each vote.
        bins: How many these are.
        images: The same of images.
        cells: Cells an axis.

    Returns:
        (images,) float32; 0 without votes.
    """
    some = slice(None, None, DRIFT_SAMPLING)
    image, bin_of = votes.image[some], bin_of[some]
    harmonics = votes.codes.shape[0] // 4
    tangent = tangents(harmonics, cells, votes.codes.device)
    u, v = votes.codes[:, some].unflatten(0, (2, 2 * harmonics))
    along = torch.stack(
        [(u * tangent[:, votes.columns[some]]).sum(0), (v * tangent[:, votes.rows[some]]).sum(0)]
    )
    counts = torch.bincount(bin_of, minlength=bins).clamp_min(1)
    mean = along.new_zeros(2, bins).index_add_(1, bin_of, along) / counts
    scatter = (along - mean[:, bin_of]).square().sum(0)
    total = scatter.new_zeros(images).index_add_(0, image, scatter)
    counts = torch.bincount(image, minlength=images).clamp_min(1)
    return total / counts / neighbour_distance(harmonics, cells)


@cache
def tangents(harmonics: int, cells: int, device: torch.device) -> Tensor:
    """(2L, cells) directions in which gamma moves on from each cell.

    They are orthogonal to gamma itself: a mixture with void only shortens what lies along them.
    """
    centres, step = cell_centres(cells, device=device), 1e-3
    ahead = gamma(centres + step, harmonics) - gamma(centres - step, harmonics)
    return F.normalize(ahead, dim=1).T.contiguous()
