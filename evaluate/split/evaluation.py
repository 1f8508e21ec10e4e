"""A checkpoint on a COCO panoptic split: predictions, scores, pictures, report.

    slice of a process -> predict, write, note, score -> gather in image order -> sums, pictures

Each process takes the images [rank::world]. What was predicted before a kill is read back instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

from panoptic_cache.evaluate.metric.score import ImageScore, Outcome, check_scorable, total_scores
from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.evaluate.report.drawing import draw_pictures
from panoptic_cache.evaluate.report.page import write_report
from panoptic_cache.evaluate.split.journal import Row, journal_files, read_journals
from panoptic_cache.evaluate.split.share import predict_slice
from panoptic_cache.evaluate.split.superseded import sweep
from panoptic_cache.evaluate.writer import PredictionWriter
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.stopping import Interrupted
from panoptic_cache.pipeline.coco import Category, CocoPanoptic, ImageId
from panoptic_cache.train.ranks import Ranks

logger = logging.getLogger(__name__)


def evaluate(
    predictor: Predictor,
    dataset: CocoPanoptic,
    out: Path,
    *,
    batch: int = 8,
    overlays: int = 16,
    title: str = "Panoptic quality",
    ranks: Ranks | None = None,
) -> Outcome:
    """Predicts every image of a split, scores, and writes what there is to look at.

    `out` gets `panoptic/*.png` and `panoptic.json` (COCO's layout of a prediction), `scores.json`,
    `overlays/*.jpg` and `comparison.png` of the first images, and `report.html`. Until all of that
    is there, `predictions*.jsonl` tell what is done, and the same call goes on from it.

    Args:
        predictor: The trained model.
        dataset: The annotated split; ground truth is never mended.
        out: Where to write.
        batch: Images the network takes at once.
        overlays: Images to draw.
        title: Of the report.
        ranks: The processes that share the work; all of them call this and get the result.

    Returns:
        With the seconds of `read`, `network`, `decode`, `write` and `score`; 0 where all images had
        been predicted before.

    Raises:
        InputError: An image cannot be used, categories differ from the model's, or `out` holds an
            unfinished evaluation of another checkpoint.
    """
    ranks = ranks or Ranks()
    check_dataset(predictor.categories, dataset)
    identity = identity_of(predictor, dataset)
    with ExitStack() as stack:

        def begin() -> dict[ImageId, Row]:
            if ranks.main:
                Storage(str(out / "panoptic")).create()
                stack.enter_context(Storage(str(out)).locked())
            return read_journals(out, identity) if ranks.main else {}

        done = ranks.gather(begin)[0]
        if done and ranks.main:
            logger.info("%s: goes on, %d images are predicted already", out, len(done))
        try:
            slices = ranks.gather(
                lambda: predict_slice(
                    predictor, dataset, out, batch=batch, ranks=ranks, done=done, identity=identity
                )
            )
        except Interrupted as stop:
            stop.advice = "run the same command to go on"
            raise
        outcomes = {at: outcome for part in slices for at, outcome in part.outcomes.items()}
        rows, images = zip(*(outcomes[at] for at in range(len(dataset.records))), strict=True)
        predicted = max(1, sum(part.predicted for part in slices))
        outcome = Outcome(
            total_scores(images, dataset.categories),
            len(images),
            {
                name: round(sum(part.seconds[name] for part in slices) / predicted, 6)
                for name in slices[0].seconds
            },
        )
        if ranks.main:
            finish(
                predictor,
                dataset,
                out,
                rows=rows,
                images=images,
                outcome=outcome,
                overlays=overlays,
                title=title,
            )
    return outcome


def identity_of(predictor: Predictor, dataset: CocoPanoptic) -> dict[str, Any]:
    """What the predictions depend on; plain values."""
    photos = "\n".join(str(record.photo) for record in dataset.records)
    return {
        **predictor.identity,
        "annotations": dataset.digest,
        "photos": hashlib.sha256(photos.encode(errors="surrogatepass")).hexdigest(),
    }


def finish(
    predictor: Predictor,
    dataset: CocoPanoptic,
    out: Path,
    *,
    rows: Sequence[Row],
    images: Sequence[ImageScore],
    outcome: Outcome,
    overlays: int,
    title: str,
) -> None:
    """Writes JSONs, pictures and the report; removes an earlier one's and the journals last."""
    PredictionWriter(out, predictor.categories).finish(rows)
    scores = json.dumps(outcome.to_json(), indent=1).encode() + b"\n"
    Storage(str(out)).write("scores.json", scores)
    values = [image.value for image in images]
    gallery = draw_pictures(predictor, dataset.records, rows, values, out, overlays=overlays)
    facts = {
        "images": str(outcome.images),
        "step": str(predictor.state.step),
        "input": f"{predictor.size} px",
        "network runs": f"{predictor.cost:.3g} an image",
        "seconds an image": f"{sum(outcome.seconds_per_image.values()):.3f}",
    }
    write_report(
        out,
        outcome.pq,
        predictor.categories,
        gallery,
        title=title,
        facts=facts,
        values=outcome.to_json(),
    )
    sweep(out, rows, overlays)
    for path in journal_files(out):
        path.unlink()


def check_dataset(categories: Sequence[Category], dataset: CocoPanoptic) -> None:
    """Raises InputError where a split cannot be scored with a model's categories."""
    check_scorable(dataset)
    for ours, theirs in zip_longest(categories, dataset.categories):
        if ours != theirs:
            raise InputError(
                f"categories differ: {_described(ours)} in the model, {_described(theirs)} in the"
                " annotations",
                remedy="evaluate on the dataset the model was trained for",
            )


def _described(category: Category | None) -> str:
    if category is None:
        return "none"
    return f"{category.id} {category.name} ({'thing' if category.isthing else 'stuff'})"
