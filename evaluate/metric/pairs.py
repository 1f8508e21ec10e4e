"""Two COCO panoptic JSONs, ground truth and prediction -> one `ImagePair` an image.

Unlike `pipeline/coco.py`, which prepares training and leaves bad images out, an evaluation repairs
nothing: areas are trusted, the order of segments is kept, and the first fault ends it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import (
    Category,
    ImageId,
    SegmentInfo,
    flag,
    is_area,
    is_file,
    read_categories,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImagePair:
    """Ground truth and prediction of one image, as the two JSONs describe them.

    Attributes:
        image_id: As annotated.
        gt_png: Path of the ground truth's PNG.
        gt_segments: As listed, with area.
        pred_png: Path of the predicted PNG.
        pred_segments: Category id by segment id.
        pred_scores: Confidence by segment id, of those that have one.
    """

    image_id: ImageId
    gt_png: Path
    gt_segments: tuple[SegmentInfo, ...]
    pred_png: Path
    pred_segments: Mapping[int, int]
    pred_scores: Mapping[int, float] = field(default_factory=dict)


def read_pairs(
    gt_json: Path, pred_json: Path, gt_dir: Path | None = None, pred_dir: Path | None = None
) -> tuple[tuple[Category, ...], list[ImagePair]]:
    """Reads both JSONs and joins them by image id, in the order of the ground truth.

    Whatever the JSONs and folders alone can tell is checked here, before any PNG is opened.
    Predictions for images without ground truth are left out, with a warning.

    Returns:
        The categories of the ground truth by ascending id, and one pair an image.

    Raises:
        InputError: A file or folder is missing, a JSON is malformed, an image has no prediction
            or two, a category is unknown, a segment is listed twice.
    """
    gt_file, pred_file = _read_json(gt_json), _read_json(pred_json)
    try:
        categories = read_categories(_get(gt_file, "categories", list, str(gt_json)), gt_json)
    except (KeyError, TypeError, ValueError) as error:
        what = f"categories malformed: {type(error).__name__} {error}"
        raise _shape_error(what, str(gt_json)) from None
    gt_rows, pred_rows = _by_image(gt_file, gt_json), _by_image(pred_file, pred_json)
    if missing := gt_rows.keys() - pred_rows.keys():
        remedy = "predict every image of the ground truth; segments_info may be empty"
        if {str(image) for image in missing} & {str(image) for image in pred_rows}:
            remedy = "image ids are numbers in one of the files, strings in the other"
        raise InputError(
            f"no prediction for {len(missing)} of {len(gt_rows)} images: image {listing(missing)}",
            where=pred_json,
            remedy=remedy,
            code="prediction-missing",
        )
    if extra := pred_rows.keys() - gt_rows.keys():
        logger.warning(
            "predictions of images without ground truth are ignored: image %s", listing(extra)
        )
    gt_pngs = _find_pngs(gt_dir or png_folder(gt_json), gt_json, gt_rows)
    asked = {image: pred_rows[image] for image in gt_rows}
    pred_pngs = _find_pngs(pred_dir or png_folder(pred_json), pred_json, asked)
    known = {category.id for category in categories}
    pairs = []
    for image_id, row in gt_rows.items():
        gt_segments = _segments(row, known, f"{gt_json}: image {image_id}", trusted=True)
        where = f"{pred_json}: image {image_id}"
        pred_segments: dict[int, int] = {}
        for segment in _segments(pred_rows[image_id], known, where, trusted=False):
            pred_segments[segment.id] = segment.category_id
        pairs.append(
            ImagePair(
                image_id,
                gt_pngs[image_id],
                gt_segments,
                pred_pngs[image_id],
                pred_segments,
                _scores(pred_rows[image_id]),
            )
        )
    return categories, pairs


def _shape_error(what: str, where: str) -> InputError:
    return InputError(what, where=where, remedy="COCO panoptic format is needed", code="json-shape")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"unreadable: {error.strerror}",
            where=path,
            remedy="check the path",
            code="json-missing",
        ) from None
    except (ValueError, RecursionError) as error:
        raise _shape_error(f"is no JSON: {error}", str(path)) from None


def _get(row: Any, key: str, kind: type | UnionType, where: str) -> Any:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise _shape_error(f"`{key}` is missing or is no {name}", where)
    return value


def _by_image(content: Any, path: Path) -> dict[ImageId, Any]:
    rows: dict[ImageId, Any] = {}
    for row in _get(content, "annotations", list, str(path)):
        image_id = _get(row, "image_id", int | str, f"{path}: annotations")
        if image_id in rows:
            raise InputError(
                f"image {image_id} is annotated twice",
                where=path,
                remedy="keep one",
                code="image-duplicate",
            )
        rows[image_id] = row
    return rows


def png_folder(path: Path) -> Path:
    """Where the PNGs of an annotation file lie: its path without `.json`."""
    return path.with_name(path.name.removesuffix(".json"))


def _find_pngs(folder: Path, annotations: Path, rows: Mapping[ImageId, Any]) -> dict[ImageId, Path]:
    """Paths by image id. An unpacking cut short shows here, not after an hour."""
    try:
        # One listing: a stat for every image takes minutes on a network disk.
        with os.scandir(folder) as entries:
            present = {entry.name for entry in entries}
    except OSError as error:
        raise InputError(
            f"no folder of PNGs: {error.strerror}",
            where=folder,
            remedy="unpack it there, or name it with --gt-dir or --pred-dir",
            code="folder-missing",
        ) from None
    names = {
        image: _get(row, "file_name", str, f"{annotations}: image {image}")
        for image, row in rows.items()
    }
    missing = [
        image for image, name in names.items() if name not in present and not is_file(folder / name)
    ]
    if missing:
        raise InputError(
            f"PNGs missing for {len(missing)} of {len(names)} images: image {listing(missing)}",
            where=folder / names[missing[0]],
            remedy="unpack the folder completely",
            code="png-missing",
        )
    return {image: folder / name for image, name in names.items()}


def _segments(row: Any, known: Set[int], where: str, *, trusted: bool) -> tuple[SegmentInfo, ...]:
    """`segments_info` of one image; areas are read where they are trusted, in the ground truth."""
    segments: dict[int, SegmentInfo] = {}
    for info in _get(row, "segments_info", list, where):
        id_ = _get(info, "id", int, where)
        place = f"{where}, segment {id_}"
        category_id = _get(info, "category_id", int, place)
        if category_id not in known:
            raise InputError(
                f"unknown category {category_id}",
                where=place,
                remedy="use the category ids of the ground truth",
                code="category-unknown",
            )
        if id_ in segments:
            remedy = "keep one entry for each id"
            raise InputError("listed twice", where=place, remedy=remedy, code="segment-duplicate")
        if trusted and not 0 < id_ < 1 << 24:
            raise InputError(
                "id is not in 1..2^24-1", where=place, remedy="renumber", code="segment-id"
            )
        area = _area(info, place) if trusted else None
        try:
            iscrowd = trusted and flag(info.get("iscrowd", 0), "iscrowd")
        except ValueError as error:
            raise _shape_error(str(error), place) from None
        segments[id_] = SegmentInfo(id_, category_id, iscrowd, area)
    return tuple(segments.values())


def _scores(row: Any) -> dict[int, float]:
    """Optional, and for ranking only: what is no finite number is no score."""
    return {
        info["id"]: float(score)
        for info in row["segments_info"]
        if isinstance(score := info.get("score"), int | float) and math.isfinite(score)
    }


def _area(info: Any, where: str) -> int:
    area = _get(info, "area", int | float, where)
    if not is_area(area):
        raise _shape_error(f"area {str(area)[:40]} is no number of pixels", where)
    return int(area)


def listing(ids: Iterable[ImageId]) -> str:
    """The first ten in ascending order, and how many more: `2, 5, 9`."""
    ordered = sorted(ids, key=lambda id_: (isinstance(id_, str), id_))
    more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return ", ".join(map(str, ordered[:10])) + more
