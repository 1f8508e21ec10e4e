"""The grid cells nearest to codes (section 5.1), by two searches over an axis each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder.parallel import in_parallel
from panoptic_cache.train.encoding import cell_centres, gamma

CHUNK = 8192
"""Pixels worked on at once: their scores stay in the processor's cache."""
DEVICE_CHUNK = 1 << 18
"""The same elsewhere, where only memory counts."""


@dataclass(frozen=True)
class NearestCells:
    """The nearest cell of each of P codes.

    Attributes:
        column: (P,) int32.
        row: (P,) int32.
        amplitude: (2, P) projections on the cell's gamma(u) and gamma(v), over |gamma|^2: 1 for a
            clean code, 0 for void.
    """

    column: Tensor
    row: Tensor
    amplitude: Tensor


def chunk_of(device: torch.device) -> int:
    """Pixels that are worked on at once."""
    return CHUNK if device.type == "cpu" else DEVICE_CHUNK


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of so many pixels, the last dimension, of all tensors at once."""
    step = chunk_of(tensors[0].device)
    return zip(*(tensor.split(step, -1) for tensor in tensors), strict=True)


def room_for(rows: int, pixels: Tensor) -> Tensor:
    """(rows, P) float32 of undefined values, for the chunks of (..., N) pixels."""
    return pixels.new_empty(rows, min(chunk_of(pixels.device), pixels.shape[-1]))


def packed_argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the first dimension and its index, several times faster than `torch.max`.

    A plain maximum is vectorised, one with indices is not: so the index rides in the lowest bits
    of the number. For n candidates these are ceil(log2 n) of 23 bits of precision (relative 2^-15
    is left for 133 classes), and scores closer than that count as equal.

    Args:
        scores: (n, P) float32.

    Returns:
        (P,) float32 maxima, not finite where a score is not finite, and (P,) int32 indices.
    """
    tags, best = Tags.of(len(scores), scores.device), scores.new_empty(scores.shape[1])

    def begin() -> Callable[[tuple[Tensor, ...]], None]:
        room = room_for(len(scores), scores)

        def search(part: tuple[Tensor, ...]) -> None:
            some, out = part
            tags.maximum(some, out, room[:, : some.shape[1]])

        return search

    in_parallel(begin, chunks(scores, best))
    return best, tags.read(best)


@dataclass(frozen=True)
class Tags:
    """The index of each of n candidates, in the lowest bits of a float.

    Attributes:
        kept: A mask of the other bits.
        values: (n, 1) int32. Counting down, equal positive scores go to the first candidate.
    """

    kept: int
    values: Tensor

    @classmethod
    @cache
    def of(cls, count: int, device: torch.device) -> Tags:
        """Those of n candidates."""
        values = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=device)
        return cls(~((1 << (count - 1).bit_length()) - 1), values[:, None])

    def maximum(self, scores: Tensor, out: Tensor, room: Tensor) -> None:
        """Writes the tagged maxima of (n, P) float32 to (P,).

        Args:
            scores: Of few pixels, see `chunks`.
            out: The maxima.
            room: (n, P) float32 that may be written into; may be the scores themselves.
        """
        bits = room.view(torch.int32)
        torch.bitwise_and(scores.view(torch.int32), self.kept, out=bits)
        bits.bitwise_or_(self.values)
        torch.amax(room, 0, out=out)

    def read(self, best: Tensor) -> Tensor:
        """(..., P) int32 indices that (..., P) float32 maxima carry."""
        return (best.view(torch.int32) & ~self.kept).neg_().add_(len(self.values) - 1)


def nearest_cells(code: Tensor, cells: int) -> NearestCells:
    """Nearest of cells x cells grid points by two searches over `cells` (section 5.1).

    |x - gamma(u)|^2 = |x|^2 + L - 2 x . gamma(u), so the nearest cell is the largest product.

    Args:
        code: (4L, P) float32.
        cells: Cells an axis.
    """
    harmonics = code.shape[0] // 4
    grid, size = axis_codes(harmonics, cells, code.device), code.shape[1]
    tags = Tags.of(cells, code.device)
    best = code.new_empty(2, size)

    def begin() -> Callable[[tuple[Tensor, ...]], None]:
        room = room_for(cells, code)

        def search(part: tuple[Tensor, ...]) -> None:
            some, out = part
            products = room[:, : some.shape[1]]
            for half, found in zip(some.chunk(2), out, strict=True):
                torch.mm(grid, half, out=products)
                tags.maximum(products, found, room=products)

        return search

    in_parallel(begin, chunks(code, best))
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
