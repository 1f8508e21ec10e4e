"""The pictures of an evaluation: overlays, the comparison sheet, the best and the worst images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.metric.matching import Matching, Overlap, match_segments
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.photo import fitted_size
from panoptic_cache.pipeline.pictures import (
    Picture,
    Tile,
    encode_picture,
    instance_numbers,
    label_segments,
    overlay,
    resized,
    save_picture,
    segment_colours,
    sheet,
    stained,
)
from panoptic_cache.pipeline.targets import SegmentMap, make_segment_map, resize_segment_map

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
class LabelledMap:
    """What a picture needs of the segments of one image, true or predicted."""

    segment_map: SegmentMap  # (H, W) segment map, 0 = unlabelled or void, i = segment i - 1 below
    labels: tuple[int, ...]  # Contiguous category of each segment
    isthing: tuple[bool, ...]  # Whether its category has instances; false for a crowd
    crowd: frozenset[int] = frozenset()  # Positions of the crowds among the segments

    def resized(self, size: tuple[int, int]) -> LabelledMap:
        """The same segments at (height, width), nearest neighbour."""
        return replace(self, segment_map=resize_segment_map(self.segment_map, size))


@dataclass(frozen=True, slots=True)
class ImageView:
    """One image and its prediction; maps have the photo's size, heads any size."""

    title: str  # Such as the file name
    photo: NDArray[np.uint8]  # (H, W, 3) uint8 RGB
    truth: LabelledMap  # See `true_map`
    prediction: LabelledMap  # See `predicted_map`
    instance: Picture | None = None  # Instance head; see `centroid_colours`
    semantic: Picture | None = None  # Semantic head; see `semantic_colours`
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
    segments: Sequence[int],
    view_of: Callable[[int, bool], ImageView],
    *,
    categories: Sequence[Category],
    overlays: int,
) -> tuple[list[Figure], list[Figure]]:
    """Writes overlays of the first images, and `comparison.png`.

    `names` are file names without suffix, `scores` the PQ and `segments` the number of true
    segments of each image; `view_of` makes the view of one, with or without its heads. Returns
    figures of the best images, best first, and of the worst that are not among them.
    """
    Storage(str(out / "overlays")).create()
    best, worst = extremes(scores, segments, SHOWN)
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


def extremes(
    scores: Sequence[float | None], segments: Sequence[int], limit: int
) -> tuple[list[int], list[int]]:
    """Positions of the `limit` best and of the `limit` worst, which do not repeat any of the best.

    Of equals, the one with more true segments comes first, then the first. Images with a single
    segment, such as an empty tile, teach little and come last in both.
    """
    defined = [
        (segments[at] < 2, score, -segments[at], at)
        for at, score in enumerate(scores)
        if score is not None
    ]
    best = [at for _, _, _, at in sorted(defined, key=lambda r: (r[0], -r[1], *r[2:]))[:limit]]
    worst = [at for _, _, _, at in sorted(defined)[:limit]]
    return best, [at for at in worst if at not in best]


def compare(truth: LabelledMap, prediction: LabelledMap) -> Matching:
    """Matches the segments of one image, by their values in the maps, with counted areas."""
    true = [
        SegmentInfo(row, label, row - 1 in truth.crowd)
        for row, label in enumerate(truth.labels, start=1)
    ]
    overlap = Overlap.of(truth.segment_map, prediction.segment_map)
    return match_segments("", overlap, true, dict(enumerate(prediction.labels, start=1)))


def matched_numbers(
    truth: LabelledMap, prediction: LabelledMap, found: Matching
) -> tuple[int, ...]:
    """Instance numbers of predicted segments that give a match its true segment's colour."""
    known, next_free = instance_numbers(truth.labels), Counter(truth.labels)
    matches = {predicted: true for true, predicted in found.ious}
    numbers: list[int] = []
    for value, label in enumerate(prediction.labels, start=1):
        if value in matches:
            numbers.append(known[matches[value] - 1])
        else:
            numbers.append(next_free[label])
            next_free[label] += 1
    return tuple(numbers)


def make_figure(view: ImageView, categories: Sequence[Category]) -> Figure:
    """Draws the pictures of an image that has a PQ."""
    found = compare(view.truth, view.prediction)
    total = len(found.ious) + len(found.missed)
    summary = f"{len(found.ious)} of {total} segments found"
    for kind, values, labels in (
        ("missed", found.missed, view.truth.labels),
        ("false", found.false, view.prediction.labels),
    ):
        counts = Counter(categories[labels[value - 1]].name for value in values).most_common()
        if counts:  # `2 person, car` for two persons and a car
            named = (name if count == 1 else f"{count} {name}" for name, count in counts)
            summary += f"; {kind}: {', '.join(named)}"
    tiles = panels(view, categories)
    pictures = tuple((name, encode_picture(tile, ".jpg")) for name, tile in tiles)
    return Figure(view.title, view.pq or 0.0, summary, pictures)


def panels(view: ImageView, categories: Sequence[Category], longest: int = PANEL) -> list[Tile]:
    """The captioned pictures of one image: Figure 8 of the paper, the truth and the errors."""
    size = fitted_size(view.photo.shape[0], view.photo.shape[1], longest, "longest")
    photo, truth = resized(view.photo, size), view.truth.resized(size)
    prediction = view.prediction.resized(size)
    found = compare(view.truth, view.prediction)
    numbers = matched_numbers(truth, prediction, found)
    tiles = [
        ("photo", photo),
        ("truth", named_overlay(photo, truth, categories)),
        ("result", named_overlay(photo, prediction, categories, numbers)),
    ]
    for name, head in (("semantic head", view.semantic), ("instance head", view.instance)):
        if head is not None:
            tiles.append((name, resized(head, size, smooth=False)))
    return [*tiles, ("errors", error_picture(photo, truth, prediction, found))]


def error_picture(
    photo: NDArray[np.uint8], truth: LabelledMap, prediction: LabelledMap, found: Matching
) -> Picture:
    """A pale photo with missed segments in `MISSED`, false ones in `FALSE`, and `BOTH`."""
    missed = np.isin(truth.segment_map, found.missed)  # (H, W) bool
    false = np.isin(prediction.segment_map, found.false)
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
    """A photo with its segments in colour and their names, of so many pixels' height."""
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
    """An annotated image as segments to draw; `ids` is (H, W)."""
    by_id = {category.id: category for category in categories}
    return LabelledMap(
        make_segment_map(ids, [segment.id for segment in segments]),
        tuple(by_id[segment.category_id].label for segment in segments),
        tuple(by_id[segment.category_id].isthing and not segment.iscrowd for segment in segments),
        frozenset(row for row, segment in enumerate(segments) if segment.iscrowd),
    )
