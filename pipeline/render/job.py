"""What a worker does: one annotated image -> its sample, one planned shard -> its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import PASSING, Storage, open_file
from panoptic_cache.pipeline.base.process import keep_heap
from panoptic_cache.pipeline.cache.index import ShardEntry, Sidecar
from panoptic_cache.pipeline.cache.sample import (
    MAX_TILE_KEY,
    Sample,
    Segment,
    encode_distance,
    measured,
)
from panoptic_cache.pipeline.cache.shards import write_shard
from panoptic_cache.pipeline.coco import Category, PanopticRecord, Rejection
from panoptic_cache.pipeline.photo import encode_jpeg, fitted_size, load_photo
from panoptic_cache.pipeline.png import MOST_UNKNOWN, check_known, read_ids
from panoptic_cache.pipeline.render.plan import RenderConfig, ShardPlan
from panoptic_cache.pipeline.targets import (
    compute_targets,
    drop_empty_rows,
    geometry,
    make_segment_map,
    resize_segment_map,
)
from panoptic_cache.pipeline.tiles import Window, tile_key, windows

OUTAGE = 2
"""So many images in a row that cannot be read, however often it is tried, are not at fault."""
_FAILING = 0


@dataclass(frozen=True, slots=True)
class RenderJob:
    """What the jobs of all shards have in common."""

    config: RenderConfig  # What decides the bytes
    plan: str  # The plan's fingerprint
    categories: tuple[Category, ...]  # By label
    storage: Storage  # The cache's folder
    strict: bool  # Every warning aborts
    tools: str  # See `tools`; a worker with others would write other bytes


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """What the driver keeps of a sidecar: little, so that its memory stays small."""

    entry: ShardEntry  # The shard's line in the index
    rejections: tuple[Rejection, ...]  # Images of it that were left out
    repairs: Mapping[str, int]  # Counts by code
    inputs: str  # See `ShardPlan.inputs`

    @classmethod
    def of(cls, sidecar: Sidecar, inputs: str) -> FinishedShard:
        """Without the samples."""
        return cls(sidecar.entry(), sidecar.rejections, sidecar.repairs, inputs)


def tools() -> str:
    """Versions of the libraries that decide the bytes of pictures."""
    return f"OpenCV {cv2.__version__}, simplejpeg {simplejpeg.__version__}, NumPy {np.__version__}"


def prepare_worker() -> None:
    """Called in each process that renders: one thread for OpenCV, and memory is kept."""
    cv2.setNumThreads(1)  # the workers are the parallelism
    keep_heap()


def render_shard(shard: ShardPlan, job: RenderJob) -> FinishedShard:
    """Renders and writes one shard. A bad image costs one sample.

    InputError where it cannot be written, a file has disappeared, this worker would write other
    bytes than the driver, or, with `strict`, anything is wrong with an image.
    """
    if job.tools != tools():
        what = f"this worker has {tools()}, the driver {job.tools}"
        remedy = "install the same versions everywhere: else bytes depend on who renders"
        raise InputError(what, shard.name, remedy, "worker-differs")
    prepare_worker()
    inputs = shard.inputs()  # before they are read: what changes meanwhile has changed
    categories = {category.id: category for category in job.categories}
    rejections: list[Rejection] = []
    repairs: Counter[str] = Counter()

    def samples() -> Iterator[Sample]:
        global _FAILING  # noqa: PLW0603 (a disk fails for all shards)
        for record in shard.records:
            mended: Counter[str] = Counter()
            try:
                of_image = render_image(record, job.config, categories, mended)
                if job.strict and (wrong := [*(+mended).items()]):
                    what = f"image {record.image_id}: {wrong[0][0]} in {wrong[0][1]} places"
                    raise InputError(what, record.png, "mend it, or leave out --strict", "strict")
                _FAILING = 0
            except InputError as error:
                _check_there(record)
                _FAILING = _FAILING + 1 if error.code == "input-failing" else 0
                if job.strict or _FAILING >= OUTAGE:
                    _FAILING = 0
                    raise
                rejections.append(Rejection.of(record.image_id, record.file_name, error))
                continue
            finally:
                repairs.update(mended)
            yield from of_image

    sidecar = write_shard(
        job.storage, shard.name, samples(), plan=job.plan, rejections=rejections, repairs=repairs
    )
    return FinishedShard.of(sidecar, inputs)


def _check_there(record: PanopticRecord) -> None:
    """Raises InputError if a file that the plan has seen is gone, or neither can be read.

    The image is not at fault: the disk was unmounted, it fails, or this worker does not share it.
    """
    failing = []
    for path in (record.photo, record.png):
        try:
            with open_file(path) as file:
                file.read(1)
        except OSError as error:
            failing += [error] if error.errno in PASSING else []
        if len(failing) == 2:
            what = f"cannot be read: {failing[0].strerror}"
            remedy = "the disk or share fails: go on with the same command when it is back"
            raise InputError(what, record.photo, remedy, "input-failing")
        if not failing and not path.exists():
            what = "was there when the work was planned, and is not there for this worker"
            remedy = "give every worker the dataset under the same path, and go on"
            raise InputError(what, path, remedy, "input-gone")


def render_image(
    record: PanopticRecord,
    config: RenderConfig,
    categories: Mapping[int, Category],
    repairs: Counter[str],
) -> list[Sample]:
    """One annotated image -> its sample, or those of its tiles.

    Read strictly, fitted, targets computed after that.

    Args:
        record: The image.
        config: How to fit and cut it.
        categories: By id.
        repairs: Counts, by code, what was mended on the way.

    Raises:
        InputError: The image must be left out.
    """
    ids = read_ids(record.png, (record.height, record.width), bgr=record.bgr)  # (H, W) int32
    pixels = config.size is not None or config.tile is not None
    photo = load_photo(record, repairs, pixels=pixels)
    listed = [segment.id for segment in record.segments]
    segment_map = make_segment_map(ids, listed)
    labelled = cv2.countNonZero(ids)
    if unknown := labelled - cv2.countNonZero(segment_map):
        if unknown > MOST_UNKNOWN * labelled:  # why is worth 15 ms
            values, counts = (each.tolist() for each in np.unique(ids, return_counts=True))
            check_known(dict(zip(values, counts, strict=True)), set(listed), record.png)
        repairs["png-id-unknown"] += 1
    repairs["segment-merged"] += record.merged
    size = fitted_size(record.height, record.width, config.size, config.fit)
    segment_map, kept = drop_empty_rows(segment_map, len(record.segments))
    repairs["segment-empty"] += len(record.segments) - len(kept)
    rows = [record.segments[row] for row in kept]
    if size != ids.shape:
        segment_map, kept = drop_empty_rows(resize_segment_map(segment_map, size), len(rows))
        rows = [rows[row] for row in kept]
    targets = compute_targets(segment_map, [bool(row.iscrowd) for row in rows])
    unmeasured = [
        Segment(
            id=row.id,
            category_id=row.category_id,
            label=categories[row.category_id].label,
            isthing=categories[row.category_id].isthing,
            iscrowd=bool(row.iscrowd),
            area=0,
            bbox=(0, 0, 0, 0),
            centroid=None,
        )
        for row in rows
    ]
    segments = measured(unmeasured, targets.geometry)
    if size == ids.shape:
        for row, found in zip(rows, segments, strict=True):
            repairs["area-wrong"] += row.area is not None and row.area != found.area
            repairs["bbox-wrong"] += row.bbox is not None and row.bbox != found.bbox
    sample = Sample(
        key=record.key,
        image_id=record.image_id,
        file_name=record.file_name,
        original_size=(record.height, record.width),
        photo=b"",
        segment_map=segment_map,
        eds=encode_distance(targets.distance),
        void=targets.void,
        segments=segments,
    )
    if config.tile is None:
        return [replace(sample, photo=photo.resized(size, config.jpeg_quality))]
    assert photo.rgb is not None
    tiles = windows(ids.shape, config.tile, config.overlap)
    return [cut_tile(sample, photo.rgb, window, config.jpeg_quality) for window in tiles]


def cut_tile(whole: Sample, rgb: NDArray[np.uint8], window: Window, jpeg_quality: int) -> Sample:
    """The sample of a tile, from that of its image and the (H, W, 3) photo.

    Areas, boxes and centroids are those of the parts of segments that lie in the tile: a network
    that sees no more cannot know where the rest is. Distances are those of the whole image: a
    boundary outside the tile still counts, and the tile's own edge is none.
    """
    segment_map, kept = drop_empty_rows(whole.segment_map[window.place], len(whole.segments))
    rows = [whole.segments[row] for row in kept]
    top, left = window.rows[0], window.columns[0]
    key = tile_key(whole.key, top, left)
    if len(key.encode()) > MAX_TILE_KEY:
        what = f"the key of a tile would have more than {MAX_TILE_KEY} bytes"
        raise InputError(what, whole.file_name, "give the photo a shorter name", "key-invalid")
    return replace(
        whole,
        key=key,
        photo=encode_jpeg(rgb[window.place], jpeg_quality),
        segment_map=np.ascontiguousarray(segment_map),
        eds=np.ascontiguousarray(whole.eds[window.place]),
        void=np.ascontiguousarray(whole.void[window.place]),
        segments=measured(rows, geometry(segment_map, len(rows))),
        tile=(top, left),
    )
