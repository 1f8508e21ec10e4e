"""What an evaluation has predicted so far, so that a killed one goes on where it stood.

    predictions.jsonl        of the main process; predictions-1.jsonl of the second, and so on

The first line says what the predictions depend on, each further one is an image's row of
`panoptic.json`, written after its PNG. The files go when the evaluation is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import cannot_write
from panoptic_cache.pipeline.coco import ImageId

Row = dict[str, Any]
_NAME = re.compile(r"predictions(-\d+)?\.jsonl")


def journal_files(folder: Path) -> list[Path]:
    """The journals of all processes that wrote here."""
    return sorted(path for path in folder.glob("*.jsonl") if _NAME.fullmatch(path.name))


def read_journals(folder: Path, identity: Mapping[str, Any]) -> dict[ImageId, Row]:
    """Rows by image id, of predictions made with this identity.

    A line that a kill cut short is passed over.

    Raises:
        InputError: The predictions here are another checkpoint's, or made with other settings.
    """
    rows: dict[ImageId, Row] = {}
    for path in journal_files(folder):
        try:
            lines = path.read_text().split("\n")
        except (OSError, ValueError) as error:
            raise InputError(
                f"journal unreadable: {error}", where=path, remedy="remove it"
            ) from None
        if len(lines) == 1:  # not even the first line is whole
            continue
        _check(_parse(lines[0]) or {}, identity, path)
        for line in lines[1:-1]:
            row = _parse(line)
            if row is not None and "image_id" in row:
                rows[row["image_id"]] = row
    return rows


class Journal:
    """Notes predictions as they are made; a context manager.

    Args:
        folder: Of the evaluation.
        identity: What the predictions depend on; plain values.
        rank: Of this process.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self._path = folder / (f"predictions-{rank}.jsonl" if rank else "predictions.jsonl")
        try:
            self._file = self._path.open("a+")
            self._file.seek(0)
            whole = self._file.read().rpartition("\n")[0]
            self._file.truncate(len(f"{whole}\n".encode()) if whole else 0)
        except OSError as error:
            raise cannot_write(error, self._path) from None
        if not whole:
            self.note(dict(identity))

    def note(self, row: Row) -> None:
        """Adds a line; it is in the kernel's hands, out of a kill's reach, on return.

        Raises:
            InputError: It cannot be written.
        """
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(error, self._path) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what could not be written has been said
            self._file.close()


def _check(found: Mapping[str, Any], identity: Mapping[str, Any], path: Path) -> None:
    wanted = json.loads(json.dumps(identity))
    if found == wanted:
        return
    other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
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
