"""From a network's output to a panoptic map: votes, peaks, assignment, classes, native size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import InputError
from train.encoding import GRID_CELLS, Encoding


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of the decoder.

    Attributes:
        cells: Cells an axis of the voting grid (section 5.1).
        radius: Cells around a peak, in each direction, whose votes belong to it.
        min_votes: Votes (pixels) under a peak below which it is noise.
        min_instance_area: Pixels of the network's output below which an instance is dropped.
        min_stuff_area: Native pixels below which a stuff segment is dropped.
    """

    cells: int = GRID_CELLS
    radius: int = 2
    min_votes: int = 4
    min_instance_area: int = 4
    min_stuff_area: int = 64


@dataclass(frozen=True)
class DecodedSegment:
    """One row of a panoptic map: id > 0, contiguous label, score in [0, 1], area in native pixels."""

    id: int
    label: int
    isthing: bool
    score: float
    area: int


@dataclass(frozen=True)
class PanopticMap:
    """Non-overlapping segments: ids (H, W) int32, 0 = void, and one row for every id in it."""

    ids: NDArray[np.int32]
    segments: tuple[DecodedSegment, ...]


def decode(
    instance: Tensor,
    semantic: Tensor,
    *,
    encoding: Encoding,
    isthing: Tensor,
    sizes: Sequence[tuple[int, int]],
    config: DecodeConfig | None = None,
) -> list[PanopticMap]:
    """Decodes a batch of predictions.

    Args:
        instance: (B, channels, h, w) predicted codes.
        semantic: (B, C, h, w) logits.
        encoding: The code the network was trained with.
        isthing: (C,) bool.
        sizes: Native (H, W) of each image.
        config: Settings; defaults where None.

    Raises:
        InputError: The prediction holds NaN or infinite values.
    """
    settings = config or DecodeConfig()
    return [
        _decode_one(code, logits, encoding, isthing.to(code.device), size, settings)
        for code, logits, size in zip(instance.float(), semantic.float(), sizes, strict=True)
    ]


def find_peaks(votes: Tensor, radius: int, min_votes: int) -> Tensor:
    """Greedy suppression in cell space: (K,) flat cells, most votes first."""
    cells = votes.shape[-1]
    left = votes.flatten().cpu().clone()
    order = left.argsort(descending=True, stable=True)
    order = order[left[order] >= min_votes]
    grid = left.view(cells, cells)
    peaks: list[int] = []
    for cell in order.tolist():
        row, column = divmod(cell, cells)
        if grid[row, column] <= 0:
            continue
        peaks.append(cell)
        grid[
            max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1
        ] = 0
    return torch.tensor(peaks, dtype=torch.int64, device=votes.device)


def _decode_one(
    code: Tensor,
    logits: Tensor,
    encoding: Encoding,
    isthing: Tensor,
    size: tuple[int, int],
    config: DecodeConfig,
) -> PanopticMap:
    height, width = code.shape[-2:]
    if not (bool(torch.isfinite(code).all()) and bool(torch.isfinite(logits.amax(0)).all())):
        raise InputError(
            "the network's output holds NaN or infinite values",
            remedy="check the checkpoint, or run the network in float32",
            code="prediction-not-finite",
        )
    labels = logits.argmax(0).flatten()  # (P,)
    costs = encoding.axis_costs(code.flatten(1), config.cells)
    best_u, column = costs.u.min(-1)
    best_v, row = costs.v.min(-1)
    inside = (best_u + best_v < costs.void) & isthing[labels]
    cell = row * config.cells + column
    votes = torch.bincount(cell[inside], minlength=config.cells**2).view(config.cells, -1)
    peaks = find_peaks(votes, config.radius, config.min_votes)
    instance = torch.zeros_like(labels)  # (P,) 0 = none, k = peak k - 1
    classes: list[int] = []
    if len(peaks):
        pixels = inside.nonzero()[:, 0]
        cost = costs.u[pixels][:, peaks % config.cells] + costs.v[pixels][:, peaks // config.cells]
        instance[pixels] = cost.argmin(-1) + 1
        ballots = torch.bincount(
            instance * len(isthing) + labels, minlength=(len(peaks) + 1) * len(isthing)
        ).view(-1, len(isthing))
        classes = (ballots[1:] * isthing).argmax(-1).tolist()
        area = ballots[1:].sum(-1)
        keep = torch.cat([area.new_zeros(1, dtype=torch.bool), area >= config.min_instance_area])
        instance = instance * keep[instance]
    segment = torch.where(
        instance > 0, instance + len(isthing), torch.where(isthing[labels], 0, labels + 1)
    ).view(1, 1, height, width)
    native = F.interpolate(segment.float(), size=size, mode="nearest-exact")[0, 0].long()
    area = torch.bincount(native.flatten(), minlength=len(isthing) + len(peaks) + 1)
    ids = torch.zeros_like(area)
    segments: list[DecodedSegment] = []
    for value in area.nonzero()[:, 0].tolist():
        count = int(area[value])
        if value == 0 or (value <= len(isthing) and count < config.min_stuff_area):
            continue
        label = value - 1 if value <= len(isthing) else classes[value - len(isthing) - 1]
        ids[value] = len(segments) + 1
        segments.append(DecodedSegment(len(segments) + 1, label, value > len(isthing), 1.0, count))
    return PanopticMap(ids[native].int().cpu().numpy(), tuple(segments))
