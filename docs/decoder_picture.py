"""Makes docs/decoder.png: votes, basins, merged basins and instances of an image of saved heads.

python docs/decoder_picture.py HEADS KEY OUT.png    HEADS: see `panoptic evaluate --save-heads`
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from panoptic_cache.evaluate.decoder import field, instances, segments
from panoptic_cache.evaluate.decoder.decode import DecodeConfig
from panoptic_cache.evaluate.study.heads import read_heads, read_meta

SIDE = 480
"""Pixels of a panel."""


def draw(folder: Path, key: str) -> np.ndarray:
    """(480, 4 x 480 + 3 x 8, 3) BGR."""
    meta, config = read_meta(folder), DecodeConfig()
    (image,) = read_heads([folder / f"{key}.npz"], meta)
    code, logits = image.positional(meta.code()).instance[None], image.semantic[None]
    isthing = torch.tensor([category.isthing for category in meta.categories])
    classes = field.read_classes(logits, isthing, config.least_class)
    noise = field.measure_noise(code, classes.chance, config.cells)
    radius = (config.smoothing * noise).round().clamp(max=field.MAX_RADIUS).long()
    smooth = field.smooth(code, torch.where(classes.chance >= 0.5, classes.thing, -1), radius)
    finite = torch.ones(1, dtype=torch.bool)
    (votes,) = field.cast_votes(smooth, classes, noise, radius, finite, cells=config.cells)
    assert votes is not None
    voters = instances.find_voters(votes, config.trust)
    basins = instances.find_basins(voters, votes, config.blur)
    owner = instances.merge(basins, voters, votes, config.bias)
    painting = segments.draw(owner, voters, votes, len(meta.categories), config.least_score)

    column, row = np.rint(voters.place).astype(int).clip(0, config.cells - 1)
    histogram = np.zeros((config.cells, config.cells))
    np.add.at(histogram, (row, column), voters.length)
    gray = 255 * (1 - np.sqrt(histogram / max(histogram.max(), 1)))
    # An instance has the colour of the first of its basins, in all panels.
    merged = np.arange(basins.cells.max() + 1)
    merged[basins.owner] = owner
    shown = np.zeros(votes.shape, int)
    shown.ravel()[voters.pixels] = owner
    shown[painting.values <= len(meta.categories)] = 0
    colours = np.random.default_rng(3).integers(60, 256, (len(merged), 3))
    colours[0] = 0
    panels = [np.repeat(gray[..., None], 3, 2), colours[basins.cells]]
    panels += [colours[merged[basins.cells]], colours[shown]]
    large = [
        cv2.resize(panel.astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
        for panel in panels
    ]
    gap = np.full((SIDE, 8, 3), 255, np.uint8)
    return np.concatenate([large[0], *(part for panel in large[1:] for part in (gap, panel))], 1)


if __name__ == "__main__":
    cv2.imwrite(sys.argv[3], draw(Path(sys.argv[1]), sys.argv[2]))
