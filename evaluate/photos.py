"""Any photos and videos: predicted in batches, and written as overlays, PNGs and their JSON.

    each process:  read -> network and decoder -> write, note      photos and frames [rank::world]
    main process:  gather in order -> panoptic.json

What was predicted before a kill is not predicted again, unless its file has changed.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.predict import Pixels, Predictor, read_picture
from panoptic_cache.evaluate.prediction_files import (
    OVERLAYS,
    PNG_FOLDER,
    Journal,
    Noted,
    PredictionRow,
    read_journals,
    supersede,
    sweep,
    write_json,
    write_png,
)
from panoptic_cache.evaluate.report.pictures import predicted_map, write_overlay
from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.process import Interrupted
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.sources import count_frames, is_video, read_frames
from panoptic_cache.train.ranks import Ranks
from panoptic_cache.train.stopping import memory_advice

logger = logging.getLogger(__name__)

LONGEST_STEM = 200
"""Bytes of a file name without suffix; most file systems allow 255 for the whole name."""

Value = TypeVar("Value")
Origin = TypeVar("Origin")


@dataclass(frozen=True, slots=True)
class Source:
    """A photo, or a frame of a video."""

    place: tuple[int, int]  # Of its file in the list, and of the frame in the video
    path: Path  # Of the file
    name: str  # Of what is written, without suffix
    image_id: str  # In `panoptic.json`

    def files(self, out: Path, overlays: int | None) -> list[Path]:
        """What its row depends on: the photo, its PNG, and the overlay if it is to be drawn."""
        found = [self.path, out / PNG_FOLDER / f"{self.name}.png"]
        drawn = overlays is None or max(self.place) < overlays
        return [*found, out / OVERLAYS / f"{self.name}.jpg"] if drawn else found

    def frame(self, number: int) -> Source:
        """A frame of the video; its name is that of the video and a number below it."""
        name = f"{self.image_id}/{number:06d}"
        return Source((self.place[0], number), self.path, name, name)


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

    Args:
        predictor: The trained model.
        paths: The files, see `sources.list_photos`.
        out: The folder to write.
        batch: Photos that the network takes at once.
        overlays: How many photos to draw, and frames of each video; all where None. Drawing takes
            as long as the decoder.
        ranks: The processes that share the work; all of them call this and get the result.

    Returns:
        How many photos and frames were predicted, and how many files were left out or cut short.

    Raises:
        InputError: No file can be used, the folder cannot be written, or it holds an unfinished run
            of another kind.
    """
    ranks = ranks or Ranks()
    identity = {**predictor.identity, "command": "predict"}
    with ExitStack() as stack:

        def begin() -> dict[ImageId, Noted]:
            if not ranks.main:
                return {}
            for name in (PNG_FOLDER, OVERLAYS):
                Storage(str(out / name)).create()
            stack.enter_context(Storage(str(out)).locked())
            return read_journals(out, identity)

        done = ranks.gather(begin)[0]
        if done and ranks.main:
            logger.info("%s: goes on, %d pictures are already predicted", out, len(done))
        share = _Share(predictor, paths, out, overlays, ranks, done)
        try:
            shares = ranks.gather(lambda: share.predict(batch, Journal(out, identity, ranks.rank)))
        except BaseException as stop:
            if isinstance(stop, Interrupted):
                stop.advice = "run the same command to go on"
            if share.rows and ranks.world == 1:  # what is done can be used
                _write(out, share.rows, predictor)
            raise
        rows = {place: row for one, _ in shares for place, row in one.items()}
        errors = [error for _, some in shares for error in some]
        if ranks.main and rows:
            # What is not told yet: of the other processes, who do not speak; and of a single file.
            for error in errors[len(share.errors) if len(paths) > 1 else 0 :]:
                logger.warning("left out: %s", error)
            sweep(out, _write(out, rows, predictor), len(rows))
    if not rows:
        none = InputError(f"none of {len(errors)} files can be used")
        raise errors[0] if len(errors) == 1 else none
    return len(rows), len(errors)


def _write(
    out: Path, rows: Mapping[tuple[int, int], PredictionRow], predictor: Predictor
) -> list[PredictionRow]:
    ordered = [row for _, row in sorted(rows.items())]
    write_json(out, ordered, predictor.categories)
    return ordered


class _Share:
    """The photos and the frames [rank::world] of one process."""

    def __init__(  # noqa: PLR0917
        self,
        predictor: Predictor,
        paths: Sequence[Path],
        out: Path,
        overlays: int | None,
        ranks: Ranks,
        done: Mapping[ImageId, Noted],
    ) -> None:
        self.predictor, self.paths, self.out, self.overlays = predictor, paths, out, overlays
        self.ranks, self.done = ranks, done
        self.rows: dict[tuple[int, int], PredictionRow] = {}  # By place
        self.errors: list[InputError] = []  # Of what was left out

    def predict(
        self, batch: int, journal: Journal
    ) -> tuple[dict[tuple[int, int], PredictionRow], list[InputError]]:
        """Predicts and writes what is not done yet; returns `rows` and `errors`."""
        total = sum(count_frames(path) if is_video(path) else 1 for path in self.paths)
        batch = max(1, min(batch, total))
        mine = -(-total // self.ranks.world)
        with (
            progress("predict", mine, "photos") as self.advance,
            journal,
            ThreadPoolExecutor(1, "keep") as behind,
        ):
            # While the network runs on one batch, the batch before it is written.
            kept: Future[None] | None = None
            pictures = self._read(2 * batch)
            while some := list(islice(pictures, batch)):
                found = self._decode(some, batch)
                if kept is not None:
                    kept.result()
                kept = behind.submit(self._keep, found, journal)
            if kept is not None:
                kept.result()
        return self.rows, self.errors

    def _read(self, depth: int) -> Iterator[tuple[Source, Pixels]]:
        """The photos, `depth` of them read ahead, then the frames of the videos."""
        names = unique_names(path.stem for path in self.paths)
        sources = [
            Source((at, 0), path, name, f"{name}{path.suffix}")
            for at, (path, name) in enumerate(zip(self.paths, names, strict=True))
        ]
        photos = [source for source in sources if not is_video(source.path)]
        photos = [photo for number, photo in enumerate(photos) if self._wants(photo, number)]
        readings = ahead(read_picture, [photo.path for photo in photos], depth)
        for photo, reading in zip(photos, readings, strict=True):
            try:
                yield photo, reading.result()
            except InputError as error:
                self._leave_out(error)
        for video in sources:
            if is_video(video.path):
                try:
                    wanted = partial(self._wants_frame, video)
                    for number, pixels in read_frames(video.path, wanted):
                        yield video.frame(number), pixels
                except InputError as error:
                    if self.ranks.main:  # all of them have met it
                        self._leave_out(error)

    def _files(self, source: Source) -> list[Path]:
        return source.files(self.out, self.overlays)

    def _wants_frame(self, video: Source, number: int) -> bool:
        return self._wants(video.frame(number), number)

    def _wants(self, source: Source, number: int) -> bool:
        """Whether the `number`-th is for this process to predict; takes it where it is done."""
        if number % self.ranks.world != self.ranks.rank:
            return False
        noted = self.done.get(source.image_id)
        if noted is None or not noted.holds(source.name, self._files(source)):
            return True
        self.rows[source.place] = noted.row
        self.advance()
        return False

    def _leave_out(self, error: InputError) -> None:
        if len(self.paths) > 1:
            logger.warning("left out: %s", error)
        self.errors.append(error)
        self.advance()

    def _decode(
        self, some: Sequence[tuple[Source, Pixels]], batch: int
    ) -> list[tuple[Source, Pixels, PanopticMap]]:
        """Predicts a batch; what fails in it is found by predicting one by one."""
        photos = [photo for _, photo in some]
        try:
            with memory_advice("ask for a smaller --batch, fewer or smaller --sizes, or a --tile"):
                if self.predictor.tile is None:
                    # The last batch is filled up: a network rounds differently in a smaller one.
                    heads = self.predictor.heads([*photos, *photos[:1] * (batch - len(photos))])
                    sizes = [(len(photo), photo.shape[1]) for photo in photos]
                    results = self.predictor.decode(heads[: len(photos)], sizes)
                else:
                    results = self.predictor(photos)
        except InputError as error:
            if len(some) > 1:
                return [one for each in some for one in self._decode([each], 1)]
            error.where = str(some[0][0].path)
            self._leave_out(error)
            return []
        return [(*one, result) for one, result in zip(some, results, strict=True)]

    def _keep(self, some: Sequence[tuple[Source, Pixels, PanopticMap]], journal: Journal) -> None:
        """Writes and notes a batch."""
        supersede(self.out)
        for source, photo, result in some:
            _, png, *overlay = files = self._files(source)
            png.parent.mkdir(exist_ok=True)  # a video has a folder of its own
            row = write_png(
                *(self.out, source.image_id, source.name, result, self.predictor.categories),
                source=os.fsencode(source.path).decode(errors="replace"),
            )
            for path in overlay:
                write_overlay(path, photo, predicted_map(result), self.predictor.categories)
            journal.note(row, files)
            self.rows[source.place] = row
            self.advance()


def ahead(
    read: Callable[[Origin], Value], origins: Iterable[Origin], depth: int
) -> Iterator[Future[Value]]:
    """Reads in order with two threads, at most `depth` ahead of the consumer.

    Yields a future for each; `result()` returns the value or raises the error of `read`.
    """
    rest = iter(origins)
    with ThreadPoolExecutor(2) as pool:
        waiting = deque(pool.submit(read, origin) for origin in islice(rest, depth))
        while waiting:
            yield waiting.popleft()
            waiting += [pool.submit(read, origin) for origin in islice(rest, 1)]


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
