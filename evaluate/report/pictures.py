"""The pictures of an evaluation: overlays, the comparison sheet, the best and the worst images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.report.compare import Comparison, compare, matched_numbers
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.photo import fitted_size
from panoptic_cache.pipeline.pictures.colours import (
    LabelledMap,
    Picture,
    encode_picture,
    overlay,
    resized,
    save_picture,
    segment_colours,
    stained,
)
from panoptic_cache.pipeline.pictures.sheets import Tile, label_segments, sheet
from panoptic_cache.pipeline.targets import make_segment_map

COMPARED = 6
"""Images on the sheet of truth beside prediction."""
SHOWN = 6
"""Best images in the report, and as many of the worst."""
PANEL, SHEET_PANEL = 480, 400
"""Longer side of a picture in the report and on the sheet, pixels."""
SMALLEST, LARGEST = 640, 1600
"""Limits of the longer side of an overlay, pixels, so that names are readable."""
LETTERS = 13
"""Height of the names on a picture of `SMALLEST` pixels, pixels."""
MISSED, FALSE, BOTH = (213, 94, 0), (0, 114, 178), (196, 105, 160)
"""Colours of errors, RGB."""


@dataclass(frozen=True, slots=True)
class ImageView:
    """One image and its prediction; maps have the photo's size, heads any size."""

    title: str  # Such as the file name
    photo: NDArray[np.uint8]  # (H, W, 3) uint8 RGB
    truth: LabelledMap  # See `true_map`
    prediction: LabelledMap  # See `predicted_map`
    # Instance head, (h, w, 3) uint8; see `colours.centroid_colours`.
    instance: Picture | None = None
    # Semantic head, (h, w, 3) uint8; see `colours.semantic_colours`.
    semantic: Picture | None = None
    pq: float | None = None  # PQ of this image, see `PQStat.mean_pq`


@dataclass(frozen=True, slots=True)
class Figure:
    """One image of the report."""

    title: str  # Such as the file name
    pq: float  # PQ of the image
    summary: str  # What was found, missed and false, in words
    pictures: tuple[tuple[str, bytes], ...]  # Caption and JPEG bytes of each picture


def draw_pictures(
    out: Path,
    names: Sequence[str],
    scores: Sequence[float | None],
    view_of: Callable[[int, bool], ImageView],
    categories: Sequence[Category],
    *,
    overlays: int,
) -> tuple[list[Figure], list[Figure]]:
    """Writes `overlays/*.jpg` and `comparison.png` of the first images.

    Args:
        out: The folder of the evaluation.
        names: File names of the overlays without suffix, one for each image.
        scores: PQ of each image.
        view_of: Makes the view of the image at a position, with or without its heads.
        categories: By label.
        overlays: Number of images to draw.

    Returns:
        Figures of the best images, best first, and of the worst that are not among them.
    """
    Storage(str(out / "overlays")).create()
    best, worst = extremes(scores, SHOWN)
    first = range(min(max(overlays, COMPARED), len(names)))
    compared: list[ImageView] = []
    figures: dict[int, Figure] = {}
    for at in sorted({*first, *best, *worst}):
        shown = at in best or at in worst
        view = view_of(at, shown)
        if shown:
            figures[at] = make_figure(view, categories)
        if at < COMPARED:
            compared.append(view)
        if at < overlays:
            path = out / "overlays" / f"{names[at]}.jpg"
            write_overlay(path, view.photo, view.prediction, categories)
    save_picture(out / "comparison.png", comparison_sheet(compared, categories))
    return [figures[at] for at in best], [figures[at] for at in worst]


def extremes(scores: Sequence[float | None], limit: int) -> tuple[list[int], list[int]]:
    """Positions of the `limit` best and of the `limit` worst; of equals, the first comes first.

    The worst do not repeat any of the best.
    """
    defined = [(score, at) for at, score in enumerate(scores) if score is not None]
    best = [at for _, at in sorted(defined, key=lambda row: (-row[0], row[1]))[:limit]]
    worst = [at for _, at in sorted(defined)[:limit]]
    return best, [at for at in worst if at not in best]


def make_figure(view: ImageView, categories: Sequence[Category]) -> Figure:
    """Draws the pictures of an image that has a PQ."""
    found = compare(view.truth, view.prediction)
    total = len(found.matches) + len(found.missed)
    summary = f"{len(found.matches)} of {total} segments found"
    for name, rows, labels in (
        ("missed", found.missed, view.truth.labels),
        ("false", found.false, view.prediction.labels),
    ):
        if rows:
            summary += f"; {name}: {_counted(categories[labels[row]].name for row in rows)}"
    pictures = tuple(
        (name, encode_picture(tile, ".jpg")) for name, tile in panels(view, categories)
    )
    return Figure(view.title, view.pq or 0.0, summary, pictures)


def _counted(names: Iterable[str]) -> str:
    """`2 person, car` for two persons and a car."""
    counts = Counter(names).most_common()
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts)


def panels(view: ImageView, categories: Sequence[Category], longest: int = PANEL) -> list[Tile]:
    """The captioned pictures of one image: Figure 8 of the paper, the truth and the errors.

    Args:
        view: The image.
        categories: By label.
        longest: Longer side of each picture, pixels.

    Returns:
        Photo, truth, result, semantic head and instance head where the view has them, errors.
    """
    size = fitted_size(view.photo.shape[0], view.photo.shape[1], longest, "longest")
    photo, truth = resized(view.photo, size), view.truth.resized(size)
    prediction = view.prediction.resized(size)
    comparison = compare(view.truth, view.prediction)
    numbers = matched_numbers(truth, prediction, comparison)
    tiles = [
        ("photo", photo),
        ("truth", named_overlay(photo, truth, categories)),
        ("result", named_overlay(photo, prediction, categories, numbers)),
    ]
    for name, head in (("semantic head", view.semantic), ("instance head", view.instance)):
        if head is not None:
            tiles.append((name, resized(head, size, smooth=False)))
    return [*tiles, ("errors", error_picture(photo, truth, prediction, comparison))]


def error_picture(
    photo: NDArray[np.uint8], truth: LabelledMap, prediction: LabelledMap, comparison: Comparison
) -> Picture:
    """A pale photo with missed segments in `MISSED`, false ones in `FALSE`, and `BOTH`."""
    missed = np.isin(truth.segment_map, np.add(comparison.missed, 1))  # (H, W) bool
    false = np.isin(prediction.segment_map, np.add(comparison.false, 1))
    return stained(photo, ((missed, MISSED), (false, FALSE), (missed & false, BOTH)))


def comparison_sheet(views: Sequence[ImageView], categories: Sequence[Category]) -> Picture:
    """One picture of several images, a row each: photo, truth, and result with its PQ."""
    rows: list[list[Tile]] = []
    for view in views:
        shown = dict(panels(view, categories, SHEET_PANEL))
        score = "" if view.pq is None else f", PQ {view.pq:.1%}"
        captions = {"photo": view.title, "truth": "truth", "result": f"result{score}"}
        rows.append([(text, shown[name]) for name, text in captions.items()])
    return sheet(rows)


def write_overlay(
    path: Path, photo: NDArray[np.uint8], segments: LabelledMap, categories: Sequence[Category]
) -> None:
    """Writes `named_overlay` as PNG or JPEG, by suffix; `SMALLEST` to `LARGEST` pixels long."""
    size = (photo.shape[0], photo.shape[1])
    longest = min(max(*size, SMALLEST), LARGEST)
    size = size if longest == max(size) else fitted_size(*size, longest, "longest")
    letters = round(LETTERS * longest / SMALLEST)
    picture = named_overlay(
        resized(photo, size), segments.resized(size), categories, letters=letters
    )
    save_picture(path, picture)


def named_overlay(
    photo: NDArray[np.uint8],
    segments: LabelledMap,
    categories: Sequence[Category],
    numbers: Sequence[int] | None = None,
    *,
    letters: int = LETTERS,
) -> Picture:
    """A photo with its segments in colour and their names.

    Args:
        photo: (H, W, 3) uint8.
        segments: Of the same size.
        categories: By label.
        numbers: See `segment_colours`.
        letters: Height of the names, pixels.
    """
    colours = segment_colours(segments.labels, segments.isthing, numbers)
    names = [
        categories[label].name + (" (crowd)" if row in segments.crowd else "")
        for row, label in enumerate(segments.labels)
    ]
    return label_segments(
        overlay(photo, segments.segment_map, colours), segments.segment_map, names, letters
    )


def predicted_map(result: PanopticMap) -> LabelledMap:
    """A prediction as segments to draw."""
    return LabelledMap(
        make_segment_map(result.ids, [segment.id for segment in result.segments]),
        tuple(segment.label for segment in result.segments),
        tuple(segment.isthing for segment in result.segments),
    )


def true_map(
    ids: NDArray[np.int32], segments: Sequence[SegmentInfo], categories: Sequence[Category]
) -> LabelledMap:
    """An annotated image as segments to draw.

    Args:
        ids: (H, W) int32 segment ids.
        segments: As annotated.
        categories: Of the annotation file.
    """
    by_id = {category.id: category for category in categories}
    return LabelledMap(
        make_segment_map(ids, [segment.id for segment in segments]),
        tuple(by_id[segment.category_id].label for segment in segments),
        tuple(by_id[segment.category_id].isthing and not segment.iscrowd for segment in segments),
        frozenset(row for row, segment in enumerate(segments) if segment.iscrowd),
    )
