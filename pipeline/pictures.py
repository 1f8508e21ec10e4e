"""Maps of segments, centroids and weights as pictures: colours, text, sheets.

A picture is (H, W, 3) uint8 RGB. A colour depends only on category and instance number, so a
category looks the same in every picture of every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.photo import decode_photo, fitted_size
from panoptic_cache.pipeline.targets import (
    CROWD,
    UNLABELLED,
    SegmentMap,
    boundary,
    edge_distance,
    resize_segment_map,
)

Picture = NDArray[np.uint8]

JPEG_QUALITY = 88
_GOLDEN_ANGLE = 137.50776

Tile = tuple[str, Picture]
"""A caption and the picture below it."""

INK, GREY, LINE, PAPER = (31, 35, 40), (105, 112, 120), (222, 226, 230), (255, 255, 255)
TILE = 480
"""Longer side of a picture on a sample's sheet, pixels."""
_UNLABELLED_COLOUR, _CROWD_COLOUR = (29, 53, 87), (244, 140, 6)
_MARGIN, _GAP, _CAPTION_SIZE, _TITLE_SIZE = 28, 16, 15, 22


def instance_numbers(labels: Sequence[int]) -> tuple[int, ...]:
    """The number of each segment among those of its category: 0, 1, ... in the order listed."""
    seen: Counter[int] = Counter()
    numbers: list[int] = []
    for label in labels:
        numbers.append(seen[label])
        seen[label] += 1
    return tuple(numbers)


def segment_colours(
    labels: Sequence[int], isthing: Sequence[bool], numbers: Sequence[int] | None = None
) -> Picture:
    """(n + 1, 3) uint8 colours of n segments, to be indexed with a segment map; row 0 is black.

    The label decides the hue; labels in a row are the golden angle apart in CIE L*a*b*. The number
    (see `instance_numbers`, the default) varies it for things. Stuff is paler, so things stand out.
    """
    label = np.asarray(labels, np.float64)
    thing = np.asarray(isthing, np.bool_)
    number = np.asarray(instance_numbers(labels) if numbers is None else numbers, np.int64)
    number = np.where(thing, number, 0)
    # 0, 1, -1, 2, -2, ...: steps around the category's own colour that repeat late.
    swing = (number + 1) // 2 * np.where(number % 2, 1, -1)
    hue = np.deg2rad(label * _GOLDEN_ANGLE + 20 + (swing * 14 + 28) % 56 - 28)
    chroma = np.where(thing, 68, 26)
    lightness = np.where(thing, 64, 68) + (label // 5 % 3 - 1) * 7 + (swing * 14 + 20) % 40 - 20
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    colours = np.zeros((len(label) + 1, 3), np.uint8)
    if len(label):
        rgb = cv2.cvtColor(lab[None].astype(np.float32), cv2.COLOR_Lab2RGB)[0]
        colours[1:] = np.rint(rgb.clip(0, 1) * 255)
    return colours


def overlay(
    photo: Picture, segment_map: SegmentMap, colours: Picture, alpha: float = 0.6
) -> Picture:
    """A photo with its segments in colour, `alpha` opaque, and their outlines in white.

    `colours` (n + 1, 3) uint8 are indexed by the segment map (H, W).
    """
    blended = photo * (1 - alpha) + colours[segment_map] * alpha
    edges = boundary(segment_map)
    blended[edges] = blended[edges] * 0.25 + 255 * 0.75
    return _rounded(blended)


def centroid_colours(uv: NDArray[np.floating[Any]]) -> Picture:
    """(2, H, W) centroids in [-1, 1] as colours: u is red, v is green; nan becomes black.

    As in Figures 1 and 8 of the paper; blue is constant.
    """
    isvoid = np.isnan(uv).any(0)
    red, green = (np.nan_to_num(uv).clip(-1, 1) + 1) * 127.5
    picture = np.stack([red, green, np.full_like(red, 140)], axis=-1)
    picture[isvoid] = 0
    return _rounded(picture)


def mark_points(picture: Picture, uv: Sequence[tuple[float, float]]) -> Picture:
    """A picture with a white dot on each centroid (u, v), in [-1, 1]."""
    height, width = picture.shape[:2]
    marked = picture.copy()
    for u, v in uv:
        centre = (int((u + 1) / 2 * width), int((v + 1) / 2 * height))
        cv2.circle(marked, centre, 4, (0, 0, 0), cv2.FILLED, cv2.LINE_AA)
        cv2.circle(marked, centre, 2, (255, 255, 255), cv2.FILLED, cv2.LINE_AA)
    return marked


def semantic_colours(labels: NDArray[np.integer[Any]], isthing: Sequence[bool]) -> Picture:
    """(H, W) labels in the colours of the C categories; negative labels become black."""
    table = segment_colours(range(len(isthing)), isthing)
    picture: Picture = table[np.maximum(labels, -1) + 1]
    return picture


def heat(weights: NDArray[np.floating[Any]]) -> Picture:
    """(H, W) weights in [0, 1] on a perceptually uniform scale from black to pale yellow."""
    levels = np.rint(weights.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1])


def stained(
    photo: Picture, marks: Sequence[tuple[NDArray[np.bool_], tuple[int, int, int]]]
) -> Picture:
    """A pale gray photo with some pixels in colour: (H, W) masks and their colours."""
    gray = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY).astype(np.float64)[..., None]
    picture = np.repeat(gray * 0.35 + 255 * 0.65, 3, axis=-1)
    for mask, colour in marks:
        picture[mask] = gray[mask] * 0.25 + np.array(colour) * 0.75
    return _rounded(picture)


def _rounded(picture: NDArray[np.floating[Any]]) -> Picture:
    return np.asarray(np.rint(picture), np.uint8)


def resized(picture: Picture, size: tuple[int, int], *, smooth: bool = True) -> Picture:
    """A picture at (height, width); maps of flat colours want `smooth=False`."""
    if picture.shape[:2] == size:
        return picture
    shrinks = size[0] < picture.shape[0]
    method = (cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC) if smooth else cv2.INTER_NEAREST_EXACT
    return np.asarray(cv2.resize(picture, size[::-1], interpolation=method), np.uint8)


def encode_picture(picture: Picture, suffix: str = ".png") -> bytes:
    """PNG or JPEG bytes of a picture; InputError for another suffix than .png, .jpg or .jpeg."""
    if suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise InputError("pictures are written as PNG or JPEG", suffix, "name it .png or .jpg")
    settings = [] if suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    _, data = cv2.imencode(suffix, picture[..., ::-1], settings)
    return bytes(data)


def save_picture(path: Path, picture: Picture) -> None:
    """Writes a PNG or JPEG, by suffix, whole or not at all; makes the folder."""
    data = encode_picture(picture, path.suffix)
    folder = Storage(str(path.parent))
    folder.create()
    folder.write(path.name, data)


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
        width, height = font(size).getlength(names[row]) + size * 0.8, size * 1.5
        left = min(max(x - width / 2, 1), segment_map.shape[1] - width - 1)
        top = min(max(y - height / 2, 1), segment_map.shape[0] - height - 1)
        box = (left, top, left + width, top + height)
        hides = names[row] in written and area[row] < width * height
        covers = any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
            for other in taken
        )
        if left < 0 or hides or covers:
            continue
        taken.append(box)
        written.add(names[row])
        pen.rounded_rectangle(box, size * 0.3, fill=(17, 20, 24, 205))
        middle = (left + width / 2, top + height / 2)
        pen.text(middle, names[row], PAPER, font=font(size), anchor="mm")
    return np.array(image)


font = cache(ImageFont.load_default)
"""The font that comes with Pillow, in a size."""


def shortened(text: str, width: float, size: int) -> str:
    """The text, cut and ended with dots if it is wider than `width` pixels."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(f"{text}...") > width:
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
        room = width - 24 - font(letters).getlength(value) - 12
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
    placed: list[tuple[int, int, Picture]] = []  # top, left, picture
    height = 0

    def place(pictures: Sequence[Picture], gap: int = 0) -> None:
        nonlocal height
        height, left = height + gap, 0
        for picture, width in zip(pictures, widths, strict=False):
            placed.append((height, left, picture))
            left += width + _GAP
        height += max(len(picture) for picture in pictures)

    for text, size, colour in ((title, _TITLE_SIZE, INK), (note, _CAPTION_SIZE, GREY)):
        if text:
            place([caption(text, inner, size, colour)])
    for row in rows:
        gap = _GAP if placed else 0
        if any(text for text, _ in row):
            place([caption(text, widths[c]) for c, (text, _) in enumerate(row)], gap)
            gap = 4
        place([picture for _, picture in row], gap)
    page = np.full((height + 2 * _MARGIN, inner + 2 * _MARGIN, 3), 255, np.uint8)
    for top, left, picture in placed:
        rows_, columns_ = picture.shape[:2]
        page[_MARGIN + top :, _MARGIN + left :][:rows_, :columns_] = picture
    return page


def sample_sheet(sample: Sample, categories: Sequence[Category] = (), d: float = 20.0) -> Picture:
    """One picture of a sample: photo, segments, centroids, EDS weight, void, and a legend.

    A category that is not among `categories` is named by its id; `d` is D of the EDS weight, in
    cached pixels. InputError where the photo is damaged.
    """
    height, width = sample.segment_map.shape
    size = fitted_size(height, width, TILE, "longest")
    photo = resized(decode_photo(sample.photo, f"{sample.key}.jpg"), size)
    colours = segment_colours(
        [segment.label for segment in sample.segments],
        [segment.isthing and not segment.iscrowd for segment in sample.segments],
    )
    segment_map = resize_segment_map(sample.segment_map, size)
    name_of = {category.id: category.name for category in categories}
    names = [
        name_of.get(segment.category_id, f"category {segment.category_id}")
        + (" (crowd)" if segment.iscrowd else "")
        for segment in sample.segments
    ]
    segments = label_segments(overlay(photo, segment_map, colours), segment_map, names)
    points = [segment.centroid for segment in sample.segments if segment.centroid is not None]
    centroids = resized(centroid_colours(sample.centroid_map()), size, smooth=False)
    weight = sample.eds_weight(d)
    void = resize_segment_map(sample.void, size)
    marks = ((void == UNLABELLED, _UNLABELLED_COLOUR), (void == CROWD, _CROWD_COLOUR))
    share = np.bincount(sample.void.ravel(), minlength=3) / sample.void.size
    crowds = sum(segment.iscrowd for segment in sample.segments)
    area: Counter[str] = Counter()
    for name, segment in zip(names, sample.segments, strict=True):
        area[name] += segment.area
    by_area = [
        (
            tuple(colours[names.index(name) + 1].tolist()),
            name if names.count(name) == 1 else f"{name}  x {names.count(name)}",
            f"{total / sample.segment_map.size:.1%}",
        )
        for name, total in area.most_common()
    ]
    eds = f"EDS weight: D = {d:g} px, mean {weight.mean():.2f}"
    voids = f"void: {share[UNLABELLED]:.1%} unlabelled (blue), {share[CROWD]:.1%} crowd (orange)"
    centroid_caption, centroids = "centroids: u is red, v is green", mark_points(centroids, points)
    above = [("photo", photo), ("segments", segments), (centroid_caption, centroids)]
    below = [(eds, resized(heat(weight), size)), (voids, stained(photo, marks))]
    below.append(("share of the picture", legend(by_area, size)))
    note = (
        f"key {sample.key}, {width} x {height} pixels, {len(names)} segments: {len(points)} things,"
        f" {len(names) - len(points) - crowds} stuff, {crowds} crowd"
    )
    return sheet([above, below], title=sample.file_name, note=note)
