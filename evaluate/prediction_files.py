"""Predictions on disk in COCO's layout: one panoptic PNG per image, and one JSON for all.

panoptic/KEY.png    segment ids of one image
panoptic.json       its segments: id, category, area and score
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panoptic_cache.evaluate.decoder.decode import DecodedSegment, PanopticMap
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category, ImageId
from panoptic_cache.pipeline.pictures.colours import encode_picture
from panoptic_cache.pipeline.png import ids_to_rgb, read_ids

PNG_FOLDER, JSON_NAME = "panoptic", "panoptic.json"

Row = dict[str, Any]
"""What `panoptic.json` says about one image."""


def write_png(
    folder: Path,
    image_id: ImageId,
    name: str,
    result: PanopticMap,
    categories: Sequence[Category],
) -> Row:
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
    return {
        "image_id": image_id,
        "file_name": f"{name}.png",
        "segments_info": [
            {
                "id": segment.id,
                "category_id": categories[segment.label].id,
                "area": segment.area,
                "score": round(segment.score, 4),
            }
            for segment in result.segments
        ],
    }


def write_json(folder: Path, rows: Sequence[Row], categories: Sequence[Category]) -> Path:
    """Writes `panoptic.json` and returns its path.

    Raises:
        InputError: It cannot be written.
    """
    content = {
        "annotations": list(rows),
        "categories": [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in categories],
    }
    Storage(str(folder)).write(JSON_NAME, json.dumps(content).encode())
    return folder / JSON_NAME


def read_png(folder: Path, row: Mapping[str, Any], categories: Sequence[Category]) -> PanopticMap:
    """Reads back what `write_png` wrote.

    Raises:
        InputError: The PNG is missing or damaged.
    """
    by_id = {category.id: category for category in categories}
    segments = []
    for info in row["segments_info"]:
        category = by_id[info["category_id"]]
        segments.append(
            DecodedSegment(
                info["id"], category.label, category.isthing, info["score"], info["area"]
            )
        )
    return PanopticMap(read_ids(folder / PNG_FOLDER / row["file_name"]), tuple(segments))
