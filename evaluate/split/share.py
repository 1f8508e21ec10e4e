"""The share of one process in an evaluation: predict, write, note, score; or read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.metric.measures import thing_ids
from panoptic_cache.evaluate.metric.score import ImageScore, score_image
from panoptic_cache.evaluate.photos import read_ahead
from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.evaluate.split.journal import Journal, Row
from panoptic_cache.evaluate.split.superseded import supersede
from panoptic_cache.evaluate.study.clock import Clock
from panoptic_cache.evaluate.views import Heads
from panoptic_cache.evaluate.writer import PredictionWriter
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.progress import progress
from panoptic_cache.pipeline.coco import CocoPanoptic, ImageId, PanopticRecord
from panoptic_cache.pipeline.pictures.colours import Picture
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.train.guards import memory_advice
from panoptic_cache.train.ranks import Ranks

Outcomes = dict[int, tuple[Row, ImageScore]]
"""Row of `panoptic.json` and score, by position in the split."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What one process did.

    Attributes:
        outcomes: Of its images.
        predicted: Images that went through the network.
        seconds: Wall time by name, summed over them; `write` and `score` run beside the others.
    """

    outcomes: Outcomes
    predicted: int
    seconds: dict[str, float]


def predict_slice(
    predictor: Predictor,
    dataset: CocoPanoptic,
    out: Path,
    *,
    batch: int,
    ranks: Ranks,
    done: Mapping[ImageId, Row],
    identity: Mapping[str, Any],
) -> Slice:
    """Predicts and scores the images [rank::world]; reads back those that are done.

    Raises:
        InputError: A picture or an annotation cannot be read, or the network says NaN.
    """
    batch = min(batch, len(dataset.records))
    clock, things = Clock("read", "network", "decode"), thing_ids(dataset.categories)
    outcomes: Outcomes = {}
    for at in range(ranks.rank, len(dataset.records), ranks.world):
        record = dataset.records[at]
        row = done.get(record.image_id)
        if row is not None and (score := score_again(record, row, out, things)):
            outcomes[at] = row, score
    rest = [at for at in range(ranks.rank, len(dataset.records), ranks.world) if at not in outcomes]
    photos = read_ahead([dataset.records[at].photo for at in rest], 2 * batch, upright=False)
    total, before = len(rest) + len(outcomes), len(outcomes)
    with (
        Journal(out, identity, ranks.rank) as journal,
        progress("evaluate", total, "images", before) as advance,
        ThreadPoolExecutor(1, "keep") as behind,
    ):
        # While the network is at a batch, the one before it is written and scored.
        keeper = Keeper(out, PredictionWriter(out, predictor.categories), journal, things)
        kept: Future[Outcomes] = Future()
        kept.set_result({})
        for places in chunks(rest, batch):
            clock.start()
            pictures = [next(photos).result() for _ in places]
            clock.lap("read")
            records = [dataset.records[at] for at in places]
            check_photos(records, pictures)
            with memory_advice("lower --batch, or ask for fewer or smaller --sizes"):
                # Always of one size: rounding of a network depends on its batch's.
                heads = predictor.heads([*pictures, *pictures[:1] * (batch - len(pictures))])
                predictor.wait()
                clock.lap("network")
                results = decoded(predictor, heads[: len(places)], pictures, records)
            clock.lap("decode")
            outcomes |= kept.result()
            advance(len(kept.result()))
            kept = behind.submit(keeper.keep, places, records, results)
        outcomes |= kept.result()
        advance(len(kept.result()))
    return Slice(outcomes, len(rest), clock.seconds | keeper.clock.seconds)


@dataclass
class Keeper:
    """Writes, notes and scores predictions.

    Attributes:
        out: Where they go.
        writer: Of their PNGs.
        journal: Of their rows.
        things: Ids of the thing categories.
        clock: Tells the time of `write` and `score`.
    """

    out: Path
    writer: PredictionWriter
    journal: Journal
    things: frozenset[int]
    clock: Clock = field(default_factory=lambda: Clock("write", "score"))

    def keep(
        self,
        places: Sequence[int],
        records: Sequence[PanopticRecord],
        results: Sequence[PanopticMap],
    ) -> Outcomes:
        """The outcomes of a batch, by position in the split."""
        supersede(self.out)
        found: Outcomes = {}
        for at, record, result in zip(places, records, results, strict=True):
            self.clock.start()
            row = self.writer.add(record.image_id, record.key, result)
            self.journal.note(row)
            self.clock.lap("write")
            found[at] = row, score_row(record, row, result.ids, self.things)
            self.clock.lap("score")
        return found


def decoded(
    predictor: Predictor,
    heads: Sequence[Heads],
    photos: Sequence[Picture],
    records: Sequence[PanopticRecord],
) -> list[PanopticMap]:
    """The panoptic maps of a batch; an error names the photo."""
    sizes = [(photo.shape[0], photo.shape[1]) for photo in photos]
    try:
        return predictor.decode(heads, sizes)
    except InputError as error:
        if len(heads) > 1:  # one by one, to learn which it is
            each = zip(heads, photos, records, strict=True)
            return [decoded(predictor, [h], [p], [r])[0] for h, p, r in each]
        raise InputError(
            error.what, where=records[0].photo, remedy=error.remedy, code=error.code
        ) from None


def check_photos(records: Sequence[PanopticRecord], photos: Sequence[Picture]) -> None:
    """Raises InputError where a photo has another size than it is annotated with."""
    for record, photo in zip(records, photos, strict=True):
        found, wanted = photo.shape[:2], (record.height, record.width)
        if found != wanted:
            raise InputError(
                f"sizes differ: photo {found}, JSON {wanted}",
                where=record.photo,
                remedy="evaluation never repairs a dataset: mend or remove the image",
                code="size-mismatch",
            )


def score_row(
    record: PanopticRecord, row: Row, ids: NDArray[np.int32], things: frozenset[int]
) -> ImageScore:
    """Scores a prediction as `panoptic.json` will tell of it."""
    infos = row["segments_info"]
    return score_image(
        record.image_id,
        read_ids(record.png, (record.height, record.width)),
        record.segments,
        ids,
        {info["id"]: info["category_id"] for info in infos},
        scores={info["id"]: info["score"] for info in infos},
        things=things,
    )


def score_again(
    record: PanopticRecord, row: Row, out: Path, things: frozenset[int]
) -> ImageScore | None:
    """Scores what an earlier run predicted; None where its PNG is not as noted."""
    try:
        ids = read_ids(out / "panoptic" / row["file_name"])
        return score_row(record, row, ids, things)
    except InputError:
        return None  # predicted again, where what is wrong with the truth will be told


def chunks(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(places), size):
        yield places[start : start + size]
