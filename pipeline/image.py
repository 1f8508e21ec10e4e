"""One annotated image -> its sample: read strictly, fit, compute the targets."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.coco import Category, PanopticRecord
from pipeline.config import RenderConfig
from pipeline.errors import InputError
from pipeline.ids import read_ids, read_png
from pipeline.sample import Sample, Segment, encode_distance
from pipeline.targets import compute_targets, drop_empty_rows, index_map, resize_index

_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"


def render_image(
    record: PanopticRecord,
    config: RenderConfig,
    categories: dict[int, Category],
    repairs: Counter[str],
) -> Sample:
    """One image to its sample.

    Args:
        record: The annotated image.
        config: Fit and size.
        categories: By id.
        repairs: Counts, by code, of what was mended on the way; added to.

    Raises:
        InputError: The image must be left out.
    """
    ids = read_ids(record.png)
    photo = read_photo(record, repairs, config)
    if photo.size != ids.shape:
        raise InputError(
            f"sizes differ: PNG {ids.shape}, photo and JSON {photo.size}",
            where=record.png,
            code="size-mismatch",
        )
    index = index_map(ids, [segment.id for segment in record.segments])
    if cv2.countNonZero(index) < cv2.countNonZero(ids):
        repairs["png-id-unknown"] += 1
    size = fitted_size(ids.shape, config)
    index, kept = drop_empty_rows(index, len(record.segments))
    repairs["segment-empty"] += len(record.segments) - len(kept)
    rows = [record.segments[row] for row in kept]
    if size != ids.shape:
        index, kept = drop_empty_rows(resize_index(index, size), len(rows))
        rows = [rows[row] for row in kept]
    targets = compute_targets(index, [row.iscrowd for row in rows])
    geometry = targets.geometry
    if size == ids.shape:
        for row, area, box in zip(
            rows, geometry.area.tolist(), geometry.bbox.tolist(), strict=True
        ):
            repairs["area-wrong"] += row.area is not None and row.area != area
            repairs["bbox-wrong"] += row.bbox is not None and list(row.bbox) != box
    segments = tuple(
        Segment(
            id=row.id,
            category_id=row.category_id,
            label=(category := categories[row.category_id]).label,
            isthing=category.isthing,
            iscrowd=row.iscrowd,
            area=area,
            bbox=tuple(box),
            centroid=tuple(centroid) if category.isthing and not row.iscrowd else None,
        )
        for row, area, box, centroid in zip(
            rows,
            geometry.area.tolist(),
            geometry.bbox.tolist(),
            geometry.centroid.tolist(),
            strict=True,
        )
    )
    return Sample(
        key=record.key,
        image_id=record.image_id,
        file_name=record.file_name,
        original_size=(record.height, record.width),
        photo=photo.resized(size, config.jpeg_quality),
        index=index,
        eds=encode_distance(targets.distance),
        void=targets.void,
        segments=segments,
    )


def fitted_size(size: tuple[int, ...], config: RenderConfig) -> tuple[int, int]:
    """(height, width) of the cached sample."""
    height, width = size
    if config.size is None:
        return height, width
    if config.fit == "squash":
        return config.size, config.size
    scale = config.size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo.

    Attributes:
        data: JPEG bytes; of a colour photo, the file's own.
        size: (height, width).
        rgb: (H, W, 3) uint8, where the settings ask for another size.
    """

    data: bytes
    size: tuple[int, int]
    rgb: NDArray[np.uint8] | None = None

    def resized(self, size: tuple[int, int], quality: int) -> bytes:
        """JPEG bytes at another size; the file's own where the size stays."""
        if size == self.size or self.rgb is None:
            return self.data
        height, width = size
        smaller = height * width < self.size[0] * self.size[1]
        rgb = cv2.resize(
            self.rgb,
            (width, height),
            interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC,
        )
        return encode_jpeg(rgb, quality)


def encode_jpeg(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """(H, W, 3) uint8 RGB -> JPEG bytes, colour at full resolution."""
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling="444"
        )
    )


def read_photo(record: PanopticRecord, repairs: Counter[str], config: RenderConfig) -> Photo:
    """Reads a JPEG strictly; converts grayscale and CMYK.

    Raises:
        InputError: Missing, truncated, not a JPEG, or of another size than annotated.
    """
    try:
        data, colours = read_jpeg(record)
        rgb: NDArray[np.uint8] | None = None
        if colours in {"CMYK", "YCCK"}:
            repairs["photo-cmyk"] += 1
            rgb = _cmyk_to_rgb(simplejpeg.decode_jpeg(data, colorspace="CMYK"))
        elif colours == "Gray" or config.size is not None:
            repairs["photo-grayscale"] += colours == "Gray"
            rgb = simplejpeg.decode_jpeg(data, colorspace="RGB")
        else:
            check_jpeg(data)
    except ValueError as error:
        raise InputError(
            f"photo damaged or no JPEG: {error}", where=record.photo, code="photo-damaged"
        ) from None
    if rgb is not None and colours in {"CMYK", "YCCK", "Gray"}:
        data = encode_jpeg(rgb, config.jpeg_quality)
    return Photo(data, (record.height, record.width), rgb)


def read_jpeg(record: PanopticRecord) -> tuple[bytes, str]:
    """The bytes of a photo and its colour space, of the size that is annotated; not decoded.

    Raises:
        InputError: It cannot be read, or has another size.
        ValueError: It is no JPEG.
    """
    try:
        data = record.photo.read_bytes()
    except OSError as error:
        raise InputError(
            f"photo unreadable: {error.strerror}", where=record.photo, code="photo-missing"
        ) from None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    # Before decoding: a header can claim gigabytes.
    if (height, width) != (record.height, record.width):
        raise InputError(
            f"sizes differ: photo {(height, width)}, JSON {(record.height, record.width)}",
            where=record.photo,
            code="size-mismatch",
        )
    return data, colours


def check_files(record: PanopticRecord) -> None:
    """What can be told of an image's files without decoding a pixel.

    Raises:
        InputError: As `render_image` would.
    """
    png = read_png(record.png)
    width, height = struct.unpack_from(">II", png, 16)
    try:
        data, _ = read_jpeg(record)
        # Markers cannot occur in a scan's data, so a file cut short has none after its last one.
        if data.find(_END_OF_IMAGE, data.rfind(_START_OF_SCAN)) < 0:
            raise ValueError("cut short")
    except ValueError as error:
        raise InputError(
            f"photo damaged or no JPEG: {error}", where=record.photo, code="photo-damaged"
        ) from None
    if (height, width) != (record.height, record.width):
        raise InputError(
            f"sizes differ: PNG {(height, width)}, JSON {(record.height, record.width)}",
            where=record.png,
            code="size-mismatch",
        )


def check_jpeg(data: bytes) -> None:
    """Raises ValueError where a colour JPEG is damaged, as decoding all of it would.

    An eighth of the size leaves out the inverse transform, in which nothing can go wrong. Every
    bit is still read, and that is where damage shows.
    """
    simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=1, min_width=1, min_factor=8)


def _cmyk_to_rgb(cmyk: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Inks as Adobe's writers store them, inverted: RGB = CMY * K / 255."""
    inks = cmyk.astype(np.uint16)
    return (inks[..., :3] * inks[..., 3:] // 255).astype(np.uint8)
