"""Panoptic PNGs and their JSON, as the official scripts of Cityscapes and ADE20K write them.

They differ from COCO's layout in where the photos lie and what they are called. COCO's own layout
is read, too, for its categories to be merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from panoptic_cache.pipeline.annotations import (
    AnnotationRow,
    CategoryRow,
    ImageRow,
    loose_row,
    parse_file,
    parse_row,
)
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Rejection
from panoptic_cache.pipeline.convert.files import Paths, walk
from panoptic_cache.pipeline.convert.source import Drawing, Item, Row, Size, Source, check_size
from panoptic_cache.pipeline.folders import Folder
from panoptic_cache.pipeline.photo import SUFFIXES
from panoptic_cache.pipeline.png import check_known, read_ids

Names = Callable[[ImageRow], tuple[str, str]]
"""From an image's row to its photo, as it is called, and its name in the new dataset."""


def cityscapes(root: Path, split: str) -> Source:
    """`gtFine/cityscapes_panoptic_SPLIT[_trainId]` of createPanopticImgs, and `leftImg8bit`."""
    places = [root / "gtFine", root]
    files = [f"cityscapes_panoptic_{split}.json", f"cityscapes_panoptic_{split}_trainId.json"]
    json = _first([place / file for file in files for place in places], "run createPanopticImgs")

    def names(row: ImageRow) -> tuple[str, str]:
        photo = row.file_name.replace("_gtFine_leftImg8bit", "_leftImg8bit")
        return photo, f"{row.id}{Path(photo).suffix}"

    return panoptic(json, json.with_suffix(""), root / "leftImg8bit" / split, names, "cityscapes")


def ade20k(root: Path, split: str) -> Source:
    """`ade20k_panoptic_SPLIT` of Mask2Former's prepare_ade20k_pan_seg, and `images`."""
    folders = {"train": "training", "val": "validation"}
    if split not in folders:
        raise InputError(f"no split {split}", where="--split", remedy="train or val")
    json = _first([root / f"ade20k_panoptic_{split}.json"], "run prepare_ade20k_pan_seg.py")
    photos = root / "images" / folders[split]
    return panoptic(json, json.with_suffix(""), photos, _as_they_are, "ade20k")


def coco_panoptic(json: Path, pngs: Path, images: Path) -> Source:
    """COCO's own files."""
    return panoptic(json, pngs, images, _as_they_are, "coco-panoptic")


def _as_they_are(row: ImageRow) -> tuple[str, str]:
    return row.file_name, row.file_name


def _first(files: list[Path], script: str) -> Path:
    for file in files:
        if file.is_file():
            return file
    raise InputError("no annotation file", where=files[0], remedy=f"{script} first")


def panoptic(json: Path, pngs: Path, images: Path, names: Names, kind: str) -> Source:
    """The images of an annotation file, found below a folder; InputError where it is none."""
    try:
        content = parse_file(json.read_bytes())
        if content.images is None or content.categories is None:
            raise ValueError("no images or no categories")
        known = {parse_row(row, CategoryRow).id for row in content.categories}
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=json) from None
    except ValueError as error:
        raise InputError(f"not a COCO panoptic annotation file: {error}", where=json) from None
    annotations: dict[str, list[Any]] = {}
    for each in content.annotations:
        annotations.setdefault(str(loose_row(each).get("image_id")), []).append(each)
    items, left_out, found = [], [], Paths(images, walk(images, SUFFIXES))
    folder = Folder(pngs, "panoptic PNG", follow_links=True)
    for each in content.images:
        said = loose_row(each)
        try:
            image = parse_row(each, ImageRow)
            rows = annotations.get(str(image.id), [])
            if len(rows) != 1:
                raise ValueError(f"{len(rows)} rows in annotations")
            row = parse_row(rows[0], AnnotationRow)
            strange = [one for one in row.segments_info if one.category_id not in known]
            if strange:
                raise ValueError(f"segment {strange[0].id}: category {strange[0].category_id}")
            called, name = names(image)
            photo, png = images / found.find(called), folder.find(row.file_name)
        except InputError as error:
            left_out.append(Rejection.of(said.get("id", ""), said["file_name"], error))
            continue
        except ValueError as error:
            called = str(said.get("file_name", ""))
            message = f"malformed annotation: {error}"
            left_out.append(Rejection(str(said.get("id")), called, "annotation-malformed", message))
            continue
        mark = hashlib.sha256(repr((image, row)).encode()).hexdigest()
        said_size = image.height and image.width and (image.height, image.width)
        draw = partial(_draw, photo, png, row, said_size or None)
        items.append(Item(image.id, name, photo, draw, (png,), mark))
    fields = ("id", "name", "isthing", "supercategory", "color")
    categories = [
        {field: row[field] for field in fields if field in row}
        for row in map(loose_row, content.categories)
    ]
    return Source(categories, items, left_out, {"format": kind})


def _draw(photo: Path, png: Path, row: AnnotationRow, said: Size | None, size: Size) -> Drawing:
    if said is not None:
        check_size(said, photo, size, row.file_name)
    ids = read_ids(png)
    check_size((ids.shape[0], ids.shape[1]), photo, size, png)
    order = np.array(sorted({0, *(segment.id for segment in row.segments_info)}))
    values, counts = np.unique(ids, return_counts=True)
    check_known(dict(zip(values.tolist(), counts.tolist(), strict=True)), {*order.tolist()}, png)
    place = np.minimum(np.searchsorted(order, ids), len(order) - 1)
    rows = {segment.id: segment for segment in row.segments_info}
    listed = [rows[one] for one in order.tolist() if one]
    known = order[place] == ids
    return Drawing(
        np.where(known, place, 0).astype(np.uint32),
        [Row(segment.category_id, bool(segment.iscrowd)) for segment in listed],
        mended=("png-id-unknown",) if not known.all() else (),
    )
