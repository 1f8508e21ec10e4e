"""One annotated image -> its sample: read strictly, fit, compute the targets."""

from __future__ import annotations

from collections import Counter

import cv2

from panoptic_cache.pipeline.cache.sample import Sample, Segment, encode_distance
from panoptic_cache.pipeline.coco import Category, PanopticRecord
from panoptic_cache.pipeline.photo import check_photo, fitted_size, read_photo
from panoptic_cache.pipeline.png import read_ids, read_png
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.pipeline.targets import (
    compute_targets,
    drop_empty_rows,
    make_segment_map,
    resize_segment_map,
)


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
    ids = read_ids(record.png, (record.height, record.width))
    photo = read_photo(record, repairs, pixels=config.size is not None)
    segment_map = make_segment_map(ids, [segment.id for segment in record.segments])
    if cv2.countNonZero(segment_map) < cv2.countNonZero(ids):
        repairs["png-id-unknown"] += 1
    size = fitted_size(record.height, record.width, config.size, config.fit)
    segment_map, kept = drop_empty_rows(segment_map, len(record.segments))
    repairs["segment-empty"] += len(record.segments) - len(kept)
    rows = [record.segments[row] for row in kept]
    if size != ids.shape:
        segment_map, kept = drop_empty_rows(resize_segment_map(segment_map, size), len(rows))
        rows = [rows[row] for row in kept]
    targets = compute_targets(segment_map, [row.iscrowd for row in rows])
    geometry = targets.geometry
    measured = zip(
        rows,
        geometry.area.tolist(),
        geometry.bbox.tolist(),
        geometry.centroid.tolist(),
        strict=True,
    )
    segments = []
    for row, area, box, centroid in measured:
        if size == ids.shape:
            repairs["area-wrong"] += row.area is not None and row.area != area
            repairs["bbox-wrong"] += row.bbox is not None and row.bbox != tuple(box)
        category = categories[row.category_id]
        segments.append(
            Segment(
                id=row.id,
                category_id=row.category_id,
                label=category.label,
                isthing=category.isthing,
                iscrowd=bool(row.iscrowd),
                area=area,
                bbox=tuple(box),
                centroid=tuple(centroid) if category.isthing and not row.iscrowd else None,
            )
        )
    return Sample(
        key=record.key,
        image_id=record.image_id,
        file_name=record.file_name,
        original_size=(record.height, record.width),
        photo=photo.resized(size, config.jpeg_quality),
        segment_map=segment_map,
        eds=encode_distance(targets.distance),
        void=targets.void,
        segments=tuple(segments),
    )


def check_files(record: PanopticRecord) -> None:
    """What can be told of an image's files without decoding a pixel.

    Raises:
        InputError: As `render_image` would.
    """
    read_png(record.png, (record.height, record.width))
    check_photo(record)
