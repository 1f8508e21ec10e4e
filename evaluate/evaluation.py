"""A checkpoint on a COCO panoptic split: predictions, PQ, overlays, report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.gallery import Gallery
from evaluate.page import write_report
from evaluate.pq import PQResult, PQStat, match_image, summarize
from evaluate.predict import PredictionWriter, Predictor, read_ahead
from evaluate.report import (
    ImageView,
    comparison_sheet,
    image_pq,
    predicted_map,
    true_map,
    write_overlay,
)
from pipeline.coco import Category, CocoPanoptic, PanopticRecord, read_ids
from pipeline.draw import save_picture
from pipeline.errors import InputError
from pipeline.progress import progress
from pipeline.storage import Storage

COMPARED = 6
"""Images on the sheet of truth beside prediction."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
        pq: The metric.
        images: How many were predicted.
        seconds_per_image: Mean wall time of `read`, `network`, `decode`, `write` and `score`.
    """

    pq: PQResult
    images: int
    seconds_per_image: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The object that `evaluate --json` prints."""
        return {
            **self.pq.to_json(),
            "images": self.images,
            "seconds_per_image": self.seconds_per_image,
        }


def evaluate(
    predictor: Predictor,
    dataset: CocoPanoptic,
    out: Path,
    *,
    batch: int = 8,
    overlays: int = 16,
    title: str = "Panoptic quality",
) -> Evaluation:
    """Predicts every image of a split, scores, and writes what there is to look at.

    `out` gets `panoptic/*.png` and `panoptic.json` (COCO's layout of a prediction), `scores.json`,
    `overlays/*.jpg` and `comparison.png` of the first images, and `report.html`.

    Args:
        predictor: The trained model.
        dataset: The annotated split; ground truth is never mended.
        out: Where to write.
        batch: Images the network takes at once.
        overlays: Images to draw.
        title: Of the report.

    Raises:
        InputError: An image cannot be used, or categories differ from the model's.
    """
    check_dataset(predictor.categories, dataset)
    clock = Clock()
    writer = PredictionWriter(out, predictor.categories)
    Storage(str(out / "overlays")).create()
    gallery, views = Gallery(predictor.categories), list[ImageView]()
    total, done = PQStat(), 0
    photos = read_ahead([record.photo for record in dataset.records], 2 * batch, upright=False)
    with progress("evaluate", len(dataset.records), "images") as advance:
        for records in chunks(dataset.records, batch):
            clock.start()
            pictures = [next(photos) for _ in records]
            clock.lap("read")
            all_heads = predictor.heads(pictures)
            clock.lap("network")
            for record, photo, heads in zip(records, pictures, all_heads, strict=True):
                clock.start()
                result = predictor.decode(heads, (photo.shape[0], photo.shape[1]))
                clock.lap("decode")
                writer.add(record.image_id, record.key, result)
                clock.lap("write")
                truth = read_ids(record.png)
                classes = {s.id: predictor.categories[s.label].id for s in result.segments}
                stat = match_image(
                    record.image_id, truth, record.segments, result.ids, classes
                ).stat
                total += stat
                clock.lap("score")
                score = image_pq(stat)
                if done < overlays or gallery.wants(score):
                    instance, semantic = predictor.head_pictures(heads)
                    view = ImageView(
                        title=record.file_name,
                        photo=photo,
                        prediction=predicted_map(result),
                        truth=true_map(truth, record.segments, predictor.categories),
                        instance=instance,
                        semantic=semantic,
                        pq=score,
                    )
                    gallery.add(view)
                    if done < overlays:
                        path = out / "overlays" / f"{record.key}.jpg"
                        write_overlay(path, photo, view.prediction, predictor.categories)
                    if len(views) < COMPARED:
                        views.append(view)
                done += 1
            advance(len(records))
    writer.finish()
    outcome = Evaluation(summarize(total, dataset.categories), done, clock.per_unit(max(1, done)))
    scores = json.dumps(outcome.to_json(), indent=1).encode() + b"\n"
    Storage(str(out)).write("scores.json", scores)
    save_picture(out / "comparison.png", comparison_sheet(views, predictor.categories))
    facts = {
        "images": str(done),
        "step": str(predictor.state.step),
        "input": f"{predictor.size} px",
        "seconds an image": f"{sum(outcome.seconds_per_image.values()):.3f}",
    }
    write_report(out, outcome.pq, predictor.categories, gallery, title=title, facts=facts)
    return outcome


def check_dataset(categories: Sequence[Category], dataset: CocoPanoptic) -> None:
    """Raises InputError where a split cannot be scored with a model's categories."""
    if dataset.rejections:
        first = dataset.rejections[0]
        raise InputError(
            f"{len(dataset.rejections)} images cannot be scored; the first is {first.image_id}:"
            f" {first.message}",
            where=first.file,
            remedy="evaluation never repairs ground truth: mend or remove them",
        )
    if not dataset.records:
        raise InputError("the split has no images", remedy="choose another split")
    if tuple(categories) != dataset.categories:
        ours, theirs = ({c.id for c in side} for side in (categories, dataset.categories))
        raise InputError(
            f"categories differ: {len(ours)} in the model, {len(theirs)} in the annotations",
            where="categories",
            remedy="evaluate on the dataset the model was trained for",
        )


def chunks(records: Sequence[PanopticRecord], size: int) -> Iterator[Sequence[PanopticRecord]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(records), size):
        yield records[start : start + size]


class Clock:
    """Adds up wall time by name."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begins a lap."""
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a lap, and begins the next."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def per_unit(self, units: int) -> dict[str, float]:
        """Seconds by name, divided by a number of units."""
        return {name: round(seconds / units, 6) for name, seconds in self._seconds.items()}
