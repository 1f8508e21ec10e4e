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
    AnnotationRow,
    ImageId,
    SegmentInfo,
    check_segments,
    is_area,
    loose_row,
    parse_row,
    read_rows,
    shape_error,
)
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category, read_categories
from panoptic_cache.pipeline.folders import Folder

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
    gt_bgr: bool = False  # Red and blue of the true PNG are swapped
    pred_bgr: bool = False  # The same of the predicted one


def read_pairs(
    gt_json: Path,
    pred_json: Path,
    gt_dir: Path | None = None,
    pred_dir: Path | None = None,
    *,
    gt_bgr: bool = False,
    pred_bgr: bool = False,
    follow_links: bool = False,
) -> tuple[tuple[Category, ...], list[ImagePair]]:
    """Reads both JSONs and joins them by image id, in the order of the ground truth.

    Returns the categories of the ground truth by ascending id, and one pair an image. Whatever the
    JSONs and folders alone can tell is checked here, before any PNG is opened: InputError names
    the file, the image and the segment. Predictions for images without ground truth are left out,
    with a warning.
    """
    gt_file, pred_file = (read_rows(path)[0] for path in (gt_json, pred_json))
    if gt_file.categories is None:
        raise shape_error("it has no `categories`", gt_json)
    categories = read_categories(gt_file.categories, gt_json)
    gt_rows = _by_image(gt_file.annotations, gt_json)
    pred_rows = _by_image(pred_file.annotations, pred_json)
    if missing := gt_rows.keys() - pred_rows.keys():  # ids may be text in one of the files
        same = {str(image): image for image in missing}
        for image in pred_rows.keys() - gt_rows.keys():
            if str(image) in same:
                pred_rows[same[str(image)]] = pred_rows.pop(image)
    if missing := gt_rows.keys() - pred_rows.keys():
        raise InputError(
            f"no prediction for {len(missing)} of {len(gt_rows)} images: image {listing(missing)}",
            where=pred_json,
            remedy="predict every image of the ground truth; segments_info may be empty",
            code="prediction-missing",
        )
    if extra := pred_rows.keys() - gt_rows.keys():
        logger.warning(
            "predictions of images without ground truth are ignored: image %s", listing(extra)
        )
    gt_pngs = _find_pngs(gt_dir or png_folder(gt_json), gt_rows, follow_links=follow_links)
    asked = {image: pred_rows[image] for image in gt_rows}
    pred_pngs = _find_pngs(pred_dir or png_folder(pred_json), asked, follow_links=follow_links)
    known = {category.id for category in categories}
    pairs = []
    for image_id, row in gt_rows.items():
        predicted = pred_rows[image_id]
        gt_segments = _checked(row, known, gt_json, trusted=True)
        pred_segments = {s.id: s.category_id for s in _checked(predicted, known, pred_json)}
        pngs = gt_pngs[image_id], pred_pngs[image_id]
        pairs.append(
            ImagePair(
                *(image_id, pngs[0], gt_segments, pngs[1], pred_segments, _scores(predicted)),
                gt_bgr=gt_bgr,
                pred_bgr=pred_bgr,
            )
        )
    return categories, pairs


def _by_image(rows: Iterable[Any], path: Path) -> dict[ImageId, AnnotationRow]:
    found: dict[ImageId, AnnotationRow] = {}
    for row in rows:
        try:
            parsed = parse_row(row, AnnotationRow)
        except ValueError as error:
            image = f"image {loose_row(row).get('image_id', 'without id')}"
            raise shape_error(f"malformed annotation: {error}", f"{path}: {image}") from None
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


def _find_pngs(
    folder: Path, rows: Mapping[ImageId, AnnotationRow], *, follow_links: bool
) -> dict[ImageId, Path]:
    """Paths by image id. An unpacking cut short shows here, not after an hour."""
    if not folder.is_dir():
        raise InputError(
            "no folder of PNGs",
            where=folder,
            remedy="unpack it there, or name it with --gt-dir or --pred-dir",
            code="folder-missing",
        )
    pngs, paths = Folder(folder, "panoptic PNG", follow_links=follow_links), {}
    pngs.guess([row.file_name for row in rows.values()])
    missing: dict[ImageId, InputError] = {}
    for image, row in rows.items():
        try:
            paths[image] = pngs.find(row.file_name)
        except InputError as error:
            if error.code != "png-missing":
                raise
            missing[image] = error
    if missing:
        first = next(iter(missing.values()))
        raise InputError(
            f"PNGs missing for {len(missing)} of {len(rows)} images: image {listing(missing)}",
            where=first.where,
            remedy=first.remedy or "unpack the folder completely",
            code="png-missing",
        )
    return paths


def _checked(
    row: AnnotationRow, known: Set[int], path: Path, *, trusted: bool = False
) -> tuple[SegmentInfo, ...]:
    """The segments of an image; where areas are trusted, those that are given must be right."""
    where = f"{path}: image {row.image_id}"
    try:
        segments = check_segments(row.segments_info, known)
    except InputError as error:
        error.where = f"{where}, {error.where}" if error.where else where
        raise
    if not trusted:
        return segments
    for one in segments:
        if one.area is not None and not is_area(one.area):
            what = f"area {str(one.area)[:40]} is no number of pixels"
            raise shape_error(what, f"{where}, segment {one.id}")
    return tuple(
        replace(one, area=int(one.area)) if isinstance(one.area, float) else one for one in segments
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
