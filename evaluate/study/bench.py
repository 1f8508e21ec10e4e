"""How well and how fast decoding is beside others' ways, and scoring beside the floor."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.metric.pairs import read_pairs
from panoptic_cache.evaluate.metric.pq import GroupPQ
from panoptic_cache.evaluate.metric.score import score_pairs
from panoptic_cache.evaluate.study.ceiling import Decoder, compare_decoders, one_by_one, ours
from panoptic_cache.evaluate.study.rivals import (
    full_search,
    painter,
    soft_votes,
    soft_votes_squared,
)
from panoptic_cache.pipeline.coco import CocoLayout, CocoPanoptic
from panoptic_cache.pipeline.render.bench import Bench, Timing, bench_dataset, best_ms

LEVELS = (0, 1, 2, 3)
"""Of corruption, see `corruption.corrupt`."""
OURS, ALONE = "ours", "ours, one by one"
RIVALS: dict[str, Decoder] = {
    "full search": full_search,
    "soft votes": soft_votes,
    "soft votes, sharper": soft_votes_squared,
    "Painter's masks": painter,
}


@dataclass(frozen=True, slots=True)
class DecoderTiming:
    """One decoder, with one setting for all levels.

    Attributes:
        name: Which.
        ms: Wall milliseconds an image, from heads to the native panoptic map, mean over levels.
        pq: All PQ in percent, by level of corruption; None where it is not defined.
        things: The same of Things.
    """

    name: str
    ms: float
    pq: tuple[float | None, ...]
    things: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """Decoders on the same corrupted codes.

    Attributes:
        title: What was measured, on what.
        timings: Ours first.
    """

    title: str
    timings: tuple[DecoderTiming, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of `rows`."""
        return ("All/Things PQ", *(f"level {level}" for level in LEVELS), "ms/image", "of ours")

    def rows(self) -> list[tuple[str, ...]]:
        """A line for each decoder."""
        own = self.timings[0].ms
        return [
            (
                t.name,
                *(f"{_percent(a)}/{_percent(b)}" for a, b in zip(t.pq, t.things, strict=True)),
                f"{t.ms:.1f}",
                f"{t.ms / own:.1f}",
            )
            for t in self.timings
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `bench decode --json` prints them."""
        own = self.timings[0].ms
        return asdict(self) | {
            "ratios": {f"{t.name} against ours": t.ms / own for t in self.timings[1:]}
        }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def bench_decode(
    layout: CocoLayout | None = None,
    images: int = 4,
    size: int = 420,
    semantic_noise: float = 0.0,
) -> DecodeBench:
    """Corrupts the ground truth's codes, and decodes them by ours and by other decoders.

    All have the paper's grid of 80 x 80 cells, whatever the size.

    Args:
        layout: A real dataset; made-up scenes where None.
        images: How many; the full search takes seconds for each.
        size: Side of the network's output.
        semantic_noise: Level of corruption of the logits, see `corruption.corrupt_logits`.
    """
    whole = ours()

    def alone(code: Tensor, logits: Tensor, isthing: Tensor, size: tuple[int, int]) -> PanopticMap:
        return whole([code], [logits], isthing, [size])[0]

    others = {ALONE: alone, **RIVALS}
    decoders = {OURS: whole, **{name: one_by_one(other) for name, other in others.items()}}
    with bench_dataset(layout, images) as dataset:
        compare_decoders(dataset.head(2), {OURS: whole}, size=size, noise=0)  # warms up
        found = [
            compare_decoders(
                dataset, decoders, size=size, noise=level, semantic_noise=semantic_noise
            )
            for level in LEVELS
        ]
        count = len(dataset.records)
    timings = tuple(
        DecoderTiming(
            name,
            ms=fmean(1e3 * level[name].seconds_per_image["decode"] for level in found),
            pq=tuple(_pq(level[name].pq.all) for level in found),
            things=tuple(_pq(level[name].pq.things) for level in found),
        )
        for name in decoders
    )
    threads = torch.get_num_threads()
    title = f"decoding {count} images at {size} px, {threads} threads"
    if semantic_noise:
        title += f", semantic noise {semantic_noise:g}"
    return DecodeBench(title, timings)


def _pq(group: GroupPQ | None) -> float | None:
    return None if group is None else 100 * group.pq


def bench_score(layout: CocoLayout | None = None, images: int = 64) -> Bench:
    """Scores a dataset against itself, next to decoding the PNGs alone.

    Args:
        layout: A real dataset; made-up scenes where None.
        images: How many.
    """
    cv2.setNumThreads(1)
    with bench_dataset(layout, images) as dataset, tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "truth.json"
        truth.write_text(json.dumps(as_json(dataset)))
        pngs = dataset.records[0].png.parent
        categories, pairs = read_pairs(truth, truth, pngs, pngs)
        ours = Timing("ours", best_ms(lambda: score_pairs(categories, pairs), len(pairs)))
        floor = Timing(
            "the floor: decoding both PNGs",
            best_ms(
                lambda: [cv2.imread(str(r.png)) for r in dataset.records for _ in range(2)],
                len(pairs),
            ),
        )
    return Bench(
        f"scoring {len(pairs)} images in one process",
        (ours, floor),
        {"ours against the floor": ours.ms / floor.ms},
    )


def as_json(dataset: CocoPanoptic) -> dict[str, object]:
    """A dataset as COCO panoptic JSON."""
    return {
        "images": [
            {"id": r.image_id, "file_name": r.file_name, "height": r.height, "width": r.width}
            for r in dataset.records
        ],
        "annotations": [
            {
                "image_id": r.image_id,
                "file_name": r.png.name,
                "segments_info": [
                    {
                        "id": s.id,
                        "category_id": s.category_id,
                        "iscrowd": int(s.iscrowd),
                        "area": s.area,
                        "bbox": list(s.bbox or ()),
                    }
                    for s in r.segments
                ],
            }
            for r in dataset.records
        ],
        "categories": [
            {"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in dataset.categories
        ],
    }
