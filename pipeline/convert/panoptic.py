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
    parse_row,
)
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.convert.source import (
    Canvas,
    Drawing,
    Item,
    Row,
    Size,
    Source,
    read_items,
    read_lists,
)
from panoptic_cache.pipeline.folders import Folder
from panoptic_cache.pipeline.png import check_known, read_ids

Names = Callable[[ImageRow], tuple[str, str]]
"""From an image's row to its photo, as it is called, and its name in the new dataset."""


def cityscapes(root: Path, split: str, *, follow_links: bool) -> Source:
    """`gtFine/cityscapes_panoptic_SPLIT[_trainId]` of createPanopticImgs, and `leftImg8bit`."""
    places = [root / "gtFine", root]
    files = [f"cityscapes_panoptic_{split}.json", f"cityscapes_panoptic_{split}_trainId.json"]
    json = _first([place / file for file in files for place in places], "run createPanopticImgs")

    def names(row: ImageRow) -> tuple[str, str]:
        photo = row.file_name.replace("_gtFine_leftImg8bit", "_leftImg8bit")
        return photo, f"{row.id}{Path(photo).suffix}"

    photos = root / "leftImg8bit" / split
    return _read(json, json.with_suffix(""), photos, "cityscapes", names, follow_links=follow_links)


def ade20k(root: Path, split: str, *, follow_links: bool) -> Source:
    """`ade20k_panoptic_SPLIT` of Mask2Former's prepare_ade20k_pan_seg, and `images`."""
    folders = {"train": "training", "val": "validation"}
    if split not in folders:
        raise InputError(f"no split {split}", where="--split", remedy="train or val")
    json = _first([root / f"ade20k_panoptic_{split}.json"], "run prepare_ade20k_pan_seg.py")
    photos = root / "images" / folders[split]
    return _read(json, json.with_suffix(""), photos, "ade20k", follow_links=follow_links)


def coco_panoptic(
    panoptic_json: Path, panoptic_dir: Path, images: Path, *, follow_links: bool
) -> Source:
    """COCO's own files."""
    return _read(panoptic_json, panoptic_dir, images, "coco-panoptic", follow_links=follow_links)


def _first(files: list[Path], script: str) -> Path:
    for file in files:
        if file.is_file():
            return file
    raise InputError("no annotation file", where=files[0], remedy=f"{script} first")


def _read(
    json: Path,
    pngs: Path,
    images: Path,
    kind: str,
    names: Names = lambda row: (row.file_name, row.file_name),
    *,
    follow_links: bool,
) -> Source:
    """The images of an annotation file, found below a folder; InputError where it is none."""
    content, parsed = read_lists(json, CategoryRow, "panoptic annotation")
    known = {row.id for row in parsed}
    annotations: dict[str, list[Any]] = {}
    for each in content.annotations:
        annotations.setdefault(str(loose_row(each).get("image_id")), []).append(each)
    photos = Folder(images, "photo", follow_links=follow_links)
    folder = Folder(pngs, "panoptic PNG", follow_links=follow_links)

    def item(image: ImageRow) -> Item:
        rows = annotations.get(str(image.id), [])
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} rows in annotations")
        row = parse_row(rows[0], AnnotationRow)
        for segment in row.segments_info:
            if segment.category_id not in known:
                raise ValueError(f"segment {segment.id}: category {segment.category_id}")
        called, name = names(image)
        photo, png = images / photos.find_like(called), folder.find(row.file_name)
        mark = hashlib.sha256(repr((image, row)).encode()).hexdigest()
        said = (image.height, image.width) if image.height and image.width else None
        return Item(image.id, name, photo, partial(_draw, png, row, said), (png,), mark)

    items, left_out = read_items(content.images, ImageRow, item, "annotation")
    fields = ("id", "name", "isthing", "supercategory", "color")
    categories = [
        {field: row[field] for field in fields if field in row}
        for row in map(loose_row, content.categories)
    ]
    return Source(categories, items, left_out, {"format": kind})


def _draw(png: Path, row: AnnotationRow, said: Size | None, canvas: Canvas) -> Drawing:
    if said is not None:
        canvas.check(said, row.file_name)
    ids = read_ids(png)
    canvas.check(ids.shape, png)
    order = np.array(sorted({0, *(segment.id for segment in row.segments_info)}))
    values, counts = np.unique(ids, return_counts=True)
    areas = dict(zip(values.tolist(), counts.tolist(), strict=True))
    check_known(areas, {*order.tolist()}, png, swapped="write it again, from RGB")
    place = np.minimum(np.searchsorted(order, ids), len(order) - 1)
    rows = {segment.id: segment for segment in row.segments_info}
    listed = [rows[one] for one in order.tolist() if one]
    known = order[place] == ids
    return Drawing(
        np.where(known, place, 0).astype(np.uint32),
        [Row(segment.category_id, bool(segment.iscrowd)) for segment in listed],
        mended=("png-id-unknown",) if not known.all() else (),
    )
