"""Samples and files made by hand, for several test modules."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from panoptic_cache.pipeline.cache.sample import Sample, Segment, encode_distance
from panoptic_cache.pipeline.photo import encode_jpeg
from panoptic_cache.pipeline.targets import SegmentMap, compute_targets, segment_dtype

EDGE_CASES: dict[str, list[list[int]]] = {
    "one pixel": [[1]],
    "one unlabelled pixel": [[0]],
    "one segment": [[1] * 5] * 4,
    "unlabelled everywhere": [[0] * 5] * 4,
    "one-pixel segment": [[1, 1, 1, 1], [1, 1, 2, 1], [1, 1, 1, 1]],
    "one row": [[1, 1, 2, 2, 0, 3]],
    "one column": [[1], [1], [0], [2], [2]],
    "segment in pieces": [[1, 2, 1], [2, 2, 2], [1, 2, 1]],
    "run over the row's end": [[1, 2, 2], [2, 2, 1], [1, 1, 1]],
    "300 segments": [[20 * y + x + 1 for x in range(20)] for y in range(15)],
}
"""Segment maps with every row in use; the last one needs uint16."""


def edge_case(name: str) -> SegmentMap:
    """A segment map of `EDGE_CASES`, in the type that its segments need."""
    values = EDGE_CASES[name]
    return np.array(values, segment_dtype(max(map(max, values))))


@st.composite
def index_maps(draw: st.DrawFn, rows: int = 5) -> SegmentMap:
    """Small segment maps, blocky or noisy, in which every segment has a pixel."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    index = rng.integers(0, draw(st.integers(0, rows)) + 1, (height, width))
    block = draw(st.integers(1, 3))
    index = index.repeat(block, 0).repeat(block, 1)
    used = np.unique(index[index > 0])
    return np.where(index > 0, np.searchsorted(used, index) + 1, 0).astype(np.uint8)


def make_sample(
    index: SegmentMap,
    *,
    key: str = "000000000001",
    things: Sequence[int] = (1,),
    crowds: Sequence[int] = (),
) -> Sample:
    """A true sample of a segment map.

    Rows in `things` are things, rows in `crowds` crowds; ids are 1000 + row, categories 10 + row.
    """
    count = int(index.max(initial=0))
    targets = compute_targets(index, [row in crowds for row in range(1, count + 1)])
    segments = []
    for row in range(1, count + 1):
        x, y, width, height = targets.geometry.bbox[row - 1].tolist()
        u, v = targets.geometry.centroid[row - 1].tolist()
        thing, crowd = row in things, row in crowds
        segments.append(
            Segment(
                id=1000 + row,
                category_id=10 + row,
                label=row - 1,
                isthing=thing,
                iscrowd=crowd,
                area=int(targets.geometry.area[row - 1]),
                bbox=(x, y, width, height),
                centroid=(u, v) if thing and not crowd else None,
            )
        )
    return Sample(
        key=key,
        image_id=int(key),
        file_name=f"{key}.jpg",
        original_size=(index.shape[0], index.shape[1]),
        photo=encode_jpeg(noise(index.shape), 95),
        segment_map=index,
        eds=encode_distance(targets.distance),
        void=targets.void,
        segments=tuple(segments),
    )


def small_samples() -> list[Sample]:
    """Three samples of different sizes."""
    sizes = (3, 11, 7)
    return [make_sample(np.full((n, 9), 1, np.uint8), key=f"{n:012d}") for n in sizes]


def noise(shape: Sequence[int], seed: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*shape[:2], 3), dtype=np.uint8)


def same_sample(one: Sample, other: Sample) -> bool:
    """Whether two samples are equal, arrays and their types included."""

    def plain(sample: Sample) -> list[Any]:
        values = [getattr(sample, name) for name in Sample.__slots__]
        return [(v.dtype, v.shape, v.tolist()) if isinstance(v, np.ndarray) else v for v in values]

    return plain(one) == plain(other)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
