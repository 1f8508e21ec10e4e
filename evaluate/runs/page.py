"""The page of a study: one HTML file with its table, line charts and pictures.

`page.html` holds the markup; style and pictures are those of an evaluation's report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.evaluate.report.page import environment
from panoptic_cache.evaluate.report.pictures import ImageView, panels, predicted_map, true_map
from panoptic_cache.evaluate.runs.execute import Note
from panoptic_cache.evaluate.runs.results import COLUMNS, Row
from panoptic_cache.evaluate.runs.study import Run, Study
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.photo import fitted_size, read_annotated
from panoptic_cache.pipeline.pictures import Picture, encode_picture, resized
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.train.encoding import GRID_CELLS, cell_centres, gamma
from panoptic_cache.train.runlog import round_ticks

PAGE_NAME = "study.html"
IMAGES = 4
"""Images whose heads are shown."""
PANEL = 320
"""Longer side of a picture, pixels."""

Panel = tuple[str, bytes]
"""Caption and JPEG."""

COLOURS = ("#2563c9", "#d1541e", "#4d8f3a", "#8b5bb5", "#b8860b", "#0e8a8a", "#c2378b", "#777777")
LEFT, RIGHT, TOP, BOTTOM = 44.0, 640.0, 14.0, 204.0
"""The plot's box, in units of the drawing, which is 684 wide and 236 high."""
Points = Sequence[tuple[float, float]]
Ticks = Sequence[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines in the units of the drawing, and the ticks of both axes with their positions."""

    lines: list[tuple[str, str, str]]  # Name, colour, and the points of an SVG polyline
    x_ticks: Ticks
    y_ticks: Ticks


def write_page(
    study: Study, out: Path, runs: Sequence[Run], notes: Mapping[Path, Note], rows: Sequence[Row]
) -> Path:
    """Writes `study.html`; InputError if there is no room, or a photo cannot be read."""
    codes, ratios = code_curves()
    template = environment(Path(__file__).parent).get_template("page.html")
    text = template.render(
        study=study,
        columns=COLUMNS,
        rows=rows,
        steps=draw_chart({row.variant.name: row.curve for row in rows}),
        sizes=size_chart({row.variant.name: row.sizes for row in rows}, study.base),
        codes=codes,
        ratios=ratios,
        galleries=draw_galleries(study, runs, notes),
    )
    Storage(str(out)).write(PAGE_NAME, text.encode(errors="replace"))
    return out / PAGE_NAME


def draw_galleries(
    study: Study, runs: Sequence[Run], notes: Mapping[Path, Note]
) -> list[tuple[str, list[Panel], list[Panel]]]:
    """Some images under the first seed of each variant.

    For each its title; the photo and the instance head of each model (Figure 7); and the base's
    result as in an evaluation's report (Figure 8).
    """
    dataset = read_dataset(CocoLayout.of(Path(study.coco), study.test_split))
    records = dataset.records[:: max(1, len(dataset.records) // IMAGES)][:IMAGES]
    photos = [read_annotated(record) for record in records]
    shown = [
        (record.file_name, [_panel("photo", photo)], list[Panel]())
        for record, photo in zip(records, photos, strict=True)
    ]
    drawn = set()
    for run in runs:
        is_base = run.variant.name == study.base
        done = run.seed == study.seeds[0] and notes[run.folder].status == "done"
        if not done or (run.train_folder in drawn and not is_base):
            continue
        drawn.add(run.train_folder)
        predictor = Predictor(run.train_folder)
        for record, photo, (title, instance, result) in zip(records, photos, shown, strict=True):
            codes, labels = predictor.head_pictures(photo)
            instance.append(_panel(run.variant.name, resized(codes, photo.shape[:2], smooth=False)))
            if is_base:
                ids = read_ids(record.png, bgr=record.bgr)
                truth = true_map(ids, record.segments, dataset.categories)
                found = predicted_map(predictor([photo])[0])
                view = ImageView(title, photo, truth, found, codes, labels)
                result += [_panel(*tile) for tile in panels(view, dataset.categories, PANEL)]
    return shown


def _panel(caption: str, picture: Picture) -> Panel:
    size = fitted_size(picture.shape[0], picture.shape[1], PANEL, "longest")
    return caption, encode_picture(resized(picture, size), ".jpg")


def draw_chart(series: Mapping[str, Points], x_ticks: Ticks = ()) -> Chart | None:
    """Scales lines to the plot; None where there is nothing to draw."""
    every = [point for points in series.values() for point in points]
    if not every:
        return None
    xs = [x for x, _ in (*every, *x_ticks)]
    x_low, x_high = min(xs), max(xs)
    heights = round_ticks(min(y for _, y in every), max(y for _, y in every))
    y_low, y_high = heights[0], heights[-1]

    def x_at(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (x - x_low) / ((x_high - x_low) or 1), 1)

    def y_at(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - y_low) / (y_high - y_low), 1)

    lines = [
        (name, COLOURS[at % len(COLOURS)], " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points))
        for at, (name, points) in enumerate(series.items())
        if points
    ]
    marks = x_ticks or [(x, f"{x:g}") for x in round_ticks(x_low, x_high) if x_low <= x <= x_high]
    return Chart(
        lines, [(x_at(x), text) for x, text in marks], [(y_at(y), f"{y:g}") for y in heights]
    )


def size_chart(sizes: Mapping[str, Sequence[tuple[str, float]]], base: str) -> Chart | None:
    """IoU of things by size, each variant less the base, percent (Figures 5 and 6)."""
    reference = dict(sizes.get(base, ()))
    at = {name: float(number) for number, name in enumerate(reference)}
    series = {
        variant: [(at[name], iou - reference[name]) for name, iou in rows if name in at]
        for variant, rows in sizes.items()
    }
    return draw_chart(series, [(x, name) for name, x in at.items()])


def code_curves(harmonics: Sequence[int] = (2, 3, 4, 5)) -> tuple[Chart | None, dict[str, float]]:
    """Distances of the codes of all cells from the right-most one (Figure 3).

    With them the distance of void for L = 4. The second result is the contrast of each code, its
    largest over its smallest distance from the right-most cell.
    """
    cells = cell_centres(GRID_CELLS).double()  # (80,)
    distances = {"coordinate, L1": cells[-1] - cells}
    for count in harmonics:
        code = gamma(cells, count)  # (80, 2L)
        distances[f"positional, L = {count}"] = torch.linalg.vector_norm(code - code[-1], dim=-1)
    series: dict[str, Points] = {
        name: [*zip(cells.tolist(), values.tolist(), strict=True)]
        for name, values in distances.items()
    }
    away = float(torch.linalg.vector_norm(gamma(cells[-1], 4)))  # void is the zero vector
    series["void, L = 4"] = [(float(cells[0]), away), (float(cells[-1]), away)]
    ratios = {name: float(values.max() / values[:-1].min()) for name, values in distances.items()}
    return draw_chart(series), ratios
