"""The rows of COCO panoptic annotation files, checked against declared types.

Rendering and scoring read the same rows: `coco.py` leaves out the image of a bad one,
`evaluate/metric/pairs.py` ends at the first.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Raw, Struct

from panoptic_cache.pipeline.base.config import decode_json

T = TypeVar("T")

ImageId = int | str
Flag = bool | Literal[0, 1]
"""How JSON has a flag. Text is refused: in Python it is true, whatever it says."""


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
    height: int
    width: int


class CategoryRow(Struct, frozen=True):
    """A row of `categories`."""

    id: int
    name: str | int
    isthing: Flag


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


def is_area(value: object) -> bool:
    """Whether a value is a number of pixels."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < 1 << 62 and value == int(value)
