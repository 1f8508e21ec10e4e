"""The folder of an evaluation: what is predicted already, and what an earlier evaluation left.

    predictions.jsonl      predictions of the main process; predictions-1.jsonl of the next, ...
    superseded.json        `panoptic.json` of an earlier evaluation, until this one is complete

The first line of a journal says what the predictions depend on. Each further line is an image's row
of `panoptic.json`, written after its PNG. Journals are removed when the evaluation is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import msgspec

from panoptic_cache.evaluate.prediction_files import JSON_NAME, PNG_FOLDER, PredictionRow
from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_write, no_links

SCORES, SUPERSEDED = "scores.json", "superseded.json"
_JOURNAL = re.compile(r"predictions(-\d+)?\.jsonl")


class Superseded(msgspec.Struct):
    """The part of an earlier `panoptic.json` that says what to remove."""

    annotations: list[PredictionRow]


class Journal:
    """Notes predictions as they are made; a context manager.

    Args:
        folder: Of the evaluation.
        identity: What the predictions depend on, as plain values.
        rank: Of this process.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self._path = folder / (f"predictions-{rank}.jsonl" if rank else "predictions.jsonl")
        try:
            self._file = open(self._path, "a+", opener=no_links)  # noqa: SIM115
            self._file.seek(0)
            complete = self._file.read().rpartition("\n")[0]  # a kill may cut the last line short
            self._file.truncate(len(f"{complete}\n".encode()) if complete else 0)
        except OSError as error:
            raise cannot_write(error, self._path) from None
        if not complete:
            self._add(identity)

    def note(self, row: PredictionRow) -> None:
        """Adds a prediction. The line is with the operating system on return, safe from a kill.

        Raises:
            InputError: It cannot be written.
        """
        self._add(msgspec.to_builtins(row))

    def _add(self, values: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(error, self._path) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # `note` has reported what could not be written
            self._file.close()


def read_journals(folder: Path, identity: Mapping[str, Any]) -> dict[ImageId, PredictionRow]:
    """Rows by image id, from the journals of all processes.

    Lines that a kill cut short are skipped.

    Raises:
        InputError: The predictions are another checkpoint's, or made with other settings.
    """
    rows: dict[ImageId, PredictionRow] = {}
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
                f"an unfinished evaluation lies here, which differs in {' and '.join(other)}",
                where=path,
                remedy="finish it, choose another --out, or remove its predictions*.jsonl",
                code="journal-differs",
            )
        for line in lines[:-1]:
            with suppress(ValueError):
                row = decode_json(line, PredictionRow)
                rows[row.image_id] = row
    return rows


def supersede(out: Path) -> None:
    """Withdraws an earlier evaluation, whose scores and pictures would not fit new predictions.

    `panoptic.json` becomes `superseded.json`, so that `sweep` knows what to remove even after a
    kill. Without `scores.json` there is no earlier evaluation, and files of `panoptic predict`
    stay. Every process may call this, any number of times.

    Raises:
        InputError: A file cannot be renamed or removed.
    """
    if not (out / SCORES).exists():
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

    Args:
        out: The folder.
        rows: Of the new `panoptic.json`.
        overlays: How many of them have an overlay.

    Raises:
        InputError: A file cannot be removed.
    """
    old: set[str] = set()
    with suppress(OSError, ValueError):
        earlier = decode_json((out / SUPERSEDED).read_bytes(), Superseded)
        old = {Path(row.file_name).stem for row in earlier.annotations}
    new = [Path(row.file_name).stem for row in rows]
    for folder, kept in ((PNG_FOLDER, new), ("overlays", new[:overlays])):
        stale = old.difference(kept)
        for path in [*(out / folder).iterdir()]:
            if path.stem in stale:
                Storage(str(out / folder)).remove(path.name)
    for path in (out / SUPERSEDED, *_journals(out)):
        Storage(str(out)).remove(path.name)


def _journals(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.jsonl") if _JOURNAL.fullmatch(path.name))
