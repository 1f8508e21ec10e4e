"""How sure the network is of each instance: what ranks them where masks are compared by AP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from evaluate.pixels import Pixels
from evaluate.segments import Painting

STRIDE = 2
"""One pixel in so many, on either axis, may be looked at,"""
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
        For each image (R,), see `Painting.scores`, which stay for stuff and where no pixel is
        looked at.
    """
    samples = [sample(one.values, one.categories) for one in paintings]
    device, harmonics = pixels.codes.device, pixels.codes.shape[0] // 4
    chances, lengths = [], []
    for image, (one, (places, rows)) in enumerate(zip(paintings, samples, strict=True)):
        own, labels = (torch.from_numpy(each).to(device) for each in (places, one.labels[rows]))
        logits = pixels.logits[image].index_select(1, own).float()
        chances.append(logits.softmax(0).gather(0, labels[None])[0])
        strength = pixels.strength.index_select(0, own + image * pixels.area)
        lengths.append((strength / (2 * harmonics)).sqrt().clamp_max(1))
    sure = (torch.cat(chances) * torch.cat(lengths)).cpu().double().numpy()
    found, end = [], 0
    for one, (_, rows) in zip(paintings, samples, strict=True):
        own_sure, end = sure[end : end + len(rows)], end + len(rows)
        count = np.bincount(rows, minlength=len(one.labels))
        total = np.bincount(rows, own_sure, minlength=len(one.labels))
        found.append(np.where(count > 0, total / count.clip(1), one.scores))
    return found


def sample(values: NDArray[np.int32], categories: int) -> tuple[Places, Places]:
    """Some pixels of each instance, spread evenly over it.

    Args:
        values: (h, w), see `Painting`.
        categories: Up to this value it is no instance.

    Returns:
        (n,) flat indices and (n,) rows, sorted by row.
    """
    sparse = values[::STRIDE, ::STRIDE]
    y, x = np.nonzero(sparse > categories)
    rows = sparse[y, x].astype(np.intp) - 1
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], (y[order] * values.shape[1] + x[order]) * STRIDE
    count = np.bincount(rows)
    rank = np.arange(len(rows)) - (count.cumsum() - count)[rows]
    kept = rank % np.maximum(count // SAMPLES, 1)[rows] == 0
    return places[kept], rows[kept]
