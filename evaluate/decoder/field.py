"""From the two heads to votes, on the device that holds them: one vote a pixel, in cells.

A processor decodes one image at a time, and leaves out classes and pixels that do not matter; on a
GPU, to ask how many there are would wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panoptic_cache.train.encoding import cell_centres, gamma

CLASS_SAMPLES, NOISE_SAMPLES = 1 << 15, 1 << 14
"""Pixels of an image that tell which classes it holds, and how noisy its codes are."""
LARGEST_LEAD = 10.0
"""Log odds beyond which a class is sure; with one class alone there are none."""
PIXELS_AT_ONCE, CHANNELS_AT_ONCE = 2048, 4
"""Scored at once for 80 cells, within a processor's cache; smoothed at once, for little memory."""
MAX_RADIUS = 9
"""Pixels. Wider means mix what lies side by side, and gain nothing at any level of noise."""
TYPICAL_POWER = 6
"""Of the power mean that tells a typical length: noise in a crowd is short, however much of it."""


@dataclass(frozen=True)
class Classes:
    """What the semantic head says of the pixels of B images; each is (B, h, w)."""

    thing: Tensor  # int64, the best thing class
    stuff: Tensor  # int64, the best stuff class
    chance: Tensor  # float32, probability of the former against the latter


@dataclass(frozen=True)
class Votes:
    """One image on the processor; P = h w. Cell 0 has its centre at place 0."""

    place: NDArray[np.float32]  # (2, P) column and row, in cells, of the centroid a code names
    length: NDArray[np.float32]  # (P,) of the code along the curve: 1 is clean, 0 void
    chance: NDArray[np.float32]  # (P,) these three as in `Classes`
    thing: NDArray[np.int64]
    stuff: NDArray[np.int64]
    radius: int  # pixels that the codes have been smoothed over
    shape: tuple[int, int]  # (h, w)
    cells: int  # along each axis of the grid


def read_classes(logits: Tensor, isthing: Tensor, least: float) -> Classes:
    """The best thing and the best stuff class of each pixel, among those that the image holds.

    One that it would lose little without is not among them: the log odds by which it wins its
    pixels, averaged over the image, are below `least`. `logits` are (B, C, h, w), `isthing` (C,).
    """
    batch, classes, height, width = logits.shape
    step = next(n for n in range(1, 1 << 16) if (height // n) * (width // n) <= CLASS_SAMPLES)
    sample = logits[:, :, ::step, ::step].flatten(2)  # (B, C, samples)
    best, winner = sample.max(1, keepdim=True)
    lead = best - sample.scatter(1, winner, -torch.inf).amax(1, keepdim=True)
    lead = lead.clamp(max=LARGEST_LEAD)
    evidence = lead.new_zeros(batch, classes).scatter_add_(1, winner[:, 0], lead[:, 0])
    held = evidence >= max(least, 1e-12) * lead.shape[2]
    held = torch.where(held.any(1, keepdim=True), held, True)  # (B, C)
    things, thing = best_class(logits, held & isthing)
    stuffs, stuff = best_class(logits, held & ~isthing)
    return Classes(thing, stuff, torch.sigmoid(things - stuffs))


def best_class(logits: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h, w) largest logit and its class among the (B, C) allowed ones; -inf and 0 if none."""
    if len(logits) == 1 and logits.device.type == "cpu" and allowed.any():
        rows = allowed[0].nonzero()[:, 0]  # a fifth of the classes, a fifth of the time
        score, place = logits[:, rows].max(1)
        return score, rows[place]
    return logits.masked_fill(~allowed[..., None, None], -torch.inf).max(1)


def nearest(code: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """The place on the curve of codes that each code is nearest to (section 5.1).

    |x - gamma(u)|^2 = |x|^2 + L - 2 x . gamma(u), so the nearest cell is the largest product. Next
    to a cell, gamma(u + d) is gamma(u) + d gamma'(u), and gamma' is orthogonal to gamma.

    Of (B, 4L, P) codes: (B, 2, P) column and row in cells; (B, P) length along the curve, the
    shorter one of both axes, over that of gamma; (B, P) variance a channel beside the curve.
    """
    harmonics = code.shape[1] // 4
    centres = cell_centres(cells, device=code.device)
    grid = gamma(centres, harmonics)  # (cells, 2L)
    near = 0.1 / cells  # gamma' by central differences, for one cell to the right
    turn = (gamma(centres + near, harmonics) - gamma(centres - near, harmonics)) / (near * cells)
    square = turn[0].square().sum()
    chunk = PIXELS_AT_ONCE if code.device.type == "cpu" else code.shape[2]
    places, lengths, besides = [], [], []
    for part in code.split(max(chunk, 1), dim=2):
        halves = part.unflatten(1, (2, 2 * harmonics)).transpose(2, 3)  # (B, 2, p, 2L)
        along, cell = (halves @ grid.T).max(3)  # (B, 2, p)
        across = (halves * turn[cell]).sum(3)
        along = along / harmonics
        places.append(cell + (across / square / along.clamp_min(0.05)).clamp(-0.5, 0.5))
        lengths.append(along.amin(1).clamp_min(0))
        explained = (harmonics * along.square() + across.square() / square).sum(1)
        besides.append((part.square().sum(1) - explained).clamp_min(0) / max(code.shape[1] - 4, 1))
    return torch.cat(places, 2), torch.cat(lengths, 1), torch.cat(besides, 1)


def measure_noise(code: Tensor, chance: Tensor, cells: int) -> Tensor:
    """(B,) median variance a channel that (B, 4L, h, w) codes of things have beside the curve."""
    flat, inside = code.flatten(2), chance.flatten(1) >= 0.5
    step = max(1, flat.shape[2] // NOISE_SAMPLES)
    _, length, beside = nearest(flat[:, :, ::step], cells)
    weight = length.pow(TYPICAL_POWER) * inside[:, ::step]
    typical = (weight * length).sum(1) / weight.sum(1).clamp_min(1e-12)
    clear = inside[:, ::step] & (length > typical[:, None] / 2)
    return torch.where(clear, beside, torch.nan).nanmedian(1).values.nan_to_num(0)


def smooth(code: Tensor, region: Tensor, radius: Tensor) -> Tensor:
    """Means of codes within regions: noise is local, an instance is not.

    First along the rows and then along the columns, each window ends where the region does (the
    cross of Zhang, Lu and Lafruit 2009), and running sums make its cost the same for any radius.
    Codes are (B, 4L, h, w), regions (B, h, w), radii (B,) pixels.
    """
    if code.device.type == "cpu" and not radius.any():
        return code
    for _ in range(2):
        parts = code.split(CHANNELS_AT_ONCE, dim=1)
        code = torch.cat([_row_means(part, region, radius) for part in parts], dim=1).mT
        region = region.mT
    return code


def _row_means(values: Tensor, region: Tensor, radius: Tensor) -> Tensor:
    """Means over windows of the row, see `smooth`."""
    batch, channels, height, width = values.shape
    at = torch.arange(width, device=values.device).expand(batch, height, width)
    edge = torch.ones(batch, height, width + 1, dtype=torch.bool, device=values.device)
    torch.ne(region[..., 1:], region[..., :-1], out=edge[..., 1:-1])
    first = torch.where(edge[..., :-1], at, 0).cummax(2).values
    end = torch.where(edge[..., 1:], at + 1, width).flip(2).cummin(2).values.flip(2)
    low = torch.maximum(at - radius[:, None, None], first)
    high = torch.minimum(at + radius[:, None, None] + 1, end)
    sums = values.new_zeros(batch, channels, height, width + 1)
    torch.cumsum(values, 3, out=sums[..., 1:])
    ends, starts = (place[:, None].expand_as(values) for place in (high, low))
    return (sums.gather(3, ends) - sums.gather(3, starts)) / (high - low)[:, None]


def cast_votes(
    code: Tensor, classes: Classes, noise: Tensor, radius: Tensor, finite: Tensor, *, cells: int
) -> list[Votes | None]:
    """The votes of B images, on the processor; None where one is not finite.

    Waits for a GPU, once. Codes are (B, 4L, h, w), smoothed; noise, radius and finite are (B,).
    """
    flat, (batch, channels, height, width) = code.flatten(2), code.shape
    # Where the semantic head sees stuff, only a code of half the length of gamma may object.
    bar = 0.125 * channels + 0.8 * channels * noise
    chance = classes.chance.flatten(1)
    able = (chance >= 0.5) | (flat.square().sum(1) > bar[:, None])  # (B, P)
    if code.device.type == "cpu" and batch == 1:
        chosen = able[0].nonzero()[:, 0]
        some, lengths, _ = nearest(flat.index_select(2, chosen), cells)
        place = flat.new_zeros(1, 2, height * width).index_copy_(2, chosen, some)
        length = flat.new_zeros(1, height * width).index_copy_(1, chosen, lengths)
    else:
        place, length, _ = nearest(flat, cells)
        length = length * able
    rows = [*place.unbind(1), length, chance, classes.thing.flatten(1), classes.stuff.flatten(1)]
    rows += [each[:, None].expand_as(chance) for each in (radius, finite)]
    packed = torch.stack([row.float() for row in rows], dim=1).cpu().numpy()  # (B, 8, P)
    found: list[Votes | None] = []
    for one in packed:
        labels = one[4].astype(np.int64), one[5].astype(np.int64)
        votes = Votes(one[:2], one[2], one[3], *labels, int(one[6, 0]), (height, width), cells)
        found.append(votes if one[7, 0] else None)
    return found
