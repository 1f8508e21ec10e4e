"""The folder of an evaluation: what is predicted already, and what an earlier evaluation left.

    predictions.jsonl      what the main process has predicted; predictions-1.jsonl the second, ...
    superseded.json        the panoptic.json of an earlier evaluation, until this one is complete

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

from panoptic_cache.evaluate.prediction_files import JSON_NAME, PNG_FOLDER, Row
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_write
from panoptic_cache.pipeline.coco import ImageId

SCORES, REPORT, SHEET, SUPERSEDED = (
    "scores.json",
    "report.html",
    "comparison.png",
    "superseded.json",
)
_JOURNAL = re.compile(r"predictions(-\d+)?\.jsonl")


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
            self._file = self._path.open("a+")
            self._file.seek(0)
            whole = self._file.read().rpartition("\n")[0]  # without a line that a kill cut short
            self._file.truncate(len(f"{whole}\n".encode()) if whole else 0)
        except OSError as error:
            raise cannot_write(error, self._path) from None
        if not whole:
            self.note(dict(identity))

    def note(self, row: Row) -> None:
        """Adds a line, and hands it to the operating system, which survives a kill.

        Raises:
            InputError: It cannot be written.
        """
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(error, self._path) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # `note` has reported what could not be written
            self._file.close()


def journal_files(folder: Path) -> list[Path]:
    """The journals of all processes that wrote here."""
    return sorted(path for path in folder.glob("*.jsonl") if _JOURNAL.fullmatch(path.name))


def read_journals(folder: Path, identity: Mapping[str, Any]) -> dict[ImageId, Row]:
    """Rows by image id, of predictions made with this identity.

    Lines that a kill cut short are skipped.

    Raises:
        InputError: The predictions are another checkpoint's, or made with other settings.
    """
    rows: dict[ImageId, Row] = {}
    for path in journal_files(folder):
        try:
            lines = path.read_text().split("\n")
        except (OSError, ValueError) as error:
            raise InputError(
                f"journal unreadable: {error}", where=path, remedy="remove it"
            ) from None
        if len(lines) == 1:  # not even the first line is complete
            continue
        _check_identity(_parse(lines[0]) or {}, identity, path)
        for line in lines[1:-1]:
            row = _parse(line)
            if row is not None and "image_id" in row:
                rows[row["image_id"]] = row
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
    for name in (REPORT, SHEET, SCORES):  # last the one that marks an evaluation
        Storage(str(out)).remove(name)


def sweep(out: Path, rows: Sequence[Row], overlays: int) -> None:
    """Removes journals, and predictions and overlays that only the superseded evaluation had.

    Args:
        out: The folder.
        rows: Of the new `panoptic.json`.
        overlays: How many of them have an overlay.

    Raises:
        InputError: A file cannot be removed.
    """
    try:
        earlier = json.loads((out / SUPERSEDED).read_bytes())["annotations"]
        old = {Path(row["file_name"]).stem for row in earlier}
    except (OSError, ValueError, KeyError, TypeError):
        old = set()
    new = [Path(row["file_name"]).stem for row in rows]
    for folder, kept in ((PNG_FOLDER, new), ("overlays", new[:overlays])):
        for path in [*(out / folder).iterdir()]:
            if path.stem in old.difference(kept):
                Storage(str(out / folder)).remove(path.name)
    for path in (out / SUPERSEDED, *journal_files(out)):
        Storage(str(out)).remove(path.name)


def _check_identity(found: Mapping[str, Any], identity: Mapping[str, Any], path: Path) -> None:
    wanted = json.loads(json.dumps(identity))  # as it reads back: tuples become lists
    other = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if other:
        raise InputError(
            f"an unfinished evaluation lies here, which differs in {' and '.join(other)}",
            where=path,
            remedy="finish it, choose another --out, or remove its predictions*.jsonl",
            code="journal-differs",
        )


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
