"""How fast training is fed and steps, each against the obvious way and the floor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from panoptic_cache.pipeline.base.config import RenderConfig
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.sample import encode_distance
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import CocoLayout, PanopticRecord
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.pipeline.render.bench import (
    Bench,
    Timing,
    bench_dataset,
    best_ms,
    obvious_targets,
)
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.targets import compute_targets, index_map, resize_index
from panoptic_cache.train.augment import draw_augmentation, make_item
from panoptic_cache.train.config import DataConfig


def bench_load(layout: CocoLayout | None = None, images: int = 32, size: int = 420) -> Bench:
    """Makes training samples on one core: from the cache, online, and only the photo.

    Args:
        layout: A real dataset; made-up scenes where None.
        images: How many.
        size: Side of the network's input, and of the cache.
    """
    cv2.setNumThreads(1)
    config = DataConfig(size=size)
    with bench_dataset(layout, images) as dataset, tempfile.TemporaryDirectory() as folder:
        render(dataset, "bench", Storage(folder), RenderConfig("squash", size), workers=0)
        reader, records = ShardReader(Path(folder)), dataset.records
        count = len(reader)

        def cached() -> None:
            for position in range(count):
                augmentation = draw_augmentation(config, 0, (0, position))
                make_item(reader.sample(position), config, augmentation)

        def each(work: Callable[[PanopticRecord, int], None]) -> Callable[[], None]:
            def run() -> None:
                for record in records:
                    work(record, size)

            return run

        timings = (
            Timing("online, the obvious way: Pillow, scipy, a loop", best_ms(each(obvious), count)),
            Timing("online, by our functions", best_ms(each(online), count)),
            Timing("from the cache", best_ms(cached, count)),
            Timing("the floor: JPEG decode and resize", best_ms(each(photo_only), count)),
        )
    slow, fast, ours, floor = (timing.ms for timing in timings)
    return Bench(
        f"one training sample at {size} px, {count} images on one core",
        timings,
        {
            "the cache against online, the obvious way": slow / ours,
            "the cache against online, by our functions": fast / ours,
            "the cache against the floor": ours / floor,
        },
    )


def obvious(record: PanopticRecord, size: int) -> None:
    """A training sample straight from COCO's files, as one would write it first."""
    photo = Image.open(record.photo).convert("RGB")
    np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR))
    obvious_targets(record, size)


def online(record: PanopticRecord, size: int) -> None:
    """A training sample straight from COCO's files: the same targets, by the same functions."""
    index = index_map(read_ids(record.png), [segment.id for segment in record.segments])
    iscrowd = [segment.iscrowd for segment in record.segments]
    targets = compute_targets(resize_index(index, (size, size)), iscrowd)
    encode_distance(targets.distance)
    photo_only(record, size)


def photo_only(record: PanopticRecord, size: int) -> None:
    """What any training must do: decode a photo and resize it."""
    photo = simplejpeg.decode_jpeg(
        record.photo.read_bytes(), "RGB", min_height=size, min_width=size
    )
    cv2.resize(photo, (size, size), interpolation=cv2.INTER_AREA)
