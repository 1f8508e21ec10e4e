"""Text and layout: names on segments, captions, legends, sheets of captioned pictures.

`sample_sheet` combines them into one picture of a cached sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.photo import decode_photo, fitted_size
from panoptic_cache.pipeline.pictures.colours import (
    LabelledMap,
    Picture,
    centroid_colours,
    heat,
    mark_points,
    overlay,
    resized,
    segment_colours,
    stained,
)
from panoptic_cache.pipeline.targets import (
    CROWD,
    UNLABELLED,
    SegmentMap,
    boundary,
    edge_distance,
    resize_segment_map,
)

Tile = tuple[str, Picture]
"""A caption and the picture below it."""

INK, GREY, LINE, PAPER = (31, 35, 40), (105, 112, 120), (222, 226, 230), (255, 255, 255)
TILE = 480
"""Longer side of a picture on a sample's sheet, pixels."""
_UNLABELLED_COLOUR, _CROWD_COLOUR = (29, 53, 87), (244, 140, 6)
_MARGIN, _GAP, _CAPTION_SIZE, _TITLE_SIZE = 28, 16, 15, 22


def label_segments(
    picture: Picture, segment_map: SegmentMap, names: Sequence[str], size: int = 13
) -> Picture:
    """Writes the name of each segment where the segment is widest, in letters of `size` pixels.

    Large segments come first. A name is left out if it is empty, would overlap another one, or
    cover most of its segment while a larger segment has the same name.
    """
    edges = boundary(segment_map)
    edges[[0, -1]] = edges[:, [0, -1]] = True
    # (H, W): squared pixels to the segment's edge or the image's. Whole numbers, as OpenCV rounds
    # the distance in another way for each number of threads, and the widest place must not change.
    room = np.rint(np.square(edge_distance(edges)))
    area = np.bincount(segment_map.ravel(), minlength=len(names) + 1)[1:]
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image, "RGBA")
    taken: list[tuple[float, float, float, float]] = []
    written: set[str] = set()
    for row in np.argsort(-area, kind="stable").tolist():
        inside = np.where(segment_map == row + 1, room, -1)
        y, x = divmod(int(inside.argmax()), segment_map.shape[1])
        if not names[row] or inside[y, x] < (size * 0.6) ** 2:
            continue
        width, height = text_width(names[row], size) + size * 0.8, size * 1.5
        left = min(max(x - width / 2, 1), segment_map.shape[1] - width - 1)
        top = min(max(y - height / 2, 1), segment_map.shape[0] - height - 1)
        box = (left, top, left + width, top + height)
        hides = names[row] in written and area[row] < width * height
        if left < 0 or hides or any(_overlap(box, other) for other in taken):
            continue
        taken.append(box)
        written.add(names[row])
        pen.rounded_rectangle(box, size * 0.3, fill=(17, 20, 24, 205))
        middle = (left + width / 2, top + height / 2)
        pen.text(middle, names[row], PAPER, font=font(size), anchor="mm")
    return np.array(image)


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


font = cache(ImageFont.load_default)
"""The font that comes with Pillow, in a size."""


def text_width(text: str, size: int) -> float:
    """Width in pixels of a line of text."""
    return font(size).getlength(text)


def shortened(text: str, width: float, size: int) -> str:
    """The text, cut and ended with dots if it is wider than `width` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(f"{text}...", size) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def caption(text: str, width: int, size: int = 15, colour: tuple[int, int, int] = INK) -> Picture:
    """A line of text on white, `width` pixels wide."""
    image = Image.new("RGB", (width, round(size * 1.6)), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((0, size * 0.8), shortened(text, width, size), colour, font=font(size), anchor="lm")
    return np.array(image)


def legend(
    rows: Sequence[tuple[tuple[int, ...] | None, str, str]], size: tuple[int, int]
) -> Picture:
    """A table on white of `size` (height, width), whose last line counts the rows that do not fit.

    A row is a coloured square (None for no square), a name and, at the right, a value.
    """
    height, width = size
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    step, letters = 24, 15
    fit = max(1, height // step)
    shown = list(rows)
    if len(shown) > fit:
        shown = [*shown[: fit - 1], (None, f"and {len(rows) - fit + 1} more", "")]
    for line, (colour, name, value) in enumerate(shown):
        top, middle = line * step, line * step + step / 2
        if colour is not None:
            pen.rounded_rectangle((0, top + 5, 14, top + 19), 3, fill=colour)
        room = width - 24 - text_width(value, letters) - 12
        text = shortened(name, room, letters)
        pen.text((24, middle), text, INK if value else GREY, font=font(letters), anchor="lm")
        pen.text((width, middle), value, GREY, font=font(letters), anchor="rm")
        pen.line((0, top + step - 1, width, top + step - 1), LINE)
    return np.array(image)


def sheet(rows: Sequence[Sequence[Tile]], *, title: str = "", note: str = "") -> Picture:
    """Captioned pictures of any sizes on white, in rows (one or more) with aligned columns.

    The title is a line above everything, the note a smaller line below it.
    """
    columns = max((len(row) for row in rows), default=0)
    widths = [max(r[c][1].shape[1] for r in rows if c < len(r)) for c in range(columns)]
    inner = sum(widths) + _GAP * (columns - 1)
    bands: list[Picture] = []
    if title:
        bands.append(caption(title, inner, _TITLE_SIZE))
    if note:
        bands.append(caption(note, inner, _CAPTION_SIZE, GREY))
    for row in rows:
        if bands:
            bands.append(_blank(_GAP, inner))
        if any(text for text, _ in row):
            captions = [caption(text, widths[c], _CAPTION_SIZE) for c, (text, _) in enumerate(row)]
            bands += [_side_by_side(captions, widths, inner), _blank(4, inner)]
        bands.append(_side_by_side([picture for _, picture in row], widths, inner))
    page = np.concatenate(bands)
    return np.pad(page, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)), constant_values=255)


def _blank(height: int, width: int) -> Picture:
    return np.full((height, width, 3), 255, np.uint8)


def _side_by_side(pictures: Sequence[Picture], widths: Sequence[int], inner: int) -> Picture:
    band = _blank(max(picture.shape[0] for picture in pictures), inner)
    left = 0
    for picture, width in zip(pictures, widths, strict=False):
        band[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += width + _GAP
    return band


def sample_sheet(sample: Sample, categories: Sequence[Category] = (), d: float = 20.0) -> Picture:
    """One picture of a sample: photo, segments, centroids, EDS weight, void, and a legend.

    A category that is not among `categories` is named by its id; `d` is D of the EDS weight, in
    cached pixels. InputError where the photo is damaged.
    """
    height, width = sample.segment_map.shape
    size = fitted_size(height, width, TILE, "longest")
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
    void = resize_segment_map(sample.void, size)
    marks = ((void == UNLABELLED, _UNLABELLED_COLOUR), (void == CROWD, _CROWD_COLOUR))
    share = np.bincount(sample.void.ravel(), minlength=3) / sample.void.size
    crowds = sum(segment.iscrowd for segment in sample.segments)
    eds = f"EDS weight: D = {d:g} px, mean {weight.mean():.2f}"
    voids = f"void: {share[UNLABELLED]:.1%} unlabelled (blue), {share[CROWD]:.1%} crowd (orange)"
    above = [
        ("photo", photo),
        ("segments", segments),
        ("centroids: u is red, v is green", mark_points(centroids, points)),
    ]
    below = [
        (eds, resized(heat(weight), size)),
        (voids, stained(photo, marks)),
        ("share of the picture", _legend(sample, names, colours, size)),
    ]
    note = (
        f"key {sample.key}, {width} x {height} pixels, {len(names)} segments: {len(points)} things,"
        f" {len(names) - len(points) - crowds} stuff, {crowds} crowd"
    )
    return sheet([above, below], title=sample.file_name, note=note)


def _legend(
    sample: Sample, names: Sequence[str], colours: Picture, size: tuple[int, int]
) -> Picture:
    """Categories by area, crowds apart from their category."""
    area: Counter[str] = Counter()
    count: Counter[str] = Counter(names)
    colour: dict[str, tuple[int, ...]] = {}
    for row, (segment, name) in enumerate(zip(sample.segments, names, strict=True), start=1):
        area[name] += segment.area
        colour.setdefault(name, tuple(colours[row].tolist()))
    rows = [
        (
            colour[name],
            name if count[name] == 1 else f"{name}  x {count[name]}",
            f"{total / sample.segment_map.size:.1%}",
        )
        for name, total in area.most_common()
    ]
    return legend(rows, size)


def labelled_map(sample: Sample) -> LabelledMap:
    """The segments of a sample, for drawing."""
    return LabelledMap(
        sample.segment_map,
        tuple(segment.label for segment in sample.segments),
        tuple(segment.isthing and not segment.iscrowd for segment in sample.segments),
        frozenset(row for row, segment in enumerate(sample.segments) if segment.iscrowd),
    )
