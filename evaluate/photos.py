"""The command `panoptic predict`: photos in, overlays, panoptic PNGs and their JSON out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, count, islice
from pathlib import Path
from typing import TypeVar

from panoptic_cache.evaluate.predict import Predictor, read_picture
from panoptic_cache.evaluate.prediction_files import (
    PNG_FOLDER,
    PredictionRow,
    write_json,
    write_png,
)
from panoptic_cache.evaluate.report.pictures import predicted_map, write_overlay
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.train.stopping import memory_advice

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png")
LONGEST_STEM = 200
"""Bytes of a file name without suffix; most file systems allow 255 for the whole name."""

Source = TypeVar("Source")
Value = TypeVar("Value")


def predict_photos(predictor: Predictor, paths: Sequence[Path], out: Path) -> int:
    """Predicts photos and writes `overlays/*.jpg`, `panoptic/*.png` and `panoptic.json`.

    A photo that cannot be read, or for which the network returns NaN, is left out with a warning.

    Args:
        predictor: The trained model.
        paths: The photos.
        out: The folder to write.

    Returns:
        Number of photos that were left out.

    Raises:
        InputError: No photo can be used, or the folder cannot be written.
    """
    for name in (PNG_FOLDER, "overlays"):
        Storage(str(out / name)).create()
    names = unique_names(path.stem for path in paths)
    rows: list[PredictionRow] = []
    errors: list[InputError] = []
    with progress("predict", len(paths), "photos") as advance, ExitStack() as stack:
        for path, name, reading in zip(paths, names, ahead(read_picture, paths, 4), strict=True):
            try:
                photo = reading.result()
                with memory_advice("ask for fewer or smaller --sizes, or another --device"):
                    result = predictor([photo])[0]
            except InputError as error:
                error.where = error.where or str(path)
                if len(paths) > 1:
                    logger.warning("left out: %s", error)
                errors.append(error)
                advance()
                continue
            row = write_png(out, f"{name}{path.suffix}", name, result, predictor.categories)
            if not rows:  # from now on, also when stopped, the JSON is replaced
                stack.callback(write_json, out, rows, predictor.categories)
            rows.append(row)
            overlay = out / "overlays" / f"{name}.jpg"
            write_overlay(overlay, photo, predicted_map(result), predictor.categories)
            advance()
    if not rows:
        none = InputError(f"none of {len(errors)} photos can be used")
        raise errors[0] if len(errors) == 1 else none
    return len(errors)


def list_photos(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the photos in the folders among them, in order.

    Raises:
        InputError: A path does not exist, or a folder holds no JPEG or PNG.
    """
    found: list[Path] = []
    for path in paths:
        try:
            if not path.is_dir():
                path.stat()
                found.append(path)
                continue
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        except FileNotFoundError:
            raise InputError("no such photo or folder", where=path) from None
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=path) from None
        if not inside:
            raise InputError("no JPEG or PNG in this folder", where=path)
        found += inside
    return found


def ahead(
    read: Callable[[Source], Value], sources: Iterable[Source], depth: int
) -> Iterator[Future[Value]]:
    """Reads in order with two threads, at most `depth` sources ahead of the consumer.

    Yields:
        A future for each source; `result()` returns the value or raises the error of `read`.
    """
    rest = iter(sources)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(read, source) for source in islice(rest, depth)]
        while waiting:
            yield waiting.pop(0)
            waiting += [pool.submit(read, source) for source in islice(rest, 1)]


def unique_names(stems: Iterable[str]) -> list[str]:
    """The stems, with `_2`, `_3`, ... appended to those that occurred before.

    Long stems are cut, so that a suffix still fits into the file system's limit.
    """
    taken: set[str] = set()
    names = []
    for stem in (os.fsencode(each)[:LONGEST_STEM].decode(errors="ignore") for each in stems):
        choices = chain([stem], (f"{stem}_{number}" for number in count(2)))
        names.append(next(name for name in choices if name not in taken))
        taken.add(names[-1])
    return names
