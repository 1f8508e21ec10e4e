"""Predictions as files: COCO panoptic PNGs and JSON, and overlays to look at."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.photos import read_ahead
from panoptic_cache.evaluate.predict import Predictor
from panoptic_cache.evaluate.report.panels import predicted_map, write_overlay
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.progress import progress
from panoptic_cache.pipeline.coco import Category, ImageId
from panoptic_cache.pipeline.pictures.colours import encode_picture
from panoptic_cache.pipeline.png import ids_to_rgb
from panoptic_cache.train.guards import memory_advice

logger = logging.getLogger(__name__)

LONGEST_STEM = 200
"""Bytes; file systems take 255 for a whole name."""


@dataclass
class PredictionWriter:
    """Writes panoptic PNGs as they come and their JSON last.

    Attributes:
        folder: Gets `panoptic/*.png` and `panoptic.json`, COCO's layout of a prediction.
        categories: By label.
        rows: Those noted so far.
    """

    folder: Path
    categories: Sequence[Category]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        Storage(str(self.folder / "panoptic")).create()

    def add(self, image_id: ImageId, name: str, result: PanopticMap) -> dict[str, Any]:
        """Writes the PNG of one image; notes and returns its row."""
        png = encode_picture(ids_to_rgb(result.ids))
        Storage(str(self.folder / "panoptic")).write(f"{name}.png", png)
        row = {
            "image_id": image_id,
            "file_name": f"{name}.png",
            "segments_info": [
                {
                    "id": segment.id,
                    "category_id": self.categories[segment.label].id,
                    "area": segment.area,
                    "score": round(segment.score, 4),
                }
                for segment in result.segments
            ],
        }
        self.rows.append(row)
        return row

    def finish(self, rows: Sequence[dict[str, Any]] | None = None) -> Path:
        """Writes `panoptic.json`, of the rows noted or of those given, and returns its path."""
        categories = [
            {"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in self.categories
        ]
        annotations = self.rows if rows is None else rows
        content = {"annotations": annotations, "categories": categories}
        Storage(str(self.folder)).write("panoptic.json", json.dumps(content).encode())
        return self.folder / "panoptic.json"


@dataclass(frozen=True, slots=True)
class Written:
    """What `predict_pictures` did.

    Attributes:
        json: The prediction's JSON.
        pictures: How many are in it.
        left_out: How many are not.
    """

    json: Path
    pictures: int
    left_out: int


def predict_pictures(predictor: Predictor, paths: Sequence[Path], out: Path) -> Written:
    """Segments pictures: `overlays/*.jpg` with labels, `panoptic/*.png`, `panoptic.json`.

    Pictures with one stem get a number behind it. One that cannot be read, or of which the network
    says nothing finite, is left out with a warning: it costs only itself.

    Args:
        predictor: The trained model.
        paths: Of the pictures.
        out: Where to write.

    Raises:
        InputError: All pictures are left out.
    """
    writer = PredictionWriter(out, predictor.categories)
    Storage(str(out / "overlays")).create()
    names = unique_names(path.stem for path in paths)
    bad: list[InputError] = []
    with (
        progress("predict", len(paths), "pictures") as advance,
        ExitStack() as stack,
    ):
        for path, name, reading in zip(paths, names, read_ahead(paths, 4), strict=True):
            try:
                photo = reading.result()
                with memory_advice("ask for fewer or smaller --sizes, or another --device"):
                    result = predictor([photo])[0]
            except InputError as error:
                error.where = error.where or str(path)
                if len(paths) > 1:
                    logger.warning("left out: %s", error)
                bad.append(error)
                advance()
                continue
            writer.add(f"{name}{path.suffix}", name, result)
            if len(writer.rows) == 1:
                stack.callback(writer.finish)  # of what there is, also when it is stopped
            overlay = out / "overlays" / f"{name}.jpg"
            write_overlay(overlay, photo, predicted_map(result), predictor.categories)
            advance()
    if len(bad) == len(paths):
        raise bad[0] if len(bad) == 1 else InputError(f"none of {len(bad)} pictures can be used")
    return Written(out / "panoptic.json", len(paths) - len(bad), len(bad))


def unique_names(stems: Iterable[str]) -> list[str]:
    """The stems, with `_2`, `_3` behind those that were there before.

    They are cut where a file system could not take them with what comes behind.
    """
    taken: set[str] = set()
    names = []
    for stem in (os.fsencode(each)[:LONGEST_STEM].decode(errors="ignore") for each in stems):
        choices = chain([stem], (f"{stem}_{number}" for number in count(2)))
        names.append(next(name for name in choices if name not in taken))
        taken.add(names[-1])
    return names
