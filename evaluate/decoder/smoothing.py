"""Means of codes within regions of one semantic label, at a cost that is the same for any radius.

Noise of a prediction is local, an instance is not: averaging neighbours of the same label removes
the one and keeps the other. The window is a cross-shaped region (Zhang, Lu and Lafruit 2009, for
stereo matching): first along the row, then along the column, and on each line it ends where the
label changes. A window thus never leaks into another class, and by running sums each mean costs
two look-ups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder.parallel import in_parallel
from panoptic_cache.evaluate.decoder.pixels import Pixels, places, spans_of

CHANNELS = 4
"""Smoothed at once: it saves memory, and gives other threads something to do."""
LARGE = 1 << 20
"""Pixels of an image above which running sums are of double precision: in single precision, means
of a few pixels would be off by a twentieth."""


@dataclass(frozen=True)
class Lines:
    """The runs of adjacent pixels of one label that N pixels form along their lines, in order.

    Attributes:
        first: (N,) int64 position of the first pixel of each pixel's run.
        last: (N,) int64 position of its last pixel.
    """

    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, labels: Tensor, pixels: Tensor) -> Lines:
        """Of (..., h, w) labels along the rows, for (N,) flat indices, ascending."""
        breaks = torch.ones(labels.shape, dtype=torch.bool, device=labels.device)
        torch.ne(labels[..., 1:], labels[..., :-1], out=breaks[..., 1:])
        starts = places(breaks.flatten().index_select(0, pixels))
        ends = torch.cat([starts[1:], starts.new_full((1,), len(pixels))])[: len(starts)]
        run = torch.repeat_interleave(ends - starts, output_size=len(pixels))
        return cls(starts.index_select(0, run), (ends - 1).index_select(0, run))

    def windows(self, at: Tensor, radius: int | Tensor, image: int | Tensor) -> Windows:
        """Windows around some positions that end where the line does.

        Args:
            at: (M,) int64.
            radius: Pixels to each side, of all or (M,) int64.
            image: The number of their image, of all or (M,) int64.
        """
        low = torch.maximum(at - radius, self.first.index_select(0, at))
        high = torch.minimum(at + radius, self.last.index_select(0, at)).add_(1)
        size = (high - low).float()
        return Windows(low.add_(image), high.add_(image), size)


@dataclass(frozen=True)
class Windows:
    """M stretches of pixels to be averaged, as places in `running_sums`.

    Attributes:
        low: (M,) int64 place of what precedes the stretch.
        high: (M,) int64 that of its end.
        size: (M,) float32 pixels.
    """

    low: Tensor
    high: Tensor
    size: Tensor

    def means(self, sums: Tensor) -> Tensor:
        """(channels, M) means, of (channels, N + 1) running sums."""
        total = sums.index_select(1, self.high).sub_(sums.index_select(1, self.low))
        return total.div_(self.size)


@dataclass(frozen=True)
class Means:
    """Codes of M pixels, image by image, each the mean over its window, or their products.

    Attributes:
        values: (channels, M) float32.
        pixels: (M,) int64 their flat indices.
        spans: Which of them each image has.
    """

    values: Tensor
    pixels: Tensor
    spans: tuple[slice, ...]

    @classmethod
    def unsmoothed(cls, pixels: Pixels, some: Tensor) -> Means:
        """The codes themselves, of (M,) int64 flat indices, image by image."""
        spans = spans_of(some, pixels.shape[0], pixels.area)
        return cls(pixels.codes.index_select(1, some), some, spans)


@dataclass(frozen=True)
class Smoother:
    """The pixels of thing classes of B images, ready to be averaged within any radius.

    Attributes:
        labels: (B, h, w) int32.
        pixels: (N,) int64 their flat indices, ascending.
        rank: (B, h, w) int32 position among them, -1 for the other pixels.
        rows: Their runs along the rows.
        sums: (channels, N + B) running sums of their codes, see `running_sums`.
    """

    labels: Tensor
    pixels: Tensor
    rank: Tensor
    rows: Lines
    sums: Tensor

    @classmethod
    def of(cls, pixels: Pixels) -> Smoother:
        """Of the pixels of thing classes."""
        inside, labels = pixels.inside, pixels.labels.view(pixels.shape)
        rank = torch.full_like(labels, -1)
        order = torch.arange(len(inside), dtype=rank.dtype, device=rank.device)
        rank.view(-1).scatter_(0, inside, order)
        channels = len(pixels.codes)
        sums = room_for_sums(channels, pixels.codes, pixels.spans)

        def add_up(some: slice) -> None:
            codes = pixels.codes[some].index_select(1, inside)
            running_sums(codes, pixels.spans, out=sums[some])

        in_parallel(lambda: add_up, groups(channels))
        return cls(labels, inside, rank, Lines.of(labels, inside), sums)

    def means(
        self,
        radii: Sequence[int],
        *,
        along: Tensor | None = None,
        step: tuple[int, int] = (1, 1),
    ) -> Means:
        """Means over cross-shaped windows.

        Args:
            radii: Of each image, in pixels.
            along: (B, K, channels): means are wanted of the codes' products with those of their
                image. Smoothing is linear: this costs less where K is less than channels.
            step: Means are wanted in every so manieth row and column.
        """
        images = len(radii)
        rank, labels = (map_.mT[:, :: step[1]].contiguous() for map_ in (self.rank, self.labels))
        upright, area = places(rank >= 0), rank[0].numel()  # column by column
        image, radius = _by_image(upright, radii, area)
        source = rank.flatten().index_select(0, upright).long()
        across = self.rows.windows(source, radius, image)
        sparse = torch.zeros(rank.shape, dtype=torch.bool, device=rank.device)
        sparse[..., :: step[0]] = True
        wanted = places(sparse.flatten().index_select(0, upright))
        image, radius = _by_image(upright.index_select(0, wanted), radii, area)
        down = Lines.of(labels, upright).windows(wanted, radius, image)
        spans = spans_of(upright, images, area)
        rows = self.sums.new_empty(len(self.sums), len(upright), dtype=torch.float32)

        def average_rows(channels: slice) -> None:
            rows[channels] = across.means(self.sums[channels])

        in_parallel(lambda: average_rows, groups(len(rows)))
        if along is not None:  # of means: those of sums would lose precision
            pairs = zip(along, spans, strict=True)
            rows = _joined([one @ rows[:, span] for one, span in pairs])
        values = rows.new_empty(len(rows), len(wanted))

        def average_columns(channels: slice) -> None:
            values[channels] = down.means(running_sums(rows[channels], spans))

        in_parallel(lambda: average_columns, groups(len(rows)))
        pixels = self.pixels.index_select(0, source.index_select(0, wanted))
        return Means(values, pixels, spans_of(pixels, images, self.labels[0].numel()))


def groups(channels: int) -> list[slice]:
    """Some channels each."""
    return [slice(start, start + CHANNELS) for start in range(0, channels, CHANNELS)]


def room_for_sums(channels: int, like: Tensor, spans: Sequence[slice]) -> Tensor:
    """(channels, N + B) for `running_sums` of the N values in B spans."""
    longest = max(span.stop - span.start for span in spans)
    dtype = torch.float64 if longest > LARGE else torch.float32
    return like.new_empty(channels, spans[-1].stop + len(spans), dtype=dtype)


def running_sums(values: Tensor, spans: Sequence[slice], out: Tensor | None = None) -> Tensor:
    """Sums of what precedes each value in its span, and of the whole span.

    Args:
        values: (channels, N) float32.
        spans: B of them, one after the other: those of images, as the precision that is enough for
            one would not last for a batch.
        out: Where to, see `room_for_sums`.

    Returns:
        (channels, N + B), of double precision where a span is longer than `LARGE`.
    """
    sums = room_for_sums(len(values), values, spans) if out is None else out
    for own, span in zip(_with_zeros(spans), spans, strict=True):
        some = sums[:, own]
        some[:, 0] = 0
        torch.cumsum(values[:, span], 1, dtype=sums.dtype, out=some[:, 1:])
    return sums


def _with_zeros(spans: Sequence[slice]) -> tuple[slice, ...]:
    """Where spans lie if each has one more at its start."""
    return tuple(slice(span.start + n, span.stop + n + 1) for n, span in enumerate(spans))


def _by_image(at: Tensor, radii: Sequence[int], area: int) -> tuple[int | Tensor, int | Tensor]:
    """Number and radius of the image of each flat index; numbers, if there is only one image."""
    if len(radii) == 1:
        return 0, radii[0]
    image = at // area
    return image, torch.tensor(radii, device=at.device).index_select(0, image)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
