"""What there is to look at after an evaluation, drawn from the predictions on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panoptic_cache.evaluate.decoder.decode import DecodedSegment, PanopticMap
from panoptic_cache.evaluate.photos import read_picture
from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.evaluate.report.gallery import Gallery
from panoptic_cache.evaluate.report.panels import (
    ImageView,
    comparison_sheet,
    predicted_map,
    true_map,
    write_overlay,
)
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import Category, PanopticRecord
from panoptic_cache.pipeline.pictures.colours import save_picture
from panoptic_cache.pipeline.png import read_ids

COMPARED = 6
"""Images on the sheet of truth beside prediction."""


def read_prediction(
    folder: Path, row: Mapping[str, Any], categories: Sequence[Category]
) -> PanopticMap:
    """A written prediction.

    Args:
        folder: Of the panoptic PNGs.
        row: Of `panoptic.json`.
        categories: By label.

    Raises:
        InputError: The PNG is missing or damaged.
    """
    by_id = {category.id: category for category in categories}
    segments = []
    for info in row["segments_info"]:
        category = by_id[info["category_id"]]
        segments.append(
            DecodedSegment(
                info["id"], category.label, category.isthing, info["score"], info["area"]
            )
        )
    return PanopticMap(read_ids(folder / row["file_name"]), tuple(segments))


def draw_pictures(
    predictor: Predictor,
    records: Sequence[PanopticRecord],
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[float | None],
    out: Path,
    *,
    overlays: int,
) -> Gallery:
    """Writes `overlays/*.jpg` and `comparison.png` of the first images; figures of some others.

    Args:
        predictor: Runs again on the few images whose heads are shown.
        records: The images.
        rows: Their predictions, as in `panoptic.json`.
        scores: Their PQ.
        out: Folder of the evaluation.
        overlays: Images to draw.

    Returns:
        The best and the worst images.
    """
    gallery = Gallery(predictor.categories)
    Storage(str(out / "overlays")).create()
    views: list[ImageView] = []
    shown = extremes(scores, gallery.limit)
    for number in sorted({*range(min(max(overlays, COMPARED), len(records))), *shown}):
        record = records[number]
        view = _view(predictor, record, rows[number], scores[number], out, heads=number in shown)
        if number in shown:
            gallery.add(view)
        if number < COMPARED:
            views.append(view)
        if number < overlays:
            path = out / "overlays" / f"{record.key}.jpg"
            write_overlay(path, view.photo, view.prediction, predictor.categories)
    save_picture(out / "comparison.png", comparison_sheet(views, predictor.categories))
    return gallery


def extremes(scores: Sequence[float | None], limit: int) -> set[int]:
    """Positions of the `limit` best and the `limit` worst; an earlier one wins a tie."""
    defined = [(score, number) for number, score in enumerate(scores) if score is not None]
    best = sorted(defined, key=lambda row: (-row[0], row[1]))[:limit]
    worst = sorted(defined)[:limit]
    return {number for _, number in (*best, *worst)}


def _view(
    predictor: Predictor,
    record: PanopticRecord,
    row: Mapping[str, Any],
    pq: float | None,
    out: Path,
    *,
    heads: bool,
) -> ImageView:
    photo = read_picture(record.photo, upright=False)
    result = read_prediction(out / "panoptic", row, predictor.categories)
    instance = semantic = None
    if heads:
        instance, semantic = predictor.head_pictures(predictor.heads([photo])[0])
    return ImageView(
        title=record.file_name,
        photo=photo,
        prediction=predicted_map(result),
        truth=true_map(read_ids(record.png), record.segments, predictor.categories),
        instance=instance,
        semantic=semantic,
        pq=pq,
    )
