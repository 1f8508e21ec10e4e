"""The instances of an image, and the pixels that belong to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from skimage.measure import label as connected
from torch import Tensor

from evaluate.peaks import (
    Instances,
    Rules,
    bin_votes,
    candidates_of,
    choose,
    chunks,
    find_candidates,
    measure_drift,
    nearest_cells,
    neighbour_distance,
    off_grid,
    packed_argmax,
    refine,
)
from evaluate.smoothing import find_regions, places, smooth
from train.encoding import GRID_CELLS

DRIFT_SAMPLING = 8
"""One vote in so many is enough to measure the drift."""
REFINEMENTS = 2
"""Moves of each prototype to the mean of its votes; a third changes nothing."""


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of the decoder.

    Squared distances are in code space. Noise is a variance a channel of the codes, over that of
    rounding to the grid; a prediction is 0.02 to 0.2 noisy. Amplitude is the length of a code along
    its grid point's: void 0, a clean code 1.

    Attributes:
        cells: Cells an axis of the voting grid (section 5.1).
        vote_amplitude: Amplitude from which a pixel votes: above one half, since mixtures of an
            instance and void, at edges, are neither.
        vote_outlier: Times the noise that a voting code may be off its grid point: mixtures of two
            instances are off by more.
        smooth_votes: Pixels of smoothing radius for noise 1. The window grows as the noise does,
            so that a clean prediction keeps its smallest objects.
        max_smooth: Largest radius, in pixels of the network's output.
        clean: Noise up to which the instances of neighbouring cells can be told apart.
        drift: The same of what `measure_drift` tells: where codes sweep over cells, neighbouring
            cells are one instance.
        gap: Least mean squared distance by which an instance must explain its pixels better than
            the others do, over that of neighbouring cells: they are two instances if clean.
        gap_noise: What noise 1 adds to it: the scatter of one instance must not look like two.
        saved: Least sum of such squared distances over the pixels of an instance.
        saved_noise: What noise 1 adds to it.
        label_cost: Squared distance, over that of neighbouring cells, for a differing label: below
            `gap`, so that a wrong label alone never splits an instance.
        cap: Squared distance, over |gamma|^2 = L, from which a vote is an outlier.
        trust: How far the semantic head moves the border between instance and none: a pixel of a
            thing class needs an amplitude of 1/2 - trust, any other 1/2 + trust.
        label_amplitude: Amplitude that a differing label counts for in the assignment.
        rescue_amplitude: A region of a thing class that no instance claims becomes one, if its mean
            code is that long: small objects lose length in a blurred prediction, crowds have none.
        rescue_noise: What noise 1 adds to it.
        rescue_area: Pixels of the network's output such a region must have.
        min_instance_area: Pixels of the network's output below which an instance is dropped.
        min_stuff_area: Native pixels below which a stuff segment is dropped: at edges, the semantic
            head mentions classes that are not there.
    """

    cells: int = GRID_CELLS
    vote_amplitude: float = 0.65
    vote_outlier: float = 0.75
    smooth_votes: float = 45.0
    max_smooth: int = 10
    clean: float = 0.005
    drift: float = 0.02
    gap: float = 0.8
    gap_noise: float = 10.0
    saved: float = 4.0
    saved_noise: float = 400.0
    label_cost: float = 0.2
    cap: float = 1.0
    trust: float = 0.125
    label_amplitude: float = 0.125
    rescue_amplitude: float = 0.3
    rescue_noise: float = 0.5
    rescue_area: int = 40
    min_instance_area: int = 4
    min_stuff_area: int = 64


@dataclass(frozen=True)
class Pixels:
    """An image as the decoder sees it; P = h w pixels.

    Attributes:
        codes: (4L, P) float32 positional codes.
        labels: (P,) int64 semantic labels.
        thing: (P,) bool, whether the label is a thing class.
        inside: (N,) int64, the indices of those pixels.
        strength: (P,) float32 squared lengths of the codes.
        size: (h, w).
    """

    codes: Tensor
    labels: Tensor
    thing: Tensor
    inside: Tensor
    strength: Tensor
    size: tuple[int, int]


def measure_noise(code: Tensor, config: DecodeConfig) -> float:
    """Median variance a channel of the codes, less that of rounding to the grid.

    Args:
        code: (4L, N) codes of pixels of thing classes; a sample will do.
        config: Settings.
    """
    if code.shape[1] == 0:
        return 0.0
    nearest = nearest_cells(code, config.cells)
    off = off_grid(code, nearest)
    clear = torch.where(nearest.amplitude.amin(0) > 0.5, off, torch.nan)
    median = float(clear.nanmedian())
    if math.isnan(median):
        return 0.0
    # A coordinate is off by up to half a cell, its square by 1/12 on average, on either axis.
    rounding = neighbour_distance(code.shape[0] // 4, config.cells) / 6 / (code.shape[0] - 2)
    return max(median - rounding, 0.0)


def find_instances(pixels: Pixels, noise: float, radius: int, config: DecodeConfig) -> Instances:
    """The instances of an image.

    Args:
        pixels: The image.
        noise: See `measure_noise`.
        radius: Of the smoothing before the vote, in pixels.
        config: Settings.

    Returns:
        K instances, on the device of the codes.
    """
    clean = noise <= config.clean
    stride = 2 if clean else 4  # neighbours say much the same, smoothed ones more so
    if radius:
        regions = find_regions(pixels.labels.view(pixels.size), pixels.inside, stride)
        code = smooth(pixels.codes.index_select(1, pixels.inside), regions, radius)
        voters = regions.pixels
    else:
        voters = pixels.inside[::stride]
        code = pixels.codes.index_select(1, voters)
    labels = pixels.labels.index_select(0, voters)
    nearest = nearest_cells(code, config.cells)
    near = neighbour_distance(code.shape[0] // 4, config.cells)
    off = near / 2 / (code.shape[0] - 2) + config.vote_outlier * noise
    amplitude = nearest.amplitude.amin(0)
    votes = (amplitude > config.vote_amplitude) & (off_grid(code, nearest) < off)
    votes = places(votes)
    rows, columns, labels = nearest.row[votes], nearest.column[votes], labels[votes]
    code = code.index_select(1, votes)
    bins = bin_votes(code, labels, rows, columns, config.cells)
    if clean:
        some = slice(None, None, DRIFT_SAMPLING)
        drift = measure_drift(code[:, some], labels[some], rows[some], columns[some], config.cells)
        clean = drift - 2 * noise / near <= config.drift  # noise scatters on two axes, too
    suppression = 0 if clean else 1
    peaks = find_candidates(bins, config.cells, radius=suppression)
    rules = Rules(
        cap=config.cap * code.shape[0] / 4,
        label_cost=config.label_cost * near,
        gap=config.gap * near + config.gap_noise * noise,
        saved=(config.saved + config.saved_noise * noise) / stride,
    )
    found = choose(bins, candidates_of(bins, peaks, radius=suppression), rules)
    for _ in range(REFINEMENTS):
        found = refine(bins, found, rules)
    return Instances(found.prototypes.to(code.device), found.labels.to(code.device))


def assign(pixels: Pixels, found: Instances, radius: int, config: DecodeConfig) -> Tensor:
    """The instance nearest to each pixel's code, unless void is nearer.

    |x - g|^2 - |x|^2 = 2L - 2 x . g, so an instance beats void if x . g / 2L, the amplitude,
    exceeds 1/2.

    Args:
        pixels: The image.
        found: K instances.
        radius: Of the smoothing of codes within thing classes, in pixels.
        config: Settings.

    Returns:
        (P,) int64: 0 = none, k = instance k - 1.
    """
    member = torch.zeros_like(pixels.labels)
    if len(found.labels) == 0:
        return member
    channels = pixels.codes.shape[0]
    scaled = found.prototypes / (channels / 2)
    # No code is nearer to an instance than its length allows: most pixels of stuff are settled.
    bar = 0.5 + config.trust
    outside = places(~pixels.thing & (pixels.strength > bar**2 * channels / 2))
    codes = pixels.codes.index_select(1, outside)
    for part in chunks(len(outside), codes.device):
        best, index = packed_argmax(scaled @ codes[:, part])
        member[outside[part]] = torch.where(best > bar, index + 1, 0)

    inside, values = pixels.inside, pixels.codes.index_select(1, pixels.inside)
    project = len(scaled) > channels  # smoothing is linear: before or after, where it costs less
    values = values if project else scaled @ values
    if radius:
        regions = find_regions(pixels.labels.view(pixels.size), inside)
        inside, values = regions.pixels, smooth(values, regions, radius)
    bar = 0.5 - config.trust + config.label_amplitude
    kinds = found.labels.unique()
    reward = config.label_amplitude * (found.labels[:, None] == kinds).to(values.dtype)
    labels = pixels.labels.index_select(0, inside)
    for part in chunks(len(inside), values.device):
        amplitude = scaled @ values[:, part] if project else values[:, part]  # (K, chunk)
        agrees = (kinds[:, None] == labels[part]).to(values.dtype)
        best, index = packed_argmax(torch.addmm(amplitude, reward, agrees))
        member[inside[part]] = torch.where(best > bar, index + 1, 0)
    return member


def rescue(pixels: Pixels, member: Tensor, noise: float, config: DecodeConfig) -> Tensor:
    """Makes instances of connected regions of a thing class that hardly any instance claims.

    Connected regions are found on the processor; few pictures need them.

    Args:
        pixels: The image.
        member: (P,) int64, see `assign`.
        noise: See `measure_noise`.
        config: Settings.

    Returns:
        (P,) int64, `member` with further instances.
    """
    free = pixels.thing & (member == 0)
    if int(free.sum()) < config.rescue_area:
        return member
    classes = torch.where(pixels.thing, pixels.labels + 1, 0).view(pixels.size).int()
    region = connected(classes.cpu().numpy(), background=0, connectivity=2).ravel()
    inside = np.flatnonzero(free.cpu().numpy())
    owner = region[inside]
    area = np.bincount(region)
    unclaimed = np.bincount(owner, minlength=len(area))
    lost = (2 * unclaimed > area) & (unclaimed >= config.rescue_area)
    inside, owner = inside[lost[owner]], owner[lost[owner]]
    if len(inside) == 0:
        return member
    device = member.device
    lost_pixels, owners = torch.from_numpy(inside).to(device), torch.from_numpy(owner).to(device)
    total = pixels.codes.new_zeros(len(pixels.codes), len(area))
    total.index_add_(1, owners, pixels.codes.index_select(1, lost_pixels))
    mean = total / torch.from_numpy(unclaimed.clip(1)).to(device)
    amplitude = nearest_cells(mean, config.cells).amplitude.amin(0)
    found = amplitude > config.rescue_amplitude + config.rescue_noise * noise
    found &= torch.from_numpy(lost).to(device)
    numbers = torch.where(found, found.cumsum(0) + member.max(), 0)
    return member.index_copy(0, lost_pixels, numbers[owners])
