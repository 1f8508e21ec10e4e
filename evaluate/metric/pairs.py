"""Two COCO panoptic JSONs, ground truth and prediction -> one `ImagePair` an image.

Unlike `pipeline/coco.py`, which leaves bad images out of training, an evaluation repairs nothing:
areas are trusted, the order of segments is kept, and the first fault ends it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from panoptic_cache.pipeline.annotations import (
    AnnotationFile,
    AnnotationRow,
    ImageId,
    SegmentInfo,
    is_area,
    loose_row,
    parse_file,
    parse_row,
)
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category, is_file, list_names, read_categories

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImagePair:
    """Ground truth and prediction of one image, as the two JSONs describe them."""

    image_id: ImageId  # As annotated
    gt_png: Path  # Path of the ground truth's PNG
    gt_segments: tuple[SegmentInfo, ...]  # As listed, with area
    pred_png: Path  # Path of the predicted PNG
    pred_segments: Mapping[int, int]  # Category id by segment id
    # Confidence by segment id, of those that have one.
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
    if gt_file.categories is None:
        raise _shape_error("it has no `categories`", str(gt_json))
    try:
        categories = read_categories(gt_file.categories, gt_json)
    except ValueError as error:
        raise _shape_error(f"categories malformed: {error}", str(gt_json)) from None
    gt_rows = _by_image(gt_file.annotations, gt_json)
    pred_rows = _by_image(pred_file.annotations, pred_json)
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
    gt_pngs = _find_pngs(gt_dir or png_folder(gt_json), gt_rows)
    asked = {image: pred_rows[image] for image in gt_rows}
    pred_pngs = _find_pngs(pred_dir or png_folder(pred_json), asked)
    known = {category.id for category in categories}
    pairs = []
    for image_id, row in gt_rows.items():
        predicted = pred_rows[image_id]
        _check_segments(row, known, f"{gt_json}: image {image_id}")
        _check_segments(predicted, known, f"{pred_json}: image {image_id}")
        pairs.append(
            ImagePair(
                image_id,
                gt_pngs[image_id],
                _true_segments(row, f"{gt_json}: image {image_id}"),
                pred_pngs[image_id],
                {segment.id: segment.category_id for segment in predicted.segments_info},
                _scores(predicted),
            )
        )
    return categories, pairs


def _shape_error(what: str, where: str) -> InputError:
    return InputError(what, where=where, remedy="COCO panoptic format is needed", code="json-shape")


def _read_json(path: Path) -> AnnotationFile[Any]:
    try:
        return parse_file(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"unreadable: {error.strerror}",
            where=path,
            remedy="check the path",
            code="json-missing",
        ) from None
    except (ValueError, RecursionError) as error:
        raise _shape_error(f"is no annotation file: {error}", str(path)) from None


def _by_image(rows: Iterable[Any], path: Path) -> dict[ImageId, AnnotationRow]:
    found: dict[ImageId, AnnotationRow] = {}
    for row in rows:
        try:
            parsed = parse_row(row, AnnotationRow)
        except ValueError as error:
            image = f"image {loose_row(row).get('image_id', 'without id')}"
            raise _shape_error(f"malformed annotation: {error}", f"{path}: {image}") from None
        if parsed.image_id in found:
            raise InputError(
                f"image {parsed.image_id} is annotated twice",
                where=path,
                remedy="keep one",
                code="image-duplicate",
            )
        found[parsed.image_id] = parsed
    return found


def png_folder(path: Path) -> Path:
    """Where the PNGs of an annotation file lie: its path without `.json`."""
    return path.with_name(path.name.removesuffix(".json"))


def _find_pngs(folder: Path, rows: Mapping[ImageId, AnnotationRow]) -> dict[ImageId, Path]:
    """Paths by image id. An unpacking cut short shows here, not after an hour."""
    try:
        present = list_names(folder)
    except OSError as error:
        raise InputError(
            f"no folder of PNGs: {error.strerror}",
            where=folder,
            remedy="unpack it there, or name it with --gt-dir or --pred-dir",
            code="folder-missing",
        ) from None
    paths = {image: folder / row.file_name for image, row in rows.items()}
    missing = [
        image
        for image, row in rows.items()
        if row.file_name not in present and not is_file(paths[image])
    ]
    if missing:
        raise InputError(
            f"PNGs missing for {len(missing)} of {len(rows)} images: image {listing(missing)}",
            where=paths[missing[0]],
            remedy="unpack the folder completely",
            code="png-missing",
        )
    return paths


def _check_segments(row: AnnotationRow, known: Set[int], where: str) -> None:
    seen: set[int] = set()
    for segment in row.segments_info:
        if segment.category_id not in known:
            raise InputError(
                f"unknown category {segment.category_id}",
                where=f"{where}, segment {segment.id}",
                remedy="use the category ids of the ground truth",
                code="category-unknown",
            )
        if segment.id in seen:
            raise InputError(
                "listed twice",
                where=f"{where}, segment {segment.id}",
                remedy="keep one entry for each id",
                code="segment-duplicate",
            )
        seen.add(segment.id)


def _true_segments(row: AnnotationRow, where: str) -> tuple[SegmentInfo, ...]:
    """The ground truth's segments, whose ids and areas must be right, as they are trusted."""
    for segment in row.segments_info:
        if not 0 < segment.id < 1 << 24:
            raise InputError(
                "id is not in 1..2^24-1",
                where=f"{where}, segment {segment.id}",
                remedy="renumber",
                code="segment-id",
            )
        if not is_area(segment.area):
            what = f"area {str(segment.area)[:40]} is no number of pixels"
            raise _shape_error(what, f"{where}, segment {segment.id}")
    return tuple(
        segment if isinstance(segment.area, int) else replace(segment, area=int(segment.area))
        for segment in row.segments_info
    )


def _scores(row: AnnotationRow) -> dict[int, float]:
    """Optional, and for ranking only: what is no finite number is no score."""
    return {
        segment.id: float(segment.score)
        for segment in row.segments_info
        if isinstance(segment.score, int | float) and math.isfinite(segment.score)
    }


def listing(ids: Iterable[ImageId]) -> str:
    """The first ten in ascending order, and how many more: `2, 5, 9`."""
    ordered = sorted(ids, key=lambda id_: (isinstance(id_, str), id_))
    more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return ", ".join(map(str, ordered[:10])) + more
