"""How an image is cut into tiles: the windows that rendering and prediction share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from panoptic_cache.pipeline.base.errors import InputError

Span = tuple[int, int]
"""First and last pixel + 1 along an axis."""


@dataclass(frozen=True, slots=True)
class Window:
    """A tile of an image: where it lies, and which of its pixels no other tile sees better."""

    rows: Span  # Of the image
    columns: Span
    # The part that lies deeper in this tile than in any other one; these parts cover the image and
    # do not overlap.
    core_rows: Span
    core_columns: Span

    @property
    def place(self) -> tuple[slice, slice]:
        """The tile in arrays of the image, (H, W, ...)."""
        return slice(*self.rows), slice(*self.columns)

    @property
    def core(self) -> tuple[slice, slice]:
        """Its own part in arrays of the image."""
        return slice(*self.core_rows), slice(*self.core_columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def tile_key(key: str, top: int, left: int) -> str:
    """The key of a tile: that of its image, and where the tile begins."""
    return f"{key}-{top}-{left}"


def check_tile(tile: int, overlap: int, *, where: str) -> None:
    """Raises InputError unless tiles have pixels and overlap by less than all of them."""
    if tile < 1 or not 0 <= overlap < tile:
        raise InputError(
            f"tiles of {tile} px that overlap by {overlap} px",
            where=where,
            remedy="tiles need pixels, and an overlap from 0 to one less than these",
        )


def windows(size: tuple[int, int], tile: int, overlap: int = 0) -> Iterator[Window]:
    """The tiles of an image of a size (height, width), row by row.

    As few as possible, spread evenly, so that the first and the last touch the image's edges. Each
    has `tile` pixels along an axis, or all pixels of an axis that has fewer; neighbours share at
    least `overlap` pixels.
    """
    columns = [*spans(size[1], tile, overlap)]
    for rows, core_rows in spans(size[0], tile, overlap):
        for across, core_columns in columns:
            yield Window(rows, across, core_rows, core_columns)


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[Span, Span]]:
    """The tiles along an axis, and the part of each that is its own."""
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    last = max(0, length - tile)
    starts = [round(last * number / max(1, count - 1)) for number in range(count)]
    ends = [min(start + tile, length) for start in starts]
    # Two neighbours share out their overlap in its middle.
    seams = [(end + start) // 2 for end, start in zip(ends, starts[1:], strict=False)]
    own = zip([0, *seams], [*seams, length], strict=True)
    yield from zip(zip(starts, ends, strict=True), own, strict=True)
