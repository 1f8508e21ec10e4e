"""Instances that cast no votes: small or faint objects, which the semantic head alone has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import label as connected

from panoptic_cache.evaluate.decoder.cells import nearest_cells
from panoptic_cache.evaluate.decoder.instances import DecodeConfig
from panoptic_cache.evaluate.decoder.peaks import Instances
from panoptic_cache.evaluate.decoder.pixels import Pixels


def rescue(
    pixels: Pixels,
    found: Sequence[Instances],
    *,
    members: NDArray[np.int32],
    labels: NDArray[np.int32],
    noise: Sequence[float],
    config: DecodeConfig,
) -> None:
    """Makes instances of connected regions of a thing class that hardly any instance claims.

    A faint one does not count: small objects of a class side by side may share it, each on a region
    of its own.

    Args:
        pixels: B images.
        found: Their instances.
        members: (B, h, w), see `assign`; further instances are written into it.
        labels: (B, h, w) semantic labels.
        noise: Of each image, see `measure_noise`.
        config: Settings.
    """
    lost = [
        lost_regions(
            member,
            label,
            pixels.things,
            least=config.rescue_area,
            clear=len(one.labels) - one.faint,
        )
        for one, member, label in zip(found, members, labels, strict=True)
    ]
    everywhere = np.concatenate(
        [one.pixels + number * pixels.area for number, one in enumerate(lost)]
    )
    if len(everywhere) == 0:
        return
    chosen = torch.from_numpy(everywhere).to(pixels.codes.device)
    codes = pixels.codes.index_select(1, chosen).cpu().split([len(one.pixels) for one in lost], 1)
    for member, one, code, variance in zip(members, lost, codes, noise, strict=True):
        if len(one.pixels) == 0:
            continue
        owner = torch.from_numpy(one.owner)
        total = code.new_zeros(int(owner.max()) + 1, len(code)).index_add_(0, owner, code.T)
        mean = total.T / torch.bincount(owner)
        amplitude = nearest_cells(mean.contiguous(), config.cells).amplitude.amin(0)
        real = (amplitude > config.rescue_amplitude + config.rescue_noise * variance).numpy()
        kept = real[one.owner]
        member.ravel()[one.pixels[kept]] = (real.cumsum() + member.max())[one.owner[kept]]


@dataclass(frozen=True)
class Lost:
    """Pixels of regions that no instance claims.

    Attributes:
        pixels: (n,) flat indices.
        owner: (n,) int64, from 0, the region of each.
    """

    pixels: NDArray[np.intp]
    owner: NDArray[np.intp]


def lost_regions(
    member: NDArray[np.int32],
    labels: NDArray[np.int32],
    things: NDArray[np.bool_],
    *,
    least: int,
    clear: int,
) -> Lost:
    """Connected regions of one thing class of which most pixels have no clear instance.

    A region in which several faint instances lie is theirs.

    Args:
        member: (h, w) int32, 0 = no instance.
        labels: (h, w) int32 semantic labels.
        things: (C,) whether a category is a thing.
        least: Pixels without clear instance that a region must have.
        clear: Instances above this number are faint.
    """
    free = np.flatnonzero(things.take(labels) & ((member == 0) | (member > clear)))
    kinds = np.bincount(labels.ravel()[free], minlength=len(things)) >= max(least, 1)
    if not kinds.any():
        return Lost(free[:0], free[:0])
    shown = np.where(kinds, np.arange(1, len(kinds) + 1), 0).astype(np.int32).take(labels)
    region = connected(shown, background=0, connectivity=2).ravel()
    free = free[region[free] > 0]
    owner, area = region[free], np.bincount(region)
    unclaimed = np.bincount(owner, minlength=len(area))
    claim = member.ravel()[free].astype(np.int64)
    claims = np.unique((owner * (claim.max() + 1) + claim)[claim > 0]) // (claim.max() + 1)
    lost = (2 * unclaimed > area) & (unclaimed >= least)
    lost &= np.bincount(claims, minlength=len(area)) < 2
    kept = lost[owner]
    return Lost(free[kept], (lost.cumsum() - 1)[owner[kept]])
