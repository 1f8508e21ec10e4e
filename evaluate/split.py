"""A trained model on a COCO panoptic split: predictions, scores, pictures, report.

    each process:  read -> network -> decode -> write, note, score      images [rank::world]
    main process:  gather in image order -> sums -> pictures, report

What was predicted before a kill is read back instead of predicted again, see `batches.Pass`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate import prediction_files as files
from panoptic_cache.evaluate.batches import STEPS, Item, Pass
from panoptic_cache.evaluate.metric.score import (
    ImageScore,
    Scores,
    check_scorable,
    score_image,
    thing_ids,
    total_scores,
)
from panoptic_cache.evaluate.predict import Heads, Predictor
from panoptic_cache.evaluate.report.page import write_report
from panoptic_cache.evaluate.report.pictures import (
    ImageView,
    draw_pictures,
    predicted_map,
    true_map,
)
from panoptic_cache.evaluate.study.heads import ImageHeads, Meta, save_heads, save_meta
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category, CocoPanoptic, PanopticRecord
from panoptic_cache.pipeline.photo import read_annotated
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.pipeline.tiles import Window, tile_key, windows
from panoptic_cache.train.ranks import Ranks


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

    Heads are saved in `heads_folder`, see `study/heads.py`. All processes of `ranks` call this and
    get the scores, with the mean seconds of each step; 0 where no image had to be predicted. Raises
    InputError where an image cannot be used, categories differ from the model's, or `out` holds an
    unfinished evaluation of another checkpoint.
    """
    ranks = ranks or Ranks()
    check_dataset(predictor.categories, dataset)
    records, things = dataset.records, thing_ids(dataset.categories)

    def item(at: int, record: PanopticRecord) -> Item:
        paths = [record.photo, record.png, out / files.PNG_FOLDER / f"{record.key}.png"]
        if heads_folder is not None:
            places: Sequence[Window | None] = [None]
            if predictor.tile is not None:
                size = record.height, record.width
                places = [*windows(size, predictor.tile, predictor.overlap)]
            paths += [heads_folder / f"{heads_name(record, place)}.npz" for place in places]
        return Item((at, 0), record.photo, record.image_id, record.key, tuple(paths))

    @lru_cache(1)  # for the tiles of an image
    def truth_of(at: int) -> NDArray[np.int32]:
        return read_ids(records[at].png, bgr=records[at].bgr)

    def save(item: Item, window: Window | None, heads: Heads) -> None:
        assert heads_folder is not None
        record, ids = records[item.place[0]], truth_of(item.place[0])
        segments = record.segments
        if window is not None:
            ids = ids[window.place]
            segments = tuple(each for each in segments if (ids == each.id).any())
        name = heads_name(record, window)
        save_heads(heads_folder, ImageHeads(name, heads.instance, heads.semantic, ids, segments))

    def score(item: Item, row: files.PredictionRow, ids: NDArray[np.int32]) -> ImageScore:
        record = records[item.place[0]]
        return score_image(
            record.image_id,
            read_ids(record.png, (record.height, record.width), bgr=record.bgr),
            record.segments,
            ids,
            {segment.id: segment.category_id for segment in row.segments_info},
            scores={segment.id: segment.score for segment in row.segments_info},
            things=things,
        )

    def prepare(stack: ExitStack) -> None:
        if heads_folder is None:
            return
        Storage(str(heads_folder)).create()
        if heads_folder.resolve() != out.resolve():
            stack.enter_context(Storage(str(heads_folder)).locked())
        save_meta(heads_folder, heads_meta(predictor, heads_folder.name))

    work = Pass(
        *(predictor, out, ranks, identity_of(predictor, dataset), min(batch, len(records))),
        save_heads=None if heads_folder is None else save,
        score=score,
    )
    with work.locked(prepare):
        items = [item(at, record) for at, record in enumerate(records)]
        pictures = work.read(items, lambda one: read_annotated(records[one.place[0]]))
        shares = work.run(pictures, "evaluate", len(records), "images")
        rows_of = {place: row for share in shares for place, row in share.rows.items()}
        rows = [row for _, row in sorted(rows_of.items())]
        scores_of = {place: one for share in shares for place, one in share.scores.items()}
        images = [image for _, image in sorted(scores_of.items())]
        predicted = max(1, sum(share.predicted for share in shares))
        seconds = {
            step: round(sum(share.seconds[step] for share in shares) / predicted, 6)
            for step in STEPS
        }
        scores = total_scores(images, dataset.categories, seconds)
        if ranks.main:
            names = [record.file_name for record in dataset.records]
            files.write_json(out, rows, predictor.categories, names)
            data = json.dumps(scores.to_json(), indent=1).encode() + b"\n"
            Storage(str(out)).write(files.SCORES, data)
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
            files.sweep(out, rows, overlays)
    return scores


def heads_name(record: PanopticRecord, window: Window | None) -> str:
    """The file, without ending, that holds what the network says of an image or of a tile."""
    return record.key if window is None else tile_key(record.key, window.rows[0], window.columns[0])


def heads_meta(predictor: Predictor, name: str) -> Meta:
    """Where saved heads come from."""
    config = predictor.state.config
    return Meta(
        name=name,
        step=predictor.state.step,
        network_size=predictor.size,
        encoding=config.loss.encoding,
        harmonics=config.loss.harmonics,
        fit=config.data.fit,
        categories=predictor.categories,
    )


def write_pictures(
    predictor: Predictor,
    dataset: CocoPanoptic,
    out: Path,
    *,
    rows: Sequence[files.PredictionRow],
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
            prediction=predicted_map(files.read_png(out, rows[at], categories)),
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
    write_report(out, values, categories, best=best, worst=worst, title=title, facts=facts)


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
