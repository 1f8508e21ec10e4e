"""A cached training sample and its members: the only place that names members, dtypes and scales.

FORMAT.md describes the same for people, and a test compares the two. Every sample has every member,
because readers such as `datasets` learn the fields from the first few samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import cv2
import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.targets import (
    Geometry,
    SegmentMap,
    boundary,
    edge_distance,
    geometry,
    segment_dtype,
    void_mask,
)

FORMAT_VERSION = 1
MEMBERS = ("eds.png", "jpg", "json", "segments.png", "void.png")
"""Suffixes of a sample's members, in the order in which they lie in the tar."""

_MAPS = ("segments", "eds", "void")

MAX_TILE_KEY = 87
"""Bytes of a key: a tar header has 100 for a member's name, of which `.segments.png` takes 13."""

EDS_STEP = 0.5
"""Pixels a step of the EDS code."""
EDS_FAR = 255
"""The code of 127.5 px or more, which counts as infinitely far."""


Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Side = Annotated[int, Meta(ge=1, lt=1 << 31)]
Size = tuple[Side, Side]
Part = Annotated[float, Meta(ge=-1, le=1)]
"""What a table may say: training and drawing rely on these ranges."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A row of the segment table, as measured on the cached map; FORMAT.md describes the fields."""

    id: Count
    category_id: int
    label: Count
    isthing: bool
    iscrowd: bool
    area: Count
    bbox: tuple[Count, Count, Count, Count]
    centroid: tuple[Part, Part] | None


@dataclass(frozen=True, slots=True)
class SampleTable:
    """What the JSON member holds; the fields are those of `Sample`."""

    image_id: int | str
    file_name: str
    original_size: Size
    size: Size
    segments: tuple[Segment, ...]
    tile: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of the cache with its targets."""

    key: str  # 12 digits, or a file's stem without dots
    image_id: int | str  # As annotated
    file_name: str  # As annotated
    original_size: tuple[int, int]  # (height, width) of the annotated image
    photo: bytes  # JPEG bytes of the cached size
    segment_map: SegmentMap  # (H, W) uint8 or uint16, 0 = unlabelled, i = row i - 1 of `segments`
    # (H, W) uint8, distance to the nearest boundary in steps of 0.5 px, 255 = far.
    eds: NDArray[np.uint8]
    void: NDArray[np.uint8]  # (H, W) uint8, 0 labelled, 1 unlabelled, 2 crowd
    segments: tuple[Segment, ...]  # The segment table
    tile: tuple[int, int] | None = None  # (top, left) in the image; none for the whole image

    def centroid_map(self) -> NDArray[np.float32]:
        """(2, H, W) float32: (u, v) of the instance at each pixel, nan where there is none."""
        table = np.full((len(self.segments) + 1, 2), np.nan, np.float32)
        for row, segment in enumerate(self.segments, start=1):
            if segment.centroid is not None:
                table[row] = segment.centroid
        return np.ascontiguousarray(table[self.segment_map].transpose(2, 0, 1))

    def eds_weight(self, d: float = 20.0, w_min: float = 0.0) -> NDArray[np.float32]:
        """(H, W) float32 loss weights: w_min + (1 - w_min) exp(-(distance / D)^2), section 3.2."""
        falloff = np.exp(-np.square(eds_distances().astype(np.float64) / d))  # (256,)
        weights = (w_min + (1 - w_min) * falloff).astype(np.float32)
        return np.asarray(weights[self.eds])


def encode_distance(distance: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Distances in pixels (float32, may be inf) -> the nearest EDS codes (uint8)."""
    steps = np.minimum(distance / np.float32(EDS_STEP), np.float32(EDS_FAR))
    return np.asarray(np.rint(steps), np.uint8)


def eds_distances() -> NDArray[np.float32]:
    """Distance in pixels of each of the 256 EDS codes; the last is inf."""
    distances = np.arange(256, dtype=np.float32) * EDS_STEP
    distances[EDS_FAR] = np.inf
    return distances


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """The members of a sample, by suffix, in the order of `MEMBERS`."""
    named = (sample.image_id, sample.file_name, sample.original_size)
    table = SampleTable(*named, sample.segment_map.shape, sample.segments, sample.tile)
    values = msgspec.to_builtins(table)
    if sample.tile is None:
        del values["tile"]
    return {
        "eds.png": _encode_png(sample.eds, _DISTANCE_PNG),
        "jpg": sample.photo,
        "json": json.dumps(values, separators=(",", ":")).encode(),
        "segments.png": _encode_png(sample.segment_map, _LABEL_PNG),
        "void.png": _encode_png(sample.void, _LABEL_PNG),
    }


def decode_sample(key: str, members: Mapping[str, bytes], classes: int | None = None) -> Sample:
    """The inverse of `encode_sample`, of a cache with so many `classes` if that is known.

    InputError where a member is missing, cannot be decoded, or disagrees with the table.
    """
    if missing := [suffix for suffix in MEMBERS if suffix not in members]:
        raise InputError(f"sample lacks {', '.join(missing)}", where=key, code="member-missing")
    table = decode_table(members["json"], key)
    maps = {name: _decode_png(members[f"{name}.png"], f"{key}.{name}.png") for name in _MAPS}
    for name, values in maps.items():
        wide = values.dtype != np.uint8 and name != "segments"
        if values.shape != table.size or wide:
            what = f"map is {values.dtype} {values.shape}, the table says {table.size}"
            raise InputError(what, f"{key}.{name}.png", code="member-damaged")
    if maps["segments"].max(initial=0) > len(table.segments):
        raise InputError("segment map and table disagree", key, code="table-mismatch")
    if classes is not None and any(segment.label >= classes for segment in table.segments):
        raise InputError("a segment has no label of the cache", key, code="table-mismatch")
    return Sample(
        key=key,
        image_id=table.image_id,
        file_name=table.file_name,
        original_size=table.original_size,
        photo=members["jpg"],
        segment_map=maps["segments"],
        eds=maps["eds"].astype(np.uint8, copy=False),
        void=maps["void"].astype(np.uint8, copy=False),
        segments=table.segments,
        tile=table.tile,
    )


def decode_table(data: bytes, key: str) -> SampleTable:
    """The JSON member of a sample; InputError where a field is missing or of another type."""
    try:
        return decode_json(data, SampleTable)
    except ValueError as error:
        what = f"no segment table: {error}"
        raise InputError(what, f"{key}.json", code="member-damaged") from None


# Measured on COCO. Segment maps are long runs, which compress best and decode fastest unfiltered.
# Distances change by about one step a row, so the filter "up" leaves runs of equal differences.
_LABEL_PNG = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 3),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE),
)
_DISTANCE_PNG = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
)


def _encode_png(values: NDArray[np.unsignedinteger[Any]], settings: tuple[int, ...]) -> bytes:
    return bytes(cv2.imencode(".png", values, settings)[1])


def _decode_png(data: bytes, where: str) -> NDArray[np.unsignedinteger[Any]]:
    """Grayscale PNG bytes -> (H, W) uint8 or uint16; InputError if damaged."""
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # no bytes, or more pixels than OpenCV reads
        values = None
    if values is None or values.ndim != 2 or values.dtype not in (np.uint8, np.uint16):
        raise InputError("map cannot be decoded", where=where, code="member-damaged")
    return np.asarray(values)


def measured(segments: Sequence[Segment], found: Geometry) -> tuple[Segment, ...]:
    """Rows of a segment table with area, box and centroid as they are on a map."""
    rows = []
    columns = found.area.tolist(), found.bbox.tolist(), found.centroid.tolist()
    for segment, area, box, uv in zip(segments, *columns, strict=True):
        centroid = tuple(uv) if segment.isthing and not segment.iscrowd else None
        rows.append(replace(segment, area=area, bbox=tuple(box), centroid=centroid))
    return tuple(rows)


def check_sample(sample: Sample) -> None:
    """Checks a decoded sample's table, maps and codes against one another.

    InputError where areas, boxes or centroids do not follow from the segment map, the void mask
    does not follow from map and crowd flags, or the EDS codes are not those of its boundaries.
    """
    segment_map, count = sample.segment_map, len(sample.segments)
    if segment_map.dtype != segment_dtype(count) or segment_map.max(initial=0) > count:
        raise InputError("segment map and table disagree", where=sample.key, code="table-mismatch")
    right = measured(sample.segments, geometry(segment_map, count))
    for segment, found in zip(sample.segments, right, strict=True):
        if segment != found:
            what = f"segment {segment.id} does not match the map"
            raise InputError(what, where=sample.key, code="table-mismatch")
    void = void_mask(segment_map, [segment.iscrowd for segment in sample.segments])
    if not np.array_equal(sample.void, void):
        raise InputError("void mask does not match the map", where=sample.key, code="void-mismatch")
    # A boundary that is not seen in a tile can be as near as the tile's edge, but no nearer.
    most = edge_distance(boundary(segment_map))
    least = np.minimum(most, edge_distance(cut_edges(sample)))
    if (sample.eds > encode_distance(most)).any() or (sample.eds < encode_distance(least)).any():
        raise InputError("EDS codes do not match the map", where=sample.key, code="eds-mismatch")


def cut_edges(sample: Sample) -> NDArray[np.bool_]:
    """(H, W) pixels along those edges of a tile where its image goes on."""
    edges = np.zeros(sample.segment_map.shape, np.bool_)
    if sample.tile is not None:
        (top, left), (rows, columns) = sample.tile, sample.segment_map.shape
        edges[0] = top > 0
        edges[-1] |= top + rows < sample.original_size[0]
        edges[:, 0] |= left > 0
        edges[:, -1] |= left + columns < sample.original_size[1]
    return edges
