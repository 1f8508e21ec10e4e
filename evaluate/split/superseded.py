"""An earlier evaluation in the same folder: withdrawn before the first new file, swept at the end.

    panoptic.json    becomes superseded.json, which tells what to sweep, also after a kill
    scores.json, report.html, comparison.png    go: they would tell of other predictions

A folder without `scores.json` holds none; what else lies there, such as pictures of `panoptic
predict`, stays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from panoptic_cache.evaluate.split.journal import Row
from panoptic_cache.pipeline.base.files import Storage, cannot_write

NAME = "superseded.json"


def supersede(out: Path) -> None:
    """Withdraws an earlier evaluation; by all processes, and again, at no harm.

    Raises:
        InputError: That is not possible.
    """
    if not (out / "scores.json").exists():
        return
    try:
        with suppress(FileNotFoundError):  # another process was quicker
            (out / "panoptic.json").replace(out / NAME)
    except OSError as error:
        raise cannot_write(error, out / NAME) from None
    for name in ("report.html", "comparison.png", "scores.json"):  # the one that tells of it last
        Storage(str(out)).remove(name)


def sweep(out: Path, rows: Sequence[Row], overlays: int) -> None:
    """Removes the predictions and overlays that only the superseded evaluation had.

    Args:
        out: The folder.
        rows: Of the new `panoptic.json`.
        overlays: How many of them have one.

    Raises:
        InputError: That is not possible.
    """
    try:
        earlier = json.loads((out / NAME).read_bytes())["annotations"]
        names = {str(row["file_name"]) for row in earlier}
    except (OSError, ValueError, KeyError, TypeError):
        return
    kept = [row["file_name"] for row in rows]
    pictures = {f"{name.removesuffix('.png')}.jpg" for name in names}
    drawn = {f"{name.removesuffix('.png')}.jpg" for name in kept[:overlays]}
    for folder, stale in (("panoptic", names - set(kept)), ("overlays", pictures - drawn)):
        for path in [*(out / folder).iterdir()]:
            if path.name in stale:
                Storage(str(out / folder)).remove(path.name)
    Storage(str(out)).remove(NAME)
