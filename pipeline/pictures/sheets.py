"""Lettering and layout: names on segments, captions, legends, and sheets of captioned pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from panoptic_cache.pipeline.pictures.colours import Picture
from panoptic_cache.pipeline.targets import SegmentMap, boundary, edge_distance

Tile = tuple[str, Picture]
"""A caption and the picture below it."""

INK, GREY, LINE, PAPER = (31, 35, 40), (105, 112, 120), (222, 226, 230), (255, 255, 255)
_MARGIN, _GAP, _CAPTION_SIZE, _TITLE_SIZE = 28, 16, 15, 22


def label_segments(
    picture: Picture, segment_map: SegmentMap, names: Sequence[str], size: int = 13
) -> Picture:
    """Writes the name of each segment where the segment is widest.

    Large segments come first. A name is left out where it would cover another one, or most of its
    segment while a larger segment has the same name.

    Args:
        picture: (H, W, 3) uint8.
        segment_map: (H, W) segment map.
        names: Of each segment; empty for none.
        size: Of the letters, pixels.
    """
    edges = boundary(segment_map)
    edges[[0, -1]] = True
    edges[:, [0, -1]] = True
    room = edge_distance(edges)
    area = np.bincount(segment_map.ravel(), minlength=len(names) + 1)[1:]
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image, "RGBA")
    taken: list[tuple[float, float, float, float]] = []
    written: set[str] = set()
    for row in np.argsort(-area, kind="stable").tolist():
        inside = np.where(segment_map == row + 1, room, -1)
        y, x = divmod(int(inside.argmax()), segment_map.shape[1])
        if not names[row] or inside[y, x] < size * 0.6:
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
        pen.text(
            (left + width / 2, top + height / 2), names[row], PAPER, font=font(size), anchor="mm"
        )
    return np.array(image)


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    """Pixels."""
    return font(size).getlength(text)


def shortened(text: str, width: float, size: int) -> str:
    """The text, cut with dots where it is wider than `width` pixels."""
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
    """A table of colours, names and values on white.

    Args:
        rows: Colour of the swatch (None without one), name, value at the right.
        size: (height, width) of the picture; rows that do not fit are counted on the last line.
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
    """Lays captioned pictures of any sizes out on white, in columns that line up.

    Args:
        rows: Tiles of each row, left to right; at least one, and rows may differ in length.
        title: A line above everything.
        note: A smaller line below the title.
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
