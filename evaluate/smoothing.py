"""Means of codes within regions of one semantic label, at a cost that is the same for any radius.

Noise of a prediction is local, an instance is not: averaging neighbours of the same label removes
the one and keeps the other. The window is a cross-shaped region (Zhang, Lu and Lafruit 2009, for
stereo matching): first along the row, then along the column, and on each line it ends where the
label changes. A window thus never leaks into another class, and by cumulative sums each mean costs
two look-ups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluate.pixels import places

CHANNELS = 8
"""Smoothed at once: it halves the memory, at no cost."""


@dataclass(frozen=True)
class Lines:
    """The runs that the pixels of one orientation form, in its order.

    Attributes:
        first: (N,) position of the first pixel of each pixel's run.
        last: (N,) position of its last pixel.
    """

    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class Regions:
    """N pixels to be averaged, row by row, and M of them whose means are wanted.

    Attributes:
        rows: Runs along the rows, of the N pixels.
        columns: Runs along the columns, of the M pixels, column by column.
        source: (M,) which of the N they are.
        pixels: (M,) their flat indices.
    """

    rows: Lines
    columns: Lines
    source: Tensor
    pixels: Tensor


def find_regions(labels: Tensor, pixels: Tensor, stride: int = 1) -> Regions:
    """Runs of equal labels.

    Args:
        labels: (B, h, w) int64, of B images.
        pixels: (N,) the flat indices, ascending, of all pixels of some of the labels.
        stride: Means are wanted in every so manieth column.
    """
    rank = torch.full(labels.shape, -1, dtype=torch.int32, device=labels.device)
    rank.view(-1)[pixels] = torch.arange(len(pixels), dtype=torch.int32, device=labels.device)
    columns, sparse = (map_.mT[:, ::stride].contiguous() for map_ in (rank, labels))
    upright = places(columns >= 0)
    source = columns.flatten().index_select(0, upright)
    return Regions(
        rows=_lines(labels, pixels),
        columns=_lines(sparse, upright),
        source=source,
        pixels=pixels.index_select(0, source),
    )


def radius_of_means(regions: Regions, radii: Sequence[int], area: int) -> int | Tensor:
    """The radius for each mean; one number where there is one image, which is faster.

    Args:
        regions: Of B images.
        radii: B of them.
        area: Pixels of an image.
    """
    if len(radii) == 1:
        return radii[0]
    image = regions.pixels // area
    return torch.tensor(radii, device=image.device).index_select(0, image)


def smooth(values: Tensor, regions: Regions, radius: int | Tensor) -> Tensor:
    """Means over cross-shaped windows.

    Args:
        values: (channels, N) float32.
        regions: See `find_regions`.
        radius: Pixels to each side; where there are several images, (M,) int64, of each mean.

    Returns:
        (channels, M) float32.
    """
    across = _windows(regions.rows, radius, regions.source)
    down = _windows(regions.columns, radius)
    # Over a whole batch, sums in single precision would lose what a window holds.
    wide = torch.float64 if isinstance(radius, Tensor) else values.dtype
    means = [
        _window_means(_window_means(few, across, wide), down, wide)
        for few in values.split(CHANNELS)
    ]
    return torch.cat(means)


def _lines(labels: Tensor, pixels: Tensor) -> Lines:
    """Runs of adjacent pixels of one label along the rows of (B, h, w) labels."""
    breaks = torch.ones(labels.shape, dtype=torch.bool, device=labels.device)
    torch.ne(labels[..., 1:], labels[..., :-1], out=breaks[..., 1:])
    breaks = breaks.flatten().index_select(0, pixels)
    starts = places(breaks)
    ends = torch.empty_like(starts)
    ends[:-1] = starts[1:] - 1
    ends[-1:] = len(pixels) - 1
    run = breaks.cumsum(0).sub_(1)
    return Lines(starts.index_select(0, run), ends.index_select(0, run))


@dataclass(frozen=True)
class _Windows:
    """Stretches of pixels to be averaged.

    Attributes:
        low: (M,) position of the first pixel of each.
        high: (M,) that of the last, plus one.
        size: (M,) pixels.
    """

    low: Tensor
    high: Tensor
    size: Tensor


def _windows(lines: Lines, radius: int | Tensor, at: Tensor | None = None) -> _Windows:
    """Windows around the M positions `at`, or around all, that end where the line does."""
    first, last = lines.first, lines.last
    if at is None:
        at = torch.arange(len(first), device=first.device)
    else:
        first, last = first.index_select(0, at), last.index_select(0, at)
    low = torch.maximum(at - radius, first)
    high = torch.minimum(at + radius, last).add_(1)
    return _Windows(low, high, high - low)


def _window_means(values: Tensor, windows: _Windows, wide: torch.dtype) -> Tensor:
    """Means of (channels, N) values over M windows, summed in a type as wide."""
    total = values.new_zeros(values.shape[0], values.shape[1] + 1, dtype=wide)
    torch.cumsum(values, 1, dtype=wide, out=total[:, 1:])
    mean = total.index_select(1, windows.high).sub_(total.index_select(1, windows.low))
    return mean.div_(windows.size).to(values.dtype)
