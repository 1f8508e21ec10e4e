"""The pixels that belong to the instances of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from evaluate.cells import chunks, packed_argmax
from evaluate.instances import DecodeConfig
from evaluate.peaks import Instances
from evaluate.pixels import Pixels, places, spans_of
from evaluate.smoothing import find_regions, radius_of_means, smooth

Amplitudes = Callable[[slice], Tensor]
"""Gives those of some pixels along each of K instances, (K, P) float32."""


def assign(
    pixels: Pixels, found: Sequence[Instances], radii: Sequence[int], config: DecodeConfig
) -> Tensor:
    """The instance nearest to each pixel's code, unless void is nearer.

    |x - g|^2 - |x|^2 = 2L - 2 x . g, so an instance beats void if x . g / 2L, the amplitude,
    exceeds 1/2.

    Args:
        pixels: B images.
        found: K instances of each.
        radii: Of the smoothing of codes within thing classes, pixels, for each.
        config: Settings.

    Returns:
        (N,) int64: 0 = none, k = instance k - 1 of the pixel's image.
    """
    member = torch.zeros_like(pixels.labels)
    device, channels = pixels.codes.device, pixels.codes.shape[0]
    most = max(len(one.labels) for one in found)
    if most == 0:
        return member
    # Side by side: each copy to a device may wait for it.
    padded = side_by_side([one.prototypes / (channels / 2) for one in found], device)
    owners = side_by_side([one.labels for one in found], device)
    kinds = side_by_side([one.labels.unique() for one in found], device)
    banks = [bank[: len(one.labels)] for bank, one in zip(padded, found, strict=True)]
    # No code is nearer to an instance than its length allows: most pixels of stuff are settled.
    bar = 0.5 + config.trust
    outside = places(~pixels.thing & (pixels.strength > bar**2 * channels / 2))
    codes = pixels.codes.index_select(1, outside)
    for bank, span in zip(banks, spans_of(outside, len(found), pixels.area), strict=True):
        claim(member, outside[span], products(bank, codes[:, span]), bar)

    inside, values = pixels.inside, pixels.codes.index_select(1, pixels.inside)
    project = most > channels  # smoothing is linear: before or after, where it costs less
    if not project:
        parts = [bank @ values[:, span] for bank, span in zip(padded, pixels.spans, strict=True)]
        values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if any(radii):
        regions = find_regions(pixels.labels.view(pixels.shape), inside)
        values = smooth(values, regions, radius_of_means(regions, radii, pixels.area))
        inside = regions.pixels  # in another order, but image by image as before
    labels = pixels.labels.index_select(0, inside)
    bar = 0.5 - config.trust + config.label_amplitude
    for bank, own, kind, span in zip(banks, owners, kinds, pixels.spans, strict=True):
        value, count = values[:, span], len(bank)
        amplitudes = products(bank, value) if project else rows(value, count)
        rewarded = agreeing(amplitudes, own[:count], kind, labels[span], config.label_amplitude)
        claim(member, inside[span], rewarded, bar)
    return member


def side_by_side(tables: Sequence[Tensor], device: torch.device) -> Tensor:
    """B tables of (K, ...) as one (B, most, ...) on a device; negative where one has no row."""
    return pad_sequence(list(tables), batch_first=True, padding_value=-1).to(device)


def products(bank: Tensor, code: Tensor) -> Amplitudes:
    """Of (K, 4L) instances with (4L, P) codes."""
    return lambda part: bank @ code[:, part]


def rows(amplitudes: Tensor, count: int) -> Amplitudes:
    """The first `count` of (at least K, P) amplitudes."""
    return lambda part: amplitudes[:count, part]


def agreeing(
    amplitudes: Amplitudes, owners: Tensor, kinds: Tensor, labels: Tensor, reward: float
) -> Amplitudes:
    """Amplitudes, with a reward where labels agree.

    Args:
        amplitudes: Of K instances and P pixels.
        owners: (K,) int64 labels of the instances.
        kinds: (C',) int64, each label among them once, and others.
        labels: (P,) int64 labels of the pixels.
        reward: What to add.

    Returns:
        Of the instances and pixels, in memory of their own.
    """
    rewards = reward * (owners[:, None] == kinds).float()
    same = kinds[:, None]
    return lambda part: torch.addmm(amplitudes(part), rewards, (same == labels[part]).float())


def claim(member: Tensor, own: Tensor, amplitudes: Amplitudes, bar: float) -> None:
    """Gives each pixel to the instance with the largest amplitude, if that exceeds `bar`.

    Args:
        member: (N,) int64, is written into: k = instance k - 1, 0 = none.
        own: (P,) int64, which of them the pixels are.
        amplitudes: Of the pixels, in memory that may be written into; those of no instance claim
            nothing.
        bar: Amplitude.
    """
    for part in chunks(len(own), member.device):
        values = amplitudes(part)
        if len(values):
            best, index = packed_argmax(values, spoil=True)
            member[own[part]] = torch.where(best > bar, index + 1, 0)
