"""A model's pass over many photos: of a split, or any photos and videos.

    each process:  read -> network -> decode -> write, note      photos [rank::world]
    main process:  gather

What was predicted before a kill is not predicted again, unless a file that it depends on has
changed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.evaluate import prediction_files as files
from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.metric.score import ImageScore
from panoptic_cache.evaluate.predict import Heads, Pixels, Predictor
from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.process import Interrupted
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.pipeline.tiles import Window
from panoptic_cache.train.ranks import Ranks
from panoptic_cache.train.stopping import memory_advice

logger = logging.getLogger(__name__)

STEPS = ("read", "network", "decode", "write", "score")
"""What is timed; `write` and `score` run beside the other steps."""


@dataclass(frozen=True, slots=True)
class Item:
    """A photo, or a frame of a video."""

    place: tuple[int, int]  # Of its file in the list, and of the frame in the video
    path: Path  # Of the file
    image_id: ImageId  # In `panoptic.json`
    name: str  # Of what is written, without suffix
    files: tuple[Path, ...]  # What its row depends on: photo, PNG and more
    source: str = ""  # See `PredictionRow`


@dataclass(slots=True)
class Share:
    """What one process did; rows and scores by place."""

    rows: dict[tuple[int, int], files.PredictionRow] = field(default_factory=dict)
    scores: dict[tuple[int, int], ImageScore] = field(default_factory=dict)
    errors: list[InputError] = field(default_factory=list)  # Of what was left out
    predicted: int = 0  # How many went through the network
    # Wall time of each step, summed over those.
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))


@dataclass
class Pass:
    """A model's pass over many photos, which all of `ranks` make together."""

    predictor: Predictor
    out: Path
    ranks: Ranks
    identity: Mapping[str, Any]  # What all predictions depend on
    batch: int
    # Is told what cannot be used; without it the first such photo ends the pass.
    leave_out: Callable[[InputError], None] | None = None
    draw: Callable[[Item, Pixels, PanopticMap], None] | None = None
    save_heads: Callable[[Item, Window | None, Heads], None] | None = None  # Window: of tiles
    score: Callable[[Item, files.PredictionRow, NDArray[np.int32]], ImageScore] | None = None
    share: Share = field(default_factory=Share)  # Of this process
    done: Mapping[ImageId, files.Noted] = field(default_factory=dict)

    @contextmanager
    def locked(self, prepare: Callable[[ExitStack], None]) -> Iterator[None]:
        """Locks the folder and reads what is done; `prepare` is called in the main process."""
        with ExitStack() as stack:

            def begin() -> dict[ImageId, files.Noted]:
                if not self.ranks.main:
                    return {}
                Storage(str(self.out / files.PNG_FOLDER)).create()
                stack.enter_context(Storage(str(self.out)).locked())
                prepare(stack)
                return files.read_journals(self.out, self.identity)

            self.done = self.ranks.gather(begin)[0]
            if self.done and self.ranks.main:
                logger.info("%s: goes on, %d are already predicted", self.out, len(self.done))
            yield

    def run(
        self, pictures: Iterator[tuple[Item, Pixels]], title: str, total: int, unit: str
    ) -> list[Share]:
        """Predicts `pictures` of this process; what all processes did. `total` is of all."""
        mine = -(-total // self.ranks.world)

        def predict() -> Share:
            with (
                progress(title, mine, unit) as self.advance,
                files.Journal(self.out, self.identity, self.ranks.rank) as self.journal,
                ThreadPoolExecutor(1, "keep") as behind,
            ):
                # While the network runs on one batch, the batch before it is written and scored.
                kept: Future[None] | None = None
                while some := [*islice(pictures, self.batch)]:
                    found = self._maps(some, self.batch)
                    if kept is not None:
                        kept.result()
                    kept = behind.submit(self._keep, found)
                if kept is not None:
                    kept.result()
            return self.share

        try:
            return self.ranks.gather(predict)
        except Interrupted as stop:
            stop.advice = "run the same command to go on"
            raise

    def read(
        self, items: Sequence[Item], read: Callable[[Item], Pixels]
    ) -> Iterator[tuple[Item, Pixels]]:
        """The items [rank::world] that are not done, two batches of them read ahead."""
        rest = (item for item in items[self.ranks.rank :: self.ranks.world] if self.wants(item))
        with ThreadPoolExecutor(2, "read") as pool:
            waiting: deque[tuple[Item, Future[Pixels]]] = deque()
            while True:
                some = islice(rest, 2 * self.batch - len(waiting))
                waiting += [(item, pool.submit(read, item)) for item in some]
                if not waiting:
                    return
                item, reading = waiting.popleft()
                try:
                    with self._timed("read"):
                        pixels = reading.result()
                except InputError as error:
                    self.fail(error)
                else:
                    yield item, pixels

    def wants(self, item: Item) -> bool:
        """Whether an item is still to be predicted; takes it where it is done."""
        noted = self.done.get(item.image_id)
        if noted is None or not noted.holds(item.name, item.files):
            return True
        self._take(item, noted.row)
        return False

    def fail(self, error: InputError) -> None:
        """Leaves out a photo."""
        if self.leave_out is None:
            raise error
        self.leave_out(error)
        self.share.errors.append(error)
        self.advance()

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.share.seconds[step] += perf_counter() - start

    def _maps(
        self, some: Sequence[tuple[Item, Pixels]], batch: int
    ) -> list[tuple[Item, Pixels, PanopticMap]]:
        """Predicts a batch; what fails in it is found by predicting one by one."""
        try:
            with memory_advice("lower --batch, ask for fewer or smaller --sizes, or for a --tile"):
                if self.predictor.tile is None:
                    maps = self._predict(some, batch)
                else:
                    maps = [self._predict_tiles(item, photo) for item, photo in some]
        except InputError as error:
            if len(some) > 1:
                found = [one for each in some for one in self._maps([each], 1)]
                if self.leave_out is None:
                    raise  # alone they work, but differ in their last digits
                return found
            error.where = error.where or str(some[0][0].path)
            self.fail(error)
            return []
        return [(*one, result) for one, result in zip(some, maps, strict=True)]

    def _predict(self, some: Sequence[tuple[Item, Pixels]], batch: int) -> list[PanopticMap]:
        photos = [photo for _, photo in some]
        with self._timed("network"):
            # The last batch is filled up: a network rounds differently in a smaller one.
            heads = self.predictor.heads([*photos, *photos[:1] * (batch - len(photos))])
            self.predictor.wait()
        if self.save_heads is not None:
            for (item, _), one in zip(some, heads, strict=False):
                self.save_heads(item, None, one)
        with self._timed("decode"):
            sizes = [(len(photo), photo.shape[1]) for photo in photos]
            return self.predictor.decode(heads[: len(photos)], sizes)

    def _predict_tiles(self, item: Item, photo: Pixels) -> PanopticMap:
        """The map of a photo that is cut into tiles, of which one batch is in memory."""

        def tiles() -> Iterator[tuple[Window, Heads]]:
            parts = self.predictor.tiles(photo)
            while True:
                with self._timed("network"):
                    part = next(parts, None)
                    self.predictor.wait()
                if part is None:
                    return
                if self.save_heads is not None:
                    self.save_heads(item, *part)
                yield part
                # A large photo takes minutes.
                self.advance(0, f"{item.path.name}: {part[0].rows[1]} of {len(photo)} rows")

        seconds, start = self.share.seconds, perf_counter()
        before = seconds["network"]
        result = self.predictor.stitch(photo, tiles())
        seconds["decode"] += perf_counter() - start - (seconds["network"] - before)
        return result

    def _keep(self, some: Sequence[tuple[Item, Pixels, PanopticMap]]) -> None:
        """Writes, notes and scores a batch."""
        files.supersede(self.out)
        for item, photo, result in some:
            with self._timed("write"):
                row = files.write_png(
                    *(self.out, item.image_id, item.name, result, self.predictor.categories),
                    source=item.source,
                )
                if self.draw is not None:
                    self.draw(item, photo, result)
                self.journal.note(row, item.files)
            with self._timed("score"):
                self._take(item, row, result.ids)
            self.share.predicted += 1

    def _take(
        self, item: Item, row: files.PredictionRow, ids: NDArray[np.int32] | None = None
    ) -> None:
        """Takes a prediction; its ids are read back where None."""
        if self.score is not None:
            ids = read_ids(self.out / files.PNG_FOLDER / row.file_name) if ids is None else ids
            self.share.scores[item.place] = self.score(item, row, ids)
        self.share.rows[item.place] = row
        self.advance()
