"""Results to look at: overlays, and truth beside prediction, as plain arrays.

The HTML page is `evaluate/report/page.py`. Nothing here needs a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.report.compare import Comparison, compare, matched_numbers
from panoptic_cache.pipeline.coco import Category, SegmentInfo
from panoptic_cache.pipeline.pictures.colours import (
    LabelledMap,
    Picture,
    fitted,
    overlay,
    resized,
    save_picture,
    segment_colours,
    stained,
)
from panoptic_cache.pipeline.pictures.sheets import Tile, label_segments, sheet
from panoptic_cache.pipeline.targets import index_map

if TYPE_CHECKING:
    from panoptic_cache.evaluate.decoder.decode import PanopticMap

PANEL = 480
"""Longer side of a picture in a figure, pixels."""
SMALLEST, LARGEST = 640, 1600
"""Longer side of an overlay, pixels: names are to be readable, and nothing is measured on it."""
LETTERS = 13
"""Size of the names on a picture of `SMALLEST` pixels, pixels."""
MISSED, FALSE, BOTH = (213, 94, 0), (0, 114, 178), (196, 105, 160)


@dataclass(frozen=True, slots=True)
class ImageView:
    """One image and what was made of it; all maps at the photo's size, heads at any.

    Attributes:
        title: Such as the file name.
        photo: (H, W, 3) uint8 RGB.
        prediction: See `predicted_map`.
        truth: See `true_map`; None where there is none.
        instance: Instance head, (h, w, 3) uint8; see `draw.centroid_colours`.
        semantic: Semantic head, (h, w, 3) uint8; see `draw.semantic_colours`.
        pq: PQ of this image, see `measures.image_pq`.
    """

    title: str
    photo: Picture
    prediction: LabelledMap
    truth: LabelledMap | None = None
    instance: Picture | None = None
    semantic: Picture | None = None
    pq: float | None = None


def predicted_map(result: PanopticMap) -> LabelledMap:
    """A decoded prediction, for drawing."""
    return LabelledMap(
        index_map(result.ids, [segment.id for segment in result.segments]),
        tuple(segment.label for segment in result.segments),
        tuple(segment.isthing for segment in result.segments),
    )


def true_map(
    ids: NDArray[np.int32], segments: Sequence[SegmentInfo], categories: Sequence[Category]
) -> LabelledMap:
    """An annotated image, for drawing.

    Args:
        ids: (H, W) int32 segment ids.
        segments: As annotated.
        categories: Of the annotation file.
    """
    by_id = {category.id: category for category in categories}
    return LabelledMap(
        index_map(ids, [segment.id for segment in segments]),
        tuple(by_id[segment.category_id].label for segment in segments),
        tuple(by_id[segment.category_id].isthing and not segment.iscrowd for segment in segments),
        frozenset(row for row, segment in enumerate(segments) if segment.iscrowd),
    )


def named_overlay(
    photo: Picture,
    segments: LabelledMap,
    categories: Sequence[Category],
    numbers: Sequence[int] | None = None,
    *,
    letters: int = LETTERS,
) -> Picture:
    """A photo with its segments in colour and named.

    Args:
        photo: (H, W, 3) uint8.
        segments: Of the same size.
        categories: By label.
        numbers: See `segment_colours`.
        letters: Size of the names, pixels.
    """
    colours = segment_colours(segments.labels, segments.isthing, numbers)
    names = [
        categories[label].name + (" (crowd)" if row in segments.crowd else "")
        for row, label in enumerate(segments.labels)
    ]
    return label_segments(overlay(photo, segments.index, colours), segments.index, names, letters)


def write_overlay(
    path: Path, photo: Picture, segments: LabelledMap, categories: Sequence[Category]
) -> None:
    """Writes `named_overlay` as PNG or JPEG, by suffix; `SMALLEST` to `LARGEST` pixels long."""
    size = (photo.shape[0], photo.shape[1])
    longest = min(max(*size, SMALLEST), LARGEST)
    size = size if longest == max(size) else fitted(size, longest)
    letters = round(LETTERS * longest / SMALLEST)
    picture = named_overlay(
        resized(photo, size), segments.resized(size), categories, letters=letters
    )
    save_picture(path, picture)


def error_picture(
    photo: Picture, truth: LabelledMap, prediction: LabelledMap, comparison: Comparison
) -> Picture:
    """A pale photo with missed segments in `MISSED`, false ones in `FALSE`, and `BOTH`."""
    missed = np.isin(truth.index, np.add(comparison.missed, 1))
    false = np.isin(prediction.index, np.add(comparison.false, 1))
    return stained(photo, ((missed, MISSED), (false, FALSE), (missed & false, BOTH)))


def panels(view: ImageView, categories: Sequence[Category], longest: int = PANEL) -> list[Tile]:
    """The captioned pictures of one image, as in Figure 8, with the truth and the errors.

    Args:
        view: The image.
        categories: By label.
        longest: Longer side of each picture, pixels.

    Returns:
        Photo, truth, result, semantic head, instance head, errors: those that there are.
    """
    size = fitted((view.photo.shape[0], view.photo.shape[1]), longest)
    photo = resized(view.photo, size)
    prediction = view.prediction.resized(size)
    tiles = [("photo", photo)]
    if view.truth is None:
        tiles.append(("result", named_overlay(photo, prediction, categories)))
    else:
        truth = view.truth.resized(size)
        comparison = compare(view.truth, view.prediction)
        numbers = matched_numbers(truth, prediction, comparison)
        tiles += [
            ("truth", named_overlay(photo, truth, categories)),
            ("result", named_overlay(photo, prediction, categories, numbers)),
        ]
    for name, head in (("semantic head", view.semantic), ("instance head", view.instance)):
        if head is not None:
            tiles.append((name, resized(head, size, smooth=False)))
    if view.truth is not None:
        tiles.append(("errors", error_picture(photo, truth, prediction, comparison)))
    return tiles


def comparison_sheet(
    views: Sequence[ImageView], categories: Sequence[Category], *, title: str = ""
) -> Picture:
    """One picture of several images, a row each: photo, truth, result; the title with its PQ.

    Args:
        views: In the order of the rows.
        categories: By label.
        title: A line above everything.
    """
    rows: list[list[Tile]] = []
    for view in views:
        shown = dict(panels(view, categories, 400))
        score = "" if view.pq is None else f", PQ {view.pq:.1%}"
        captions = {"photo": view.title, "truth": "truth", "result": f"result{score}"}
        rows.append([(text, shown[name]) for name, text in captions.items() if name in shown])
    return sheet(rows, title=title)
