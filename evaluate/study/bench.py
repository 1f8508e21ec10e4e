"""How well and how fast decoding is beside others' ways, and scoring beside the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import torch

from panoptic_cache.evaluate.metric.pairs import ImagePair
from panoptic_cache.evaluate.metric.pq import GroupPQ
from panoptic_cache.evaluate.metric.score import score_pairs
from panoptic_cache.evaluate.study import heads
from panoptic_cache.evaluate.study.comparison import (
    Comparison,
    Decoder,
    compare_decoders,
    our_decoder,
)
from panoptic_cache.evaluate.study.corruption import Corruption, corrupted_heads
from panoptic_cache.evaluate.study.heads import TUNED_ON, ImageHeads, Part
from panoptic_cache.evaluate.study.rivals import Rival, rivals
from panoptic_cache.pipeline.coco import Category, CocoLayout, read_dataset
from panoptic_cache.pipeline.render.bench import (
    BenchTable,
    Timing,
    bench_dataset,
    best_ms,
    timing_table,
)
from panoptic_cache.train.encoding import Encoding, PositionalCode

LEVELS = (0, 1, 2, 3)
"""Of corruption of the codes."""
OURS = "ours"
COLUMNS = ("PQ", "All", "Things", "Stuff", "agnostic", "TP", "FP", "FN", "ms/image", "to ours")


def bench_heads(folder: Path, part: Part = "all", limit: int | None = None) -> BenchTable:
    """Decodes the saved heads of a part, or the first `limit` of them, by ours and by others.

    Raises InputError where the folder or a file of it cannot be used.
    """
    meta = heads.read_meta(folder)
    paths = heads.list_heads(folder, part)[:limit]
    case, read = meta.name or folder.name, partial(heads.read_heads, paths, meta)
    size, code = meta.network_size, meta.code()
    found = _compare(read, len(paths), meta.categories, code, size=size, title=case)
    return _table(_title(len(paths), f"of {case}", meta.name, part), {case: found})


def bench_decode(
    layout: CocoLayout | None = None,
    images: int = 4,
    corruption: Corruption | None = None,
    encoding: Encoding | None = None,
    part: Part = "all",
) -> BenchTable:
    """Decodes the ground truth's codes by ours and by others, at each of `LEVELS` of noise.

    Made-up scenes where there is no layout; the paper's encoding where there is none given. Parts
    are those of the whole split, whatever the number of images.
    """
    given, code = corruption or Corruption(), encoding or PositionalCode()
    found, split = {}, layout.panoptic_json.stem.removeprefix("panoptic_") if layout else ""
    with (
        bench_dataset(None, images)
        if layout is None
        else nullcontext(read_dataset(layout)) as whole
    ):
        names = {*heads.in_part([record.key for record in whole.records], part)}
        records = tuple(record for record in whole.records if record.key in names)
        dataset = replace(whole, records=records).spread(images)
        count = len(dataset.records)
        for level in LEVELS:
            make = partial(corrupted_heads, dataset, replace(given, noise=level), code)
            case = f"level {level}"
            found[case] = _compare(
                make, count, dataset.categories, code, size=given.size, title=case
            )
    title = _title(count, f"at {given.size} px", split, part)
    for name in ("semantic_noise", "drift"):
        if value := getattr(given, name):
            title += f", {name.replace('_', ' ')} {value:g}"
    return _table(title, found)


def _title(count: int, what: str, name: str, part: Part) -> str:
    title = f"decoding {count} images {what}, {torch.get_num_threads()} threads"
    tuned = part != "reporting" and name in TUNED_ON
    return title + "; our settings were found on some of them" * tuned


def _compare(
    images: Callable[[], Iterator[ImageHeads]],
    count: int,
    categories: tuple[Category, ...],
    encoding: Encoding,
    *,
    size: int,
    title: str,
) -> Comparison:
    """All decoders on the same images; a rival once for each setting, as `NAME|SETTING`."""

    def alone(rival: Rival) -> Decoder:
        return lambda image: rival(image, categories)

    decoders = {OURS: our_decoder(categories)}
    for name, settings in rivals(size).items():
        decoders |= {f"{name}|{setting}": alone(rival) for setting, rival in settings.items()}
    for image in islice(images(), 1):
        decoders[OURS](image.positional(encoding))  # warms up
    positional = (image.positional(encoding) for image in images())
    return compare_decoders(positional, count, decoders, categories=categories, title=title)


def _table(title: str, found: Mapping[str, Comparison]) -> BenchTable:
    """A line for each decoder on each set of heads, then what the codes of each set look like.

    A rival has the setting that suits it best over all sets. PQ is in percent, `agnostic` that of
    things as one category with its counts, `ms` wall milliseconds an image, `behind` the All PQ of
    ours less this one's with its 95 % interval; `timings` and `ratios` are means over the sets.
    """
    scored = {case: {name: one.outcome(name) for name in one.trials} for case, one in found.items()}

    def mean(name: str) -> float:
        return fmean(_pq(some[name].pq.all) or 0.0 for some in scored.values())

    best: dict[str, str] = {}
    for name in next(iter(found.values())).trials:
        decoder = name.partition("|")[0]
        best[decoder] = max(best.get(decoder, name), name, key=mean)
    rows: list[dict[str, Any]] = []
    for case, outcomes in scored.items():
        ours = _pq(outcomes[OURS].pq.all)
        for decoder, name in best.items():
            pq, agnostic = outcomes[name].pq, outcomes[name].breakdown.agnostic
            row = {
                "case": case,
                "decoder": decoder,
                "setting": name.partition("|")[2],
                **{key: _pq(getattr(pq, key.lower())) for key in ("All", "Things", "Stuff")},
                "agnostic": 100 * agnostic.pq,
                **{key: getattr(agnostic, key) for key in ("tp", "fp", "fn")},
                "ms": 1e3 * found[case].trials[name].seconds / outcomes[name].images,
                "behind": None,
                "interval": None,
            }
            if name != OURS and ours is not None and row["All"] is not None:
                row["behind"] = ours - row["All"]
                row["interval"] = [100 * end for end in found[case].interval(OURS, name)]
            rows.append(row)
    by_decoder = {name: [row for row in rows if row["decoder"] == name] for name in best}
    ms = {name: fmean(row["ms"] for row in some) for name, some in by_decoder.items()}
    timings = [
        {
            "name": name,
            "ms": ms[name],
            "pq": [row["All"] for row in some],
            "things": [row["Things"] for row in some],
        }
        for name, some in by_decoder.items()
    ]
    qualities = {case: one.quality() for case, one in found.items()}
    measured = {case: quality and asdict(quality) for case, quality in qualities.items()}
    values = {
        "title": title,
        "rows": rows,
        "measured": measured,
        "timings": timings,
        "ratios": {f"{name} against ours": ms[name] / ms[OURS] for name in ms if name != OURS},
    }
    lines = [_line(row) for row in rows]
    for case, quality in measured.items():
        for name, value in (quality or {}).items():
            lines.append((f"{case}: measured {name}", f"{value:.3g}", *[""] * (len(COLUMNS) - 2)))
    return BenchTable(title, COLUMNS, lines, values)


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"{row['case']}: {row['decoder']}" + (f", {row['setting']}" if row["setting"] else "")
    shown = (row[key] for key in ("All", "Things", "Stuff", "agnostic"))
    pq = ("-" if value is None else f"{value:.1f}" for value in shown)
    known = row["behind"] is not None
    behind = "{:+.1f} [{:.1f}, {:.1f}]".format(row["behind"], *row["interval"]) if known else ""
    counts = (str(row[key]) for key in ("tp", "fp", "fn"))
    return (name, *pq, *counts, f"{row['ms']:.1f}", behind)


def _pq(group: GroupPQ | None) -> float | None:
    return None if group is None else 100 * group.pq


def bench_score(layout: CocoLayout | None = None, images: int = 64) -> BenchTable:
    """Scores a dataset, or made-up scenes, against itself, next to decoding the PNGs alone."""
    cv2.setNumThreads(1)
    with bench_dataset(layout, images) as dataset:
        pairs = []
        for each in dataset.records:
            kinds = {segment.id: segment.category_id for segment in each.segments}
            pairs.append(ImagePair(each.image_id, each.png, each.segments, each.png, kinds))
        count = len(pairs)
        ours = Timing("ours", best_ms(lambda: score_pairs(dataset.categories, pairs), count))
        twice = [str(pair.gt_png) for pair in pairs for _ in range(2)]
        read = best_ms(lambda: [cv2.imread(path) for path in twice], count)
    floor = Timing("the floor: decoding both PNGs", read)
    ratios = {"ours against the floor": ours.ms / floor.ms}
    return timing_table(f"scoring {count} images in one process", (ours, floor), ratios)
