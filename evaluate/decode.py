"""From a network's output to a panoptic map.

    codes -> votes of the pixels -> instances -> every pixel to an instance or none
    logits -> stuff where no instance is, and the class of each instance by majority

The codes are noisy to a degree that no fixed threshold suits: so the noise is measured first, as
what codes hold beside the nearest grid point, and smoothing and suppression follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from skimage.measure import label as connected
from torch import Tensor

from evaluate.peaks import (
    CHUNK,
    Instances,
    bin_votes,
    choose,
    find_candidates,
    nearest_cells,
    neighbour_distance,
    noise_variance,
    packed_argmax,
    prototypes_of,
    refine,
)
from evaluate.segments import DecodedSegment, PanopticMap, number, paint
from evaluate.smoothing import Regions, find_regions, smooth
from pipeline.errors import InputError
from train.encoding import (
    GRID_CELLS,
    AxisCosts,
    ClassificationCode,
    DirectCode,
    Encoding,
    PositionalCode,
    cell_centres,
    gamma,
)


__all__ = ["DecodeConfig", "DecodedSegment", "PanopticMap", "decode"]


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of the decoder; noise is a variance a channel, over that of the grid's rounding.

    Attributes:
        cells: Cells an axis of the voting grid (section 5.1).
        vote_amplitude: Length of a code, void 0 and clean 1, from which its pixel votes. Above one
            half, since mixtures at edges are no instances.
        smooth_votes: Pixels of smoothing radius for noise 1: the window grows as the noise does.
        max_smooth: Largest radius, in pixels of the network's output.
        clean: Noise below which even neighbouring cells can be two instances.
        gap: Least mean squared distance, over that of neighbouring cells, by which an instance
            must explain its pixels better than the others do.
        gap_noise: What noise 1 adds to the gap, as a squared distance.
        saved: Least sum of squared distances, over its pixels, that an instance must explain.
        saved_noise: What noise 1 adds to it.
        label_cost: What a differing label adds in the voting, as `gap`: below it, so that a label
            alone never splits an instance.
        cap: Squared distance, over |gamma|^2 = L, from which a vote is an outlier.
        trust: How far the semantic head moves the border of 1/2 in amplitude between instance and
            none: a pixel of a thing class needs 1/2 - trust, another one 1/2 + trust.
        assign_label_cost: Squared distance, over L, that a differing label adds in the assignment.
        rescue_amplitude: A region of a thing class that no instance claims is one, if its mean
            code is that long. Small objects lose length in a blurred prediction, crowds have none.
        min_instance_area: Pixels of the network's output below which an instance is dropped.
        min_stuff_area: Native pixels below which a stuff segment is dropped.
    """

    cells: int = GRID_CELLS
    vote_amplitude: float = 0.65
    outlier: float = 2.0
    smooth_votes: float = 45.0
    max_smooth: int = 10
    clean: float = 0.005
    gap: float = 0.8
    gap_noise: float = 10.0
    saved: float = 4.0
    saved_noise: float = 400.0
    label_cost: float = 0.2
    cap: float = 1.0
    trust: float = 0.125
    assign_label_cost: float = 0.5
    rescue_amplitude: float = 0.3
    rescue_noise: float = 0.5
    rescue_area: int = 40
    min_instance_area: int = 4
    min_stuff_area: int = 64


def decode(
    instance: Tensor,
    semantic: Tensor,
    *,
    encoding: Encoding,
    isthing: Tensor,
    sizes: Sequence[tuple[int, int]],
    config: DecodeConfig | None = None,
) -> list[PanopticMap]:
    """Decodes a batch of predictions, on the device that holds them.

    Args:
        instance: (B, channels, h, w) predicted codes.
        semantic: (B, C, h, w) logits.
        encoding: The code the network was trained with.
        isthing: (C,) bool.
        sizes: Native (H, W) of each image.
        config: Settings; defaults where None.

    Returns:
        A map for each image, at its native size.

    Raises:
        InputError: The prediction holds NaN or infinite values.
    """
    settings = config or DecodeConfig()
    flags = isthing.to(instance.device)
    return [
        _decode_one(
            to_positional(code.float().flatten(1), encoding).unflatten(1, code.shape[-2:]),
            logits.float(),
            isthing=flags,
            size=size,
            config=settings,
        )
        for code, logits, size in zip(instance, semantic, sizes, strict=True)
    ]


def to_positional(code: Tensor, encoding: Encoding) -> Tensor:
    """Codes of any encoding as positional ones, so that one geometry serves all.

    Direct: gamma of the coordinates, times the instance channel. Classification: the expectation of
    gamma under the predicted probabilities, void counting as zero.

    Args:
        code: (channels, P).
        encoding: What they are.

    Returns:
        (4L, P).
    """
    match encoding:
        case DirectCode():
            harmonics = PositionalCode().harmonics
            colour = code[:2].clamp(0, 1) * 2 - 1
            halves = gamma(colour, harmonics) * code[2].clamp(0, 1)[:, None]  # (2, P, 2L)
            # clamp keeps NaN; an infinite colour would pass for one on the edge
            return torch.where(
                code.isfinite().all(0), halves.transpose(1, 2).flatten(0, 1), torch.nan
            )
        case ClassificationCode():
            costs: AxisCosts = encoding.axis_costs(code, encoding.cells)
            grid = gamma(
                cell_centres(encoding.cells, device=code.device), PositionalCode().harmonics
            )
            return torch.cat([(-axis).exp() @ grid for axis in (costs.u, costs.v)], dim=1).T
        case _:
            return code


def _decode_one(
    code: Tensor,
    logits: Tensor,
    *,
    isthing: Tensor,
    size: tuple[int, int],
    config: DecodeConfig,
) -> PanopticMap:
    """One image: (4L, h, w) codes, (C, h, w) logits."""
    best, flat_labels = packed_argmax(logits.flatten(1))
    if not bool((best.isfinite().all() & code.sum().isfinite())):
        raise InputError(
            "the network's output holds NaN or infinite values",
            remedy="check the checkpoint, or run the network in float32",
            code="prediction-not-finite",
        )
    labels = flat_labels.view(code.shape[-2:])
    thing = isthing[labels]
    regions = find_regions(labels, thing)
    codes = code.flatten(1)
    inside = codes[:, regions.pixels]
    noise = measure_noise(inside, config)
    radius = min(round(config.smooth_votes * noise), config.max_smooth)
    found = find_instances(
        smooth(inside, regions, radius), flat_labels[regions.pixels], noise, config
    )
    member = assign(
        codes, inside, flat_labels, thing.flatten(), regions, radius // 2, found, config
    )
    member = rescue(member.view_as(labels), codes, labels, thing, noise, config)
    painting = paint(member, labels, isthing, min_instance_area=config.min_instance_area)
    return number(painting, size, min_stuff_area=config.min_stuff_area)


def measure_noise(code: Tensor, config: DecodeConfig) -> float:
    """Median variance a channel of the codes, less that of rounding to the grid.

    Args:
        code: (4L, N) codes of pixels of thing classes.
        config: Settings.
    """
    some = code[:, ::4]
    nearest = nearest_cells(some, config.cells)
    clear = nearest.amplitude.amin(0) > 0.5
    if not bool(clear.any()):
        return 0.0
    rounding = neighbour_distance(code.shape[0] // 4, config.cells) / 6 / (code.shape[0] - 2)
    return max(float(noise_variance(some, nearest)[clear].median()) - rounding, 0.0)


def find_instances(code: Tensor, labels: Tensor, noise: float, config: DecodeConfig) -> Instances:
    """The instances of an image.

    Args:
        code: (4L, N) smoothed codes of pixels of thing classes.
        labels: (N,) semantic labels.
        noise: See `measure_noise`.
        config: Settings.

    Returns:
        K instances, on the device of `code`.
    """
    harmonics = code.shape[0] // 4
    stride = 1 if noise <= config.clean else 2  # smoothed neighbours say the same
    code, labels = code[:, ::stride], labels[::stride]
    nearest = nearest_cells(code, config.cells)
    near = neighbour_distance(harmonics, config.cells)
    limit = near / 2 / (code.shape[0] - 2) + config.outlier * noise
    votes = (nearest.amplitude.amin(0) > config.vote_amplitude) & (
        noise_variance(code, nearest) < limit
    )
    bins = bin_votes(
        code[:, votes],
        labels[votes],
        type(nearest)(nearest.column[votes], nearest.row[votes], nearest.amplitude[:, votes]),
        config.cells,
    )
    radius = 0 if noise <= config.clean else 1
    peaks = find_candidates(bins, config.cells, radius=radius)
    cap, label_cost = config.cap * harmonics, config.label_cost * near
    found = choose(
        bins,
        Instances(prototypes_of(bins, peaks, radius=radius), bins.label[peaks]),
        cap=cap,
        label_cost=label_cost,
        gap=config.gap * near + config.gap_noise * noise,
        saved=(config.saved + config.saved_noise * noise) / stride,
    )
    for _ in range(2):
        found = refine(bins, found, cap=cap, label_cost=label_cost)
    return Instances(found.prototypes.to(code.device), found.labels.to(code.device))


def assign(
    codes: Tensor,
    inside: Tensor,
    labels: Tensor,
    thing: Tensor,
    regions: Regions,
    radius: int,
    found: Instances,
    config: DecodeConfig,
) -> Tensor:
    """(P,) int64: 0 = none, k = instance k - 1, the nearest in code space unless void is nearer."""
    member = torch.zeros_like(labels)
    if len(found.labels) == 0:
        return member
    harmonics = codes.shape[0] // 4
    if radius:
        codes = codes.index_copy(1, regions.pixels, smooth(inside, regions, radius))
    # |x - g|^2 - |x|^2 = 2 L - 2 x . g, so the amplitude x . g / 2 L is compared with 1/2.
    bar = torch.where(thing, 0.5 - config.trust, 0.5 + config.trust)
    step = CHUNK if codes.device.type == "cpu" else len(labels)
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        amplitude = (found.prototypes / (2 * harmonics)) @ codes[:, part]
        differs = (found.labels[:, None] != labels[part]) & thing[part]
        amplitude -= differs * (config.assign_label_cost / 4)
        best, index = packed_argmax(amplitude)
        member[part] = torch.where(best > bar[part], index + 1, 0)
    return member


def rescue(
    member: Tensor, codes: Tensor, labels: Tensor, thing: Tensor, noise: float, config: DecodeConfig
) -> Tensor:
    """Makes instances of connected regions of a thing class that hardly any instance claims.

    Args:
        member: (h, w) int64, see `assign`.
        codes: (4L, P) codes.
        labels: (h, w) int64 semantic labels.
        thing: (h, w) bool, pixels of thing classes.
        config: Settings.

    Returns:
        (h, w) int64, `member` with further instances.
    """
    regions = torch.from_numpy(
        connected(torch.where(thing, labels + 1, 0).cpu().numpy(), background=0, connectivity=2)
    ).to(labels.device)
    free = thing & (member == 0)
    count = int(regions.max()) + 1
    area = torch.bincount(regions.flatten(), minlength=count)
    unclaimed = torch.bincount(regions[free], minlength=count)
    lost = (2 * unclaimed > area) & (unclaimed >= config.rescue_area)
    lost[0] = False
    pixels = (free & lost[regions]).flatten().nonzero()[:, 0]
    if len(pixels) == 0:
        return member
    region = regions.flatten()[pixels]
    total = codes.new_zeros(codes.shape[0], count).index_add_(1, region, codes[:, pixels])
    mean = total[:, lost] / unclaimed[lost]
    alive = nearest_cells(mean, config.cells).amplitude.amin(0) > config.rescue_amplitude + config.rescue_noise * noise
    lost[lost.clone()] = alive
    numbers = torch.where(lost, lost.cumsum(0) + member.max(), 0)
    result = member.flatten().clone()
    result[pixels] = numbers[region]
    return result.view_as(member)
