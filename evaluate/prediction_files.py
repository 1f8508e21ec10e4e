"""Predictions on disk in COCO's layout, and what a run that was killed needs to go on.

    panoptic/KEY.png       segment ids of one image
    panoptic.json          photos, and their segments: id, category, area and score
    predictions.jsonl      journal of the main process; predictions-1.jsonl of the next, ...
    superseded.json        `panoptic.json` of an earlier evaluation, until this run is complete

The first line of a journal says what the predictions depend on. Each further line is an image's row
of `panoptic.json`, written after its PNG, with the state of the files that it depends on. Journals
are removed when the run is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TextIO

from msgspec import Struct, to_builtins

from panoptic_cache.evaluate.decoder.decode import DecodedSegment, PanopticMap
from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_write, no_links, stamp
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures import encode_picture
from panoptic_cache.pipeline.png import ids_to_rgb, read_ids
from panoptic_cache.pipeline.sources import is_video

PNG_FOLDER, JSON_NAME, OVERLAYS = "panoptic", "panoptic.json", "overlays"
SCORES, SUPERSEDED = "scores.json", "superseded.json"
_JOURNAL = re.compile(r"predictions(-\d+)?\.jsonl")


class SegmentRow(Struct, frozen=True):
    """A predicted segment; `area` in pixels, `score` in [0, 1]."""

    id: int
    category_id: int
    area: int
    score: float


class PredictionRow(Struct, frozen=True, omit_defaults=True):
    """A predicted image, as COCO's `annotations` list it; `file_name` is the PNG's."""

    image_id: ImageId
    file_name: str
    segments_info: list[SegmentRow]
    source: str = ""  # Path of any photo or video, as it was given


class Noted(Struct, frozen=True):
    """A line of a journal."""

    row: PredictionRow
    files: list[int]  # See `stamp`: of the files that the row depends on

    def holds(self, name: str, files: Sequence[Path]) -> bool:
        """Whether it is of the PNG of this name, and no file has changed since."""
        return self.row.file_name == f"{name}.png" and self.files == stamp(*files)


class _Rows(Struct):
    """The part of `panoptic.json` that says what to remove."""

    annotations: list[PredictionRow]


def write_png(
    folder: Path,
    image_id: ImageId,
    name: str,
    result: PanopticMap,
    categories: Sequence[Category],
    *,
    source: str = "",
) -> PredictionRow:
    """Writes `NAME.png`, and returns its row of `panoptic.json`."""
    path = folder / PNG_FOLDER / f"{name}.png"
    storage = Storage(str(path.parent))  # a video has a folder of its own
    storage.create()
    storage.write(path.name, encode_picture(ids_to_rgb(result.ids)))
    segments = [
        SegmentRow(one.id, categories[one.label].id, one.area, round(one.score, 4))
        for one in result.segments
    ]
    return PredictionRow(image_id, f"{name}.png", segments, source)


def write_json(
    folder: Path,
    rows: Sequence[PredictionRow],
    categories: Sequence[Category],
    photos: Sequence[str] | None = None,
) -> None:
    """Writes `panoptic.json`, which is a dataset, too, with the photos' folder.

    `photos` are their names as annotated, in the order of the rows. Those of any photos are paths
    below the folder that all of them share.
    """
    if photos is None:
        paths = [os.path.abspath(row.source) for row in rows]  # noqa: PTH100 (of text)
        top = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
        photos = [Path(os.path.relpath(path, top)).as_posix() for path in paths]
    content = {
        "images": [
            {"id": row.image_id, "file_name": name}
            for row, name in zip(rows, photos, strict=True)
            if not is_video(Path(name))
        ],
        "annotations": to_builtins(rows),
        "categories": [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in categories],
    }
    Storage(str(folder)).write(JSON_NAME, json.dumps(content).encode())


def read_png(folder: Path, row: PredictionRow, categories: Sequence[Category]) -> PanopticMap:
    """Reads back what `write_png` wrote; InputError where the PNG is missing or damaged."""
    of = {category.id: category for category in categories}
    segments = tuple(
        DecodedSegment(s.id, of[s.category_id].label, of[s.category_id].isthing, s.score, s.area)
        for s in row.segments_info
    )
    return PanopticMap(read_ids(folder / PNG_FOLDER / row.file_name), segments)


class Journal:
    """Notes predictions as they are made; a context manager.

    `identity` is what all of them depend on, as plain values, and `rank` this process' number.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self._path = folder / (f"predictions-{rank}.jsonl" if rank else "predictions.jsonl")
        self._identity = identity
        self._file: TextIO | None = None

    def note(self, row: PredictionRow, files: Sequence[Path] = ()) -> None:
        """Adds a prediction, and the state of the files that it depends on.

        The line is with the operating system on return, safe from a kill.
        """
        lines = json.dumps(to_builtins(Noted(row, stamp(*files)))) + "\n"
        try:
            if self._file is None:  # a run that predicts nothing leaves no journal
                self._file = open(self._path, "a+", opener=no_links)  # noqa: SIM115
                self._file.seek(0)
                complete = self._file.read().rpartition("\n")[0]  # a kill may cut the last line
                self._file.truncate(len(f"{complete}\n".encode()) if complete else 0)
                if not complete:
                    lines = f"{json.dumps(self._identity)}\n{lines}"
            self._file.write(lines)
            self._file.flush()
        except OSError as error:
            raise cannot_write(error, self._path) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # `note` has reported what could not be written
            if self._file is not None:
                self._file.close()


def read_journals(folder: Path, identity: Mapping[str, Any]) -> dict[ImageId, Noted]:
    """Notes by image id, from the journals of all processes; damaged lines are skipped.

    Raises InputError where the predictions are another checkpoint's, or made with other settings.
    """
    rows: dict[ImageId, Noted] = {}
    wanted = json.loads(json.dumps(identity))  # as it reads back: tuples become lists
    for path in _journals(folder):
        try:
            first, *lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(
                f"journal unreadable: {error}", where=path, remedy="remove it"
            ) from None
        if not lines:  # not even the first line is complete
            continue
        found: dict[str, Any] = {}
        with suppress(ValueError):
            found = decode_json(first, dict[str, Any])
        other = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if other:
            raise InputError(
                f"an unfinished run lies here, which differs in {' and '.join(other)}",
                where=path,
                remedy="finish it, choose another --out, or remove its predictions*.jsonl",
                code="journal-differs",
            )
        for line in lines[:-1]:
            with suppress(ValueError):
                noted = decode_json(line, Noted)
                rows[noted.row.image_id] = noted
    return rows


def supersede(out: Path) -> None:
    """Withdraws an earlier `panoptic.json`, and the scores and pictures of an evaluation.

    They would not fit new predictions. That of an evaluation becomes `superseded.json`, so that
    `sweep` knows what to remove even after a kill. Without `scores.json` there is no evaluation,
    and the PNGs and overlays of `panoptic predict` stay. Every process may call this, any number of
    times, until the new one is written.
    """
    if not (out / SCORES).exists():
        Storage(str(out)).remove(JSON_NAME)
        return
    try:
        with suppress(FileNotFoundError):  # another process was faster
            (out / JSON_NAME).replace(out / SUPERSEDED)
    except OSError as error:
        raise cannot_write(error, out / SUPERSEDED) from None
    for name in ("report.html", "comparison.png", SCORES):  # the mark of an evaluation goes last
        Storage(str(out)).remove(name)


def sweep(out: Path, rows: Sequence[PredictionRow], overlays: int) -> None:
    """Removes the journals, and PNGs and overlays that only the superseded evaluation had.

    `rows` are those of the new `panoptic.json`, of which the first `overlays` have an overlay.
    """
    old: set[str] = set()
    with suppress(OSError, ValueError):
        earlier = decode_json((out / SUPERSEDED).read_bytes(), _Rows)
        old = {row.file_name.removesuffix(".png") for row in earlier.annotations}
    new = [row.file_name.removesuffix(".png") for row in rows]
    for folder, kept in ((PNG_FOLDER, new), (OVERLAYS, new[:overlays])):
        stale = old.difference(kept)
        for path in [*(out / folder).iterdir()]:
            if path.stem in stale and path.is_file():
                Storage(str(out / folder)).remove(path.name)
    for path in (out / SUPERSEDED, *_journals(out)):
        Storage(str(out)).remove(path.name)


def _journals(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.jsonl") if _JOURNAL.fullmatch(path.name))
