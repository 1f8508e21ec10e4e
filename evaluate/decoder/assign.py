"""The pixels that belong to the instances of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from panoptic_cache.evaluate.decoder.cells import Tags, chunks, room_for
from panoptic_cache.evaluate.decoder.instances import DecodeConfig
from panoptic_cache.evaluate.decoder.parallel import both, in_parallel
from panoptic_cache.evaluate.decoder.peaks import Instances
from panoptic_cache.evaluate.decoder.pixels import Pixels, places
from panoptic_cache.evaluate.decoder.smoothing import Means, Smoother


def assign(
    pixels: Pixels,
    smoother: Smoother | None,
    found: Sequence[Instances],
    noise: Sequence[float],
    config: DecodeConfig,
) -> Tensor:
    """The instance nearest to each pixel's code, unless void is nearer.

    |x - g|^2 - |x|^2 = 2L - 2 x . g, so an instance beats void if x . g / 2L, the amplitude,
    exceeds 1/2. Smoothed codes hardly change from a pixel to the next: of these, those of every
    second column are compared, and the pixels between take the instance of a neighbour of their
    label; those that have none are compared unsmoothed.

    Args:
        pixels: B images, all of them smoothed here or none.
        smoother: Theirs; None where codes are clean.
        found: K instances of each.
        noise: Of each, see `measure_noise`.
        config: Settings.

    Returns:
        (N,) int32: 0 = none, k = instance k - 1 of the pixel's image.
    """
    member, channels = torch.zeros_like(pixels.labels), pixels.codes.shape[0]
    most = max(len(one.labels) for one in found)
    if most == 0:
        return member
    banks = Banks.of(found, pixels, config.label_amplitude)
    radii = [config.smoothing_radius(each) // 2 for each in noise]
    smoothing = smoother if all(radii) else None
    inside_bar = 0.5 - config.trust + config.label_amplitude
    outside_bar = 0.5 + config.trust

    def claim_inside() -> None:
        if smoothing is None:
            means, along = Means.unsmoothed(pixels, pixels.inside), None
        else:
            # Smoothing is linear: it comes after the product where that leaves less to smooth.
            along = banks.padded if most < channels else None
            means = smoothing.means(radii, along=along, step=(1, 2))
        banks.claim(member, means, inside_bar, labels=pixels.labels, multiplied=along is not None)

    def claim_outside() -> None:
        # No code is nearer to an instance than its length allows: most pixels of stuff are settled.
        strong = pixels.strength > outside_bar**2 * channels / 2
        means = Means.unsmoothed(pixels, places(~pixels.thing & strong))
        banks.claim(member, means, outside_bar)

    both(claim_inside, claim_outside)  # the longer one first: its parts find help later
    if smoothing is not None:
        lonely = Means.unsmoothed(pixels, spread(member, pixels))
        banks.claim(member, lonely, inside_bar, labels=pixels.labels)
    return member


@dataclass(frozen=True)
class Banks:
    """The instances of B images, to be compared with codes.

    Attributes:
        padded: (B, most, 4L) what codes are multiplied with to get amplitudes.
        counts: How many rows each image has.
        rewards: (B, most, C) float32, what is added where labels agree.
    """

    padded: Tensor
    counts: tuple[int, ...]
    rewards: Tensor

    @classmethod
    def of(cls, found: Sequence[Instances], pixels: Pixels, reward: float) -> Banks:
        """Of the instances found in B images."""
        # Side by side: each copy to a device may wait for it.
        device, half = pixels.codes.device, pixels.codes.shape[0] / 2
        padded = side_by_side([one.prototypes for one in found], device) / half
        owners = side_by_side([one.labels for one in found], device)
        every = torch.arange(len(pixels.things), device=device)
        counts = tuple(len(one.labels) for one in found)
        return cls(padded, counts, reward * (owners[..., None] == every))

    def claim(
        self,
        member: Tensor,
        means: Means,
        bar: float,
        *,
        labels: Tensor | None = None,
        multiplied: bool = False,
    ) -> None:
        """Gives each pixel to the instance with the largest amplitude, if that exceeds `bar`.

        Args:
            member: (N,) int32, is written into: k = instance k - 1, 0 = none.
            means: Codes of M pixels.
            bar: Amplitude.
            labels: (N,) int32; to be given where amplitudes are rewarded.
            multiplied: Means are of amplitudes.
        """
        for number, span in enumerate(means.spans):
            count, pixels, values = self.counts[number], means.pixels[span], means.values[:, span]
            if count == 0 or len(pixels) == 0:
                continue
            best, index = largest(
                values[:count] if multiplied else values,
                bank=None if multiplied else self.padded[number, :count],
                rewards=self.rewards[number, :count],
                labels=None if labels is None else labels.index_select(0, pixels),
            )
            member.scatter_(0, pixels, torch.where(best > bar, index.add_(1), 0))


def side_by_side(tables: Sequence[NDArray[Any]], device: torch.device) -> Tensor:
    """B tables of (K, ...) as one (B, most, ...) on a device; negative where one has no row."""
    rows = [torch.from_numpy(table) for table in tables]
    return pad_sequence(rows, batch_first=True, padding_value=-1).to(device)


def largest(
    values: Tensor, bank: Tensor | None, rewards: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The largest amplitude of P pixels, and whose it is.

    Args:
        values: (4L, P) float32 codes, or (K, P) amplitudes.
        bank: (K, 4L) what to multiply codes with; None for amplitudes.
        rewards: (K, C) to be added, by instance and label.
        labels: (P,) int32; None adds nothing.

    Returns:
        (P,) float32 and (P,) int32.
    """
    count = len(rewards)
    tags, best = Tags.of(count, values.device), values.new_empty(values.shape[1])

    def begin() -> Callable[[tuple[Tensor, ...]], None]:
        room, products = room_for(count, values), room_for(count, values)

        def search(part: tuple[Tensor, ...]) -> None:
            out, amplitudes, *label = part
            sums, some = room[:, : len(out)], products[:, : len(out)]
            if bank is not None:
                amplitudes = torch.mm(bank, amplitudes, out=some)
            if label:
                amplitudes = torch.index_select(rewards, 1, *label, out=sums).add_(amplitudes)
            tags.maximum(amplitudes, out, room=sums)

        return search

    in_parallel(begin, chunks(best, values, *([] if labels is None else [labels])))
    return best, tags.read(best)


def spread(member: Tensor, pixels: Pixels) -> Tensor:
    """Gives pixels of thing classes in odd columns the instance of a neighbour in their row.

    Args:
        member: (N,) int32, is written into.
        pixels: B images; a neighbour counts if it is of the same label, the left one first.

    Returns:
        (P,) int64 flat indices of those that have no such neighbour.
    """
    own, labels, thing = (map_.view(pixels.shape) for map_ in (member, pixels.labels, pixels.thing))
    todo, width = torch.zeros_like(thing), pixels.shape[2]
    todo[..., 1::2] = thing[..., 1::2]
    for beside, count in ((0, width // 2), (2, (width - 1) // 2)):
        its = (..., slice(beside, beside + 2 * count, 2))
        odd = (..., slice(1, 1 + 2 * count, 2))
        same = todo[odd] & (labels[odd] == labels[its])
        own[odd] = torch.where(same, own[its], own[odd])
        todo[odd] &= ~same
    return places(todo)
