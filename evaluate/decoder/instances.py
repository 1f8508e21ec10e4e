"""The instances of an image: from its pixels to prototypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder.cells import nearest_cells, neighbour_distance, off_grid
from panoptic_cache.evaluate.decoder.faint import add_faint, at_home, split
from panoptic_cache.evaluate.decoder.parallel import both
from panoptic_cache.evaluate.decoder.peaks import (
    Instances,
    Rules,
    candidates_of,
    choose,
    find_candidates,
    refine,
)
from panoptic_cache.evaluate.decoder.pixels import Pixels, places
from panoptic_cache.evaluate.decoder.smoothing import Means, Smoother
from panoptic_cache.evaluate.decoder.votes import Bins, Votes, bin_votes
from panoptic_cache.train.encoding import GRID_CELLS

SAMPLING = 16
"""One pixel in so many is enough to measure the noise, and"""
SAMPLES = 2048
"""about so many are at most."""
CLEAN_STEP, NOISY_STEP = 2, (2, 4)
"""One pixel in so many votes, or where codes are noisy and smoothed, one row and one column: their
neighbours say much the same."""
REFINEMENTS = 2
"""Moves of each prototype to the mean of its votes; a third changes nothing."""


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of the decoder.

    Squared distances are in code space. Noise is a variance a channel of the codes, over that of
    rounding to the grid; a prediction is 0.02 to 0.2 noisy. Amplitude is the length of a code along
    its grid point's: void 0, a clean code 1.

    The defaults were searched, from random values, on made-up scenes and eight photos, corrupted as
    `corruption.py` does. That noise has no drift, so `vote_amplitude`, `drift`, `gap` and
    `label_cost` are what a small trained network needs.

    Attributes:
        cells: Cells an axis of the voting grid (section 5.1).
        vote_amplitude: Amplitude from which a pixel votes: above one half, since mixtures of an
            instance and void, at edges, are neither.
        vote_outlier: Times the noise that a voting code may be off its grid point: mixtures of two
            instances are off by more.
        smooth_votes: Pixels of smoothing radius for noise 1; the radius is 1 at least. The window
            grows as the noise does, so that a clean prediction keeps its smallest objects.
        max_smooth: Largest radius, in pixels of the network's output.
        clean: Noise up to which codes are not smoothed, and the instances of neighbouring cells can
            be told apart.
        drift: The same of what `measure_drift` tells: where codes sweep over cells, neighbouring
            cells are one instance.
        gap: Least mean squared distance by which an instance must explain its pixels better than
            the others do, over that of neighbouring cells: they are two instances if clean.
        gap_noise: What noise 1 adds to it: the scatter of one instance must not look like two.
        saved: Least sum of such squared distances over the pixels of an instance.
        saved_noise: What noise 1 adds to it.
        split_gap: `gap` for an instance next to another one, if codes are noisy.
        split_noise: What noise 1 adds to it.
        split_saved: Times `saved` that such an instance must explain.
        home: Pixels of the network's output that a vote may lie from its centroid to count as one
            at home, on either axis.
        faint_amplitude: Amplitude from which a pixel at home votes: small objects lose length in a
            blurred prediction.
        faint_gap: `gap` for an instance of such votes, over `cap`: what the others leave almost
            unexplained.
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
    vote_outlier: float = 0.8
    smooth_votes: float = 58.0
    max_smooth: int = 18
    clean: float = 0.007
    drift: float = 0.02
    gap: float = 0.8
    gap_noise: float = 6.4
    saved: float = 3.3
    saved_noise: float = 330.0
    split_gap: float = 1.05
    split_noise: float = 2.9
    split_saved: float = 3.8
    home: float = 6.5
    faint_amplitude: float = 0.21
    faint_gap: float = 0.45
    label_cost: float = 0.2
    cap: float = 1.1
    trust: float = 0.18
    label_amplitude: float = 0.33
    rescue_amplitude: float = 0.23
    rescue_noise: float = 0.21
    rescue_area: int = 60
    min_instance_area: int = 4
    min_stuff_area: int = 64

    def is_clean(self, noise: float) -> bool:
        """Whether codes need no smoothing."""
        return noise <= self.clean

    def smoothing_radius(self, noise: float) -> int:
        """Pixels, before the vote; half of it before the assignment. 0 where codes are clean."""
        if self.is_clean(noise):
            return 0
        return min(max(1, round(self.smooth_votes * noise)), self.max_smooth)


def measure_noise(pixels: Pixels, config: DecodeConfig) -> list[float]:
    """Median variance a channel of the codes, less that of rounding to the grid, of each image.

    Args:
        pixels: B images; those of thing classes are measured.
        config: Settings.

    Returns:
        B variances, 0 where no code is long enough.
    """
    inside = [pixels.inside[span] for span in pixels.spans]
    samples = [some[:: max(SAMPLING, len(some) // SAMPLES)] for some in inside]
    code = pixels.codes.index_select(1, torch.cat(samples))
    nearest = nearest_cells(code, config.cells)
    clear = torch.where(nearest.amplitude.amin(0) > 0.5, off_grid(code, nearest), torch.nan)
    parts = clear.split([len(sample) for sample in samples])
    medians = torch.stack([part.nanmedian() for part in parts]).tolist()
    # A coordinate is off by up to half a cell, its square by 1/12 on average, on either axis.
    rounding = neighbour_distance(code.shape[0] // 4, config.cells) / 6 / (code.shape[0] - 2)
    return [0.0 if math.isnan(median) else max(median - rounding, 0.0) for median in medians]


def find_instances(
    pixels: Pixels, smoother: Smoother | None, noise: Sequence[float], config: DecodeConfig
) -> list[Instances]:
    """The instances of each image.

    Args:
        pixels: B images, all of them clean or none, see `DecodeConfig.is_clean`.
        smoother: Theirs; None where codes are clean.
        noise: Of each, see `measure_noise`.
        config: Settings.

    Returns:
        B times K instances, on the processor.
    """
    cells, images = config.cells, pixels.shape[0]
    votes, faint = find_votes(pixels, smoother, noise, config)
    bins, faint_bins = both(
        lambda: bin_votes(votes, images, cells),
        lambda: [None] * images if faint is None else bin_votes(faint, images, cells),
    )
    return [
        explain(own, weak, variance, config)
        for own, weak, variance in zip(bins, faint_bins, noise, strict=True)
    ]


def find_votes(
    pixels: Pixels, smoother: Smoother | None, noise: Sequence[float], config: DecodeConfig
) -> tuple[Votes, Votes | None]:
    """Pixels with a clear code and the cells nearest to them; arguments as of `find_instances`.

    Returns:
        The votes; and where codes are noisy, those of fainter pixels at home, see `faint.py`.
    """
    if smoother is None:
        some = [pixels.inside[span][::CLEAN_STEP] for span in pixels.spans]
        means = Means.unsmoothed(pixels, torch.cat(some))
    else:
        radii = [config.smoothing_radius(each) for each in noise]
        means = smoother.means(radii, step=NOISY_STEP)
    code, voters = means.values, means.pixels
    image = voters // pixels.area
    nearest = nearest_cells(code, config.cells)
    near = neighbour_distance(code.shape[0] // 4, config.cells)
    limits = [near / 2 / (code.shape[0] - 2) + config.vote_outlier * each for each in noise]
    limit = torch.tensor(limits, device=code.device).index_select(0, image)
    amplitude, regular = nearest.amplitude.amin(0), off_grid(code, nearest) < limit

    def chosen(mask: Tensor) -> Votes:
        some = places(mask)
        return Votes(
            codes=code.index_select(1, some),
            labels=pixels.labels.index_select(0, voters.index_select(0, some)).long(),
            rows=nearest.row.index_select(0, some).long(),
            columns=nearest.column.index_select(0, some).long(),
            image=image.index_select(0, some),
        )

    votes = chosen(regular & (amplitude > config.vote_amplitude))
    if smoother is None:
        return votes, None
    home = at_home(voters % pixels.area, nearest, pixels.shape[1:], config.cells, config.home)
    return votes, chosen(regular & home & (amplitude > config.faint_amplitude))


def explain(bins: Bins, faint: Bins | None, noise: float, config: DecodeConfig) -> Instances:
    """The few instances that explain the votes of an image.

    Args:
        bins: The votes.
        faint: The fainter ones; None where codes are clean. Those need no second look: if they
            still sweep over cells, as those of a network that has learnt little, it would find
            instances that are none.
        noise: See `measure_noise`.
        config: Settings.
    """
    cells, channels = config.cells, bins.code.shape[1]
    near = neighbour_distance(channels // 4, cells)
    drift = bins.drift - 2 * noise / near  # noise scatters on two axes, too
    clean = config.is_clean(noise)
    suppression = 0 if clean and drift <= config.drift else 1
    of_one_vote = CLEAN_STEP if clean else math.prod(NOISY_STEP)  # pixels
    peaks = find_candidates(bins, cells, radius=suppression)
    rules = Rules(
        cap=config.cap * channels / 4,
        label_cost=config.label_cost * near,
        gap=config.gap * near + config.gap_noise * noise,
        saved=(config.saved + config.saved_noise * noise) / of_one_vote,
    )
    found = choose(bins, candidates_of(bins, peaks, radius=suppression), rules)
    if faint is not None:
        more = replace(rules, saved=config.split_saved * rules.saved)
        gap = config.split_gap * near + config.split_noise * noise
        found = split(bins, refine(bins, found, rules), more, cells=cells, gap=gap)
    for _ in range(REFINEMENTS):
        found = refine(bins, found, rules)
    if faint is not None:
        more = replace(rules, gap=max(rules.gap, config.faint_gap * rules.cap))
        found = add_faint(faint, found, more, cells=cells)
    return found
