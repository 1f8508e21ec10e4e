"""One sample of a cache as one picture: photo, segments, centroids, EDS weight, void, legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.photo import decode_photo
from panoptic_cache.pipeline.pictures.colours import (
    LabelledMap,
    Picture,
    centroid_colours,
    fitted,
    heat,
    mark_points,
    overlay,
    resized,
    segment_colours,
    void_picture,
)
from panoptic_cache.pipeline.pictures.sheets import label_segments, legend, sheet
from panoptic_cache.pipeline.targets import CROWD, UNLABELLED, resize_segment_map

TILE = 480
"""Longer side of a picture, pixels."""


def sample_sheet(sample: Sample, categories: Sequence[Category] = (), d: float = 20.0) -> Picture:
    """One picture of a sample: photo, segments, centroids, EDS weight, void, and a legend.

    Args:
        sample: As cached.
        categories: For the names; their ids stand in for them where absent.
        d: D of the EDS weight, in cached pixels.

    Raises:
        InputError: The photo cannot be decoded.
    """
    size = fitted(sample.segment_map.shape, TILE)
    photo = resized(decode_photo(sample.photo, f"{sample.key}.jpg"), size)
    drawn = labelled_map(sample)
    colours = segment_colours(drawn.labels, drawn.isthing)
    drawn = drawn.resized(size)
    name_of = {category.id: category.name for category in categories}
    names = [
        name_of.get(segment.category_id, f"category {segment.category_id}")
        + (" (crowd)" if segment.iscrowd else "")
        for segment in sample.segments
    ]
    segments = label_segments(overlay(photo, drawn.segment_map, colours), drawn.segment_map, names)
    points = [segment.centroid for segment in sample.segments if segment.centroid is not None]
    centroids = resized(centroid_colours(sample.centroid_map()), size, smooth=False)
    weight = sample.eds_weight(d)
    void = resize_segment_map(sample.void, size).astype(np.uint8)
    share = np.bincount(sample.void.ravel(), minlength=3) / sample.void.size
    height, width = sample.segment_map.shape
    crowds = sum(segment.iscrowd for segment in sample.segments)
    return sheet(
        [
            [
                ("photo", photo),
                ("segments", segments),
                ("centroids: u is red, v is green", mark_points(centroids, points)),
            ],
            [
                (
                    f"EDS weight: D = {d:g} px, mean {weight.mean():.2f}",
                    resized(heat(weight), size),
                ),
                (
                    f"void: {share[UNLABELLED]:.1%} unlabelled (blue),"
                    f" {share[CROWD]:.1%} crowd (orange)",
                    void_picture(void, photo),
                ),
                ("share of the picture", _legend(sample, names, colours, size)),
            ],
        ],
        title=sample.file_name,
        note=f"key {sample.key}, {width} x {height} pixels, {len(names)} segments: {len(points)}"
        f" things, {len(names) - len(points) - crowds} stuff, {crowds} crowd",
    )


def _legend(
    sample: Sample, names: Sequence[str], colours: Picture, size: tuple[int, int]
) -> Picture:
    """Categories by area; crowds stand alone."""
    area: Counter[str] = Counter()
    count: Counter[str] = Counter(names)
    colour: dict[str, tuple[int, ...]] = {}
    for row, (segment, name) in enumerate(zip(sample.segments, names, strict=True), start=1):
        area[name] += segment.area
        colour.setdefault(name, tuple(colours[row].tolist()))
    return legend(
        [
            (
                colour[name],
                name if count[name] == 1 else f"{name}  x {count[name]}",
                f"{total / sample.segment_map.size:.1%}",
            )
            for name, total in area.most_common()
        ],
        size,
    )


def labelled_map(sample: Sample) -> LabelledMap:
    """The segments of a sample, for drawing."""
    return LabelledMap(
        sample.segment_map,
        tuple(segment.label for segment in sample.segments),
        tuple(segment.isthing and not segment.iscrowd for segment in sample.segments),
        frozenset(row for row, segment in enumerate(sample.segments) if segment.iscrowd),
    )
