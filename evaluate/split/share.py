"""The share of one process in an evaluation: predict, write, note and score its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.metric.score import ImageScore, score_image, thing_ids
from panoptic_cache.evaluate.photos import ahead
from panoptic_cache.evaluate.predict import Heads, Pixels, Predictor
from panoptic_cache.evaluate.prediction_files import (
    PNG_FOLDER,
    Journal,
    Noted,
    PredictionRow,
    supersede,
    write_png,
)
from panoptic_cache.evaluate.study.heads import ImageHeads, save_heads
from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.coco import CocoPanoptic, PanopticRecord
from panoptic_cache.pipeline.photo import read_annotated
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.pipeline.tiles import Window, tile_key, windows
from panoptic_cache.train.ranks import Ranks
from panoptic_cache.train.stopping import memory_advice

STEPS = ("read", "network", "decode", "write", "score")
"""What is timed; `write` and `score` run beside the other steps."""


@dataclass(slots=True)
class Share:
    """What one process did."""

    # Row of `panoptic.json` and score of its images, by position in the split.
    outcomes: dict[int, tuple[PredictionRow, ImageScore]] = field(default_factory=dict)
    predicted: int = 0  # Number of images that went through the network
    # Wall time of each step, summed over those images.
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Adds the wall time of a block to a step."""
        start = perf_counter()
        yield
        self.seconds[step] += perf_counter() - start


def predict_share(
    predictor: Predictor,
    dataset: CocoPanoptic,
    out: Path,
    *,
    batch: int,
    ranks: Ranks,
    done: Mapping[ImageId, Noted],
    identity: Mapping[str, Any],
    heads_folder: Path | None = None,
) -> Share:
    """Predicts and scores the images [rank::world], or scores from disk those that are done.

    What has changed since it was noted is done again. Raises InputError where a photo or an
    annotation cannot be read, or the network returns NaN.
    """
    share, things = Share(), thing_ids(dataset.categories)
    mine = range(ranks.rank, len(dataset.records), ranks.world)

    def files(record: PanopticRecord) -> list[Path]:
        found = [record.photo, record.png, out / PNG_FOLDER / f"{record.key}.png"]
        if heads_folder is not None:
            found += [heads_folder / f"{name}.npz" for name in heads_names(predictor, record)]
        return found

    for at in mine:
        record = dataset.records[at]
        noted = done.get(record.image_id)
        if noted is not None and noted.holds(record.key, files(record)):
            ids = read_ids(out / PNG_FOLDER / noted.row.file_name)
            share.outcomes[at] = noted.row, score_row(record, noted.row, ids, things)
    rest = [at for at in mine if at not in share.outcomes]
    share.predicted = len(rest)
    batch = min(batch, len(dataset.records))
    photos = ahead(read_annotated, [dataset.records[at] for at in rest], 2 * batch)

    def keep(places: Sequence[int], heads: Sequence[Heads], results: Sequence[PanopticMap]) -> None:
        """Writes, notes and scores a batch; the heads of tiles are saved already."""
        supersede(out)
        for at, both, result in zip_longest(places, heads, results):
            record = dataset.records[at]
            with share.timed("write"):
                if heads_folder is not None and both is not None:
                    ids, truth = read_ids(record.png, bgr=record.bgr), record.segments
                    image = ImageHeads(record.key, both.instance, both.semantic, ids, truth)
                    save_heads(heads_folder, image)
                row = write_png(out, record.image_id, record.key, result, predictor.categories)
                journal.note(row, files(record))
            with share.timed("score"):
                share.outcomes[at] = row, score_row(record, row, result.ids, things)
            advance()

    with (
        Journal(out, identity, ranks.rank) as journal,
        progress("evaluate", len(mine), "images", len(share.outcomes)) as advance,
        ThreadPoolExecutor(1, "keep") as behind,
    ):
        # While the network runs on one batch, the batch before it is written and scored.
        kept: Future[None] | None = None
        for start in range(0, len(rest), batch):
            places = rest[start : start + batch]
            records = [dataset.records[at] for at in places]
            with share.timed("read"):
                pixels = [next(photos).result() for _ in places]
            with memory_advice("lower --batch, or ask for fewer or smaller --sizes"):
                heads, results = predict_batch(
                    predictor, records, pixels, batch, share, heads_folder
                )
            if kept is not None:
                kept.result()
            kept = behind.submit(keep, places, heads, results)
        if kept is not None:
            kept.result()
    return share


def predict_batch(  # noqa: PLR0917
    predictor: Predictor,
    records: Sequence[PanopticRecord],
    pixels: Sequence[Pixels],
    batch: int,
    share: Share,
    heads_folder: Path | None,
) -> tuple[list[Heads], list[PanopticMap]]:
    """Heads and maps of at most `batch` images; of tiles, the heads are saved here and not kept."""
    if predictor.tile is not None:
        each = zip(records, pixels, strict=True)
        return [], [predict_tiles(predictor, *one, share, heads_folder) for one in each]
    with share.timed("network"):
        # The last batch is filled up: a network rounds differently in a smaller one.
        filling = [pixels[0]] * (batch - len(pixels))
        heads = predictor.heads([*pixels, *filling])[: len(pixels)]
        predictor.wait()
    with share.timed("decode"):
        return heads, decoded(predictor, heads, records)


def heads_names(predictor: Predictor, record: PanopticRecord) -> list[str]:
    """The files, without ending, that hold what the network says of an image."""
    if predictor.tile is None:
        return [record.key]
    places = windows((record.height, record.width), predictor.tile, predictor.overlap)
    return [tile_key(record.key, one.rows[0], one.columns[0]) for one in places]


def predict_tiles(
    predictor: Predictor,
    record: PanopticRecord,
    photo: Pixels,
    share: Share,
    heads_folder: Path | None,
) -> PanopticMap:
    """The panoptic map of an image that is cut into tiles, of which one batch is in memory.

    Raises InputError where the network returns NaN; it names the photo.
    """
    ids = read_ids(record.png, bgr=record.bgr) if heads_folder is not None else None

    def tiles() -> Iterator[tuple[Window, Heads]]:
        parts = predictor.tiles(photo)
        names = iter(heads_names(predictor, record))
        while True:
            with share.timed("network"):
                part = next(parts, None)
                predictor.wait()
            if part is None:
                return
            if heads_folder is not None and ids is not None:
                window, heads = part
                own = ids[window.place]
                truth = tuple(each for each in record.segments if (own == each.id).any())
                save_heads(
                    heads_folder,
                    ImageHeads(next(names), heads.instance, heads.semantic, own, truth),
                )
            yield part

    before, start = share.seconds["network"], perf_counter()
    try:
        return predictor.stitch(photo, tiles())
    except InputError as error:
        error.where = str(record.photo)
        raise
    finally:
        network = share.seconds["network"] - before
        share.seconds["decode"] += perf_counter() - start - network


def decoded(
    predictor: Predictor, heads: Sequence[Heads], records: Sequence[PanopticRecord]
) -> list[PanopticMap]:
    """The panoptic maps of a batch; an error names the photo."""
    try:
        return predictor.decode(heads, [(record.height, record.width) for record in records])
    except InputError as error:
        if len(heads) > 1:  # one by one, to find the photo
            each = zip(heads, records, strict=True)
            return [decoded(predictor, [one], [record])[0] for one, record in each]
        error.where = str(records[0].photo)
        raise


def score_row(
    record: PanopticRecord, row: PredictionRow, ids: NDArray[np.int32], things: frozenset[int]
) -> ImageScore:
    """Scores a prediction from its (H, W) ids and its row of `panoptic.json`."""
    return score_image(
        record.image_id,
        read_ids(record.png, (record.height, record.width), bgr=record.bgr),
        record.segments,
        ids,
        {segment.id: segment.category_id for segment in row.segments_info},
        scores={segment.id: segment.score for segment in row.segments_info},
        things=things,
    )
