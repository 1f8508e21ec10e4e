"""Means of codes within regions of one semantic label, at a cost that is the same for any radius.

Noise of a prediction is local, an instance is not: averaging neighbours of the same label removes
the one and keeps the other. The window is a cross-shaped region (Zhang, Lu and Lafruit 2009, for
stereo matching): first along the row, then along the column, and on each line it ends where the
label changes. A window thus never leaks into another class, and by cumulative sums each mean costs
two look-ups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """N pixels to be smoothed, and how they hang together.

    Attributes:
        pixels: (N,) flat indices, row by row.
        rows: Runs along the rows, in the order of `pixels`.
        columns: Runs along the columns, in column order.
        to_columns: (N,) position in `pixels` of each pixel in column order.
        to_rows: (N,) the inverse.
    """

    pixels: Tensor
    rows: Lines
    columns: Lines
    to_columns: Tensor
    to_rows: Tensor


def find_regions(labels: Tensor, member: Tensor) -> Regions:
    """Runs of equal labels among the member pixels.

    Args:
        labels: (h, w) int64.
        member: (h, w) bool, the pixels that take part.
    """
    height, width = labels.shape
    pixels = member.flatten().nonzero()[:, 0]
    upright = member.T.flatten().nonzero()[:, 0]  # x * h + y
    x, y = upright // height, upright % height
    rank = torch.zeros(height * width, dtype=torch.int64, device=labels.device)
    rank[pixels] = torch.arange(len(pixels), device=labels.device)
    to_columns = rank[y * width + x]
    to_rows = torch.empty_like(to_columns)
    to_rows[to_columns] = torch.arange(len(pixels), device=labels.device)
    return Regions(
        pixels=pixels,
        rows=_lines(labels.flatten()[pixels], pixels, width),
        columns=_lines(labels.flatten()[pixels][to_columns], upright, height),
        to_columns=to_columns,
        to_rows=to_rows,
    )


def smooth(values: Tensor, regions: Regions, radius: int) -> Tensor:
    """Mean over each pixel's cross-shaped window.

    Args:
        values: (channels, N) float32, in the order of `regions.pixels`.
        regions: See `find_regions`.
        radius: Pixels to each side; 0 returns the values.

    Returns:
        (channels, N) float32.
    """
    if radius == 0:
        return values
    along_rows = _line_mean(values, regions.rows, radius)
    upright = _line_mean(along_rows.index_select(1, regions.to_columns), regions.columns, radius)
    return upright.index_select(1, regions.to_rows)


def _lines(labels: Tensor, places: Tensor, length: int) -> Lines:
    """Runs of adjacent pixels of one label; `places` index lines of `length` pixels."""
    count = len(places)
    breaks = torch.ones(count, dtype=torch.bool, device=places.device)
    breaks[1:] = (
        (labels[1:] != labels[:-1]) | (places[1:] != places[:-1] + 1) | (places[1:] % length == 0)
    )
    starts = breaks.nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([count])]) - 1
    run = breaks.cumsum(0) - 1
    return Lines(starts[run], ends[run])


def _line_mean(values: Tensor, lines: Lines, radius: int) -> Tensor:
    here = torch.arange(values.shape[1], device=values.device)
    low = torch.maximum(here - radius, lines.first)
    high = torch.minimum(here + radius, lines.last) + 1
    total = values.new_zeros(values.shape[0], values.shape[1] + 1)
    torch.cumsum(values, 1, out=total[:, 1:])
    mean = total.index_select(1, high).sub_(total.index_select(1, low))
    return mean.div_(high - low)
