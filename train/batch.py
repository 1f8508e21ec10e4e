"""A batch: indices, not maps.

It ships the photo, the segment index map, the EDS code and the void mask as bytes, and one table
row a segment. Codes, labels and weights are gathers on the device, and so is the colour jitter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from panoptic_cache.train.augment import PADDING, Item


@dataclass(frozen=True)
class Batch:
    """B samples of side S, on any device.

    Row 0 of the tables stands for unlabelled pixels, so that the index map gathers directly.

    Attributes:
        keys: B sample keys.
        photo: (B, 3, S, S) uint8 RGB.
        index: (B, S, S) uint8 or int32, rows of the tables.
        eds: (B, S, S) uint8, see `panoptic_cache.pipeline.cache.sample`.
        void: (B, S, S) uint8, 0 labelled, 1 unlabelled, 2 crowd, 3 padding.
        eds_scale: (B,) float32, pixels of S for one pixel that `eds` counts.
        colour: (B, 3) float32 factors of brightness, contrast and saturation.
        centroid: (B, R, 2) float32, (u, v) in [-1, 1].
        instance: (B, R) bool, the row is a non-crowd thing with pixels.
        label: (B, R) int64, category, -1 for unlabelled and for rows of no segment.
    """

    keys: tuple[str, ...]
    photo: Tensor
    index: Tensor
    eds: Tensor
    void: Tensor
    eds_scale: Tensor
    colour: Tensor
    centroid: Tensor
    instance: Tensor
    label: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; without waiting for the copies where memory is pinned."""
        return Batch(
            self.keys,
            *(getattr(self, name).to(device, non_blocking=True) for name in _TENSORS),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return Batch(self.keys, *(getattr(self, name).pin_memory() for name in _TENSORS))


_TENSORS = tuple(field.name for field in fields(Batch) if field.name != "keys")


def collate(items: Sequence[Item]) -> Batch:
    """Stacks items; tables are padded with rows of no segment."""
    rows = max(len(item.label) for item in items)
    index = np.stack([item.index for item in items])

    def table(name: str, fill: float) -> Tensor:
        values = [getattr(item, name) for item in items]
        result = np.full((len(items), rows, *values[0].shape[1:]), fill, values[0].dtype)
        for row, value in zip(result, values, strict=True):
            row[: len(value)] = value
        return torch.from_numpy(result)

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(item, name) for item in items]))

    return Batch(
        keys=tuple(item.key for item in items),
        photo=stack("photo"),
        index=torch.from_numpy(index if index.dtype == np.uint8 else index.astype(np.int32)),
        eds=stack("eds"),
        void=stack("void"),
        eds_scale=torch.tensor([item.eds_scale for item in items]),
        colour=stack("colour"),
        centroid=table("centroid", 0.0),
        instance=table("instance", 0),
        label=table("label", -1),
    )


def jitter_colour(photo: Tensor, factors: Tensor, void: Tensor | None = None) -> Tensor:
    """Brightness, contrast and saturation, on the device.

    Contrast is about the mean of the picture. Padding has no part in it, else a picture that fills
    less of the input would fade to black, and stays black, as at prediction.

    Args:
        photo: (B, 3, S, S) uint8 RGB, 0 in the padding.
        factors: (B, 3) float32, 1 = unchanged.
        void: (B, S, S) uint8 that says where padding is; None where there is none.

    Returns:
        (B, 3, S, S) float32 in [0, 1].
    """
    brightness, contrast, saturation = factors.T[..., None, None, None]  # (B, 1, 1, 1) each
    inside = torch.ones_like(photo[:, 0]).bool() if void is None else void != PADDING
    pixels = inside.sum((1, 2)).clamp(min=1).view(-1, 1, 1, 1)
    # A sum of whole numbers is the same in any order: on any device, however it is split.
    mean = photo.sum((1, 2, 3), keepdim=True) / (3 * pixels) * (brightness / 255)
    scaled = photo.float() * (brightness * contrast / 255)
    grey = scaled.mean(1, keepdim=True)
    jittered = torch.lerp(grey, scaled, saturation) + mean * (1 - contrast)
    result: Tensor = jittered.clamp(0, 1) * inside[:, None]
    return result
