"""The page of a study: one HTML file with its table, curves and pictures.

`page.html` holds the markup; style and pictures are those of an evaluation's report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.evaluate.report.page import environment
from panoptic_cache.evaluate.report.pictures import ImageView, panels, predicted_map, true_map
from panoptic_cache.evaluate.runs.charts import Chart, code_curves, draw_chart, size_chart
from panoptic_cache.evaluate.runs.execute import Note
from panoptic_cache.evaluate.runs.results import MEASURES, Row
from panoptic_cache.evaluate.runs.study import Run, Study
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.photo import fitted_size, read_annotated
from panoptic_cache.pipeline.pictures import Picture, encode_picture, resized
from panoptic_cache.pipeline.png import read_ids

PAGE_NAME = "study.html"
IMAGES = 4
"""Images whose heads are shown."""
PANEL = 320
"""Longer side of a picture, pixels."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture of the page."""

    caption: str
    jpeg: bytes


@dataclass(frozen=True, slots=True)
class Gallery:
    """One image under all variants."""

    title: str
    instance: tuple[Panel, ...]  # The photo, then the instance head of each variant (Figure 7)
    result: tuple[Panel, ...]  # Of the base, as in an evaluation's report (Figure 8)


def write_page(
    study: Study, out: Path, runs: Sequence[Run], notes: Mapping[Path, Note], rows: Sequence[Row]
) -> Path:
    """Writes `study.html`.

    Raises:
        InputError: No space, no permission, or a photo of the test split cannot be read.
    """
    base = study.base or study.variants[0].name
    distances, ratios = code_curves()
    charts: list[tuple[str, str, Chart | None]] = [
        (
            "PQ over steps",
            "All PQ of samples of the test split during training, percent, mean over the seeds.",
            draw_chart({row.variant.name: row.curve for row in rows}),
        ),
        (
            "Things by size",
            f"Mean IoU of true instances with the best predicted one, less that of {base!r},"
            " percent. The size is the side of a square of the same area (Figures 5 and 6 of the"
            " paper).",
            size_chart({row.variant.name: row.sizes for row in rows}, base),
        ),
        (
            "How far codes lie apart",
            "Distance of the code of each of the 80 cells of an axis from that of the right-most"
            " one (Figure 3). Contrast, the largest distance over the smallest: "
            + "; ".join(f"{name}: {value:.3g}" for name, value in ratios.items())
            + ". The paper gives 79 for the coordinate and about 5 for L = 4.",
            distances,
        ),
    ]
    text = (
        environment(Path(__file__).parent)
        .get_template("page.html")
        .render(
            study=study,
            base=base,
            measures=[*MEASURES],
            rows=rows,
            charts=charts,
            galleries=draw_galleries(study, runs, notes, base),
        )
    )
    Storage(str(out)).write(PAGE_NAME, text.encode(errors="replace"))
    return out / PAGE_NAME


def draw_galleries(
    study: Study, runs: Sequence[Run], notes: Mapping[Path, Note], base: str
) -> list[Gallery]:
    """The heads of the same images under the first seed of each variant."""
    dataset = read_dataset(CocoLayout.of(Path(study.coco), study.test_split))
    chosen = dataset.records[:: max(1, len(dataset.records) // IMAGES)][:IMAGES]
    photos = [read_annotated(record) for record in chosen]
    instance = [[_panel("photo", photo)] for photo in photos]
    result: list[list[Panel]] = [[] for _ in photos]
    first = {run.variant.name: run for run in runs if run.seed == study.seeds[0]}
    for variant in study.variants:
        run = first[variant.name]
        if notes[run.folder].status != "done" or variant.trained_by:
            continue
        predictor = Predictor(run.train_folder)
        for at, (photo, record) in enumerate(zip(photos, chosen, strict=True)):
            codes, labels = predictor.head_pictures(photo)
            instance[at].append(_panel(variant.name, resized(codes, photo.shape[:2], smooth=False)))
            if variant.name == base:
                view = ImageView(
                    record.file_name,
                    photo,
                    true_map(
                        read_ids(record.png, bgr=record.bgr), record.segments, dataset.categories
                    ),
                    predicted_map(predictor([photo])[0]),
                    codes,
                    labels,
                )
                result[at] = [_panel(*tile) for tile in panels(view, dataset.categories, PANEL)]
    return [
        Gallery(record.file_name, tuple(instance[at]), tuple(result[at]))
        for at, record in enumerate(chosen)
    ]


def _panel(caption: str, picture: Picture) -> Panel:
    size = fitted_size(picture.shape[0], picture.shape[1], PANEL, "longest")
    return Panel(caption, encode_picture(resized(picture, size), ".jpg"))
