"""One image of a source -> its panoptic PNG, its photo and its rows of the annotation file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from panoptic_cache.pipeline.annotations import MOST_SEGMENTS
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_write, write_file
from panoptic_cache.pipeline.coco import CocoLayout, Rejection
from panoptic_cache.pipeline.convert.source import Canvas, Drawing, Item, Row, photo_size
from panoptic_cache.pipeline.folders import is_file
from panoptic_cache.pipeline.png import ids_to_rgb

_SPREAD = 0x9E3779
"""Odd, so its multiples modulo 2^24 are distinct: neighbours in the table get unlike colours."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of an image: a row of the journal."""

    name: str  # Of the image's photo
    mark: str  # Of its inputs
    image: dict[str, Any] | None = None  # Rows of the annotation file, or None and the reason
    annotation: dict[str, Any] | None = None
    left_out: Rejection | None = None
    unlabelled: int = 0  # Pixels
    overlaps: int = 0  # Pixels
    mended: tuple[str, ...] = ()

    def stands(self, mark: str, layout: CocoLayout, png: str) -> bool:
        """Whether its inputs have not changed, and its files are there."""
        files = (layout.images / self.name, layout.panoptic_dir / png)
        return self.mark == mark and (self.left_out is not None or all(map(is_file, files)))


def convert_image(
    one: tuple[Item, str, str],
    layout: CocoLayout,
    *,
    copy: bool,
    upright: bool,
    isthing: Mapping[int, bool],
) -> Outcome:
    """Draws an image, writes its PNG and its photo; what is wrong with it becomes its reason.

    `one` has the image, the name of its PNG, and the mark of its inputs; `isthing` is by the id of
    the category. The others are those of `convert`.
    """
    item, png, mark = one
    try:
        size = photo_size(item.photo, upright=upright)
        drawing = item.draw(Canvas(item.photo, size))
        ids, segments, empty = _number_segments(drawing, isthing)
    except InputError as error:
        return Outcome(item.name, mark, left_out=Rejection.of(item.image_id, item.name, error))
    except MemoryError:
        raise InputError(
            "out of memory", where=item.name, remedy="use fewer --workers", code="out-of-memory"
        ) from None
    place = layout.panoptic_dir / png
    Storage(str(place.parent)).create()
    bgr = np.ascontiguousarray(ids_to_rgb(ids)[..., ::-1])
    write_file(place, cv2.imencode(".png", bgr)[1].tobytes(), durable=False)
    _bring(item.photo, layout.images / item.name, copy=copy)
    height, width = size
    return Outcome(
        item.name,
        mark,
        {"id": item.image_id, "file_name": item.name, "height": height, "width": width},
        {"image_id": item.image_id, "file_name": png, "segments_info": segments},
        unlabelled=int(ids.size - np.count_nonzero(ids)),
        overlaps=drawing.overlaps,
        mended=(*drawing.mended, *["segment-empty"] * empty),
    )


def _number_segments(
    drawing: Drawing, isthing: Mapping[int, bool]
) -> tuple[NDArray[np.int32], list[dict[str, Any]], int]:
    """Ids of a drawing's segments: (H, W) int32, their rows, and how many rows had no pixel.

    What has one category of stuff becomes one segment, and what has an unknown one void. Raises
    InputError where there are more segments than a sample can hold.
    """
    areas = np.bincount(drawing.segment_map.ravel(), minlength=len(drawing.rows) + 1)
    empty = 0
    numbers: dict[object, int] = {}  # of the segments kept, from 1
    kept: list[Row] = []
    table = np.zeros(len(drawing.rows) + 1, np.int32)
    for place, row in enumerate(drawing.rows, 1):
        thing = isthing.get(row.category_id)
        empty += bool(thing) and not areas[place]
        if areas[place] and thing is not None:
            one = place if thing else ("stuff", row.category_id)
            if one not in numbers:
                numbers[one] = len(kept) + 1
                kept.append(row)
            table[place] = numbers[one]
    if len(kept) > MOST_SEGMENTS:
        raise InputError(
            f"{len(kept)} segments, {MOST_SEGMENTS} are the most", code="segments-too-many"
        )
    segment_map: NDArray[np.int32] = table[drawing.segment_map]  # (H, W)
    areas = np.bincount(segment_map.ravel(), minlength=len(kept) + 1)
    segments = [
        {
            "id": number * _SPREAD & 0xFFFFFF,
            "category_id": row.category_id,
            "iscrowd": int(row.iscrowd and isthing[row.category_id]),
            "area": int(areas[number]),
            "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start],
        }
        for number, row, (y, x) in zip(
            range(1, len(kept) + 1), kept, ndimage.find_objects(segment_map), strict=True
        )
    ]
    ids = np.array([0, *(segment["id"] for segment in segments)], np.int32)[segment_map]
    return ids, segments, empty


def _bring(photo: Path, place: Path, *, copy: bool) -> None:
    """Copies a photo, or links it where both lie on one disk.

    A hard link lies in the dataset itself. A symbolic one would lead out of it, where other
    commands do not follow unless they are told to.
    """
    temporary = place.with_name(f".{place.name}.tmp")
    Storage(str(place.parent)).create()
    try:
        temporary.unlink(missing_ok=True)
        try:
            if not copy:
                temporary.hardlink_to(photo.resolve())
        except OSError:
            copy = True
        if copy:
            shutil.copyfile(photo, temporary)
        temporary.replace(place)
        temporary.unlink(missing_ok=True)  # it stays where both are links to one file
    except OSError as error:
        raise cannot_write(error, place) from None
