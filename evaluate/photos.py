"""Any photos and videos: predicted in batches, and written as overlays, PNGs and their JSON."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from panoptic_cache.evaluate import prediction_files as files
from panoptic_cache.evaluate.batches import Item, Pass
from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.predict import Pixels, Predictor
from panoptic_cache.evaluate.report.pictures import predicted_map, write_overlay
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.photo import read_photo
from panoptic_cache.pipeline.sources import count_frames, is_video, read_frames
from panoptic_cache.train.ranks import Ranks

logger = logging.getLogger(__name__)

LONGEST_STEM = 200
"""Bytes of a file name without suffix; most file systems allow 255 for the whole name."""


def predict_photos(
    predictor: Predictor,
    paths: Sequence[Path],
    out: Path,
    *,
    batch: int = 8,
    overlays: int | None = None,
    ranks: Ranks | None = None,
) -> tuple[int, int]:
    """Predicts photos and videos, and writes `overlays/*.jpg`, `panoptic/*.png`, `panoptic.json`.

    What cannot be read, or for which the network returns NaN, is left out with a warning. Until all
    is written, `predictions*.jsonl` lists what is done, and the same call goes on from it.
    `overlays` is how many photos to draw, and frames of each video; all where None, as drawing
    takes as long as decoding.

    All processes of `ranks` call this and get the result: how many photos and frames were
    predicted, and how many files were left out or cut short. Raises InputError where no file can be
    used, or the folder holds an unfinished run of another kind.
    """
    ranks = ranks or Ranks()
    total = sum(count_frames(path) if is_video(path) else 1 for path in paths)

    def item(place: tuple[int, int], path: Path, name: str, image_id: str) -> Item:
        depends = [path, out / files.PNG_FOLDER / f"{name}.png"]
        if overlays is None or max(place) < overlays:
            depends.append(out / files.OVERLAYS / f"{name}.jpg")
        source = os.fsencode(path).decode(errors="replace")
        return Item(place, path, image_id, name, tuple(depends), source)

    def frame(video: Item, number: int) -> Item:
        name = f"{video.image_id}/{number:06d}"
        return item((video.place[0], number), video.path, name, name)

    def pictures() -> Iterator[tuple[Item, Pixels]]:
        names = unique_names(path.stem for path in paths)
        items = [
            item((at, 0), path, name, f"{name}{path.suffix}")
            for at, (path, name) in enumerate(zip(paths, names, strict=True))
        ]
        photos = [one for one in items if not is_video(one.path)]
        yield from work.read(photos, lambda photo: read_photo(photo.path))
        for video in items:
            if is_video(video.path):
                yield from frames(video)

    def frames(video: Item) -> Iterator[tuple[Item, Pixels]]:
        def wanted(number: int) -> bool:
            return number % ranks.world == ranks.rank and work.wants(frame(video, number))

        try:
            for number, pixels in read_frames(video.path, wanted):
                yield frame(video, number), pixels
        except InputError as error:
            if ranks.main:  # all of them have met it
                work.fail(error)

    def leave_out(error: InputError) -> None:
        if len(paths) > 1:  # else it is raised, or told in the end
            logger.warning("left out: %s", error)

    def draw(item: Item, photo: Pixels, result: PanopticMap) -> None:
        for path in item.files[2:]:
            write_overlay(path, photo, predicted_map(result), predictor.categories)

    def finish(rows: Mapping[tuple[int, int], files.PredictionRow]) -> list[files.PredictionRow]:
        ordered = [row for _, row in sorted(rows.items())]
        files.write_json(out, ordered, predictor.categories)
        return ordered

    work = Pass(
        *(predictor, out, ranks, {**predictor.identity, "command": "predict"}),
        max(1, min(batch, total)),
        leave_out=leave_out,
        draw=draw,
    )
    with work.locked(lambda _: Storage(str(out / files.OVERLAYS)).create()):
        try:
            shares = work.run(pictures(), "predict", total, "photos")
        except BaseException:
            if work.share.rows and ranks.world == 1:  # what is done can be used
                finish(work.share.rows)
            raise
        rows = {place: row for share in shares for place, row in share.rows.items()}
        errors = [error for share in shares for error in share.errors]
        if ranks.main and rows:
            # What is not told yet: of the other processes, who do not speak; and of a single file.
            for error in errors[len(work.share.errors) if len(paths) > 1 else 0 :]:
                logger.warning("left out: %s", error)
            files.sweep(out, finish(rows), len(rows))
    if not rows:
        none = InputError(f"none of {len(errors)} files can be used")
        raise errors[0] if len(errors) == 1 else none
    return len(rows), len(errors)


def unique_names(stems: Iterable[str]) -> list[str]:
    """The stems, with `_2`, `_3`, ... appended to those that occurred before, in any case.

    Long stems are cut, so that a suffix still fits into the file system's limit.
    """
    taken: set[str] = set()
    numbers: Counter[str] = Counter()
    names = []
    for each in stems:
        name = stem = os.fsencode(each)[:LONGEST_STEM].decode(errors="ignore") or "photo"
        while name.casefold() in taken:
            numbers[stem] += 1
            name = f"{stem}_{numbers[stem] + 1}"
        taken.add(name.casefold())
        names.append(name)
    return names
