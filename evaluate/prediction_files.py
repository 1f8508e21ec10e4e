"""Predictions on disk in COCO's layout: one panoptic PNG per image, and one JSON for all.

panoptic/KEY.png    segment ids of one image
panoptic.json       its segments: id, category, area and score
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct, to_builtins

from panoptic_cache.evaluate.decoder.decode import DecodedSegment, PanopticMap
from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures.colours import encode_picture
from panoptic_cache.pipeline.png import ids_to_rgb, read_ids

PNG_FOLDER, JSON_NAME = "panoptic", "panoptic.json"


class SegmentRow(Struct, frozen=True):
    """A predicted segment; `area` in pixels, `score` in [0, 1]."""

    id: int
    category_id: int
    area: int
    score: float


class PredictionRow(Struct, frozen=True):
    """A predicted image, as COCO's `annotations` list it; `file_name` is the PNG's."""

    image_id: ImageId
    file_name: str
    segments_info: list[SegmentRow]


def write_png(
    folder: Path, image_id: ImageId, name: str, result: PanopticMap, categories: Sequence[Category]
) -> PredictionRow:
    """Writes the PNG of one image; its folder must exist.

    Args:
        folder: The folder of all predictions.
        image_id: Id of the image in the dataset.
        name: File name of the PNG, without suffix.
        result: The prediction.
        categories: By label.

    Returns:
        The image's row of `panoptic.json`.

    Raises:
        InputError: The PNG cannot be written.
    """
    png = encode_picture(ids_to_rgb(result.ids))
    Storage(str(folder / PNG_FOLDER)).write(f"{name}.png", png)
    segments = [
        SegmentRow(one.id, categories[one.label].id, one.area, round(one.score, 4))
        for one in result.segments
    ]
    return PredictionRow(image_id, f"{name}.png", segments)


def write_json(folder: Path, rows: Sequence[PredictionRow], categories: Sequence[Category]) -> None:
    """Writes `panoptic.json`; InputError where that is not possible."""
    content = {
        "annotations": to_builtins(rows),
        "categories": [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in categories],
    }
    Storage(str(folder)).write(JSON_NAME, json.dumps(content).encode())


def read_png(folder: Path, row: PredictionRow, categories: Sequence[Category]) -> PanopticMap:
    """Reads back what `write_png` wrote.

    Raises:
        InputError: The PNG is missing or damaged.
    """
    by_id = {category.id: category for category in categories}
    segments = []
    for info in row.segments_info:
        category = by_id[info.category_id]
        segments.append(
            DecodedSegment(info.id, category.label, category.isthing, info.score, info.area)
        )
    return PanopticMap(read_ids(folder / PNG_FOLDER / row.file_name), tuple(segments))
