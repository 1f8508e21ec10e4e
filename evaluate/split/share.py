"""The share of one process in an evaluation: predict, write, note and score its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.metric.breakdown import thing_ids
from panoptic_cache.evaluate.metric.score import ImageScore, score_image
from panoptic_cache.evaluate.photos import ahead
from panoptic_cache.evaluate.predict import Heads, Pixels, Predictor, read_picture
from panoptic_cache.evaluate.prediction_files import PNG_FOLDER, PredictionRow, write_png
from panoptic_cache.evaluate.split.folder import Journal, supersede
from panoptic_cache.evaluate.study.heads import ImageHeads, save_heads
from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.coco import CocoPanoptic, PanopticRecord
from panoptic_cache.pipeline.png import read_ids
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
    done: Mapping[ImageId, PredictionRow],
    identity: Mapping[str, Any],
    heads_folder: Path | None = None,
) -> Share:
    """Predicts and scores the images [rank::world], or scores from disk those that are done.

    Raises:
        InputError: A photo or an annotation cannot be read, or the network returns NaN.
    """
    share, things = Share(), thing_ids(dataset.categories)
    mine = range(ranks.rank, len(dataset.records), ranks.world)
    for at in mine:
        record = dataset.records[at]
        row = done.get(record.image_id)
        saved = heads_folder is None or (heads_folder / f"{record.key}.npz").exists()
        if row is not None and saved:
            with suppress(InputError):  # what cannot be read back is predicted again
                ids = read_ids(out / PNG_FOLDER / row.file_name)
                share.outcomes[at] = row, score_row(record, row, ids, things)
    rest = [at for at in mine if at not in share.outcomes]
    share.predicted = len(rest)
    batch = min(batch, len(dataset.records))
    photos = ahead(read_annotated, [dataset.records[at] for at in rest], 2 * batch)

    def keep(places: Sequence[int], heads: Sequence[Heads], results: Sequence[PanopticMap]) -> None:
        """Writes, notes and scores a batch."""
        supersede(out)
        for at, both, result in zip(places, heads, results, strict=True):
            record = dataset.records[at]
            with share.timed("write"):
                if heads_folder is not None:
                    ids, truth = read_ids(record.png), record.segments
                    heads_of = ImageHeads(record.key, both.instance, both.semantic, ids, truth)
                    save_heads(heads_folder, heads_of)
                row = write_png(out, record.image_id, record.key, result, predictor.categories)
                journal.note(row)
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
                with share.timed("network"):
                    # The last batch is filled up: a network rounds differently in a smaller one.
                    filling = pixels[:1] * (batch - len(pixels))
                    heads = predictor.heads([*pixels, *filling])[: len(pixels)]
                    predictor.wait()
                with share.timed("decode"):
                    results = decoded(predictor, heads, records)
            if kept is not None:
                kept.result()
            kept = behind.submit(keep, places, heads, results)
        if kept is not None:
            kept.result()
    return share


def read_annotated(record: PanopticRecord) -> Pixels:
    """The photo of an annotated image; InputError where it has another size than annotated."""
    photo = read_picture(record.photo, upright=False)
    if photo.shape[:2] != (record.height, record.width):
        raise InputError(
            f"sizes differ: photo {photo.shape[:2]}, JSON {(record.height, record.width)}",
            where=record.photo,
            remedy="evaluation never repairs a dataset: mend or remove the image",
            code="size-mismatch",
        )
    return photo


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
        raise InputError(
            error.what, where=records[0].photo, remedy=error.remedy, code=error.code
        ) from None


def score_row(
    record: PanopticRecord, row: PredictionRow, ids: NDArray[np.int32], things: frozenset[int]
) -> ImageScore:
    """Scores a prediction from its (H, W) ids and its row of `panoptic.json`."""
    return score_image(
        record.image_id,
        read_ids(record.png, (record.height, record.width)),
        record.segments,
        ids,
        {segment.id: segment.category_id for segment in row.segments_info},
        scores={segment.id: segment.score for segment in row.segments_info},
        things=things,
    )
