"""The grid cells nearest to codes (section 5.1), by two searches over an axis each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train.encoding import cell_centres, gamma

CHUNK = 8192
"""Pixels worked on at once: their scores stay in the processor's cache."""
DEVICE_CHUNK = 1 << 18
"""The same elsewhere, where only memory counts."""


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
