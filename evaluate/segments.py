"""From the instance of each pixel to segments: classes, stuff, small areas, native size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluate.peaks import packed_argmax


@dataclass(frozen=True)
class DecodedSegment:
    """One row of a panoptic map.

    Attributes:
        id: Positive, unique in its map.
        label: Contiguous category label.
        isthing: Whether it is an instance.
        score: Share of its pixels whose semantic label agrees, in [0, 1].
        area: Native pixels.
    """

    id: int
    label: int
    isthing: bool
    score: float
    area: int


@dataclass(frozen=True)
class PanopticMap:
    """Segments that do not overlap.

    Attributes:
        ids: (H, W) int32 segment ids, 0 = void.
        segments: One row for each id in `ids`, in ascending order.
    """

    ids: NDArray[np.int32]
    segments: tuple[DecodedSegment, ...]


@dataclass(frozen=True)
class Painting:
    """What each pixel shows, before ids are given.

    Attributes:
        values: (h, w) int64: 0 = void, v = row v - 1 of the tables below.
        labels: (R,) contiguous category of each row: all C categories as stuff, then instances.
        scores: (R,) share of pixels whose semantic label agrees.
        categories: C.
    """

    values: Tensor
    labels: Tensor
    scores: Tensor
    categories: int


def paint(member: Tensor, labels: Tensor, isthing: Tensor, *, min_instance_area: int) -> Painting:
    """Classes of instances by majority vote, stuff where none is.

    Pixels of a thing class that no instance claims are void.

    Args:
        member: (h, w) int64, 0 = no instance, k = instance k - 1.
        labels: (h, w) int64 semantic labels.
        isthing: (C,) bool.
        min_instance_area: Pixels below which an instance is dropped.
    """
    categories = len(isthing)
    count = int(member.max()) + 1
    ballots = torch.bincount((member * categories + labels).flatten(), minlength=count * categories)
    ballots = ballots.view(count, categories)
    winning, winner = (ballots * isthing).max(1)
    area = ballots.sum(1)
    valid = (area >= min_instance_area) & (winning > 0)
    valid[0] = False
    stuff = torch.where(isthing[labels], 0, labels + 1)
    return Painting(
        values=torch.where(valid[member], member + categories, stuff),
        labels=torch.cat([torch.arange(categories, device=labels.device), winner[1:]]),
        scores=torch.cat([torch.ones(categories, device=labels.device), (winning / area)[1:]]),
        categories=categories,
    )


def resize_values(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map of values to (H, W) by bilinear vote; by nearest pixel where it shrinks.

    A pixel takes the value with the largest bilinear weight among its four neighbours, which is
    the bilinear resize of each segment's mask. Only pixels at edges need it.

    Args:
        values: (h, w) int64.
        size: (H, W).
    """
    rows, row_shift = _nearest(values.shape[0], size[0], values.device)
    columns, column_shift = _nearest(values.shape[1], size[1], values.device)
    result = values[rows][:, columns]
    if size[0] <= values.shape[0] or size[1] <= values.shape[1]:
        return result
    mixed = _edges(values)[rows][:, columns].flatten().nonzero()[:, 0]
    y, x = mixed // size[1], mixed % size[1]
    row, column = rows[y], columns[x]
    below = (row + row_shift[y].sign().long()).clamp(0, values.shape[0] - 1)
    beside = (column + column_shift[x].sign().long()).clamp(0, values.shape[1] - 1)
    corners = torch.stack(
        [values[row, column], values[row, beside], values[below, column], values[below, beside]]
    )  # (4, N)
    far_row, far_column = row_shift.abs()[y], column_shift.abs()[x]
    row_weights = torch.stack([1 - far_row, far_row])  # (2, N)
    column_weights = torch.stack([1 - far_column, far_column])
    weights = (row_weights[:, None] * column_weights).flatten(0, 1)
    votes = ((corners[:, None] == corners) * weights).sum(1)
    _, winner = packed_argmax(votes)
    result.view(-1)[mixed] = corners.gather(0, winner[None])[0]
    return result


def number(painting: Painting, size: tuple[int, int], *, min_stuff_area: int) -> PanopticMap:
    """Resizes to native and gives ids 1, 2, ... to what is left.

    Args:
        painting: See `paint`.
        size: Native (H, W).
        min_stuff_area: Native pixels below which a stuff segment becomes void.
    """
    values = resize_values(painting.values, size)
    area = torch.bincount(values.flatten(), minlength=len(painting.labels) + 1)
    stuff = torch.arange(len(area), device=area.device) <= painting.categories
    kept = (area > 0) & ~(stuff & (area < min_stuff_area))
    kept[0] = False
    ids = torch.where(kept, kept.cumsum(0), 0)
    rows = kept.nonzero()[:, 0]
    table = zip(
        ids[rows].tolist(),
        painting.labels[rows - 1].tolist(),
        (~stuff[rows]).tolist(),
        painting.scores[rows - 1].tolist(),
        area[rows].tolist(),
        strict=True,
    )
    segments = tuple(DecodedSegment(*row) for row in table)
    return PanopticMap(ids=ids.int()[values].cpu().numpy(), segments=segments)


def _edges(values: Tensor) -> Tensor:
    """(h, w) bool, pixels that differ from one of their eight neighbours."""
    edges = torch.zeros_like(values, dtype=torch.bool)
    across = values[:, 1:] != values[:, :-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    across = values[1:] != values[:-1]
    down = edges.clone()
    for one, other in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        down[one] |= across | edges[other]
    return down


def _nearest(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nearest source index of each target pixel, and the signed offset from its centre."""
    place = (torch.arange(target, device=device) + 0.5) * (source / target)
    index = place.long().clamp_max(source - 1)
    return index, place - 0.5 - index
