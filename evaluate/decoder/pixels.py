"""A batch of heads as the decoder sees it: pixels of images side by side, codes of any encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panoptic_cache.evaluate.decoder.cells import chunks, packed_argmax, room_for
from panoptic_cache.evaluate.decoder.parallel import in_parallel
from panoptic_cache.train.encoding import Encoding


class NotFiniteError(Exception):
    """The heads of an image hold NaN or infinite values.

    Args:
        image: Its place in the batch.
    """

    def __init__(self, image: int) -> None:
        super().__init__(image)
        self.image = image


@dataclass(frozen=True)
class Pixels:
    """B images of one size, side by side: N = B h w pixels, image by image.

    Attributes:
        codes: (4L, N) float32 positional codes.
        labels: (N,) int32 semantic labels.
        thing: (N,) bool, whether the label is a thing class.
        strength: (N,) float32 squared lengths of the codes.
        inside: (I,) int64, the indices of the pixels of thing classes, ascending.
        spans: Which of `inside` each image has.
        shape: (B, h, w).
        things: (C,) whether a category is a thing, on the processor.
        logits: B times (C, h w), as given.
    """

    codes: Tensor
    labels: Tensor
    thing: Tensor
    strength: Tensor
    inside: Tensor
    spans: tuple[slice, ...]
    shape: tuple[int, int, int]
    things: NDArray[np.bool_]
    logits: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        instance: Sequence[Tensor],
        semantic: Sequence[Tensor],
        *,
        encoding: Encoding,
        isthing: Tensor,
    ) -> Pixels:
        """Of (channels, h, w) codes and (C, h, w) logits of B images.

        Raises:
            NotFiniteError: Those of an image hold NaN or infinite values.
        """
        images, (height, width) = len(instance), instance[0].shape[-2:]
        logits = tuple(each.flatten(1) for each in semantic)
        scores = [packed_argmax(each.float()) for each in logits]
        codes = [to_positional(code.flatten(1).float(), encoding) for code in instance]
        best, labels, code = (
            parts[0] if images == 1 else torch.cat(parts, dim=-1)
            for parts in ([b for b, _ in scores], [k for _, k in scores], codes)
        )
        strength = torch.empty_like(best)

        def begin() -> Callable[[tuple[Tensor, ...]], None]:
            room = room_for(len(code), code)

            def measure(part: tuple[Tensor, ...]) -> None:
                some, out = part
                torch.sum(torch.square(some, out=room[:, : len(out)]), 0, out=out)

            return measure

        in_parallel(begin, chunks(code, strength))
        finite = (best.abs() + strength).view(images, -1).amax(1).isfinite().tolist()
        if not all(finite):
            raise NotFiniteError(finite.index(False))
        thing = isthing.to(labels.device).index_select(0, labels)
        inside = places(thing)
        spans = spans_of(inside, images, height * width)
        shape, things = (images, height, width), isthing.cpu().numpy()
        return cls(code, labels, thing, strength, inside, spans, shape, things, logits)

    @property
    def area(self) -> int:
        """Pixels of an image."""
        return self.shape[1] * self.shape[2]

    def take(self, images: Sequence[int]) -> Pixels:
        """Some of the images, in this order."""
        if len(images) == self.shape[0]:
            return self
        chosen = torch.tensor(images, device=self.labels.device)
        codes, labels, thing, strength = (
            all_.unflatten(-1, (self.shape[0], -1)).index_select(-2, chosen).flatten(-2)
            for all_ in (self.codes, self.labels, self.thing, self.strength)
        )
        inside, spans, end = [], [], 0
        for new, old in enumerate(images):
            inside.append(self.inside[self.spans[old]] + (new - old) * self.area)
            spans.append(slice(end, end := end + len(inside[-1])))
        shape = (len(images), *self.shape[1:])
        logits = tuple(self.logits[image] for image in images)
        inside_ = torch.cat(inside)
        return Pixels(
            codes, labels, thing, strength, inside_, tuple(spans), shape, self.things, logits
        )


def places(mask: Tensor) -> Tensor:
    """(N,) int64 flat indices of what is true; a tenth of the time of `nonzero` on a processor."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def spans_of(pixels: Tensor, images: int, area: int) -> tuple[slice, ...]:
    """Where those of each image lie among indices of pixels, image by image.

    Args:
        pixels: (M,) int64, ascending by image.
        images: How many.
        area: Pixels of an image.
    """
    if images == 1:
        return (slice(0, len(pixels)),)
    edges = torch.arange(images + 1, device=pixels.device) * area
    bounds = torch.searchsorted(pixels, edges).tolist()
    return tuple(slice(start, stop) for start, stop in pairwise(bounds))


def to_positional(code: Tensor, encoding: Encoding) -> Tensor:
    """See `Encoding.to_positional`."""
    return encoding.to_positional(code)
