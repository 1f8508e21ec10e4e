"""How fast decoding and scoring are, against the obvious way and the floor."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import cv2
import torch
from torch import Tensor

from evaluate.decode import decode
from evaluate.pairs import read_pairs
from evaluate.pq import score_pairs
from pipeline.bench import Bench, Timing, bench_dataset, best_ms
from pipeline.coco import CocoLayout, CocoPanoptic, PanopticRecord
from pipeline.ids import read_ids
from pipeline.targets import geometry, index_map, resize_index
from train.encoding import GRID_CELLS, PositionalCode, cell_centres, gamma
from train.losses import gather_rows


def bench_decode(layout: CocoLayout | None = None, images: int = 8, size: int = 420) -> Bench:
    """Decodes the ground truth's codes: ours, and a search through all cells for each pixel.

    Args:
        layout: A real dataset; made-up scenes where None.
        images: How many.
        size: Side of the network's output.
    """
    with bench_dataset(layout, images) as dataset:
        heads = [true_heads(record, dataset, size) for record in dataset.records]
        count = len(heads)
        isthing = torch.tensor([category.isthing for category in dataset.categories])
        sizes = [(record.height, record.width) for record in dataset.records]

        def ours() -> None:
            for (code, logits), native in zip(heads, sizes, strict=True):
                decode(code, logits, encoding=PositionalCode(), isthing=isthing, sizes=[native])

        timings = (
            Timing(
                f"the obvious way: the nearest of {GRID_CELLS**2} cells, only that",
                best_ms(lambda: [full_search(code[0]) for code, _ in heads], count, repeats=1),
            ),
            Timing("ours, from the heads to the native panoptic map", best_ms(ours, count)),
        )
    return Bench(
        f"decoding {count} images at {size} px, {torch.get_num_threads()} threads",
        timings,
        {"ours against the obvious way": timings[0].ms / timings[1].ms},
    )


def true_heads(record: PanopticRecord, dataset: CocoPanoptic, size: int) -> tuple[Tensor, Tensor]:
    """What a perfect network says: codes (1, 4L, S, S) and one-hot logits (1, C, S, S)."""
    by_id = {category.id: category for category in dataset.categories}
    index = index_map(read_ids(record.png), [segment.id for segment in record.segments])
    index = resize_index(index, (size, size))
    found = geometry(index, len(record.segments))
    rows = [by_id[segment.category_id] for segment in record.segments]
    instance = [
        bool(category.isthing and not segment.iscrowd and area)
        for category, segment, area in zip(rows, record.segments, found.area, strict=True)
    ]
    centroid = torch.zeros(1, len(rows) + 1, 2)
    centroid[0, 1:] = torch.from_numpy(found.centroid).nan_to_num()
    codes = PositionalCode().encode(centroid, torch.tensor([[False, *instance]]))
    label = torch.zeros(1, len(rows) + 1, len(by_id))
    label[0, torch.arange(1, len(rows) + 1), [category.label for category in rows]] = 10.0
    map_ = torch.from_numpy(index.astype("int32"))[None]
    return gather_rows(codes, map_), gather_rows(label, map_)


def full_search(code: Tensor, chunk: int = 8192) -> Tensor:
    """The nearest cell of each pixel by the distance to every cell's whole code, (P,) int64."""
    axis = gamma(cell_centres(GRID_CELLS), code.shape[0] // 4)
    u, v = torch.meshgrid(torch.arange(GRID_CELLS), torch.arange(GRID_CELLS), indexing="xy")
    cells = torch.cat([axis[u.flatten()], axis[v.flatten()]], dim=1)  # (6400, 4L)
    pixels = code.flatten(1).T
    return torch.cat([torch.cdist(part, cells).argmin(1) for part in pixels.split(chunk)])


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
