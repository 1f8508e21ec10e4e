"""A trained model on a COCO panoptic split: predictions, scores, pictures, report.

    each process:  read -> network -> decode -> write, note, score      images [rank::world]
    main process:  gather in image order -> sums -> pictures, report

What was predicted before a kill is read back instead of predicted again.
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

from panoptic_cache.evaluate.metric.score import Scores, check_scorable, total_scores
from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.evaluate.prediction_files import (
    PNG_FOLDER,
    SCORES,
    Noted,
    PredictionRow,
    read_journals,
    read_png,
    sweep,
    write_json,
)
from panoptic_cache.evaluate.report.page import write_report
from panoptic_cache.evaluate.report.pictures import (
    ImageView,
    draw_pictures,
    predicted_map,
    true_map,
)
from panoptic_cache.evaluate.split.share import STEPS, predict_share
from panoptic_cache.evaluate.study.heads import Meta, save_meta
from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.process import Interrupted
from panoptic_cache.pipeline.coco import Category, CocoPanoptic
from panoptic_cache.pipeline.photo import read_annotated
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.train.ranks import Ranks

logger = logging.getLogger(__name__)


def evaluate(
    predictor: Predictor,
    dataset: CocoPanoptic,
    out: Path,
    *,
    batch: int = 8,
    overlays: int = 16,
    heads_folder: Path | None = None,
    title: str = "Panoptic quality",
    ranks: Ranks | None = None,
) -> Scores:
    """Predicts every image of a split, scores the predictions, and writes pictures and a report.

    `out` gets `panoptic/*.png` and `panoptic.json` (COCO's layout of a prediction), `scores.json`,
    `overlays/*.jpg` and `comparison.png` of the first images, and `report.html`. Until all of them
    are written, `predictions*.jsonl` lists what is done, and the same call resumes from it.

    Args:
        predictor: The trained model.
        dataset: The annotated split; its ground truth is never repaired.
        out: Folder to write.
        batch: Images that the network takes at once.
        overlays: Number of images to draw.
        heads_folder: Where to save what the heads say, see `study/heads.py`.
        title: Of the report.
        ranks: The processes that share the work; all of them call this and get the result.

    Returns:
        Scores, and the mean seconds of each step; 0 where no image had to be predicted.

    Raises:
        InputError: An image cannot be used, categories differ from the model's, or `out` holds an
            unfinished evaluation of another checkpoint.
    """
    ranks = ranks or Ranks()
    check_dataset(predictor.categories, dataset)
    identity = identity_of(predictor, dataset)
    with ExitStack() as stack:

        def begin() -> dict[ImageId, Noted]:
            if not ranks.main:
                return {}
            Storage(str(out / PNG_FOLDER)).create()
            stack.enter_context(Storage(str(out)).locked())
            if heads_folder is not None:
                config = predictor.state.config
                meta = Meta(
                    name=heads_folder.name,
                    step=predictor.state.step,
                    network_size=predictor.size,
                    encoding=config.loss.encoding,
                    harmonics=config.loss.harmonics,
                    fit=config.data.fit,
                    categories=predictor.categories,
                )
                Storage(str(heads_folder)).create()
                if heads_folder.resolve() != out.resolve():
                    stack.enter_context(Storage(str(heads_folder)).locked())
                save_meta(heads_folder, meta)
            return read_journals(out, identity)

        done = ranks.gather(begin)[0]
        if done and ranks.main:
            logger.info("%s: resumes, %d images are already predicted", out, len(done))
        try:
            shares = ranks.gather(
                lambda: predict_share(
                    predictor,
                    dataset,
                    out,
                    batch=batch,
                    ranks=ranks,
                    done=done,
                    identity=identity,
                    heads_folder=heads_folder,
                )
            )
        except Interrupted as stop:
            stop.advice = "run the same command to go on"
            raise
        outcomes = {at: outcome for share in shares for at, outcome in share.outcomes.items()}
        rows, images = zip(*(outcomes[at] for at in range(len(dataset.records))), strict=True)
        predicted = max(1, sum(share.predicted for share in shares))
        seconds = {
            step: round(sum(share.seconds[step] for share in shares) / predicted, 6)
            for step in STEPS
        }
        scores = total_scores(images, dataset.categories, seconds)
        if ranks.main:
            write_json(out, rows, predictor.categories)
            data = json.dumps(scores.to_json(), indent=1).encode() + b"\n"
            Storage(str(out)).write(SCORES, data)
            write_pictures(
                predictor,
                dataset,
                out,
                rows=rows,
                pqs=[image.stat.mean_pq for image in images],
                scores=scores,
                overlays=overlays,
                title=title,
            )
            sweep(out, rows, overlays)
    return scores


def write_pictures(
    predictor: Predictor,
    dataset: CocoPanoptic,
    out: Path,
    *,
    rows: Sequence[PredictionRow],
    pqs: Sequence[float | None],
    scores: Scores,
    overlays: int,
    title: str,
) -> None:
    """Writes overlays, `comparison.png` and the report."""
    categories = predictor.categories

    def view_of(at: int, with_heads: bool) -> ImageView:
        record = dataset.records[at]
        photo = read_annotated(record)
        instance = semantic = None
        if with_heads:  # the heads are not kept; the network runs again on these few images
            instance, semantic = predictor.head_pictures(photo)
        return ImageView(
            title=record.file_name,
            photo=photo,
            prediction=predicted_map(read_png(out, rows[at], categories)),
            truth=true_map(read_ids(record.png, bgr=record.bgr), record.segments, categories),
            instance=instance,
            semantic=semantic,
            pq=pqs[at],
        )

    names = [record.key for record in dataset.records]
    segments = [len(record.segments) for record in dataset.records]
    best, worst = draw_pictures(
        out, names, pqs, segments, view_of, categories=categories, overlays=overlays
    )
    facts = {
        "images": str(scores.images),
        "step": str(predictor.state.step),
        "input": f"{predictor.size} px",
        "network runs": f"{predictor.cost:.3g} {'a tile' if predictor.tile else 'an image'}",
        "seconds an image": f"{sum(scores.seconds_per_image.values()):.3f}",
    }
    values = scores.to_json()
    write_report(
        out, scores.pq, categories, values, best=best, worst=worst, title=title, facts=facts
    )


def identity_of(predictor: Predictor, dataset: CocoPanoptic) -> dict[str, Any]:
    """What the predictions depend on, as plain values."""
    photos = "\n".join(f"{r.photo}{' upright' * r.upright}" for r in dataset.records)
    return {
        **predictor.identity,
        "annotations": dataset.digest,
        "photos": hashlib.sha256(photos.encode(errors="surrogatepass")).hexdigest(),
    }


def check_dataset(categories: Sequence[Category], dataset: CocoPanoptic) -> None:
    """Raises InputError where a split cannot be scored with a model's categories."""
    check_scorable(dataset)

    def described(category: Category | None) -> str:
        if category is None:
            return "none"
        return f"{category.id} {category.name} ({'thing' if category.isthing else 'stuff'})"

    for ours, theirs in zip_longest(categories, dataset.categories):
        if ours != theirs:
            raise InputError(
                f"categories differ: {described(ours)} in the model, {described(theirs)} in the"
                " annotations",
                remedy="evaluate on the dataset the model was trained for",
            )
