"""How well and how fast decoding is beside others' ways, and scoring beside the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean

import cv2
import torch

from panoptic_cache.evaluate.metric.pairs import ImagePair
from panoptic_cache.evaluate.metric.pq import GroupPQ
from panoptic_cache.evaluate.metric.score import Outcome, score_pairs
from panoptic_cache.evaluate.study.comparison import (
    Comparison,
    Decoder,
    compare_decoders,
    our_decoder,
)
from panoptic_cache.evaluate.study.corruption import Corruption, Quality, corrupted_heads
from panoptic_cache.evaluate.study.heads import (
    ImageHeads,
    Part,
    in_part,
    list_heads,
    read_heads,
    read_meta,
)
from panoptic_cache.evaluate.study.rivals import Rival, known_instances, rivals
from panoptic_cache.pipeline.coco import Category, CocoLayout
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
OURS, KNOWN = "ours", "known instances"


@dataclass(frozen=True, slots=True)
class DecoderResult:
    """What a decoder reached on one set of heads; PQ in percent, None where it is undefined."""

    decoder: str  # Its name
    setting: str  # The one of several that suits a rival best on these heads; empty for ours
    All: float | None  # PQ
    Things: float | None  # The same
    Stuff: float | None  # The same
    agnostic: float  # PQ of things as one category
    tp: int  # Of that
    fp: int  # Of that
    fn: int  # Of that
    ms: float  # Wall milliseconds an image, from heads to the native panoptic map
    behind: float | None = None  # All PQ of ours less this one's; None for ours
    interval: tuple[float, float] | None = None  # 95 % interval of that, over images


@dataclass(frozen=True, slots=True)
class Case:
    """The decoders on one set of heads."""

    name: str  # Of the set
    results: tuple[DecoderResult, ...]  # Ours first
    quality: Quality | None  # What its codes look like


def decode_table(title: str, cases: Sequence[Case]) -> BenchTable:
    """A line for each decoder, then what the codes look like; the cases have the same decoders.

    Of the values, `rows` has the fields of `DecoderResult` and `case`; `measured` the noise and the
    drift of each case; `timings` and `ratios` are means over the cases.
    """
    results = [*zip(*(case.results for case in cases), strict=True)]
    columns: tuple[str, ...] = ("All/Things PQ", *(c.name for c in cases), "ms/image", "of ours")
    if len(cases) == 1:
        columns = ("PQ", "All", "Things", "Stuff", "agnostic", "TP", "FP", "FN", "ms", "to ours")
    lines = [_single(*some) if len(some) == 1 else _levels(some, results[0]) for some in results]
    for name in ("noise", "drift"):
        measured = [getattr(case.quality, name, None) for case in cases]
        text = ["-" if value is None else f"{value:.3g}" for value in measured]
        lines.append((f"measured {name}", *text, *[""] * (len(columns) - 1 - len(text))))
    own = _ms(results[0])
    timings = [
        {
            "name": some[0].decoder,
            "ms": _ms(some),
            "pq": [one.All for one in some],
            "things": [one.Things for one in some],
        }
        for some in results
    ]
    values = {
        "title": title,
        "rows": [{"case": c.name, **asdict(r)} for c in cases for r in c.results],
        "measured": {c.name: c.quality and asdict(c.quality) for c in cases},
        "timings": timings,
        "ratios": {f"{some[0].decoder} against ours": _ms(some) / own for some in results[1:]},
    }
    return BenchTable(title, columns, lines, values)


def _ms(some: Sequence[DecoderResult]) -> float:
    return fmean(one.ms for one in some)


def _named(one: DecoderResult) -> str:
    return f"{one.decoder}, {one.setting}" if one.setting else one.decoder


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _single(one: DecoderResult) -> tuple[str, ...]:
    behind = ""
    if one.behind is not None and one.interval is not None:
        behind = f"{one.behind:+.1f} [{one.interval[0]:.1f}, {one.interval[1]:.1f}]"
    values = (_percent(value) for value in (one.All, one.Things, one.Stuff, one.agnostic))
    counts = (str(count) for count in (one.tp, one.fp, one.fn))
    return (_named(one), *values, *counts, f"{one.ms:.1f}", behind)


def _levels(some: Sequence[DecoderResult], ours: Sequence[DecoderResult]) -> tuple[str, ...]:
    quality = (f"{_percent(one.All)}/{_percent(one.Things)}" for one in some)
    return (_named(some[0]), *quality, f"{_ms(some):.1f}", f"{_ms(some) / _ms(ours):.1f}")


def bench_heads(folder: Path, part: Part = "all", limit: int | None = None) -> BenchTable:
    """Decodes saved heads by ours and by other decoders.

    Args:
        folder: See `heads.py`.
        part: Which of its images.
        limit: Only the first so many of these.

    Raises:
        InputError: The folder or a file of it cannot be used.
    """
    meta = read_meta(folder)
    paths = list_heads(folder, part)[:limit]
    found = _compare(
        lambda: read_heads(paths, meta),
        len(paths),
        meta.categories,
        meta.code(),
        meta.network_size,
        title="heads",
    )
    case = meta.name or folder.name
    (results,) = _results([found])
    threads = torch.get_num_threads()
    title = f"decoding {len(paths)} images of {case}, {threads} threads"
    return decode_table(title, [Case(case, results, found.quality())])


def bench_decode(
    layout: CocoLayout | None = None,
    images: int = 4,
    corruption: Corruption | None = None,
    encoding: Encoding | None = None,
    part: Part = "all",
) -> BenchTable:
    """Corrupts the ground truth's codes, and decodes them by ours and by other decoders.

    Args:
        layout: A real dataset; made-up scenes where None.
        images: How many.
        corruption: Size and errors; the noise of the codes takes all of `LEVELS`.
        encoding: Of the codes; the paper's where None.
        part: Which of the images.
    """
    given, code = corruption or Corruption(), encoding or PositionalCode()
    with bench_dataset(layout, images) as whole:
        names = {*in_part([record.key for record in whole.records], part)}
        records = tuple(record for record in whole.records if record.key in names)
        dataset = replace(whole, records=records)
        found = []
        for level in LEVELS:
            quality = replace(given, noise=level)
            found.append(
                _compare(
                    partial(corrupted_heads, dataset, quality, code),
                    len(records),
                    dataset.categories,
                    code,
                    given.size,
                    title=f"level {level}",
                )
            )
    title = f"decoding {len(records)} images at {given.size} px, {torch.get_num_threads()} threads"
    for name in ("semantic_noise", "drift"):
        if value := getattr(given, name):
            title += f", {name.replace('_', ' ')} {value:g}"
    cases = zip(LEVELS, _results(found), found, strict=True)
    return decode_table(
        title, [Case(f"level {level}", some, one.quality()) for level, some, one in cases]
    )


def _compare(
    images: Callable[[], Iterator[ImageHeads]],
    count: int,
    categories: tuple[Category, ...],
    encoding: Encoding,
    size: int,
    *,
    title: str,
) -> Comparison:
    """All decoders on the same images; a rival once for each setting, as `NAME|SETTING`."""
    ours = our_decoder(categories, encoding)

    def alone(rival: Rival) -> Decoder:
        return lambda some: [rival(image.positional(encoding), categories) for image in some]

    decoders = {OURS: ours}
    for name, settings in rivals(size).items():
        decoders |= {f"{name}|{setting}": alone(rival) for setting, rival in settings.items()}
    decoders[KNOWN] = alone(known_instances)
    for image in islice(images(), 1):  # warms up
        ours([image])
    return compare_decoders(
        images(), count, decoders, categories=categories, encoding=encoding, title=title
    )


def _results(found: Sequence[Comparison]) -> list[tuple[DecoderResult, ...]]:
    """The decoders of each comparison, with the setting that is best over all of them."""
    scored = [{name: one.outcome(name) for name in one.trials} for one in found]

    def mean(name: str) -> float:
        return fmean(_pq(some[name].pq.all) or 0.0 for some in scored)

    best: dict[str, str] = {}
    for name in scored[0]:
        rival = name.partition("|")[0]
        best[rival] = max(best.get(rival, name), name, key=mean)
    return [
        tuple(_result(one, some, rival, name) for rival, name in best.items())
        for one, some in zip(found, scored, strict=True)
    ]


def _result(found: Comparison, scored: dict[str, Outcome], rival: str, name: str) -> DecoderResult:
    pq, agnostic = scored[name].pq, scored[name].scores.breakdown.agnostic
    result = DecoderResult(
        rival,
        name.partition("|")[2],
        All=_pq(pq.all),
        Things=_pq(pq.things),
        Stuff=_pq(pq.stuff),
        agnostic=100 * agnostic.pq,
        tp=agnostic.tp,
        fp=agnostic.fp,
        fn=agnostic.fn,
        ms=1e3 * found.trials[name].seconds / scored[name].images,
    )
    ours = _pq(scored[OURS].pq.all)
    if name == OURS or ours is None or result.All is None:
        return result
    low, high = found.interval(OURS, name)
    return replace(result, behind=ours - result.All, interval=(100 * low, 100 * high))


def _pq(group: GroupPQ | None) -> float | None:
    return None if group is None else 100 * group.pq


def bench_score(layout: CocoLayout | None = None, images: int = 64) -> BenchTable:
    """Scores a dataset against itself, next to decoding the PNGs alone.

    Args:
        layout: A real dataset; made-up scenes where None.
        images: How many.
    """
    cv2.setNumThreads(1)
    with bench_dataset(layout, images) as dataset:
        pairs = [
            ImagePair(
                r.image_id, r.png, r.segments, r.png, {s.id: s.category_id for s in r.segments}
            )
            for r in dataset.records
        ]
        count = len(pairs)
        ours = Timing("ours", best_ms(lambda: score_pairs(dataset.categories, pairs), count))
        twice = [str(pair.gt_png) for pair in pairs for _ in range(2)]
        floor = Timing(
            "the floor: decoding both PNGs",
            best_ms(lambda: [cv2.imread(path) for path in twice], count),
        )
    return timing_table(
        f"scoring {count} images in one process",
        (ours, floor),
        {"ours against the floor": ours.ms / floor.ms},
    )
