"""The grid cells nearest to codes (section 5.1), by two searches over an axis each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from train.encoding import cell_centres, gamma

CHUNK = 8192
"""Pixels worked on at once: their scores stay in the processor's cache."""
PRODUCTS = 2048
"""The same of products with the grid, which are made and read at once."""
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


def chunks(size: int, device: torch.device, step: int = CHUNK) -> Iterator[slice]:
    """Slices of `step` pixels on a processor, of `DEVICE_CHUNK` elsewhere."""
    step = step if device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, size, step):
        yield slice(start, start + step)


def packed_argmax(scores: Tensor, *, spoil: bool = False) -> tuple[Tensor, Tensor]:
    """Maximum over the first dimension and its index, several times faster than `torch.max`.

    A plain maximum is vectorised, one with indices is not: so the index rides in the lowest bits
    of the number. For n candidates these are ceil(log2 n) of 23 bits of precision (relative 2^-15
    is left for 133 classes), and scores closer than that count as equal.

    Args:
        scores: (n, P) float32.
        spoil: They may be overwritten, which is faster where they are fresh in the cache.

    Returns:
        (P,) float32 maxima, not finite where a score is not finite, and (P,) int64 indices.
    """
    tags = _Tags.of(len(scores), scores.device)
    best = torch.empty(scores.shape[1], dtype=torch.float32, device=scores.device)
    room = torch.empty(0, dtype=torch.float32, device=scores.device)
    for part in chunks(len(best), scores.device):
        some = scores[:, part]
        tags.maximum(some, best[part], room=some if spoil else room.resize_(some.shape))
    return best, tags.read(best)


@dataclass(frozen=True)
class _Tags:
    """The index of each of n candidates, in the lowest bits of a float.

    Attributes:
        kept: A mask of the other bits.
        values: (n, 1) int32. Counting down, equal positive scores go to the first candidate.
    """

    kept: int
    values: Tensor

    @classmethod
    @cache
    def of(cls, count: int, device: torch.device) -> _Tags:
        values = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=device)
        return cls(~((1 << (count - 1).bit_length()) - 1), values[:, None])

    def maximum(self, scores: Tensor, out: Tensor, *, room: Tensor) -> None:
        """Writes the tagged maxima of (n, P) float32 to (P,); `room` is overwritten."""
        bits = torch.bitwise_and(scores.view(torch.int32), self.kept, out=room.view(torch.int32))
        bits.bitwise_or_(self.values)
        torch.amax(room, 0, out=out)

    def read(self, best: Tensor) -> Tensor:
        """(..., P) int64 indices that (..., P) float32 maxima carry."""
        return (len(self.values) - 1) - (best.view(torch.int32) & ~self.kept).long()


def nearest_cells(code: Tensor, cells: int) -> NearestCells:
    """Nearest of cells x cells grid points by two searches over `cells` (section 5.1).

    |x - gamma(u)|^2 = |x|^2 + L - 2 x . gamma(u), so the nearest cell is the largest product.

    Args:
        code: (4L, P) float32.
        cells: Cells an axis.
    """
    harmonics = code.shape[0] // 4
    grid, size = axis_codes(harmonics, cells, code.device), code.shape[1]
    tags = _Tags.of(cells, code.device)
    best = code.new_empty(2, size)
    for part in chunks(size, code.device, PRODUCTS):
        for half, found in zip(code[:, part].chunk(2), best[:, part], strict=True):
            products = grid @ half
            tags.maximum(products, found, room=products)
    column, row = tags.read(best)
    return NearestCells(column=column, row=row, amplitude=best / harmonics)


@cache
def axis_codes(harmonics: int, cells: int, device: torch.device) -> Tensor:
    """(cells, 2L) gamma of the cells of an axis."""
    return gamma(cell_centres(cells, device=device), harmonics)


def off_grid(code: Tensor, nearest: NearestCells) -> Tensor:
    """(P,) variance a channel of what a code holds beside its cell's, whatever its amplitude."""
    harmonics = code.shape[0] // 4
    explained = harmonics * nearest.amplitude.square().sum(0)
    return (code.square().sum(0) - explained).clamp_min(0) / (code.shape[0] - 2)


@cache
def neighbour_distance(harmonics: int, cells: int) -> float:
    """Squared distance of the codes of neighbouring cells (0.51 for L = 4, 80 cells)."""
    near = gamma(torch.tensor([0.0, 2.0 / cells]), harmonics)
    return float((near[1] - near[0]).square().sum())
