"""How fast rendering is: the obvious way, ours and the floor, on the same pictures in one run."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.segmentation import find_boundaries

from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.cache.shards import pack_shard
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic, PanopticRecord, read_dataset
from panoptic_cache.pipeline.render.job import render_image
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.pipeline.scenes.scene import write_dataset


@dataclass(frozen=True, slots=True)
class BenchTable:
    """What every benchmark gives."""

    title: str  # What was measured, on what
    columns: tuple[str, ...]  # The table's head
    rows: list[tuple[str, ...]]  # Its lines
    values: dict[str, Any]  # The same as plain values, as `--json` prints them


class Timing(NamedTuple):
    """One way of doing the work."""

    name: str  # What was done
    ms: float  # Milliseconds an image, the best of the repeats
    kilobytes: float = 0.0  # Of output an image; 0 where it has none


def timing_table(title: str, timings: Sequence[Timing], ratios: dict[str, float]) -> BenchTable:
    """A line for each timing, then one for each of the ratios that count."""
    lines: list[tuple[str, ...]] = [
        (name, f"{ms:.2f}", f"{1e3 / ms:.1f}", f"{kilobytes:.0f}" if kilobytes else "")
        for name, ms, kilobytes in timings
    ]
    lines += [(name, f"{ratio:.2f}", "", "") for name, ratio in ratios.items()]
    values = {"title": title, "timings": [t._asdict() for t in timings], "ratios": ratios}
    return BenchTable(title, ("", "ms/image", "images/s", "kB/image"), lines, values)


def best_ms(work: Callable[[], object], images: int, repeats: int = 3) -> float:
    """Milliseconds an image of the fastest of some repeats: the others were disturbed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3 / images


@contextmanager
def bench_dataset(
    layout: CocoLayout | None, images: int, size: int = 640
) -> Iterator[CocoPanoptic]:
    """Some images of a dataset, or made-up scenes of COCO's size in a temporary folder."""
    if layout is not None:
        yield read_dataset(layout).spread(images)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), images=images, val_images=1, seed=0, size=size)
        yield read_dataset(CocoLayout.of(Path(folder), "train"))


def bench_render(layout: CocoLayout | None = None, images: int = 32) -> BenchTable:
    """Renders some pictures of a dataset, or made-up scenes, on one core in three ways."""
    cv2.setNumThreads(1)
    with bench_dataset(layout, images) as dataset:
        records, count = dataset.records, len(dataset.records)
        categories = {category.id: category for category in dataset.categories}

        def render() -> list[Sample]:
            config, repairs = RenderConfig(), Counter[str]()
            samples = (render_image(each, config, categories, repairs) for each in records)
            return [sample for of_image in samples for sample in of_image]

        def timing(name: str, work: Callable[[], object], size: int = 0) -> Timing:
            return Timing(name, best_ms(work, count), size / count / 1e3)

        size = len(pack_shard(render())[0])
        obvious, ours, targets, floor = (
            timing(
                "the obvious way: Pillow, find_boundaries, scipy, a loop, dense arrays",
                lambda: render_obvious(records),
                len(render_obvious(records)),
            ),
            timing("ours", lambda: pack_shard(render()), size),
            timing("- of which without the tar", render),
            timing(
                "the floor: read, decode the PNG, write a tar",
                lambda: render_floor(records, size // count),
            ),
        )
    return timing_table(
        f"rendering {count} images on one core",
        (obvious, ours, targets, floor),
        {
            "ours against the obvious way": obvious.ms / ours.ms,
            "ours against the floor": ours.ms / floor.ms,
        },
    )


def render_obvious(records: Sequence[PanopticRecord]) -> bytes:
    """What one would write first: dense float maps, a mask a segment."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for record in records:
            photo = record.photo.read_bytes()
            Image.open(io.BytesIO(photo)).convert("RGB").load()
            table = [{"id": segment.id, "area": segment.area} for segment in record.segments]
            members = {"jpg": photo, "json": json.dumps(table).encode()}
            for name, values in obvious_targets(record).items():
                member = io.BytesIO()
                np.save(member, values)
                members[f"{name}.npy"] = member.getvalue()
            for name, data in members.items():
                add(tar, f"{record.key}.{name}", data)
    return buffer.getvalue()


def obvious_targets(record: PanopticRecord, size: int | None = None) -> dict[str, NDArray[Any]]:
    """Ids, weights and centroids as dense maps, of the native size or squashed to a square."""
    png = Image.open(record.png).convert("RGB")
    if size is not None:
        png = png.resize((size, size), Image.Resampling.NEAREST)
    rgb = np.asarray(png).astype(np.int32)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    edges = find_boundaries(ids, connectivity=1, mode="thick")
    distance = ndimage.distance_transform_edt(~edges)
    height, width = ids.shape
    centroids = np.zeros((2, height, width), np.float16)
    for segment in record.segments:
        mask = ids == segment.id
        y, x = np.nonzero(mask)
        if len(x):
            centroids[0, mask] = 2 * (x.mean() + 0.5) / width - 1
            centroids[1, mask] = 2 * (y.mean() + 0.5) / height - 1
    weight = np.exp(-np.square(distance / 20)).astype(np.float16)
    return {"ids": ids, "weight": weight, "centroids": centroids}


def render_floor(records: Sequence[PanopticRecord], size: int) -> bytes:
    """What nobody can leave out: reading both files, decoding the PNG, writing as many bytes."""
    buffer, payload = io.BytesIO(), bytes(size)
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for record in records:
            record.photo.read_bytes()
            cv2.imread(str(record.png), cv2.IMREAD_COLOR)
            add(tar, record.key, payload)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member to a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
