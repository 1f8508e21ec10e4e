"""How sure the network is of each instance: what ranks them where masks are compared by AP."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.pixels import Pixels
from panoptic_cache.evaluate.decoder.segments import Painting

STRIDE = 2
"""One pixel in so many, on either axis, is looked at,"""
SAMPLES = 16
"""and of each instance up to twice so many are."""

Places = NDArray[np.intp]


def confidences(pixels: Pixels, paintings: Sequence[Painting]) -> list[NDArray[np.float64]]:
    """The confidence of each row of the paintings, in [0, 1].

    Of an instance, the mean over some of its pixels of the probability of its category, times the
    length of their codes: 1 where both heads are sure, small where the code is nearly void.

    Args:
        pixels: B images.
        paintings: Theirs.

    Returns:
        For each image (R,), 1 for stuff.
    """
    samples = [sample(one) for one in paintings]
    ends = np.cumsum([0, *(len(rows) for _, rows in samples)]).tolist()
    spans = [slice(start, end) for start, end in pairwise(ends)]
    own, labels = torch.from_numpy(  # one copy to the device
        np.concatenate(
            [
                (places, one.labels[rows])
                for one, (places, rows) in zip(paintings, samples, strict=True)
            ],
            axis=1,
        )
    ).to(pixels.codes.device)
    chances, lengths = [], []
    for image, span in enumerate(spans):
        logits = pixels.logits[image].index_select(1, own[span]).float()
        chances.append(logits.softmax(0).gather(0, labels[None, span])[0])
        strength = pixels.strength.index_select(0, own[span] + image * pixels.area)
        lengths.append((strength / (pixels.codes.shape[0] // 2)).sqrt().clamp_max(1))
    sure = (torch.cat(chances) * torch.cat(lengths)).cpu().double().numpy()
    found = []
    for one, (_, rows), span in zip(paintings, samples, spans, strict=True):
        count = np.bincount(rows, minlength=len(one.labels))
        total = np.bincount(rows, sure[span], minlength=len(one.labels))
        found.append(np.where(count > 0, total / count.clip(1), 1.0))
    return found


def sample(painting: Painting) -> tuple[Places, Places]:
    """Some pixels of each instance, spread evenly over it.

    Returns:
        (n,) flat indices and (n,) rows, sorted by row; each instance that is shown has one.
    """
    values, categories = painting.values, painting.categories
    sparse = values[::STRIDE, ::STRIDE]
    y, x = np.nonzero(sparse > categories)
    rows = sparse[y, x].astype(np.intp) - 1
    places = (y * values.shape[1] + x) * STRIDE
    unseen = np.bincount(rows, minlength=len(painting.labels)) == 0
    unseen[:categories] = False
    if unseen.any():  # so thin that no such pixel is one of theirs
        thin = np.flatnonzero(np.append(False, unseen)[values])
        rows = np.append(rows, values.ravel()[thin] - 1)
        places = np.append(places, thin)
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    count = np.bincount(rows)
    rank = np.arange(len(rows)) - (count.cumsum() - count)[rows]
    kept = rank % np.maximum(count // SAMPLES, 1)[rows] == 0
    return places[kept], rows[kept]
