"""The rows of COCO panoptic annotation files, checked against declared types.

Rendering, scoring and evaluating read them here: `coco.py` leaves out the image of a bad row,
`evaluate/metric/pairs.py` ends at the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.structs import replace

from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import read_file

T = TypeVar("T")

ImageId = int | str
Flag = bool | Literal[0, 1]
"""How JSON has a flag. Text is refused: in Python it is true, whatever it says."""
MOST_SEGMENTS = 65_535
"""Of an image: a segment map has 16 bits."""


class SegmentInfo(Struct, frozen=True, gc=False):
    """A row of `segments_info`. COCO's train2017 has 1.3 million of them."""

    id: int  # R + 256 G + 65536 B of its pixels
    category_id: int  # As annotated
    iscrowd: Flag = False  # A group that is not split into instances
    area: Any = None  # Pixels, unchecked: rendering counts anew, scoring checks and trusts it
    bbox: tuple[int | float, ...] | None = None  # x, y, width, height; rendering computes it anew
    score: Any = None  # Confidence, which predictions may have; unchecked


class AnnotationRow(Struct, frozen=True, gc=False):
    """A row of `annotations`: the segments of one image."""

    image_id: ImageId
    file_name: str
    segments_info: tuple[SegmentInfo, ...]


class ImageRow(Struct, frozen=True, gc=False):
    """A row of `images`."""

    id: ImageId
    file_name: str
    height: int | None = None  # Of the PNG where None
    width: int | None = None  # The same


class CategoryRow(Struct, frozen=True):
    """A row of `categories`."""

    id: int
    name: str | int
    isthing: Flag | UnsetType = UNSET


class AnnotationFile(Struct, Generic[T]):
    """The lists of an annotation file, or of a prediction, which only needs annotations.

    Their rows are parsed one by one, by `parse_row`, so that a bad one spoils no other.
    """

    annotations: list[T]
    images: list[T] | None = None
    categories: list[T] | None = None


def parse_file(data: bytes) -> AnnotationFile[Any]:
    """The lists of a file; ValueError where it is no annotation file."""
    try:
        return msgspec.json.decode(data, type=AnnotationFile[Raw])
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        # Python's json also writes, and reads, NaN, UTF-16 and half a surrogate pair.
        return decode_json(data, AnnotationFile[Any])
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_rows(path: Path) -> tuple[AnnotationFile[Any], bytes]:
    """The lists of an annotation file, and its bytes; InputError where it is none."""
    try:
        data = read_file(path)
        return parse_file(data), data
    except OSError as error:
        raise InputError(
            f"unreadable: {error.strerror}",
            where=path,
            remedy="check the path",
            code="json-missing",
        ) from None
    except ValueError as error:
        raise shape_error(f"is no annotation file: {error}", path) from None


def shape_error(what: str, where: Path | str) -> InputError:
    """The error for a file of another shape."""
    remedy = "it needs images, annotations with segments_info, and categories"
    return InputError(what, where=where, remedy=remedy, code="json-shape")


def parse_row(row: Any, kind: type[T]) -> T:
    """One row of a file; ValueError names the field that is missing or of another type."""
    if isinstance(row, Raw):
        try:
            return decode_json(bytes(row), kind)
        except msgspec.ValidationError:
            row = decode_json(bytes(row), object)
    return msgspec.convert(_whole_numbers(row), kind)


def _whole_numbers(value: Any) -> Any:
    """640.0 as 640, at any depth: some tools write every number with a point."""
    if isinstance(value, dict):
        return {name: _whole_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def loose_row(row: Any) -> dict[str, Any]:
    """What there is in a row that `parse_row` refuses."""
    values = decode_json(bytes(row), object) if isinstance(row, Raw) else row
    return values if isinstance(values, dict) else {}


def parse_categories(rows: Iterable[Any] | None, source: Path) -> list[CategoryRow]:
    """The categories by ascending id; InputError names the field that is wrong."""
    try:
        parsed = sorted((parse_row(row, CategoryRow) for row in rows or ()), key=lambda row: row.id)
    except ValueError as error:
        raise shape_error(f"categories malformed: {error}", source) from None
    if not parsed or len({row.id for row in parsed}) < len(parsed):
        raise shape_error("categories are empty or share an id", source)
    if without := [str(row.name) for row in parsed if row.isthing is UNSET]:
        raise InputError(
            f"{len(without)} of {len(parsed)} categories, such as {without[0]}, have no `isthing`",
            where=source,
            remedy="add it to each: 1 where things are counted one by one, 0 for stuff such as sky",
            code="json-shape",
        )
    return parsed


def check_segments(rows: Iterable[SegmentInfo], known: Set[int]) -> tuple[SegmentInfo, ...]:
    """The segments of one image, those listed again under their id and category merged.

    InputError names a segment whose id or category is wrong, not the image. The area of what was
    merged is None: some tools list all painted areas of a category, some the same one twice.
    """
    found: dict[int, SegmentInfo] = {}
    for row in rows:
        if not 0 < row.id < 1 << 24:
            raise InputError(
                "id is not in 1..2^24-1",
                where=f"segment {row.id}",
                remedy="renumber",
                code="segment-id",
            )
        if row.category_id not in known:
            raise InputError(
                f"unknown category {row.category_id}",
                where=f"segment {row.id}",
                remedy="use the ids that `categories` lists",
                code="category-unknown",
            )
        before = found.setdefault(row.id, row)
        if (before.category_id, before.iscrowd) != (row.category_id, row.iscrowd):
            raise InputError(
                f"listed twice, as category {before.category_id} with iscrowd {before.iscrowd:d}"
                f" and as {row.category_id} with {row.iscrowd:d}",
                where=f"segment {row.id}",
                remedy="keep one entry for each id",
                code="segment-duplicate",
            )
        if before is not row:
            found[row.id] = replace(before, area=None, bbox=None)
    if len(found) > MOST_SEGMENTS:
        raise InputError(
            f"{len(found)} segments, {MOST_SEGMENTS} are the most",
            remedy="cut the image into tiles",
            code="segments-many",
        )
    return tuple(found.values())


def is_area(value: object) -> bool:
    """Whether a value is a number of pixels."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < 1 << 62 and value == int(value)
